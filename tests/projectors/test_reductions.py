"""Pixel shuffle and frame stacking: equal to native modules, counts as the tensors have it, items alone and together."""

import math

import pytest
import torch
from native_parts import config, linears, projector, randomized
from torch import nn
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.mistral3.modeling_mistral3 import Mistral3PatchMerger

from cornstarch_hf import ModalEncoderModule
from cornstarch_hf.projectors.reductions import (
    FrameStackProjection,
    PixelShuffleProjection,
    blocks_to_channels,
    divided,
    from_axes,
    item_axes,
    pad_end,
    per_axis,
    to_axes,
)

TEXT = {"model_type": "llama", "vocab_size": 99, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


# ---- native modules


def test_internvl_to_the_bit():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": [24, 24], "patch_size": [4, 4]}  # fmt: skip
    native = randomized(
        InternVLForConditionalGeneration(
            InternVLConfig(vision_config=vision, text_config=LlamaConfig(**TEXT).to_dict(), image_token_id=7)
        )
    ).model
    inner = native.multi_modal_projector
    norm = {f"head.norm.{key}": value for key, value in inner.layer_norm.state_dict().items()}
    made = projector("pixel_shuffle", 16, 24, weights=norm | linears(inner, "linear_1", "linear_2"))
    encoder = ModalEncoderModule(native.vision_tower, made, drop_prefix=1).eval()
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = native.get_image_features(
            pixels, vision_feature_layer=-1, vision_feature_select_strategy="default"
        ).pooler_output
        found = encoder(pixel_values=pixels).pooler_output
    assert torch.equal(torch.stack(found), expected) and expected.shape == (2, 9, 24)


@pytest.mark.parametrize("scale_factor", [2, 3])
def test_idefics3_to_the_bit(scale_factor):
    native = randomized(
        Idefics3Connector(
            config(scale_factor=scale_factor, vision_config={"hidden_size": 8}, text_config={"hidden_size": 12})
        )
    )
    options = {"scale_factor": scale_factor, "num_layers": 1, "norm": "none", "bias": False}
    made = projector("pixel_shuffle", 8, 12, weights=linears(native, "modality_projection.proj"), **options)
    x = torch.randn(3, 36, 8)
    assert torch.equal(made(x)[0], native(x)) and made(x)[0].shape == (3, 36 // scale_factor**2, 12)


def test_mistral3_orders_channels_otherwise():
    native = randomized(
        Mistral3PatchMerger(config(spatial_merge_size=2, vision_config={"hidden_size": 8, "patch_size": 4}))
    )
    options = {"num_layers": 1, "norm": "none", "bias": False}
    weights = linears(native, "merging_layer")
    made = projector("pixel_shuffle", 8, 8, weights=weights, channel_order="channel", **options)
    sizes = [(4, 6), (2, 4)]
    packed, lengths = torch.randn(32, 8), [24, 8]
    expected = native(packed, torch.tensor(sizes) * 4)
    found = made(packed, lengths=lengths, grids=sizes)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)  # products of other shapes round otherwise
    assert found.feature_lens.tolist() == [6, 2]
    other = projector("pixel_shuffle", 8, 8, weights=weights, **options)
    assert not torch.allclose(other(packed, lengths=lengths, grids=sizes)[0], expected, atol=1e-2)


def test_voxtral_to_the_bit():
    audio = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_mel_bins": 8, "max_source_positions": 12}  # fmt: skip
    native = randomized(
        VoxtralForConditionalGeneration(
            VoxtralConfig(audio_config=audio, text_config=LlamaConfig(**TEXT).to_dict(), audio_token_id=7)
        )
    ).model
    weights = linears(native.multi_modal_projector, "linear_1", "linear_2")
    made = projector("frame_stack", 16, 24, weights=weights, remainder="error")
    encoder = ModalEncoderModule(native.audio_tower, made).eval()
    mel = torch.randn(2, 8, 24)
    with torch.no_grad():
        expected = native.get_audio_features(mel).pooler_output
        found = encoder(input_features=mel).pooler_output
    assert torch.equal(torch.cat(found), expected) and len(found[0]) == 3


@pytest.mark.parametrize("place", ["norm_mid", "norm_post"])
def test_ultravox(place):
    """Frames stacked with zeros at the end, then norm, linear, SwiGLU and linear, with a second norm by version."""
    options = {
        "stack_factor": 8,
        "gated": True,
        "activation": "silu",
        "norm": "rms_norm",
        "hidden_size": 10,
        place: "rms_norm",
    }
    made = projector("frame_stack", 6, 12, **options)
    weights = randomized(made).projection.head.state_dict()
    x = torch.randn(2, 19, 6)

    def rms(values, name):
        values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
        return values * weights[f"{name}.weight"] if f"{name}.weight" in weights else values

    stacked = torch.zeros(2, 24, 6)
    stacked[:, :19] = x
    hidden = rms(stacked.reshape(2, 3, 48), "norm") @ weights["linear_1.weight"].T
    values, gates = hidden.chunk(2, -1)
    hidden = values * nn.functional.silu(gates)
    hidden = rms(hidden, "norm_mid") if place == "norm_mid" else hidden
    expected = hidden @ weights["linear_2.weight"].T
    expected = rms(expected, "norm_post") if place == "norm_post" else expected
    assert torch.equal(made(x)[0], expected) and expected.shape == (2, 3, 12)


# ---- arithmetic


@pytest.mark.parametrize("order", ["block", "channel"])
def test_blocks_by_hand(order):
    rows, columns, width = 4, 6, 3
    x = torch.arange(rows * columns * width).reshape(1, rows * columns, width)
    joined = blocks_to_channels(x, (rows, columns), 2, order)
    assert joined.shape == (1, 6, 12)
    for i in range(rows // 2):
        for j in range(columns // 2):
            block = x.reshape(rows, columns, width)[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            block = block.flatten() if order == "block" else block.permute(2, 0, 1).flatten()
            assert torch.equal(joined[0, i * 3 + j], block)
    maps = x.reshape(1, rows, columns, width).permute(0, 3, 1, 2).float()
    if order == "channel":
        expected = nn.functional.pixel_unshuffle(maps, 2).flatten(2).transpose(1, 2)
        assert torch.equal(joined.float(), expected)


def test_axes_and_back():
    x = torch.randn(2, 24, 5)
    assert to_axes(x, 3, (2, 4)).shape == (6, 5, 2, 4)
    assert torch.equal(from_axes(to_axes(x, 3, (2, 4)), 3), x)
    assert torch.equal(from_axes(to_axes(x, 1, (24,)), 1), x)
    padded = pad_end(x.reshape(2, 4, 6, 5), (4, 6), (5, 8))
    assert padded.shape == (2, 5, 8, 5) and torch.equal(padded[:, :4, :6], x.reshape(2, 4, 6, 5))
    assert padded[:, 4:].eq(0).all() and padded[:, :, 6:].eq(0).all() and pad_end(x, (24,), (24,)) is x


def test_where_features_lie():
    assert item_axes(12, None, 1) == item_axes(12, (3, 4), 1) == (1, (12,))
    assert item_axes(16, None, 2) == (1, (4, 4)) and item_axes(12, (3, 4), 2) == (1, (3, 4))
    assert item_axes(24, (2, 3, 4), 2) == (2, (3, 4)) and item_axes(24, (2, 3, 4), 3) == (1, (2, 3, 4))
    assert item_axes(12, (3, 4), 3) == (1, (1, 3, 4))
    with pytest.raises(ValueError, match=r"257 features are no square .*16 x 16 = 256.*drop_prefix=1"):
        item_axes(257, None, 2)
    with pytest.raises(ValueError, match="A grid of 3 x 4 = 12 does not hold 13 features"):
        item_axes(13, (3, 4), 2)


def test_remainders():
    assert [divided(7, 2, mode, "x") for mode in ("pad", "partial", "drop")] == [4, 4, 3]
    assert divided(6, 2, "error", "x") == 3 and divided(0, 4, "drop", "x") == 0
    with pytest.raises(
        ValueError, match=r"scale_factor=2 does not divide 7 features along an axis \(1 would be left\).*remainder="
    ):
        divided(7, 2, "error", "scale_factor")
    with pytest.raises(ValueError, match="stack_factor=4 leaves nothing of 3 features"):
        divided(3, 4, "drop", "stack_factor")
    assert per_axis(2, 3, "x") == [2, 2, 2] and per_axis((1, 2), 2, "x") == [1, 2]
    for wrong in (0, 1.5, [1], [1, -1], True, None):
        with pytest.raises(ValueError, match="pool_size must be a positive integer or a list of 2"):
            per_axis(wrong, 2, "pool_size")


def test_what_is_padded_is_zero_and_what_is_dropped_is_the_end():
    x = torch.randn(2, 7, 4)
    padded = FrameStackProjection(4, 4, stack_factor=3)
    whole = torch.cat([x, torch.zeros(2, 2, 4)], 1)
    assert torch.equal(padded(x), padded(whole)) and padded(x).shape == (2, 3, 4)
    dropped = FrameStackProjection(4, 4, stack_factor=3, remainder="drop")
    assert torch.equal(dropped(x), dropped(x[:, :6]))
    shuffled = PixelShuffleProjection(4, 4, remainder="pad")
    maps = torch.zeros(2, 4, 4, 4)
    maps[:, :3, :3] = square = torch.randn(2, 3, 3, 4)
    assert torch.equal(shuffled(square.flatten(1, 2)), shuffled(maps.flatten(1, 2)))
    with pytest.raises(ValueError, match="scale_factor=2 does not divide 3"):
        PixelShuffleProjection(4, 4)(square.flatten(1, 2))


# ---- counts


LENGTHS = [(n, None) for n in (1, 2, 5, 9, 16, 30)]
GRIDS = [(6, (2, 3)), (16, None), (16, (4, 4)), (12, (3, 4)), (35, (5, 7)), (24, (2, 3, 4)), (3, (1, 3))]
TINY = {"num_queries": 3, "depth": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
QUERIES = {
    "num_query_tokens": 3,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
FORMS = [
    ("pixel_shuffle", {"remainder": "pad"}, GRIDS),
    ("pixel_shuffle", {"remainder": "pad", "scale_factor": 3, "channel_order": "channel"}, GRIDS),
    ("frame_stack", {}, LENGTHS),
    ("frame_stack", {"stack_factor": 1, "remainder": "drop"}, LENGTHS),
    ("avg_pool", {"dims": 1}, LENGTHS),
    ("avg_pool", {"dims": 1, "pool_size": 2, "remainder": "drop"}, LENGTHS[1:]),
    ("avg_pool", {"dims": 1, "num_tokens": 2}, LENGTHS[1:]),
    ("avg_pool", {}, GRIDS),
    ("avg_pool", {"pool_size": [2, 1]}, GRIDS),
    ("avg_pool", {"num_tokens": 4}, GRIDS[:-1]),
    ("avg_pool", {"num_tokens": [1, 3]}, GRIDS),
    ("avg_pool", {"dims": 3, "pool_size": [2, 2, 1]}, GRIDS),
    ("conv", {"dims": 1}, LENGTHS),
    ("conv", {"dims": 1, "kernel_size": 4, "stride": 3, "padding": 0, "remainder": "pad"}, LENGTHS),
    ("conv", {}, GRIDS),
    ("conv", {"num_convs": 2, "conv_sizes": [6, 10], "conv_bias": True}, GRIDS),
    ("conv", {"kernel_size": 2, "remainder": "pad"}, GRIDS),
    ("conv", {"dims": 3}, GRIDS),
    ("resampler", TINY, LENGTHS),
    ("qformer", QUERIES, LENGTHS),
    ("resampler", {**TINY, "query_size": 6, "num_layers": 1, "gated": False}, GRIDS),
]


@pytest.mark.parametrize(("kind", "options", "items"), FORMS, ids=lambda x: x if isinstance(x, str) else "")
def test_counts_are_what_comes_out(kind, options, items):
    made = projector(kind, 8, 12, **options)
    for length, grid in items:
        count = made.feature_count(length, grid)
        out = made(torch.randn(2, length, 8), grids=None if grid is None else [grid] * 2)[0]
        assert out.shape == (2, count, 12) and out.isfinite().all(), (length, grid)
        assert kind in ("resampler", "qformer") or count <= length


@pytest.mark.parametrize(("kind", "options", "items"), FORMS, ids=lambda x: x if isinstance(x, str) else "")
def test_items_never_see_each_other_or_padding(kind, options, items):
    made = randomized(projector(kind, 8, 12, **options))
    items = [*items, items[0]]
    each = [torch.randn(n, 8) for n, _ in items]
    lengths, grids = [n for n, _ in items], [g for _, g in items]
    if any(grids):
        grids = [g or (math.isqrt(n),) * 2 for n, g in items]
    padded = nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=float("nan"))
    by = {"lengths": lengths, "grids": grids if any(grids) else None}
    together, packed = made(padded, **by), made(torch.cat(each), **by)
    assert torch.equal(together[0], packed[0]) and together.feature_lens.tolist() == packed.feature_lens.tolist()
    for item, grid, found in zip(each, grids, together[0].split(together.feature_lens.tolist()), strict=True):
        alone = made(item, grids=None if grid is None else [grid])
        assert alone.feature_lens is None
        torch.testing.assert_close(found, alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scale_factor": 0.5}, ValueError, "scale_factor must be an integer >= 1, got 0.5.*scale_factor=2"),
        (
            {"channel_order": "rows"},
            ValueError,
            r"channel_order='rows' is unknown, expected one of \['block', 'channel'\]",
        ),
        ({"remainder": "drop"}, ValueError, r"remainder='drop' is unknown, expected one of \['error', 'pad'\]"),
        ({"scale": 2}, TypeError, r"no options \['scale'\], expected some of .*'scale_factor'"),
        ({"norm": "batch"}, ValueError, "norm='batch' is unknown"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        PixelShuffleProjection(8, 8, **options)


def test_stack_factors_that_make_no_sense():
    with pytest.raises(ValueError, match="stack_factor must be an integer >= 1, got 0"):
        FrameStackProjection(8, 8, stack_factor=0)
