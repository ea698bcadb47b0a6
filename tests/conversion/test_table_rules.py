"""Native types with rules: equal there and back, their configurations too, with images and videos in one row."""

import native_models
import native_types
import pytest
from native_types import check_bfloat16, check_gradients, check_there_and_back, check_videos

from cornstarch_hf import from_native

MRULES = {"rule": "mrope", "axes": 3}
# One of each rule, and of each way to merge.
TYPES = ["qwen2_vl", "qwen3_vl", "hunyuan_vl", "gemma3", "gemma4", "paligemma", "molmo2", "ovis2"]


@pytest.mark.parametrize("model_type", TYPES)
def test_a_native_model_and_its_composition_are_equal_there_and_back(model_type, tmp_path):
    check_there_and_back(native_types.build(model_type), tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_images_and_videos_of_one_row_are_equal_and_their_tower_is_stored_once(model_type, tmp_path):
    check_videos(native_types.build(model_type), tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "hunyuan_vl", "gemma3", "paligemma", "ovis2", "molmo2"])
def test_gradients_are_those_of_the_native_model(model_type):
    check_gradients(native_types.build(model_type))


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "molmo2"])
def test_logits_are_equal_in_bfloat16(model_type):
    check_bfloat16(native_types.build(model_type))


def test_rules_are_written_into_the_configuration():
    model, _ = from_native(native_models.native("qwen2_5_vl"))
    assert model.config.positions == MRULES | {"time_step": {"video": 4}} and model.config.mask is None
    assert model.config.video_modality["additional_args"] == ["second_per_grid_ts"]
    model, _ = from_native(native_models.native("gemma4"))
    assert model.config.mask == {"rule": "item_blocks", "windowed": True, "layers": ["sliding_attention"]}
    model, _ = from_native(native_models.native("ovis2"))
    assert model.config.vision_modality["marks"] == {243 + i: 43 + i for i in range(5)}


def test_a_setting_that_cannot_be_converted_is_named():
    native = native_models.native("gemma4", text={"use_bidirectional_attention": None})
    with pytest.raises(ValueError, match="use_bidirectional_attention=None cannot be converted"):
        from_native(native)
