"""Save, load in a fresh process through every Auto class: keys, logits, ids and greedy tokens equal to the bit."""

import functools

import pytest
import tiny
import torch
import user_parts
from helpers import check_round_trips, compose_tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
)
from cornstarch_hf.projectors.resampler import ResamplerProjection

PAIRS = [
    ("clip", "whisper", "llama"),
    ("siglip", "wav2vec2", "qwen3"),
    ("dinov2", "esm", "gpt2"),
    ("convnext", "whisper", "gemma3"),
    ("qwen2_vl", "wav2vec2", "qwen3_moe"),
    ("clip", "esm", "falcon_h1"),
    ("qwen2_vl", "whisper", "llama"),
]


@pytest.mark.parametrize(
    "language_model",
    [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in tiny.LANGUAGE_MODELS],
)
def test_every_encoder_with_every_language_model(tmp_path, language_model):
    made = {key: compose_tiny([key], tiny.LANGUAGE_MODELS[language_model]()) for key in tiny.ENCODERS}
    check_round_trips(tmp_path, made)


@pytest.mark.slow
def test_pairs_of_encoders(tmp_path):
    made = {"-".join(p): compose_tiny(p[:2], tiny.LANGUAGE_MODELS[p[2]](), projector="mlp") for p in PAIRS}
    made["two_images"] = compose_tiny({"left": "clip", "right": "siglip"}, tiny.qwen3())
    check_round_trips(tmp_path, made)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied(tmp_path, tied):
    made = {key: compose_tiny(["clip", "whisper"], build(tie_word_embeddings=tied)) for key, build in
            {"llama": tiny.llama, "gpt2": tiny.gpt2, "gemma3": tiny.gemma3}.items()}  # fmt: skip
    check_round_trips(tmp_path, made)


def with_parts(encoder, language_model=None):
    model = MultimodalModel(encoders={"vision": encoder}, language_model=language_model or tiny.llama()).eval()
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    processor = MultimodalProcessor(tokenizer, {"vision": tiny.clip_processor()}, model=model)
    processor.items = {"vision": tiny.image}
    return model, processor


@pytest.mark.slow
def test_own_projector_callbacks_and_encoder_of_the_users_file(tmp_path):
    projection = user_parts.GatedProjection(16, 32, gain=3.0)
    wrapped = MultimodalProjector(MultimodalProjectorConfig(), projection=projection)
    torch_only = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24, bias=False), nn.SiLU(), nn.Linear(24, 32))
    plain = MultimodalProjector(MultimodalProjectorConfig(), projection=torch_only)
    newline = user_parts.Newline(hidden_size=32)
    nn.init.normal_(newline.newline)
    drop = functools.partial(user_parts.drop_tokens, count=2)
    made = {
        "own": with_parts(ModalEncoderModule(tiny.clip(), wrapped)),
        "torch": with_parts(ModalEncoderModule(tiny.clip(), plain)),
        "callbacks": with_parts(
            ModalEncoderModule(tiny.clip(), postprocess_module_callback=drop, postprocess_projector_callback=newline)
        ),
        "encoder": with_parts(ModalEncoderModule(user_parts.PatchEncoder(user_parts.PatchConfig(width=12)))),
    }
    before = {key: value.clone() for key, value in projection.state_dict().items()}
    check_round_trips(tmp_path, made, "user_parts")
    again = MultimodalModel.from_pretrained(tmp_path / "own").vision_encoder.projector.projection
    assert type(again) is user_parts.GatedProjection and again.gain == 3.0
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


SMALL = {"projection_type": "resampler", "num_queries": 3, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
REDUCTIONS = {
    "pixel_shuffle": ("clip", {"projection_type": "pixel_shuffle", "norm": "rms_norm"}),
    "avg_pool": ("qwen2_vl", "avg_pool"),
    "avg_pool_1d": ("wav2vec2", {"projection_type": "avg_pool", "pool_size": 3}),
    "frame_stack": ("whisper", "frame_stack"),
    "conv": ("convnext", {"projection_type": "conv", "conv_sizes": [24], "activation": "silu"}),
    "conv_1d": ("esm", "conv"),
    "resampler": ("siglip", SMALL),
    "rows": ("siglip", "users_rows"),
    "halving": ("esm", "users_halving"),
}


@pytest.mark.slow
def test_token_reductions(tmp_path):
    made = {}
    for label, (key, fields) in REDUCTIONS.items():
        name = tiny.ENCODERS[key][0]
        prefix = {"drop_prefix": 1} if key == "clip" else {}
        fields = {"projection_type": fields} if isinstance(fields, str) else fields
        config = MultimodalProjectorConfig(**fields)
        projector = MultimodalProjector(config)
        made[label] = compose_tiny([key], **{name: {"projector": projector, **prefix}})
        assert made[label][0].encoders[name].projector.reduces
    wrapped = MultimodalProjector(
        MultimodalProjectorConfig(),
        ResamplerProjection(16, 32, **{k: v for k, v in SMALL.items() if k in ResamplerProjection.DEFAULTS}),
    )
    made["wrapped"] = with_parts(ModalEncoderModule(tiny.clip(), wrapped))
    check_round_trips(tmp_path, made, "user_parts")


@pytest.mark.slow
def test_lora_on_encoder_and_language_model(tmp_path):
    def lora(model, rank, **options):
        wrapped = get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], **options))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        return wrapped

    made = {}
    for tied in (True, False):
        language_model = lora(tiny.llama(tie_word_embeddings=tied), 4, task_type="CAUSAL_LM")
        model, processor = with_parts(ModalEncoderModule(lora(tiny.clip(), 2)), language_model)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all("lora_" in n or ".projector." in n for n in names) and len(names) == 2 * 2 * (3 + 2) + 2
        made[f"tied_{tied}"] = (model, processor)
    check_round_trips(tmp_path, made)
