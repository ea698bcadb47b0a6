"""save_ultravox(): a hand-written module of that architecture, with the files that were written, equals the composition."""

import json
import os

import pytest
import tiny
import torch
import transformers
from containable import composed, copies, language_model, sound_batch, tower
from native_types import logits_of
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from cornstarch_hf import MultimodalProcessor
from cornstarch_hf.conversion.ultravox import save_ultravox

OPTIONS = {"stack_factor": 8, "gated": True, "norm": "rms_norm", "norm_mid": "rms_norm"}


def projector(**changes):
    options = {key: value for key, value in (OPTIONS | changes).items() if key != "activation"}
    return {
        "projection_type": "frame_stack",
        "activation": changes.get("activation", "silu"),
        "projection_kwargs": options,
    }


def made(text="llama", encoder=None, **changes):
    selection = {key: changes.pop(key) for key in ("layer", "drop_prefix") if key in changes}
    return composed(encoder or tower("whisper"), language_model(text), projector(**changes), name="audio", **selection)


class Norm(nn.Module):
    """Divides by the root of the mean square, in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6))


class Projector(nn.Module):
    """As the public checkpoints' configurations say: frames side by side, norm, linear, SwiGLU, norm, linear; no biases."""

    def __init__(self, config):
        super().__init__()
        self.stack = config["stack_factor"]
        width, inner = config["audio_config"]["d_model"] * self.stack, config["hidden_size"]
        out, mid = config["text_config"]["hidden_size"], config["projector_ln_mid"]
        self.ln_pre = Norm(width)
        self.linear_1 = nn.Linear(width, inner, bias=False)
        self.linear_2 = nn.Linear(inner // 2, out, bias=False)
        self.ln_mid = Norm(inner // 2) if mid else nn.Identity()
        self.ln_post = nn.Identity() if mid else Norm(out)

    def forward(self, frames):
        items, length, width = frames.shape
        frames = F.pad(frames, (0, 0, 0, -length % self.stack)).reshape(items, -1, width * self.stack)
        values, gates = self.linear_1(self.ln_pre(frames)).chunk(2, dim=-1)
        return self.ln_post(self.linear_2(self.ln_mid(F.silu(gates) * values)))


class Ultravox(nn.Module):
    """A Whisper encoder, the projector, and a causal language model into whose embeddings the sounds are put."""

    def __init__(self, config):
        super().__init__()
        audio, text = (
            transformers.CONFIG_MAPPING[config[key]["model_type"]].from_dict(config[key])
            for key in ("audio_config", "text_config")
        )
        self.audio_tower, self.multi_modal_projector = WhisperEncoder(audio), Projector(config)
        self.language_model = transformers.AutoModelForCausalLM.from_config(text)
        self.token = config["audio_token_index"]

    def forward(self, input_ids, attention_mask, input_features):
        sounds = self.multi_modal_projector(self.audio_tower(input_features).last_hidden_state)
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        embeddings = embeddings.masked_scatter((input_ids == self.token)[..., None], sounds.flatten(0, 1))
        return self.language_model(inputs_embeds=embeddings, attention_mask=attention_mask)


def read(folder):
    """The reference module with the files of a folder, each tensor by its name."""
    config = json.loads((folder / "config.json").read_text())
    model, tensors = Ultravox(config).eval(), load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = ["language_model.lm_head.weight"] if config["text_config"]["tie_word_embeddings"] else []
    assert (missing, unexpected) == (tied, [])
    model.language_model.tie_weights()
    return config, model, tensors


@pytest.mark.parametrize(
    ("text", "norms"),
    [("llama", {}), ("qwen3", {"norm_mid": "none", "norm_post": "rms_norm"}), ("granite", {}), ("tied", {})],
)
def test_what_is_written_computes_what_the_composition_does(text, norms, tmp_path):
    model = made("llama" if text == "tied" else text, **norms)
    if text == "tied":
        model.language_model.config.tie_word_embeddings = True
        model.language_model.lm_head.weight = model.get_input_embeddings().weight
    inputs = sound_batch(model)
    save_ultravox(model, None, tmp_path)
    config, reference, _ = read(tmp_path)
    reference, model = copies(reference, model)
    assert torch.equal(logits_of(reference, inputs), logits_of(model, inputs))
    assert config["projector_ln_mid"] is (not norms)


def test_the_files_are_those_that_loaders_read(tmp_path):
    model = made()
    save_ultravox(model, None, tmp_path)
    config, _, tensors = read(tmp_path)
    head = model.audio_encoder.projector.projection.head
    told = {
        "architectures": ["UltravoxModel"], "model_type": "ultravox", "audio_model_id": None, "text_model_id": None,
        "audio_token_index": 90, "hidden_size": 64, "stack_factor": 8, "projector_act": "swiglu", "projector_ln_mid": True,
        "num_projector_layers": 0, "norm_init": 0.4, "ignore_index": -100, "vocab_size": 96, "dtype": "float32",
        "torch_dtype": "float32",
    }  # fmt: skip
    assert {key: config[key] for key in config if key not in ("audio_config", "text_config")} == told
    assert config["audio_config"]["model_type"] == "whisper" and config["text_config"]["model_type"] == "llama"
    ours = {key for key in tensors if key.startswith("multi_modal_projector.")}
    assert ours == {f"multi_modal_projector.{key}.weight" for key in ("ln_pre", "linear_1", "ln_mid", "linear_2")}
    assert torch.equal(tensors["multi_modal_projector.linear_1.weight"], head.linear_1.weight)
    assert tensors["multi_modal_projector.linear_1.weight"].shape == (64, 256)
    rest = {key.split(".")[0] for key in tensors}
    assert rest == {"audio_tower", "multi_modal_projector", "language_model"}
    assert {"audio_tower.conv1.weight", "audio_tower.layers.0.self_attn.q_proj.weight"} <= set(tensors)
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= set(tensors)


def test_experts_are_written_by_the_names_of_public_checkpoints(tmp_path):
    model = made("qwen3_moe")
    save_ultravox(model, None, tmp_path)
    model.language_model.save_pretrained(tmp_path / "text")
    alone = load_file(tmp_path / "text" / "model.safetensors")
    written = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0." in key for key in alone)
    assert {key.removeprefix("language_model.") for key in written if key.startswith("language_model.")} == set(alone)


def test_a_processor_and_code_of_others_are_written_as_names(tmp_path):
    tokenizer = tiny.tokenizer()
    model = composed(tiny.whisper(), tiny.llama(), projector(), name="audio", token=None)
    processor = MultimodalProcessor(tokenizer=tokenizer, processors={"audio": tiny.whisper_processor()}, model=model)
    save_ultravox(model, processor, tmp_path, code="someone/ultravox")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "someone/ultravox--ultravox_model.UltravoxModel"
    told = json.loads((tmp_path / "processor_config.json").read_text())
    assert told["processor_class"] == "UltravoxProcessor" and told["stack_factor"] == 8
    assert told["encoder_ds_factor"] == 2 * tiny.whisper_processor().hop_length
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == processor.tokenizer.get_vocab()
    assert config["audio_token_index"] == model.config.modality("audio")["token_id"] is not None
    assert (tmp_path / "preprocessor_config.json").is_file()
    before = set(os.listdir(tmp_path))
    save_ultravox(model, processor, tmp_path, code="someone/ultravox")
    assert set(os.listdir(tmp_path)) == before


REFUSED = {
    "another tower": (lambda: made(encoder=tower("qwen2_audio_encoder")), "has a WhisperEncoder, got Qwen2AudioEncoder"),
    "layer": (lambda: made(layer=-2), "its layer is -2, Ultravox computes what it does with -1"),
    "gate": (lambda: made(gated=False), "its projector's gated is False"),
    "activation": (lambda: made(activation="gelu"), "its projector's activation is 'gelu'"),
    "bias": (lambda: made(bias=True), "its projector's bias is True"),
    "layers": (lambda: made(num_layers=1, gated=False), "its projector's num_layers is 1"),
    "no norm": (lambda: made(norm="none"), "its projector's norm is 'none'"),
    "neither norm": (lambda: made(norm_mid="none"), "norm_mid='none', norm_post='none' .* one of the two is 'rms_norm'"),
    "both norms": (lambda: made(norm_post="rms_norm"), "one of the two is 'rms_norm' in Ultravox"),
    "epsilon": (lambda: made(norm_eps=1e-5), "norm_eps=1e-05; one of the two"),
    "rest of frames": (lambda: made(remainder="drop"), "its projector's remainder is 'drop'"),
    "projector": (lambda: composed(
        tower("whisper"), language_model("llama"), {"projection_type": "mlp"}, name="audio"
    ), "its projector's projection_type is 'mlp'"),
    "dtypes": (lambda: half(), r"dtypes \['torch.float16', 'torch.float32'\]"),
    "token": (lambda: composed(
        tower("whisper"), language_model("llama"), projector(), name="audio", token=None
    ), "audio has no id of placeholders"),
    "callback": (lambda: called(), r"Ultravox has no \['postprocess_projector_callback'\]"),
}  # fmt: skip


def half():
    model = made()
    model.audio_encoder.to(torch.float16)
    return model


def called():
    from cornstarch_hf.conversion.steps import unit_rms

    model = made()
    model.audio_encoder.postprocess_projector_callback = unit_rms
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_ultravox_computes_otherwise_is_refused_and_nothing_is_written(case, tmp_path):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        save_ultravox(build(), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_wrong_types_are_refused(tmp_path):
    with pytest.raises(TypeError, match="save_ultravox takes a MultimodalModel, got LlamaForCausalLM"):
        save_ultravox(tiny.llama(), None, tmp_path)
    with pytest.raises(TypeError, match="code must be the id of a repository, got 3"):
        save_ultravox(made(), None, tmp_path, code=3)
