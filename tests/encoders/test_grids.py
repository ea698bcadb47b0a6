"""Grids: told from inputs and configuration alone, or refused with both numbers and a remedy."""

import pytest
import torch
from native_parts import config

from cornstarch_hf.encoders.grids import GridQuery, grids_of_tensor, item_grids, patch_grid
from cornstarch_hf.parts.known_encoders import merged_patches


def pixels(*size):
    return {"pixel_values": torch.empty(1, 3, *size, device="meta")}


VIT = config(patch_size=4, num_channels=3)
STAGED = config(patch_size=4, depths=[1, 1])
CONV = config(depths=[2, 2])
TOWER = config(spatial_merge_size=2)
VIDEO = config(patch_size=[4, 4], tubelet_size=2, num_channels=3)
FRAMES = {"pixel_values_videos": torch.empty(1, 6, 3, 8, 12, device="meta")}


@pytest.mark.parametrize(
    ("known", "grids"),
    [
        (GridQuery(pixels(8, 12), VIT, "image", [6]), [(2, 3)]),
        (GridQuery(pixels(9, 15), VIT, "image", [6, 6]), [(2, 3), (2, 3)]),
        (GridQuery(pixels(8, 12), VIT, "image", [6], changed=True), [(2, 3)]),
        (GridQuery(pixels(16, 32), STAGED, "image", [8]), [(2, 4)]),
        (GridQuery(pixels(64, 32), CONV, "image", [2]), [(2, 1)]),
        (GridQuery(pixels(28, 28), STAGED, "image", [16]), [(4, 4)]),  # stages that round up, of a square image
        (GridQuery({}, config(), "image", [9]), [(3, 3)]),
        (GridQuery(FRAMES, VIDEO, "video", [18]), [(3, 2, 3)]),
        (GridQuery({"pixel_values": torch.empty(1, 3, 6, 8, 12)}, VIDEO, "video", [18]), [(3, 2, 3)]),
        (
            GridQuery({"grid_thw": torch.tensor([[1, 4, 6], [3, 4, 8]])}, TOWER, "image", [6, 24]),
            [(1, 2, 3), (3, 2, 4)],
        ),
        (
            GridQuery({"image_grid_hws": torch.tensor([[4, 6]])}, config(merge_kernel_size=[2, 3]), "image", [4]),
            [(2, 2)],
        ),
        (GridQuery({"grid_thw": torch.tensor([[1, 2, 3]])}, config(), "audio", [6]), [(1, 2, 3)]),
        (GridQuery({"spatial_shapes": torch.tensor([[2, 3], [4, 1]])}, VIT, "image", [6, 4]), [(2, 3), (4, 1)]),
    ],
)
def test_known_grids(known, grids):
    assert item_grids(known) == grids


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (GridQuery(pixels(8, 12), VIT, "image", [7]), "7 features do not fill the grid of 2 x 3 = 6 patches, 1 too many.*drop_prefix=1"),
        (GridQuery(pixels(8, 8), VIT, "image", [8], dropped=1), "8 features .* 2 x 2 = 4 patches, 4 too many.*drop_prefix=5"),
        (GridQuery(pixels(8, 8), VIT, "image", [1]), r"1 features do not fill the grid of 2 x 2 = 4 patches; .*feature_grids"),
        (GridQuery(pixels(64, 64), VIT, "image", [64], changed=True), "64 features do not fill the grid of 16 x 16 = 256"),
        (GridQuery(pixels(64, 64), STAGED, "image", [64], changed=True), "64 features do not fill"),
        (GridQuery({}, config(), "image", [257]), "The grid of 257 features is not known.*16 x 16 = 256.*drop_prefix=1"),
        (GridQuery({}, config(), "image", [16], changed=True), "The grid of 16 features is not known"),
        (GridQuery(pixels(8, 8), VIT, "audio", [4]), "kind 'audio' lie in a sequence of 4, not in a grid.*frame_stack"),
        (GridQuery({"grid_thw": torch.tensor([[1, 4, 4]])}, TOWER, "image", [16]), "1 x 4 x 4 patches gave 16 features, but patches merged 2 x 2 give 4"),
        (GridQuery({"grid_thw": torch.tensor([[1, 4, 4]])}, TOWER, "image", [4, 4]), "1 grids were given for 2 items"),
        (GridQuery({"spatial_shapes": torch.tensor([[2, 3]])}, VIT, "image", [8]), "2 x 3 = 6 patches gave 8 features"),
    ],
)  # fmt: skip
def test_grids_that_are_not_known(known, message):
    with pytest.raises(ValueError, match=message):
        item_grids(known)


def test_merges_and_patches():
    assert merged_patches(TOWER) == (2, 2) and merged_patches(config()) == (1, 1)
    assert patch_grid({"pixel_values": torch.empty(2, 7, 48)}, VIT) is None and patch_grid({}, VIT) is None
    assert patch_grid(FRAMES, config(patch_size=4, temporal_patch_size=3)) == (2, 2, 3)


def test_grids_as_a_callback_states_them():
    assert grids_of_tensor(torch.tensor([[2, 3]])) == grids_of_tensor([(2, 3)]) == [(2, 3)]
    with pytest.raises(ValueError, match=r"\(height, width\) or \(frames, height, width\) per item, got \[\(6,\)\]"):
        grids_of_tensor([[6]])


def test_images_padded_to_one_size_lie_in_grids_of_their_own():
    inputs = {"pixel_values": torch.zeros(2, 3, 16, 24), "image_sizes": torch.tensor([[16, 8], [8, 24]])}
    assert item_grids(GridQuery(inputs, VIT, "image", [8, 12])) == [(4, 2), (2, 6)]
    with pytest.raises(ValueError, match="do not fill the grid of 4 x 6"):
        item_grids(GridQuery(inputs, VIT, "image", [8, 11]))
