"""Encoders that draw: the same features each time, and an error where a part of an item would be left out by chance."""

import catalog
import pytest
import tiny
import torch
from transformers import InformerConfig, InformerModel

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.encoders.counting import FeatureCounter
from cornstarch_hf.parts.known_encoders import ENCODER_TYPES, deterministic_inputs

CASES = {"vit_mae": "ViTMAEModel"}


def test_every_row_has_its_case():
    assert CASES.keys() == {name for name in ENCODER_TYPES if ENCODER_TYPES[name].random_input}


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_an_item_gives_the_same_features_each_time_in_their_order(size):
    encoder = ModalEncoderModule(catalog.build("ViTMAEModel"))
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama()).eval()
    pixels = {"pixel_values": torch.randn(2, 3, *size), "interpolate_pos_encoding": True}
    patches = (size[0] // 8) * (size[1] // 8)
    with torch.no_grad():
        first = encoder(**pixels).pooler_output
        second = encoder(**pixels).pooler_output
        shuffled = torch.arange(patches).flip(0).float().expand(2, -1)
        backwards = encoder(**pixels, noise=shuffled).last_hidden_state
        plain = encoder.module(**pixels, noise=shuffled.flip(1)).last_hidden_state
    assert [len(x) for x in first] == [patches + 1] * 2
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(encoder(**pixels).last_hidden_state, plain), "patches in their order"
    assert not torch.equal(backwards, plain), "noise that is given wins"
    assert (
        FeatureCounter(model.config).count(
            "vision", {k: v[:1] if k == "pixel_values" else v for k, v in pixels.items()}
        )
        == patches + 1
    )


def test_an_encoder_that_leaves_out_a_part_by_chance_is_refused_unless_it_is_given_the_noise():
    module = catalog.build("ViTMAEModel")
    module.config.mask_ratio = 0.75
    with pytest.raises(
        ValueError, match=r"ViTMAEModel leaves out 75% .*drawn at random.*config\.mask_ratio = 0, or pass `noise`"
    ):
        ModalEncoderModule(module)
    encoder = ModalEncoderModule(module, additional_args=["noise"])
    assert "noise" in encoder.parameter_names


def test_others_get_nothing():
    assert deterministic_inputs({"pixel_values": torch.zeros(1, 3, 8, 8)}, tiny.clip().config) == {}


def test_an_encoder_that_drops_values_at_random_is_refused():
    case = catalog.cases()["SpeechT5DecoderWithSpeechPrenet"]
    module = catalog.build("SpeechT5DecoderWithSpeechPrenet", case)
    ModalEncoderModule(module)
    module.config.speech_decoder_prenet_dropout = 0.5
    with pytest.raises(ValueError, match=r"drops 50% .* set its config.speech_decoder_prenet_dropout = 0"):
        ModalEncoderModule(module)


def test_attention_to_keys_drawn_at_random_is_refused():
    sizes = {
        "prediction_length": 4,
        "context_length": 8,
        "d_model": 16,
        "lags_sequence": [1],
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    with pytest.raises(
        ValueError, match=r"Informer\w+ attends to keys that are drawn at random.*attention_type='full'"
    ):
        ModalEncoderModule(InformerModel(InformerConfig(**sizes)))
    whole = ModalEncoderModule(InformerModel(InformerConfig(**sizes, attention_type="full"))).eval()
    inputs = {"inputs_embeds": torch.randn(1, 8, whole.module.config.feature_size)}
    assert torch.equal(whole.select(**inputs).last_hidden_state, whole.select(**inputs).last_hidden_state)
