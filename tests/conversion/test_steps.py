"""Callbacks of converted models, each alone: shapes, masks, numbers of features."""

import math

import pytest
import torch
from transformers import Qwen2AudioEncoderConfig

from cornstarch_hf.conversion import steps
from cornstarch_hf.encoders.selection import EncoderOutput
from cornstarch_hf.parts.registries import CALLBACKS


def test_they_are_known_by_name_as_soon_as_the_package_is_imported():
    names = {name for name in CALLBACKS if name.startswith("native_")}
    assert names >= {
        "native_any_resolution",
        "native_real_images",
        "native_sound_mask",
        "native_tiles",
        "native_unit_rms",
    }


@pytest.mark.parametrize("whole", [False, True])
def test_images_of_zeros_pad_a_row_and_patches_are_told_by_their_pixels(whole):
    pixels = torch.ones(2, 2, 3, 4, 4)
    pixels[0, 1] = 0
    mask = torch.ones(2, 2, 4, 4, dtype=torch.bool)
    mask[1, 0, 3] = False  # the last row of pixels: its patches have some
    mask[1, 1, 2:] = False
    found = steps.real_images({"pixel_values": pixels, "pixel_attention_mask": mask}, 2, whole)
    assert set(found) == {"pixel_values", "patch_attention_mask"} and found["pixel_values"].shape == (3, 3, 4, 4)
    some = [[True, True], [not whole, not whole]]
    assert found["patch_attention_mask"].tolist() == [[[True] * 2] * 2, some, [[True] * 2, [False] * 2]]
    every = steps.real_images({"pixel_values": pixels}, 2)
    assert bool(every["patch_attention_mask"].all()) and len(every["patch_attention_mask"]) == 3


def test_a_mask_of_pixels_is_one_of_patches_where_it_is_given():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = False
    found = steps.patch_mask({"pixel_values": 0, "pixel_mask": mask}, 2)
    assert found["patch_attention_mask"].tolist() == [[[True, False]] * 2] and "pixel_mask" not in found
    assert steps.patch_mask({"pixel_values": 0, "pixel_mask": None}, 2) == {"pixel_values": 0}


POINTS = [[4, 8], [8, 4]]


def test_tiles_that_pad_are_left_out():
    sizes = torch.tensor([[4, 8], [8, 8]])
    found = steps.tiles({"pixel_values": torch.rand(2, 5, 3, 4, 4), "image_sizes": sizes}, POINTS, 4)
    assert found["pixel_values"].shape == (6, 3, 4, 4)  # each image and two tiles
    alone = {"pixel_values": torch.rand(2, 5, 3, 4, 4), "image_sizes": sizes, "batch_num_images": torch.tensor([2])}
    assert steps.tiles(alone, POINTS, 4)["pixel_values"].shape == (2, 3, 4, 4)
    flat = {"pixel_values": torch.rand(6, 3, 4, 4), "image_sizes": sizes}
    assert steps.tiles(flat, POINTS, 4) is flat


def test_tiles_become_rows_that_end_by_a_learnt_vector():
    step = steps.AnyResolution(2, POINTS, 4, 2)
    step.image_newline.data.fill_(9.0)
    features = torch.arange(3 * 4 * 2, dtype=torch.float32).view(3, 4, 2)
    inputs = {"image_sizes": torch.tensor([[4, 8]])}
    (image,) = step(inputs, EncoderOutput(last_hidden_state=features)).last_hidden_state
    assert image.shape == (4 + 2 * 5, 2) and torch.equal(image[:4], features[0])
    assert image[4:, 0].tolist() == [8, 10, 16, 18, 9, 12, 14, 20, 22, 9]  # both tiles, row by row


def test_videos_keep_a_quarter_of_each_frame_and_one_vector():
    step = steps.AnyResolution(2, POINTS, 6, 2)
    frames = torch.rand(2, 3 * 9, 2)
    found = step({"pixel_values": 0}, EncoderOutput(last_hidden_state=frames)).last_hidden_state
    assert [x.shape for x in found] == [(3 * math.ceil(3 / 2) ** 2 + 1, 2)] * 2


@pytest.mark.parametrize("mode", ["average", "max"])
def test_frames_are_pooled_one_by_one(mode):
    features = torch.rand(2, 3 * 16, 5)
    pool = torch.nn.AvgPool2d(2) if mode == "average" else torch.nn.MaxPool2d(2)
    expected = pool(features.reshape(6, 4, 4, 5).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2).reshape(2, -1, 5)
    even = steps.pooled_frames({}, EncoderOutput(last_hidden_state=features), mode, 2, 4)
    assert torch.equal(even.last_hidden_state, expected)
    packed = EncoderOutput(last_hidden_state=features.flatten(0, 1)[:80], feature_lens=torch.tensor([48, 32]))
    uneven = steps.pooled_frames({}, packed, mode, 2, 4)
    assert torch.equal(uneven.last_hidden_state, expected.flatten(0, 1)[:20]) and uneven.lengths == [12, 8]


def test_sounds_keep_the_features_of_their_frames():
    mask = (torch.arange(16)[None] < torch.tensor([16, 10])[:, None]).long()
    inputs = {"input_features": torch.rand(2, 4, 16), "feature_attention_mask": mask}
    output = steps.sound_lengths(inputs, EncoderOutput(last_hidden_state=torch.rand(2, 4, 3)))
    assert output.lengths == [4, 2]
    config = Qwen2AudioEncoderConfig()
    config._attn_implementation = "eager"
    found = steps.sound_mask(inputs, config)["attention_mask"]
    assert found.shape[-1] == 8 and (found[:, 0, 0] == 0).sum(-1).tolist() == [8, 5]


def test_features_get_a_root_mean_square_of_one():
    output = steps.unit_rms({}, EncoderOutput(last_hidden_state=torch.full((1, 2, 4), 3.0)), 0.0)
    assert torch.allclose(output.last_hidden_state, torch.ones(1, 2, 4))
