"""Pooling and convolutions: equal to Gemma 3, Qwen2-Audio's pooling and GOT-OCR 2, windows at the end, bad options."""

import pytest
import torch
from native_parts import config, linears, projector, randomized
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2MultiModalProjector

from cornstarch_hf.projectors.windows import (
    AvgPoolProjection,
    ConvProjection,
    convolution_axes,
    convolved,
    tokens_per_axis,
)


@pytest.mark.parametrize("side", [2, 3])
def test_gemma3(side):
    native = randomized(
        Gemma3MultiModalProjector(
            config(
                mm_tokens_per_image=side**2,
                text_config={"hidden_size": 12},
                vision_config={"hidden_size": 8, "layer_norm_eps": 1e-6, "image_size": 24, "patch_size": 4},
            )
        )
    )
    weights = {
        "head.norm.weight": 1 + native.mm_soft_emb_norm.weight,  # kept there as the distance from one
        "head.linear_1.weight": native.mm_input_projection_weight.T,
    }
    made = projector("avg_pool", 8, 12, weights=weights, num_tokens=side**2)
    x = torch.randn(3, 36, 8)
    expected, pools = native(x), []
    native.mm_soft_emb_norm.register_forward_hook(lambda module, inputs, output: pools.append(output))
    native(x)
    pooled = made.projection.head.norm(made.projection.reduce(x, 1, (6, 6)))
    assert torch.equal(pooled, pools[0])
    torch.testing.assert_close(
        made(x)[0], expected, rtol=1e-6, atol=1e-6
    )  # its weight is transposed: sums round otherwise
    assert expected.shape == (3, side**2, 12)


def test_got_ocr2_to_the_bit():
    native = randomized(
        GotOcr2MultiModalProjector(config(vision_config={"output_channels": 8}, text_config={"hidden_size": 12}))
    )
    options = {"num_convs": 2, "conv_sizes": [16, 12], "activation": "linear"}
    weights = {f"convs.{i}.weight": native.get_parameter(f"conv_upsampler{i + 1}.weight") for i in range(2)}
    made = projector("conv", 8, 12, weights=weights | linears(native, "multimodal_projector"), **options)
    for maps in (torch.randn(2, 8, 8, 8), torch.randn(2, 8, 5, 11)):
        found = made(maps.permute(0, 2, 3, 1))[0]
        assert torch.equal(found, native(maps)) and found.shape[1] == made.feature_count(
            maps[0, 0].numel(), maps.shape[2:]
        )


def test_one_axis_as_torch_has_it():
    x = torch.randn(2, 11, 8)
    pooled = randomized(AvgPoolProjection(8, 6, dims=1, remainder="drop", norm="none"))
    expected = nn.AvgPool1d(2, stride=2)(x.transpose(1, 2)).transpose(1, 2)  # as Qwen2-Audio pools
    assert torch.equal(pooled(x), pooled.head(expected)) and pooled.feature_count(11) == 5
    conv = randomized(ConvProjection(8, 6, "relu", dims=1, kernel_size=5, stride=2, padding=2))
    expected = torch.relu(nn.functional.conv1d(x.transpose(1, 2), conv.convs[0].weight, stride=2, padding=2))
    assert torch.equal(conv(x), conv.head(expected.transpose(1, 2)))


def test_frames_are_pooled_alone_unless_three_axes_are_asked_for():
    frames = torch.randn(2, 3, 4, 6, 8)
    pooled = AvgPoolProjection(8, 6)
    together = pooled(frames.flatten(1, 3), (3, 4, 6))
    each = [pooled(frames[:, i].flatten(1, 2), (4, 6)) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(each, 1))
    cubes = AvgPoolProjection(8, 6, dims=3, pool_size=[3, 2, 2], norm="none")
    means = frames.reshape(2, 3, 2, 2, 3, 2, 8).mean((1, 3, 5)).flatten(1, 2)
    torch.testing.assert_close(cubes(frames.flatten(1, 3), (3, 4, 6)), cubes.head(means))


def test_the_last_window_averages_what_is_there():
    x = torch.randn(1, 5, 8)
    means = torch.stack([x[0, :2].mean(0), x[0, 2:4].mean(0), x[0, 4]])
    made = AvgPoolProjection(8, 8, dims=1, norm="none")
    torch.testing.assert_close(made(x)[0], made.head(means))
    assert AvgPoolProjection(8, 8, dims=1).feature_count(0) == 0
    with pytest.raises(ValueError, match="pool_size=2 does not divide 5 features"):
        AvgPoolProjection(8, 8, dims=1, remainder="error")(x)


def test_a_fixed_number_of_tokens():
    made = AvgPoolProjection(8, 8, num_tokens=4, norm="none")
    x = torch.randn(1, 35, 8)
    maps = x.reshape(1, 5, 7, 8).permute(0, 3, 1, 2).contiguous()
    expected = nn.AdaptiveAvgPool2d(2)(maps).flatten(2).transpose(1, 2)
    assert torch.equal(made(x, (5, 7)), made.head(expected))
    with pytest.raises(ValueError, match="num_tokens asks for 2 x 2 features, but the item has 1 x 3"):
        made.feature_count(3, (1, 3))
    assert (
        tokens_per_axis(27, 3) == [3, 3, 3] and tokens_per_axis([2, 3], 2) == [2, 3] and tokens_per_axis(10, 1) == [10]
    )
    with pytest.raises(ValueError, match=r"num_tokens=10 is no square \(3\*\*2 = 9\).*a list of 2"):
        AvgPoolProjection(8, 8, num_tokens=10)


def test_convolutions_see_every_feature_or_say_so():
    for size in range(1, 12):
        for kernel, stride, padding in ((3, 2, 1), (4, 3, 0), (5, 5, 2), (2, 2, 0)):
            count, zeros = convolved(size, kernel, stride, padding, "pad")
            assert (count - 1) * stride + kernel >= size + padding > (count - 2) * stride + kernel or count == 1
            assert (size + 2 * padding + zeros - kernel) // stride + 1 == count
    x = torch.randn(2, 5, 8)
    made = ConvProjection(8, 8, dims=1, kernel_size=2, remainder="pad")
    assert torch.equal(made(x), made(torch.cat([x, torch.zeros(2, 1, 8)], 1)))
    dropped = ConvProjection(8, 8, dims=1, kernel_size=2, remainder="drop")
    other = torch.cat([x[:, :4], torch.randn(2, 1, 8)], 1)
    assert torch.equal(dropped(x), dropped(other)) and dropped(x).shape == dropped(x[:, :4]).shape
    with pytest.raises(
        ValueError, match="kernel_size=2, stride=2, padding=0 leaves 1 of 5 features along an axis unseen"
    ):
        ConvProjection(8, 8, dims=1, kernel_size=2)(x)
    with pytest.raises(ValueError, match="kernel_size=4 with padding=0 does not fit 3 features"):
        ConvProjection(8, 8, dims=1, kernel_size=4, padding=0, remainder="drop").feature_count(3)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (AvgPoolProjection, {"pool_size": 2, "num_tokens": 4}, "pool_size and num_tokens exclude each other"),
        (
            AvgPoolProjection,
            {"pool_size": [2, 2, 2]},
            r"pool_size must be .* a list of 2 \(one per axis, dims=2\), got \[2, 2, 2\]",
        ),
        (AvgPoolProjection, {"dims": 4}, r"dims=4 is unknown, expected one of \[1, 2, 3\]"),
        (AvgPoolProjection, {"remainder": "pad"}, r"remainder='pad' is unknown.*'drop', 'error', 'partial'"),
        (ConvProjection, {"stride": 4}, "stride=4 is larger than kernel_size=3"),
        (ConvProjection, {"padding": 3}, "padding=3 is not smaller than kernel_size=3"),
        (ConvProjection, {"padding": [1]}, r"padding must be .* a list of 2 \(one per axis\), got \[1\]"),
        (ConvProjection, {"num_convs": 0}, "num_convs must be an integer >= 1, got 0"),
        (ConvProjection, {"conv_sizes": [4, 4]}, r"conv_sizes must be 1 positive integers \(num_convs\), got \[4, 4\]"),
    ],
)
def test_options_that_make_no_sense(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(8, 8, **options)


def test_padding_is_half_a_kernel_unless_it_is_given():
    assert convolution_axes(3, 2, None, 2) == ([3, 3], [2, 2], [1, 1])
    assert convolution_axes([2, 5], 2, [0, 1], 2) == ([2, 5], [2, 2], [0, 1]) and convolution_axes(2, 2, None, 1)[
        2
    ] == [0]
