"""What image processors emit of tiles, in one form: the layout is that of the pixels themselves."""

import numpy as np
import pytest
import tiles
import tiny
import torch
from PIL import Image

from cornstarch_hf.processing.tiles import UNKNOWN, layout_of, run_tiled

SIZES = [(64, 64), (40, 120), (120, 40), (60, 90), (90, 60)]


def ramps(height, width):
    """Red grows from left to right, green from top to bottom: a tile's place can be read from its mean."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 128)], -1).astype(np.uint8))


@pytest.mark.parametrize("name", [name for name in tiles.PROCESSORS if name not in ("Aria", *tiles.TELL_NO_GRID)])
@pytest.mark.parametrize("size", SIZES)
def test_tiles_lie_where_their_pixels_are(name, size):
    found = run_tiled(tiles.built(name), "vision", [ramps(*size)], {})
    (count,), ((rows, columns, whole),) = found["num_tiles"].tolist(), found["tile_grids"].tolist()
    assert len(found["pixel_values"]) == count == rows * columns + (whole >= 0) and found["pixel_values"].ndim == 4
    if count == 1:
        return
    red, green, blue = found["pixel_values"].double().unbind(1)  # (tiles, height, width)
    seen = blue > blue.max() - 0.1  # what is no padding, which is black
    means = torch.stack([(ramp * seen).sum((1, 2)) / seen.sum((1, 2)) for ramp in (red, green)], -1)
    spans = [float(red[i][seen[i]].max() - red[i][seen[i]].min()) for i in range(count)]
    if whole >= 0 and columns > 1:  # the whole image holds all of the ramp
        assert max(range(count), key=lambda i: spans[i]) == whole
    placed = means[[i for i in range(count) if i != whole]].view(rows, columns, 2)
    assert bool((placed[:, 1:, 0] > placed[:, :-1, 0]).all()) and bool((placed[1:, :, 1] > placed[:-1, :, 1]).all())
    assert ("tile_image_sizes" in found) == (name in tiles.UNPADS)
    if name in tiles.UNPADS:
        assert found["tile_image_sizes"].tolist() == [list(size)]


@pytest.mark.parametrize("name", tiles.PROCESSORS)
def test_images_of_one_call_are_those_of_single_calls(name):
    if name == "Aria":
        images = [ramps(8, 16)]
    else:
        images = [ramps(*size) for size in [(8, 8), (9, 30), (1, 40), (30, 9)] if tiles.takes(name, size)]
    processor = tiles.built(name)
    together = run_tiled(processor, "vision", images, {})
    alone = [run_tiled(processor, "vision", [image], {}) for image in images]
    assert all(torch.equal(value, torch.cat([one[key] for one in alone])) for key, value in together.items())
    assert int(together["num_tiles"].sum()) == len(together["pixel_values"])
    assert bool((together["pixel_values"] != 0).flatten(1).any(-1).all())  # none of padding


@pytest.mark.parametrize(
    "layout, shape", [("channels_first", (3, 9, 30)), ("channels_last", (9, 30, 3)), (None, (9, 30, 3))]
)
def test_arrays_have_the_size_of_their_layout(layout, shape):
    array = np.zeros(shape, np.uint8) + 7
    options = {} if layout is None else {"input_data_format": layout}
    found = run_tiled(tiles.built("GotOcr2"), "vision", [array], options)
    picture = run_tiled(tiles.built("GotOcr2"), "vision", [Image.new("RGB", (30, 9), (7, 7, 7))], {})
    assert torch.equal(found["tile_grids"], picture["tile_grids"]) and found["tile_grids"][0, :2].tolist() == [1, 3]


def test_a_layout_that_does_not_make_the_count_is_not_known():
    processor = tiles.built("LlavaNext")
    given = {"image_sizes": torch.tensor([[9, 30]])}
    assert layout_of(processor, given, (9, 30), {}, 4, (8, 8)) == (1, 3, 0)
    assert layout_of(processor, given, (9, 30), {}, 7, (8, 8)) == UNKNOWN
    assert layout_of(processor, {}, (9, 30), {}, 4, (8, 8)) == UNKNOWN


def test_settings_of_a_call_come_before_those_of_the_processor():
    found = run_tiled(tiles.built("LlavaNext"), "vision", [ramps(9, 30)], {"image_grid_pinpoints": [[16, 16]]})
    assert found["tile_grids"].tolist() == [[2, 2, 0]]
    found = run_tiled(tiles.built("GotOcr2"), "vision", [ramps(9, 30)], {"crop_to_patches": False})
    assert found["tile_grids"].tolist() == [[1, 1, -1]] and found["num_tiles"].tolist() == [1]


def test_tiles_of_several_sizes_and_padded_ones_are_refused():
    import transformers

    sized = getattr(transformers, f"Idefics2ImageProcessor{tiny.BACKEND}")
    free = sized(size={"shortest_edge": 4, "longest_edge": 8}, do_image_splitting=False)
    with pytest.raises(
        ValueError, match=r"vision, item 1: Idefics2.*\(3, 5, 8\) for item 0 and .*item 1, expected tiles of"
    ):
        run_tiled(free, "vision", [ramps(5, 8), ramps(8, 5)], {})
    split = sized(size={"shortest_edge": 4, "longest_edge": 32}, do_image_splitting=True)
    with pytest.raises(ValueError, match="vision, item 0: Idefics2.* pads its tiles to one size"):
        run_tiled(split, "vision", [ramps(9, 31)], {})
