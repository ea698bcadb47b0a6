"""Widths and axes of encoders' features, found without an item."""

import catalog
import pytest
import tiny
import torch
from torch import nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2Model,
    PatchTSTConfig,
    PatchTSTModel,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2VisionConfig,
)

from cornstarch_hf.encoders.feature_layout import FeatureAxes, find_feature_axes
from cornstarch_hf.encoders.selection import Selection
from cornstarch_hf.parts.weightless import with_plain_kernels

WIDTHS = {
    "clip": 16,
    "siglip": 16,
    "dinov2": 16,
    "convnext": 20,
    "qwen2_vl": 24,
    "whisper": 16,
    "wav2vec2": 16,
    "esm": 16,
}
KINDS = {"whisper": "audio", "wav2vec2": "audio", "esm": "text"}


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_the_width_of_every_encoder_is_found_and_nothing_is_drawn(key):
    module = tiny.ENCODERS[key][1]()
    before = torch.get_rng_state()
    data_format = {"convnext": "channels_first", "qwen2_vl": None}.get(key, "channels_last")
    assert find_feature_axes(module, KINDS.get(key, "image"), Selection(), key) == FeatureAxes(WIDTHS[key], data_format)
    assert torch.equal(torch.get_rng_state(), before)


def test_several_layers_are_as_wide_as_all_of_them():
    assert find_feature_axes(tiny.clip(), "image", Selection(layer=(-1, -2)), "vision") == FeatureAxes(
        32, "channels_last"
    )
    with pytest.raises(ValueError, match="vision: layer -9 does not exist"):
        find_feature_axes(tiny.clip(), "image", Selection(layer=-9), "vision")


def test_layers_of_different_widths_are_as_wide_as_their_sum_and_must_have_one_size():
    module = tiny.convnext(hidden_sizes=[8, 12, 16, 20])  # hidden states of 8, 8, 12, 16 and 20 channels
    assert find_feature_axes(module, "image", Selection(layer=(1, 0)), "vision") == FeatureAxes(16, "channels_first")
    with pytest.raises(
        ValueError, match=r"vision: hidden states of different sizes cannot be joined, layer=\(-2, -1\)"
    ):
        find_feature_axes(module, "image", Selection(layer=(-2, -1)), "vision")
    config = MobileNetV2Config(depth_multiplier=0.25, output_stride=8)  # dilated: the last stages keep their size
    states = MobileNetV2Model(config).eval()(torch.randn(1, 3, 64, 64), output_hidden_states=True).hidden_states
    assert states[-1].shape[2:] == states[-4].shape[2:] and states[-1].shape[1] != states[-4].shape[1]
    layout = find_feature_axes(MobileNetV2Model(config), "image", Selection(layer=(-4, -1)), "vision")
    assert layout == FeatureAxes(states[-1].shape[1] + states[-4].shape[1], "channels_first")


def test_bins_that_only_the_convolutions_tell_of():
    case = catalog.cases()["Gemma4AudioModel"]
    module = catalog.build("Gemma4AudioModel", case)
    assert find_feature_axes(module, "audio", Selection(), "audio").width == 24
    assert find_feature_axes(module, "audio", Selection(layer=-2), "audio").width == module.config.hidden_size == 32


class Config(PreTrainedConfig):
    model_type = "of-a-test"


class Encoder(PreTrainedModel):
    """Gives a tensor of a shape that depends on the number of samples."""

    config_class = Config
    main_input_name = "input_values"

    def __init__(self, config, shape=None):
        super().__init__(config)
        self.shape, self.layer = shape, nn.Linear(1, 1)
        self.post_init()

    def forward(self, input_values):
        if input_values.ndim != 2:
            raise ValueError("two axes")
        return input_values.new_zeros([n if isinstance(n, int) else input_values.shape[1] // 1000 for n in self.shape])


@pytest.mark.parametrize(
    ("shape", "known", "expected"),
    [
        ((1, "n", 12), None, FeatureAxes(12, "channels_last")),
        ((1, 12, "n"), None, FeatureAxes(12, "channels_first")),
        ((1, 12, 7), 12, FeatureAxes(12, "channels_first")),
        ((1, 7, 12), None, FeatureAxes(12, "channels_last")),
        ((1, 12, "n", "n"), None, FeatureAxes(12, "channels_first")),
        ((1, "n", "n", 12), None, FeatureAxes(12, "channels_last")),
        ((1, 12, 5, 5), None, FeatureAxes(12, "channels_first")),
        ((1, 5, 5, 12), None, FeatureAxes(12, "channels_last")),
        ((1, 5, 7, 12), 12, FeatureAxes(12, "channels_last")),
        ((1, 12, 5, 7), None, FeatureAxes(12, "channels_first")),
        ((3, 1, 7, 12), None, FeatureAxes(12, "layers_first")),
        (("n", 12), None, FeatureAxes(12, None)),
    ],
)
def test_axes_are_told_by_what_changes_with_the_item_then_by_the_known_width_then_by_squares(
    monkeypatch, shape, known, expected
):
    config = Config() if known is None else Config(hidden_size=known)
    monkeypatch.setattr(Encoder.__init__, "__defaults__", (shape,))
    assert find_feature_axes(Encoder(config), "audio", Selection(), "audio") == expected


def test_an_encoder_that_takes_nothing_known_has_no_layout(monkeypatch):
    monkeypatch.setattr(Encoder.__init__, "__defaults__", ((1, 2, 3),))
    made = Encoder(Config())
    monkeypatch.setattr(Encoder, "forward", lambda self, something_else: something_else)
    assert find_feature_axes(made, "audio", Selection(), "audio") is None


def test_series_of_several_channels_have_their_width_last():
    config = PatchTSTConfig(num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=12, num_hidden_layers=1,
                            num_attention_heads=2, ffn_dim=8)  # fmt: skip
    assert find_feature_axes(PatchTSTModel(config), "time", Selection(), "series") == FeatureAxes(12, "channels_last")


def test_attention_kernels_of_accelerators_are_replaced():
    config = Sam2VisionConfig()
    config._attn_implementation = "flash_attention_2"
    assert with_plain_kernels(config)._attn_implementation == "eager"
    config._attn_implementation = "sdpa"
    assert with_plain_kernels(config)._attn_implementation == "sdpa"
