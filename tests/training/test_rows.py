"""Rows of a batch: where items stand, where a row may be cut, what is kept of its inputs, and what is filled up to join them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_types import WITH_VIDEOS, build
from own_memory import own_memory
from transformers import CONFIG_MAPPING

from cornstarch_hf import from_native
from cornstarch_hf.training.rows import PlacedItem, inputs_within, join_rows, place_items, whole_items_within

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


# ---- inputs of several rows

# Their towers see single images, so that videos are encoded frame by frame.
BY_FRAME = ["llava_next_video", "llava_onevision", "video_llava"]


def films(model, counts):
    side = model.config.vision_config.image_size
    pixels = [
        torch.randn(1, frames, 3, side, side, generator=torch.Generator().manual_seed(i))
        for i, frames in enumerate(counts)
    ]
    return [{"pixel_values_videos": one} for one in pixels]  # fmt: skip


def config_of(**inputs):
    """A configuration of modalities by name: kind, and the keywords of their inputs."""

    class Config:
        encoders, joined = list(inputs), {}

        @staticmethod
        def modality(name):
            kind, *keys = inputs[name]
            return {"kind": kind, "input_names": {key: key for key in keys}}

    return Config


def test_every_type_whose_videos_are_encoded_frame_by_frame_is_compared():
    known = [name for name in WITH_VIDEOS if name in CONFIG_MAPPING]  # older versions of transformers lack some
    assert [name for name in known if from_native(build(name))[0].encoders["video"].by_frame] == BY_FRAME


@pytest.mark.parametrize("model_type", BY_FRAME)
def test_videos_of_several_numbers_of_frames_are_what_each_is_alone(model_type):
    model = own_memory(from_native(build(model_type))[0])
    rows = films(model, [2, 4, 3])
    batch = join_rows([*rows, {}], model.config)
    assert batch["frame_mask"].sum(-1).tolist() == [2, 4, 3]
    with torch.no_grad():
        found = model.get_video_features(**batch).pooler_output
        for one, row in zip(found, rows, strict=True):
            (alone,) = model.get_video_features(**row).pooler_output
            assert one.shape == alone.shape
            torch.testing.assert_close(one, alone, atol=1e-5, rtol=1e-4)


def test_equal_numbers_of_frames_and_masks_that_are_there_stay():
    config = config_of(video=("video", "pixel_values", "frame_mask"))
    even = [{"pixel_values": torch.ones(1, 2, 3, 4, 4)}, {"pixel_values": torch.ones(2, 2, 3, 4, 4)}]
    assert join_rows(even, config).keys() == {"pixel_values"}
    given = {"pixel_values": torch.ones(1, 3, 3, 4, 4), "frame_mask": torch.tensor([[True, True, False]])}
    assert join_rows([even[0], given], config)["frame_mask"].tolist() == [[True, True, False]] * 2


def test_videos_are_refused_where_their_encoder_sees_frames_together():
    rows = [{"pixel_values": torch.ones(1, frames, 3, 4, 4)} for frames in (4, 4, 8)]
    with pytest.raises(
        ValueError,
        match=r"^row 2: film: pixel_values has the shape \(1, 8, 3, 4, 4\), in row 0 \(1, 4, 3, 4, 4\), and nothing would tell "
        r"the encoder what is padding in a batch of both: sample as many frames of each \(num_frames=\), or put these rows into",
    ):
        join_rows(rows, config_of(film=("video", "pixel_values")))


def pixels(*shape):
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


# What tells: a mask of pixels or of frames, sizes in pixels; and rows of several tiles, which models know by themselves.
TOLD = {
    "a mask of pixels": [
        {"pixel_values": pixels(1, 3, *size), "pixel_mask": torch.ones(1, *size)} for size in ((4, 2), (2, 6))
    ],
    "a mask of pixels of several images": [
        {"pixel_values": pixels(1, n, 3, *size), "pixel_mask": torch.ones(1, n, *size)}
        for n, size in ((1, (4, 2)), (3, (2, 6)))
    ],
    "sizes": [
        {"pixel_values": pixels(1, 3, 4, 2), "image_sizes": torch.tensor([[4, 2]])},
        {"pixel_values": pixels(2, 3, 2, 6), "image_sizes": torch.tensor([[2, 6], [2, 4]])},
    ],
    "a mask of frames": [{"input_features": pixels(1, 8, n), "input_features_mask": torch.ones(1, n)} for n in (3, 5)],
    "sequences": [{"input_values": pixels(1, n), "values_padding": torch.zeros(1, n)} for n in (3, 5)],
    "tiles": [{"pixel_values": pixels(1, n, 3, 4, 4)} for n in (2, 3)],
}


@pytest.mark.parametrize("rows", TOLD.values(), ids=TOLD)
def test_what_is_told_is_filled_up_at_its_end(rows):
    batch = join_rows(rows, config_of(some=("image", *rows[0])))
    for key, whole in batch.items():
        assert len(whole) == sum(len(row[key]) for row in rows)
        start = 0
        for row in rows:
            part, place = row[key], whole[start : start + len(row[key])]
            start += len(part)
            inside = torch.zeros_like(place, dtype=torch.bool)
            inside[tuple(slice(n) for n in part.shape)] = True
            assert torch.equal(place[inside].view(part.shape), part)
            assert (place[~inside] == (key == "values_padding")).all()


NOT_TOLD = {
    "nothing": ({}, {}),
    "a mask in one row": ({}, {"pixel_mask": torch.ones(1, 2, 6)}),
    "a mask of something else": ({"pixel_mask": torch.ones(1, 4, 4)}, {"pixel_mask": torch.ones(1, 4, 4)}),
    "sizes of images before they were resized": (
        {"image_sizes": torch.tensor([[4, 2]])},
        {"image_sizes": torch.tensor([[20, 60]])},
    ),
}


@pytest.mark.parametrize("told", NOT_TOLD.values(), ids=NOT_TOLD)
def test_what_nothing_tells_is_refused_with_the_row(told):
    rows = [{}, {"pixel_values": pixels(1, 3, 4, 2)} | told[0], {"pixel_values": pixels(1, 3, 2, 6)} | told[1]]
    with pytest.raises(
        ValueError, match=r"^row 2: vision: pixel_values .*\(1, 3, 2, 6\), in row 1 \(1, 3, 4, 2\).*a fixed size"
    ):
        join_rows(rows, config_of(vision=("image", "pixel_values", "pixel_mask", "image_sizes")))


def test_tensors_of_several_ranks_are_refused():
    rows = [{"input_features": pixels(1, 3, 4)}, {"input_features": pixels(1, 3)}]
    with pytest.raises(ValueError, match=r"^row 1: audio: input_features has the shape \(1, 3\).*items of one size"):
        join_rows(rows, config_of(audio=("audio", "input_features")))


def test_inputs_of_another_modality_tell_nothing():
    rows = [{"pixel_values": pixels(1, 3, n, 2), "input_features_mask": torch.ones(1, n, 2)} for n in (2, 4)]
    with pytest.raises(ValueError, match="^row 1: vision"):
        join_rows(rows, config_of(vision=("image", "pixel_values"), audio=("audio", "input_features_mask")))


def test_rows_without_an_encoders_inputs_add_nothing():
    assert join_rows([{}, {}], config_of(vision=("image", "pixel_values"))) == {}


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("audio", [(1, 5, 8), (1, 9, 8)]), ("audio", [(1, 300), (2, 200)]), ("image", [(1, 1, 4, 4), (1, 3, 4, 4)])],
)
def test_lengths_that_no_mask_tells_are_refused(kind, shapes):
    rows = [{"values": pixels(*shape)} for shape in shapes]
    with pytest.raises(
        ValueError, match=r"^row 1: some: values has the shape .*, in row 0 .*nothing would tell the encoder"
    ):
        join_rows(rows, config_of(some=(kind, "values")))


def test_an_input_that_one_row_lacks_is_refused():
    rows = [{}, {"ids": torch.ones(1, 3), "mask": torch.ones(1, 3)}, {"ids": torch.ones(1, 3)}]
    with pytest.raises(ValueError, match="^row 2: series: there is no mask, which others have"):
        join_rows(rows, config_of(series=("series", "ids", "mask")))
