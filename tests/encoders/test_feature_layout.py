"""Inputs of ordinary items: of the names that an encoder takes, floats without memory, integers real."""

import pytest
import tiny
import torch
from transformers import PreTrainedConfig

from cornstarch_hf.encoders.feature_layout import item_shapes, typical_inputs
from cornstarch_hf.encoders.item_sizes import first_positive_setting
from cornstarch_hf.encoders.towers import ITEM_INPUTS
from cornstarch_hf.parts.signatures import forward_parameters


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_every_input_is_one_that_the_encoder_takes(key):
    module = tiny.ENCODERS[key][1]()
    names = forward_parameters(module)
    kind = {"whisper": "audio", "wav2vec2": "audio", "esm": "text"}.get(key, "image")
    found = list(typical_inputs(names, module.config, kind))
    assert found and all(set(inputs) <= set(names) for inputs in found)
    assert all(x.is_meta == x.is_floating_point() for inputs in found for x in inputs.values())


def test_the_configurations_own_sizes_come_first():
    first = next(typical_inputs(["pixel_values"], tiny.clip().config, "image"))
    assert first["pixel_values"].shape == (1, 3, 8, 8)
    config = PreTrainedConfig(image_size={"height": 6, "width": 4}, num_channels=1)
    assert next(typical_inputs(["pixel_values"], config, "image"))["pixel_values"].shape == (1, 1, 6, 4)
    clip = next(typical_inputs(["pixel_values"], PreTrainedConfig(image_size=8, num_frames=4), "video"))
    assert clip["pixel_values"].shape == (1, 4, 3, 8, 8)
    wave = next(typical_inputs(["input_values", "attention_mask"], PreTrainedConfig(), "audio"))
    assert wave["input_values"].ndim == 2 and set(wave) == {"input_values"}
    grid = next(typical_inputs(["hidden_states", "grid_thw"], tiny.qwen2_vl().config, "image"))
    assert len(grid["hidden_states"]) == int(grid["grid_thw"].prod())


def test_names_that_no_recipe_knows_have_no_inputs():
    assert list(typical_inputs(["something"], PreTrainedConfig(), "image")) == []
    assert "pixel_values" in item_shapes([], PreTrainedConfig(), "image")


def test_numbers_of_a_configuration():
    config = PreTrainedConfig(a=True, b=0, c=[2, 7], d=5, e="5")
    assert first_positive_setting(config, "a", "b", "e", "missing", default=3) == 3
    assert (
        first_positive_setting(config, "b", "c", "d", default=3) == 7
        and first_positive_setting(config, "d", default=3) == 5
    )
    assert torch.Size([first_positive_setting(config, "d", default=3)]) == (5,)


def test_each_input_that_holds_items_has_its_recipe():
    assert tuple(item_shapes([], PreTrainedConfig(), "image")) == ITEM_INPUTS
