"""Projector configurations: options by their own names, checked at once, kept through JSON; nothing is ignored."""

import json

import pytest
import tiny
import user_parts
from transformers import AutoConfig

from cornstarch_hf import MultimodalConfig, MultimodalProjector, MultimodalProjectorConfig, register_projector
from cornstarch_hf.configuration_projector import (
    BUILT_IN_PROJECTIONS,
    CUSTOM_PROJECTION,
    feature_width,
    options_of,
    text_width,
)
from cornstarch_hf.parts.registries import PROJECTORS


def test_every_built_in_type_is_registered_and_has_defaults_for_all():
    assert set(BUILT_IN_PROJECTIONS) <= set(PROJECTORS) and CUSTOM_PROJECTION not in PROJECTORS
    with pytest.raises(ValueError, match="native_type"):  # which module of which type it is has no default
        MultimodalProjector(MultimodalProjectorConfig(projection_type="native", in_features=8, out_features=8))
    for kind in set(BUILT_IN_PROJECTIONS) - {"native"}:
        made = MultimodalProjector(MultimodalProjectorConfig(projection_type=kind, in_features=8, out_features=8))
        assert made.projection is not None and made.config.projection_kwargs == {}


def test_options_by_their_own_names():
    flat = MultimodalProjectorConfig(projection_type="frame_stack", stack_factor=3, norm="rms_norm", in_features=8)
    nested = MultimodalProjectorConfig(
        projection_type="frame_stack", projection_kwargs={"stack_factor": 3, "norm": "rms_norm"}, in_features=8
    )
    assert flat == nested and flat.projection_kwargs == {"stack_factor": 3, "norm": "rms_norm"}
    flat.out_features = 4
    made = MultimodalProjector(flat).projection
    assert made.stack_factor == 3 and made.head.linear_1.in_features == 24
    own = MultimodalProjectorConfig(projection_type="users_gated", gain=2.0, in_features=8, out_features=8)
    assert MultimodalProjector(own).projection.gain == 2.0


def test_json_keeps_them(tmp_path):
    config = MultimodalProjectorConfig(projection_type="avg_pool", num_tokens=(2, 3), in_features=8, out_features=4)
    assert config.projection_kwargs == {"num_tokens": [2, 3]}  # as JSON gives it back
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["projection_kwargs"] == {"num_tokens": [2, 3]} and "num_tokens" not in stored
    for again in (MultimodalProjectorConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert again.projection_kwargs == config.projection_kwargs and again.projection_type == "avg_pool"
    assert MultimodalProjectorConfig(**config.to_dict()).projection_kwargs == config.projection_kwargs
    stored |= {"pool_size": None, "note_of_another_tool": 3, "activation": "silu"}  # entries beside ours
    again = MultimodalProjectorConfig.from_dict(stored)
    assert again.note_of_another_tool == 3 and again.activation == "silu" and "note_of_another_tool" in again.to_dict()


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"projection_type": "pixel_shuffle", "scale": 2}, TypeError, r"'pixel_shuffle' projector takes no \['scale'\].*'scale_factor'"),
        ({"projection_type": "linear", "scale_factor": 2}, TypeError, r"'linear' projector takes no \['scale_factor'\], expected some of \[\]"),
        ({"projection_type": "mlp", "projection_kwargs": {"depth": 2}}, TypeError, r"'mlp' projector takes no \['depth'\], expected some of \['activation', 'bias', 'hidden_size', 'norm', 'norm_eps', 'num_layers'\]"),
        ({"projection_type": "users_gated", "gian": 2.0}, TypeError, r"takes no \['gian'\], expected some of \['gain'\]"),
        ({"projection_type": "frame_stack", "stack_factor": 0}, ValueError, "stack_factor must be an integer >= 1, got 0"),
        ({"projection_type": "conv", "stride": 5}, ValueError, "stride=5 is larger than kernel_size=3"),
        ({"projection_type": "avg_pool", "norm": "batch"}, ValueError, "norm='batch' is unknown"),
        ({"projection_type": "resampler", "projection_kwargs": {"num_heads": 6}}, ValueError, "num_kv_heads=4 must divide num_heads=6"),
        ({"projection_type": "frame_stack", "stack_factor": 2, "projection_kwargs": {"stack_factor": 3}}, ValueError, "stack_factor was given twice, as 3 and as 2"),
        ({"projection_type": "users_gated", "gain": object()}, ValueError, "is not a JSON value"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_fail_later_is_refused_at_once(values, error, message):
    with pytest.raises(error, match=message):
        MultimodalProjectorConfig(**values)


def test_an_entry_of_a_composed_configuration_is_read_likewise():
    entry = {"projection_type": "pixel_shuffle", "scale_factor": 3, "in_features": 16, "out_features": 32}
    config = MultimodalConfig(
        text_config=tiny.llama().config,
        encoders=["vision"],
        vision_config=tiny.clip().config,
        vision_projector_config=entry,
    )
    assert config.vision_projector_config.projection_kwargs == {"scale_factor": 3}
    assert entry == {"projection_type": "pixel_shuffle", "scale_factor": 3, "in_features": 16, "out_features": 32}
    with pytest.raises(ValueError, match="scale_factor must be an integer >= 1, got -1"):
        MultimodalConfig(
            text_config=tiny.llama().config, encoders=["vision"], vision_config=tiny.clip().config,
            vision_projector_config=entry | {"scale_factor": -1},
        )  # fmt: skip


def test_classes_that_take_any_keyword_get_all_of_them():
    class Anything(user_parts.GatedProjection):
        def __init__(self, in_features, out_features, **options):
            super().__init__(in_features, out_features)
            self.options = options

    register_projector("users_anything", Anything)
    try:
        config = MultimodalProjectorConfig(projection_type="users_anything", depth=3, in_features=4, out_features=4)
        assert config.projection_kwargs == {"depth": 3}
        assert MultimodalProjector(config).projection.options["depth"] == 3
        assert options_of("users_anything", ("depth", "activation", "dtype")) == {"depth"}
    finally:
        del PROJECTORS._entries["users_anything"]
    assert options_of("users_anything", ("depth",)) == set()


def test_widths():
    assert (feature_width(tiny.convnext().config), feature_width(tiny.qwen2_vl().config)) == (20, 24)
    assert text_width(tiny.gpt2().config) == 32
    with pytest.raises(ValueError, match="no hidden_size, so the projector's out_features must be given"):
        text_width(MultimodalProjectorConfig())
