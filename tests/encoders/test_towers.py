"""Towers: which part of a model encodes, what kind of thing, and what its `forward` takes."""

import catalog
import convertible_models
import pytest
import tiny
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperModel,
)
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

from cornstarch_hf.encoders.towers import counted_lengths, infer_kind, main_input, resolve_tower
from cornstarch_hf.parts.signatures import accepts, forward_parameters, takes_any_keyword


def test_plain_encoders_are_their_own_towers():
    for _, build, *_ in tiny.ENCODERS.values():
        model = build()
        assert resolve_tower(model) is model


def test_towers_inside_of_other_models():
    whole = WhisperModel(tiny.whisper().config)
    assert resolve_tower(whole) is whole.encoder
    headed = CLIPVisionModelWithProjection(tiny.clip().config)
    assert type(resolve_tower(headed)).__name__ in ("CLIPVisionModel", "CLIPVisionTransformer")
    wrapped = get_peft_model(tiny.clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert resolve_tower(wrapped) is wrapped


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WhisperModel, "got the class WhisperModel"),
        (torch.nn.Linear(1, 1), "PreTrainedModel as the encoder, got Linear"),
        ("a/b", "got str"),
        (ViTPreTrainedModel(ViTPreTrainedModel.config_class()), "ViTPreTrainedModel is abstract.*'ViTModel'"),
    ],
)
def test_what_has_no_tower(model, message):
    with pytest.raises(TypeError, match=message):
        resolve_tower(model)


class TwoTowers(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.towers = {"image": tiny.clip(), "audio": tiny.whisper()}

    def get_encoder(self, modality=None):
        return self if modality is None else self.towers[modality]

    def forward(self, input_ids):
        return input_ids


@pytest.mark.parametrize("model_type", ["llava", "audioflamingo3", "fuyu", "blip-2", "granite_speech"])
def test_a_whole_multimodal_language_model_is_no_encoder(model_type):
    with pytest.raises(ValueError, match=r"is a whole multimodal language model: .*from_native.*'select': 'native'"):
        resolve_tower(convertible_models.build(model_type))


@pytest.mark.parametrize("name", ["CLIPModel", "BlipModel", "SiglipModel", "Blip2VisionModelWithProjection"])
def test_towers_that_were_trained_together_are_encoders(name):
    layers = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"vision_config": layers | {"image_size": 16, "patch_size": 8}}
    if name == "Blip2VisionModelWithProjection":
        sizes["qformer_config"] = layers | {"encoder_hidden_size": 8}
    else:
        sizes["text_config"] = layers | {"vocab_size": 20}
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**sizes))
    tower = resolve_tower(model)
    assert tower in model.modules() and infer_kind(tower) == "image"


def test_of_several_towers_one_is_chosen_by_kind():
    model = TwoTowers()
    assert resolve_tower(model, "image") is resolve_tower(model, "video") is model.towers["image"]
    assert resolve_tower(model, "audio") is model.towers["audio"]
    with pytest.raises(ValueError, match=r"TwoTowers has towers for \['audio', 'image'\]: choose one by kind="):
        resolve_tower(model)


KINDS = {
    "clip": "image",
    "convnext": "image",
    "qwen2_vl": "image",
    "whisper": "audio",
    "wav2vec2": "audio",
    "esm": "text",
}


@pytest.mark.parametrize(("key", "kind"), KINDS.items())
def test_kinds(key, kind):
    assert infer_kind(tiny.ENCODERS[key][1]()) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [("Gemma4AudioModel", "audio"), ("InstructBlipVideoVisionModel", "image"), ("PerceiverModel", "image"),
     ("TimesformerModel", "video"), ("VideoMAEModel", "video"), ("LayoutLMv3Model", "image")],
)  # fmt: skip
def test_kinds_of_towers_that_state_others(name, kind):
    assert infer_kind(catalog.build(name)) == kind


def test_an_input_that_no_kind_has_is_the_kind():
    class Spectra(PreTrainedModel):
        config_class, main_input_name, input_modalities = PreTrainedConfig, "spectra", ()

        def forward(self, spectra, *more, mask=None):
            return spectra

    model = Spectra(PreTrainedConfig())
    assert infer_kind(model) == "spectra" and list(forward_parameters(model)) == ["spectra", "mask"]
    assert accepts(model, "mask") and not accepts(model, "more") and not takes_any_keyword(model)


def test_parameters_are_those_of_the_wrapped_model():
    wrapped = get_peft_model(tiny.clip(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert forward_parameters(wrapped) == forward_parameters(tiny.clip()) and "pixel_values" in forward_parameters(
        wrapped
    )
    assert takes_any_keyword(wrapped) == takes_any_keyword(tiny.clip())


def test_audio_encoders_count_their_own_lengths():
    lengths = torch.tensor([400, 91])
    real = [tiny.wav2vec2()(torch.randn(1, n)).last_hidden_state.shape[1] for n in (400, 91)]
    assert counted_lengths(tiny.wav2vec2(), lengths, 400, real[0]) == real
    assert counted_lengths(tiny.wav2vec2(), lengths, 400, real[0] + 1) is None, "those are other features"
    assert counted_lengths(tiny.clip(), lengths, 400, real[0]) is None


def test_encoder_decoders_give_their_encoder():
    config = T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, vocab_size=20)
    model = T5ForConditionalGeneration(config)
    assert resolve_tower(model) is model.encoder and infer_kind(model.encoder) == "text"


def test_the_main_input_is_what_the_class_states_or_the_first_that_is_no_mask():
    assert [main_input(tiny.ENCODERS[key][1]()) for key in ("clip", "whisper", "esm")] == [
        "pixel_values",
        "input_features",
        "input_ids",
    ]
    inner = resolve_tower(catalog.build("TimeSeriesTransformerModel"))
    assert (inner.main_input_name, main_input(inner)) == ("past_values", "inputs_embeds")
    assert next(iter(forward_parameters(inner))) == "attention_mask"
