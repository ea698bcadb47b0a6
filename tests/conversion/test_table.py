"""Each row of the conversion table against native models without weights; what is refused, and why."""

import copy

import convertible_models
import native_models
import native_types
import pytest
import torch
import transformers
from convertible_models import TYPES
from transformers import CONFIG_MAPPING

from cornstarch_hf import MultimodalModel, from_native, to_native
from cornstarch_hf.conversion.entries import Case, First, HiddenState, Inverse, Ratio, setting
from cornstarch_hf.conversion.keys import key_map, prefixes, tensors
from cornstarch_hf.conversion.refusals import OUTSIDE
from cornstarch_hf.conversion.table import NATIVE


def configuration(model_type):
    """A tiny configuration of a native type."""
    if model_type in native_models.NATIVE:
        return native_models.configuration(model_type)
    changes = TYPES[model_type].changes if model_type in TYPES else {}
    return convertible_models.small(CONFIG_MAPPING[model_type], changes)


def on_meta(model_type):
    """A native model of a type without weights."""
    with torch.device("meta"):
        return getattr(transformers, NATIVE[model_type].architecture)(configuration(model_type))


@pytest.mark.parametrize("model_type", NATIVE)
def test_each_native_tensor_is_one_of_ours_or_is_kept(model_type):
    native, row = on_meta(model_type), NATIVE[model_type]
    model, _ = from_native(native)
    names, rest = key_map(native, model, prefixes(native, model, row))
    held = {name for name, _ in tensors(native, persistent=True)}
    ours = {name for name, _ in tensors(model, persistent=True)}
    assert len(set(names.values())) == len(names)  # no two of ours are one of theirs
    assert set(names) | {f"native_rest.{name}" for name in rest} == ours
    assert set(names.values()) | set(rest) == held and not set(names.values()) & set(rest)
    shapes = dict(tensors(native))
    assert all(tensor.shape == shapes[names[name]].shape for name, tensor in tensors(model) if name in names)
    back = to_native(model)
    assert {name: (t.shape, t.dtype) for name, t in tensors(back, persistent=True)} == {
        name: (t.shape, t.dtype) for name, t in tensors(native, persistent=True)
    }


@pytest.mark.parametrize("model_type", NATIVE)
def test_a_row_names_what_transformers_has(model_type):
    row = NATIVE[model_type]
    assert CONFIG_MAPPING[model_type].model_type == model_type and hasattr(transformers, row.architecture)
    config = configuration(model_type)
    assert "vision" in row.parts or "audio" in row.parts
    for part in row.parts_for(config).values():
        assert isinstance(setting(config, part.token), int)


@pytest.mark.parametrize("model_type", OUTSIDE)
def test_types_outside_the_architecture_are_refused_with_the_reason(model_type):
    class Outside(transformers.PreTrainedConfig):
        pass

    Outside.model_type = model_type
    model = convertible_models.build("llava")
    model.config.__class__ = type("Other", (type(model.config),), {"model_type": model_type})
    with pytest.raises(ValueError, match=f"'{model_type}' cannot be composed .*: {OUTSIDE[model_type][:30]}"):
        from_native(model)


def test_an_unknown_type_is_refused_with_those_that_are_known():
    model = convertible_models.build("llava")
    model.config.__class__ = type("Other", (type(model.config),), {"model_type": "brand_new"})
    with pytest.raises(ValueError, match=r"'brand_new' is not known, expected one of \['aria', .*'llava', "):
        from_native(model)
    assert set(OUTSIDE).isdisjoint(NATIVE) and len(OUTSIDE) == 18
    assert set(OUTSIDE) <= set(CONFIG_MAPPING)  # the names that configurations have


@pytest.mark.parametrize(
    ("model_type", "change", "told"),
    [
        ("llava", {"vision_feature_select_strategy": "full", "vision_feature_layer": 99}, "layer 99 does not exist"),
        (
            "granite_speech",
            {"has_lora_adapter": True},
            "'granite_speech' with has_lora_adapter=True cannot be converted",
        ),
        ("llava_next_video", {"spatial_pool_mode": "conv"}, "spatial_pool_mode='conv' of LlavaNextVideoConfig cannot"),
        ("voxtral", {"audio_config": {"intermediate_size": 48}}, "audio_config.intermediate_size=48 .* no multiple of"),
    ],
)
def test_settings_that_cannot_be_converted_are_named(model_type, change, told):
    with pytest.raises(ValueError, match=told):
        from_native(convertible_models.build(model_type, **change))


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("aria", {"vision_feature_layer": -2}),
        ("janus", {"vision_config": {"projection_dim": 32, "depth": 1}}),
        ("llava", {"vision_feature_layer": [-2, 1], "vision_feature_select_strategy": "full"}),
        ("llava", {"projector_hidden_act": "relu", "multimodal_projector_bias": False}),
        ("llava_onevision", {"vision_aspect_ratio": "anyres_max_4"}),
    ],
)
def test_settings_of_the_whole_decide_what_its_parts_compute(model_type, change):
    native = convertible_models.build(model_type, **change)
    inputs = native_types.inputs_of(native)
    native_types.check_equal(native, from_native(native)[0], inputs)


@pytest.mark.parametrize("count", [5, 7])
def test_marks_stand_for_the_last_rows_of_a_table(count):
    native = native_models.native("ovis2", vision={"num_visual_indicator_tokens": count})
    native_types.check_equal(native, from_native(native)[0], native_types.inputs_of(native))


def test_encoder_decoders_in_a_supported_type_are_refused():
    config = copy.copy(convertible_models.build("blip-2"))
    config.config.use_decoder_only_language_model = False
    with pytest.raises(ValueError, match="'blip-2' with use_decoder_only_language_model=False cannot be converted"):
        from_native(config)


def test_values_of_a_row_read_the_configuration():
    config = convertible_models.build("internvl").config
    assert Inverse("downsample_ratio").read(config) == 2 and First(("nothing", "projector_hidden_act")).read(config)
    assert Ratio("vision_config.hidden_size", 5, exact=False).read(config) == 6
    with pytest.raises(ValueError, match="vision_config.hidden_size=32 of InternVLConfig is no multiple of 5"):
        Ratio("vision_config.hidden_size", 5).read(config)
    with pytest.raises(ValueError, match="InternVLConfig has no setting 'vision_config.nothing'"):
        setting(config, "vision_config.nothing")
    with pytest.raises(
        ValueError, match=r"downsample_ratio=0.5 of InternVLConfig cannot be converted, expected one of \[1\]"
    ):
        Case("downsample_ratio", {1: 2}).read(config)
    config.vision_feature_layer = [-1, -2]
    assert HiddenState("vision_feature_layer").read(config) == [2, -2]
    assert isinstance(from_native(convertible_models.build("internvl"))[0], MultimodalModel)
