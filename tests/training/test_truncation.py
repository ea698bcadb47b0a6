"""Rows cut to whole items: where items stand, where a row may be cut, what is kept of packed and padded inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cornstarch_hf.training.truncation import PlacedItem, inputs_within, place_items, whole_items_within

TOKEN_IDS = {"vision": 9, "audio": 8}
PARTS = st.lists(
    st.one_of(
        st.integers(1, 4).map(lambda n: ("text", n)), st.tuples(st.sampled_from(["vision", "audio"]), st.integers(0, 5))
    ),
    max_size=8,
)


def built(parts):
    """Ids of a row, and features of each item by modality."""
    ids, lengths = [], {"vision": [], "audio": []}
    for name, count in parts:
        ids += [TOKEN_IDS.get(name, 5)] * count
        if name != "text":
            lengths[name].append(count)
    return ids, lengths


def test_items_that_touch_are_told_apart():
    ids = [1, 9, 9, 9, 8, 8, 2, 9]
    placed = place_items(ids, TOKEN_IDS, {"vision": [1, 2, 1], "audio": [2]})
    assert [(p.modality, p.index, p.start, p.stop) for p in placed] == [
        ("vision", 0, 1, 2), ("vision", 1, 2, 4), ("vision", 2, 7, 8), ("audio", 0, 4, 6),
    ]  # fmt: skip


@settings(deadline=None, derandomize=True)
@given(PARTS, st.integers(1, 20), st.sampled_from(["right", "left"]))
def test_no_item_is_cut_and_no_more_than_needed_is_dropped(parts, limit, side):
    ids, lengths = built(parts)
    items = place_items(ids, TOKEN_IDS, lengths)
    start, stop = whole_items_within(items, len(ids), limit, side)
    assert stop - start <= max(limit, 0) or len(ids) <= limit
    assert (start == 0) if side == "right" else (stop == len(ids))
    assert not any(item.start < cut < item.stop for item in items for cut in (start, stop))
    longer = (0, stop + 1) if side == "right" else (start - 1, len(ids))
    if len(ids) > limit and longer[1] - longer[0] <= limit:
        cut = longer[1] if side == "right" else longer[0]
        assert any(item.start < cut < item.stop for item in items), "one token more would cut an item"
    for name, token in TOKEN_IDS.items():
        kept = [i for i in items if i.modality == name and start <= i.start and i.stop <= stop]
        assert ids[start:stop].count(token) == sum(i.stop - i.start for i in kept)


def test_encoders_that_see_the_same_items_pack_each_in_its_own_grid():
    grids = {"near": torch.tensor([[1, 2, 4], [1, 2, 2]]), "far": torch.tensor([[1, 1, 2], [1, 1, 1]])}
    inputs = {f"{name}_pixel_values": torch.arange(float(grid.prod(-1).sum()))[:, None] for name, grid in grids.items()}
    inputs |= {f"{name}_image_grid_thw": grid for name, grid in grids.items()}
    names = {"near": [[f"{name}_pixel_values", f"{name}_image_grid_thw"] for name in grids]}
    items = [PlacedItem("near", 0, 1, 3), PlacedItem("near", 1, 4, 5)]
    kept, dropped = inputs_within(inputs, names, items, 3, 6)
    assert dropped == {"near": 1} and kept["near_image_grid_thw"].tolist() == [[1, 2, 2]]
    assert kept["near_pixel_values"].flatten().tolist() == [8.0, 9.0, 10.0, 11.0]
    assert kept["far_pixel_values"].flatten().tolist() == [2.0] and kept["far_image_grid_thw"].tolist() == [[1, 1, 1]]


def test_inputs_of_dropped_items_go_with_them():
    grid = torch.tensor([[1, 2, 2], [1, 1, 2], [1, 1, 1]])
    inputs = {
        "pixel_values": torch.arange(7.0)[:, None],
        "image_grid_thw": grid,
        "input_features": torch.zeros(1, 3, 4),
    }
    names = {"vision": [["pixel_values", "image_grid_thw"]], "audio": [["input_features", "unused"]]}
    items = [PlacedItem("vision", 0, 1, 3), PlacedItem("vision", 1, 3, 4), PlacedItem("audio", 0, 5, 8), PlacedItem("vision", 2, 9, 10)]  # fmt: skip
    kept, dropped = inputs_within(inputs, names, items, 0, 5)
    assert dropped == {"audio": 1, "vision": 1} and set(kept) == {"pixel_values", "image_grid_thw"}
    assert torch.equal(kept["pixel_values"], torch.arange(6.0)[:, None]) and torch.equal(
        kept["image_grid_thw"], grid[:2]
    )
    kept, dropped = inputs_within(inputs, names, items, 3, 10)
    assert dropped == {"vision": 1} and kept["input_features"] is inputs["input_features"]
    assert kept["pixel_values"].flatten().tolist() == [4.0, 5.0, 6.0]
    assert (
        inputs_within(inputs, names, items, 0, 12) == (inputs, {})
        and inputs_within(inputs, names, items, 10, 12)[0] == {}
    )
    with pytest.raises(ValueError, match="vision: 'pixel_values' has 5 rows for 3 items"):
        inputs_within({"pixel_values": torch.zeros(5, 1)}, names, items, 0, 5)
