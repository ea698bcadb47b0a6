"""Encoders' inputs of rows as those of a batch: what is filled up, where something tells, and what is refused."""

import pytest
import torch
from native_types import WITH_VIDEOS, build
from own_memory import own_memory

from cornstarch_hf import from_native
from cornstarch_hf.training.joining import join_rows

# Their towers see single images, so that videos are encoded frame by frame.
BY_FRAME = ["llava_next_video", "llava_onevision", "video_llava"]


def films(model, counts):
    side = model.config.vision_config.image_size
    pixels = [torch.randn(1, frames, 3, side, side, generator=torch.Generator().manual_seed(i)) for i, frames in enumerate(counts)]
    return [{"pixel_values_videos": one} for one in pixels]  # fmt: skip


def config_of(**inputs):
    """A configuration of modalities by name: kind, and the keywords of their inputs."""

    class Config:
        encoders = list(inputs)

        @staticmethod
        def modality(name):
            kind, *keys = inputs[name]
            return {"kind": kind, "input_names": {key: key for key in keys}}

    return Config


def test_every_type_whose_videos_are_encoded_frame_by_frame_is_compared():
    assert BY_FRAME == [name for name in WITH_VIDEOS if from_native(build(name))[0].encoders["video"].by_frame]


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
