"""Compositions of the parts of native multimodal models give their logits and tokens to the bit."""

import functools

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    MistralForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils import ModelOutput

from cornstarch_hf import (
    ModalEncoderModule,
    MultimodalModel,
    MultimodalProcessor,
    MultimodalProjector,
    MultimodalProjectorConfig,
)
from cornstarch_hf.projectors.reductions import PixelShuffleProjection

VISION = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 8}  # fmt: skip
IMAGE, AUDIO = 300, 301


def causal_lm(native, cls, backbone):
    """The causal language model made of a native model's backbone and head, sharing their weights."""
    model = cls(backbone.config)
    model.model.load_state_dict(backbone.state_dict())
    model.lm_head.load_state_dict(native.lm_head.state_dict())
    return model.eval()


def mlp_of(native):
    inner = native.model.multi_modal_projector
    return nn.Sequential(inner.linear_1, inner.act, inner.linear_2)


def left_padded(rows, pad=0):
    length = max(map(len, rows))
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_internvl():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": [16, 16], "patch_size": [4, 4]}  # fmt: skip
    text = LlamaConfig(**tiny.TEXT).to_dict()
    native = InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()
    inner = native.model.multi_modal_projector
    names = {"norm": inner.layer_norm, "linear_1": inner.linear_1, "linear_2": inner.linear_2}
    shuffle = PixelShuffleProjection(16, 32, scale_factor=2)
    shuffle.load_state_dict(
        {f"head.{name}.{key}": value for name, layer in names.items() for key, value in layer.state_dict().items()}
    )
    projector = MultimodalProjector(MultimodalProjectorConfig(), projection=shuffle)
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(native.model.vision_tower, projector, drop_prefix=1)},
        language_model=causal_lm(native, LlamaForCausalLM, native.model.language_model),
    ).eval()
    model.set_modality_token_ids({"vision": IMAGE})
    inputs = left_padded([[1, 5, *[IMAGE] * 4, 7], [1, *[IMAGE] * 4, 9, *[IMAGE] * 4, 11, 12], [1, 8]])
    inputs["pixel_values"] = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native(**inputs).logits)
    tokens = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    assert torch.equal(model.generate(**inputs, **tokens), native.generate(**inputs, **tokens))


def test_llava():
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=VISION, text_config=LlamaConfig(**tiny.TEXT).to_dict(), image_token_id=IMAGE,
                         image_seq_length=4, vision_feature_layer=-2, vision_feature_select_strategy="default")  # fmt: skip
    native = LlavaForConditionalGeneration(config).eval()
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp"), projection=mlp_of(native))
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(native.model.vision_tower, projector, layer=-2, drop_prefix=1)},
        language_model=causal_lm(native, LlamaForCausalLM, native.model.language_model),
    ).eval()
    model.set_modality_token_ids({"vision": IMAGE})
    inputs = left_padded([[1, 5, *[IMAGE] * 4, 7], [1, *[IMAGE] * 4, 9, *[IMAGE] * 4, 11, 12], [1, 8]])
    inputs["pixel_values"] = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native(**inputs).logits)
    tokens = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    assert torch.equal(model.generate(**inputs, **tokens), native.generate(**inputs, **tokens))


class NativePacking:
    """The parts of the native model that its any-resolution packing needs, borrowed as the document says."""

    def __init__(self, native):
        self.config, self.newline = native.config, native.model.image_newline
        self.pack = native.model.pack_image_features


def flatten_tiles(inputs, config=None):
    sizes = inputs["image_sizes"]
    tiles = [image_size_to_num_patches(s, config.image_grid_pinpoints, config.vision_config.image_size) for s in sizes]
    pixels = inputs["pixel_values"]
    return inputs | {"pixel_values": torch.cat([p[:n] for p, n in zip(pixels, tiles, strict=True)]), "tiles": tiles}


def pack_tiles(inputs, output, pack_image_features=None, image_newline=None):
    features = torch.split(output[0], inputs["tiles"])
    features, lengths = pack_image_features(
        features, inputs["image_sizes"], vision_feature_select_strategy="default", image_newline=image_newline
    )
    if isinstance(output, ModelOutput):
        output.last_hidden_state = torch.cat(list(features))
        output["feature_lens"] = lengths
        return output
    return (list(features), *output[1:])


def llava_next(seed=0):
    torch.manual_seed(seed)
    text = MistralConfig(**tiny.TEXT)
    config = LlavaNextConfig(vision_config=VISION, text_config=text.to_dict(), image_token_id=IMAGE,
                             image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]], vision_feature_layer=-2)  # fmt: skip
    native = LlavaNextForConditionalGeneration(config).eval()
    nn.init.normal_(native.model.image_newline)
    return native


@pytest.mark.parametrize("return_dict", [True, False])
def test_llava_next_by_callbacks(return_dict):
    native = llava_next()
    native.model.vision_tower.config.return_dict = return_dict
    projector = MultimodalProjector(MultimodalProjectorConfig(projection_type="mlp"), projection=mlp_of(native))
    pack = functools.partial(
        pack_tiles, pack_image_features=native.model.pack_image_features, image_newline=native.model.image_newline
    )
    encoder = ModalEncoderModule(
        model=native.model.vision_tower,
        projector=projector,
        additional_args=["image_sizes"],
        preprocess_callback=functools.partial(flatten_tiles, config=native.config),
        postprocess_projector_callback=pack,
        layer=-2,
        drop_prefix=1,
    )
    model = MultimodalModel(
        encoders={"vision": encoder}, language_model=causal_lm(native, MistralForCausalLM, native.model.language_model)
    ).eval()
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
    )
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"
    processor = MultimodalProcessor(tokenizer, {"vision": image_processor}, model=model)
    assert processor.image_token_id == IMAGE
    images = [[tiny.image(0, (9, 20))], [tiny.image(1, (20, 9)), tiny.image(2, (17, 15))], []]
    inputs = processor(
        text=["<image> what", "a <image> and <image>", "none"], images=images, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = native.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        counts = [(row == IMAGE).sum().item() for row in inputs["input_ids"]]
        assert counts == [len(expected[0]), len(expected[1]) + len(expected[2]), 0]
        native.model.vision_tower.config.return_dict = True
        reference = native(**inputs).logits
        native.model.vision_tower.config.return_dict = return_dict
        assert torch.equal(model(**inputs).logits, reference)
    tokens = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
    generated = model.generate(**inputs, **tokens)
    native.model.vision_tower.config.return_dict = True
    assert torch.equal(generated, native.generate(**inputs, **tokens))


def qwen2_audio_masks(inputs, encoder=None):
    """The padding mask that the native model makes of `feature_attention_mask`."""
    features, mask = inputs["input_features"], inputs["feature_attention_mask"]
    lengths, _ = encoder._get_feat_extract_output_lengths(mask.sum(-1))
    longest = (features.shape[-1] - 2) // 2 + 1
    valid = (torch.arange(longest)[None] < lengths[:, None]).long()
    blank = torch.zeros(len(features), longest, 1)
    attention = create_bidirectional_mask(config=encoder.config, inputs_embeds=blank, attention_mask=valid)
    return inputs | {"attention_mask": attention}


def qwen2_audio_lengths(inputs, output, encoder=None):
    _, lengths = encoder._get_feat_extract_output_lengths(inputs["feature_attention_mask"].sum(-1))
    return BaseModelOutput(last_hidden_state=[x[:n] for x, n in zip(output[0], lengths.tolist(), strict=True)])


def test_qwen2_audio():
    torch.manual_seed(0)
    audio = {"model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
                 "encoder_ffn_dim": 32, "num_mel_bins": 8, "max_source_positions": 20}  # fmt: skip
    text = dict(model_type="qwen2", **tiny.TEXT)
    native = Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    ).eval()
    tower = native.model.audio_tower
    projector = MultimodalProjector(MultimodalProjectorConfig(), projection=native.model.multi_modal_projector.linear)
    encoder = ModalEncoderModule(
        tower,
        projector,
        ["feature_attention_mask"],
        functools.partial(qwen2_audio_masks, encoder=tower),
        postprocess_projector_callback=functools.partial(qwen2_audio_lengths, encoder=tower),
    )
    language_model = causal_lm(native, Qwen2ForCausalLM, native.model.language_model)
    model = MultimodalModel(encoders={"audio": encoder}, language_model=language_model).eval()
    model.set_modality_token_ids({"audio": AUDIO})
    valid = [40, 23, 12]
    mask = (torch.arange(40)[None] < torch.tensor(valid)[:, None]).long()
    lengths = tower._get_feat_extract_output_lengths(mask.sum(-1))[1].tolist()
    rows = [[1, *[AUDIO] * lengths[0], 5], [1, 4, *[AUDIO] * lengths[1], 6, *[AUDIO] * lengths[2], 7], [1, 9]]
    inputs = left_padded(rows) | {"input_features": torch.randn(3, 8, 40), "feature_attention_mask": mask}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, native(**inputs).logits)
    tokens = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [AUDIO]}
    assert torch.equal(model.generate(**inputs, **tokens), native.generate(**inputs, **tokens))
