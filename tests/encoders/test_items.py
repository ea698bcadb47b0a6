"""Batches of an encoder's inputs: whose is what, and what of it is padding."""

import pytest
import torch

from cornstarch_hf.encoders.items import (
    groups_by_length,
    is_raw_sequence,
    item_count,
    packed_sizes,
    padding_of,
    select_items,
    split_items,
    without_padding,
)
from cornstarch_hf.parts.known_encoders import grid_of

GRID = torch.tensor([[1, 2, 2], [1, 1, 2]])


def test_rows_of_a_batch_go_to_their_items():
    grid, packed = torch.tensor([[1, 2, 2], [1, 1, 2]]), torch.arange(6.0)[:, None]
    first, second = split_items({"pixel_values": packed, "image_grid_thw": grid, "note": "x"}, 2, "vision")
    assert torch.equal(first["pixel_values"], packed[:4]) and torch.equal(second["pixel_values"], packed[4:])
    assert torch.equal(second["image_grid_thw"], grid[1:]) and "note" not in first
    with pytest.raises(ValueError, match="vision: 'pixel_values' has 3 rows for 2 items"):
        split_items({"pixel_values": torch.zeros(3, 1)}, 2, "vision")


def test_an_items_padding_is_cut_where_its_mask_tells():
    ids, mask = torch.tensor([[5, 6, 1, 1]]), torch.tensor([[1, 1, 0, 0]])
    assert without_padding({"input_ids": ids, "attention_mask": mask})["input_ids"].tolist() == [[5, 6]]
    features = {"input_features": torch.zeros(1, 8, 4), "attention_mask": mask}
    assert without_padding(features) is features


def test_packed_items_lie_along_whichever_axis_has_their_sizes():
    patches = torch.arange(6.0)
    for value, axis in (
        (patches[:, None], 0),
        (patches[None, :, None], 1),
        (patches.repeat_interleave(4)[None, None, None], 3),
    ):
        parts = split_items({"pixel_values": value, "target_sizes": GRID[:, 1:]}, 2, "vision")
        unit = value.shape[axis] // 6
        assert [part["pixel_values"].shape[axis] for part in parts] == [4 * unit, 2 * unit]
        assert torch.equal(torch.cat([part["pixel_values"] for part in parts], dim=axis), value)
    sound = torch.randn(8, 7)
    parts = split_items({"input_features": sound, "feature_lens": torch.tensor([4, 3])}, 2, "audio")
    assert [tuple(p["input_features"].shape) for p in parts] == [(8, 4), (8, 3)]
    assert [p["feature_lens"].tolist() for p in parts] == [[4], [3]]


@pytest.mark.parametrize("shape", [(12, 24), (12, 6, 6), (5, 6, 6, 6), (1, 12), (1, 3, 4, 20), (2, 12)])
def test_packed_items_of_another_number_than_their_sizes_say_are_not_divided_along_some_other_axis(shape):
    with pytest.raises(ValueError, match=f"vision: 'pixel_values' has {shape[0]} rows for 3 items: .*6 together"):
        split_items({"pixel_values": torch.zeros(shape), "image_grid_thw": torch.tensor([[1, 1, 2]] * 3)}, 3, "vision")


def test_how_many_items_there_are():
    assert item_count({"pixel_values": torch.zeros(6, 1), "image_grid_thw": GRID}) == 2
    assert item_count({"input_features": torch.zeros(8, 7), "feature_lens": torch.tensor([4, 3])}) == 2
    assert item_count({"pixel_values": torch.zeros(3, 3, 8, 8)}) == 3 and item_count({}) == 1
    assert grid_of({"x": GRID}) is None and packed_sizes({"x": GRID}) is None
    assert packed_sizes({"grid_hws": GRID[:, 1:]}) == [4, 2]


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["attention_mask", "padding_mask", "input_features_mask", "audio_mel_mask"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 5, 4), (3, 1, 4)])
def test_padding_is_found_along_the_axis_that_is_as_long_as_the_mask(name, shape):
    mask = 1 - MASK if name == "audio_mel_mask" else MASK
    x = torch.randn(shape)
    inputs = {"input_features": x, name: mask, "freq": torch.zeros(3, 1)}
    padded = padding_of(inputs, "audio")
    assert padded == (name, 4, [3, 1, 4]) and groups_by_length(padded) == {3: [0], 1: [1], 4: [2]}
    assert not is_raw_sequence(inputs, padded)
    axis = shape.index(4)
    one = select_items(inputs, padded, [0])
    assert torch.equal(one["input_features"], x[:1].narrow(axis, 0, 3)) and one["freq"].shape == (1, 1)
    assert torch.equal(one[name], mask[:1, :3]), "what an encoder does without a mask may differ"
    assert torch.equal(select_items(inputs, padded, [2])["input_features"], x[2:])


def test_masks_of_something_else_say_nothing_of_padding():
    for inputs in (
        {"input_features": torch.zeros(2, 8, 9), "attention_mask": torch.ones(2, 4)},
        {"pixel_values": torch.zeros(2, 3, 8, 8), "patch_attention_mask": torch.ones(2, 2, 2)},
        {"input_features": torch.zeros(2, 8, 9)},
        {"input_features": torch.zeros(2, 8, 9), "attention_mask": torch.ones(2, 9, device="meta")},
    ):
        assert padding_of(inputs, "audio") is None


def test_padding_that_is_not_on_the_right_or_not_to_be_found_is_refused():
    for mask in ([[0, 1, 1, 1]], [[1, 0, 1, 1]]):
        with pytest.raises(
            ValueError, match="audio: items .* padded on the right; the attention_mask has zeros before ones"
        ):
            padding_of({"input_values": torch.zeros(1, 4), "attention_mask": torch.tensor(mask)}, "audio")
    with pytest.raises(ValueError, match="the audio_mel_mask has ones before zeros"):
        padding_of({"audio_mel": torch.zeros(1, 4, 2), "audio_mel_mask": torch.tensor([[1, 0, 0, 0]])}, "audio")
    inputs = {"input_features": torch.zeros(3, 4, 4), "attention_mask": MASK}
    with pytest.raises(ValueError, match=r"several axes as long as its mask \(3, 4\): pad the batch to another length"):
        select_items(inputs, padding_of(inputs, "audio"), [0])
    assert select_items(inputs, padding_of(inputs, "audio"), [2])["input_features"].shape == (1, 4, 4)
