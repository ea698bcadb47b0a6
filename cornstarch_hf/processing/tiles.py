"""Images that a processor splits into tiles, in one form whatever it emits; `encoders/tiles` packs their features.

A checkpoint's code carries this file only where an encoder takes tiles.
"""

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from .subprocessors import TILERS, called, options_of

# Rows and columns of tiles, and which of an image's tiles is the whole image made small, -1 for none.
Layout = tuple[int, int, int]
UNKNOWN: Layout = (0, 0, -1)
# Settings with the sizes in pixels, height and width, to which an image may be fitted before it is split.
PINPOINTS = ("image_grid_pinpoints", "split_resolutions")


def run_tiled(processor: Any, name: str, items: list[Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tiles of images, each image processed alone so that no tile is padding.

    Returns:
        `pixel_values` ``(tiles of all images, channels, height, width)`` and what else has a row for each tile (masks);
        `num_tiles` ``(images,)``, `tile_grids` ``(images, 3)``: a `Layout`, with 0 rows where there are none or the processor
        does not tell; and from one that fits images into the middle of a canvas `tile_image_sizes` ``(images, 2)``: height
        and width in pixels of the images as they were.

    Raises:
        ValueError: tiles of several sizes, or whose padding nothing would tell the encoder.
    """
    told = {"return_row_col_info": True} if "return_row_col_info" in (options_of(processor, "image") or ()) else {}
    every = []
    for i, item in enumerate(items):
        found = called(processor, name, [item], {**options, **told}, first=i)
        every.append(_one_form(processor, found, _size(item, options), options, f"{name}, item {i}"))
    shapes = [tuple(one["pixel_values"].shape[1:]) for one in every]
    if other := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        told_apart = f"tiles of shape {shapes[0]} for item 0 and {shapes[other]} for item {other}"
        raise ValueError(
            f"{name}, item {other}: {type(processor).__name__} gives {told_apart}, expected tiles of one size: give it a fixed "
            "one (size={'height': ..., 'width': ...})."
        )
    return {key: torch.cat([one[key] for one in every]) for key in every[0]}


def _size(item: Any, options: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an image that was made ready, an array or tensor in the layout of the call."""
    if not isinstance(item, (np.ndarray, Tensor)):
        return item.size[1], item.size[0]  # PIL's
    layout = getattr(given := options.get("input_data_format"), "value", given)
    first = layout == "channels_first" or (layout is None and isinstance(item, Tensor))
    height, width = item.shape[-2:] if first else item.shape[:2]
    return int(height), int(width)


def _one_form(
    processor: Any, found: dict[str, Tensor], size: tuple[int, int], options: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """The tensors of one image in the form of `run_tiled`."""
    pixels = found.get("pixel_values")
    if pixels is None or pixels.ndim not in (4, 5, 6):
        shape = None if pixels is None else tuple(pixels.shape)
        raise ValueError(
            f"{where}: {type(processor).__name__} gives pixel_values of shape {shape}, expected images or their tiles, (tiles, "
            "channels, height, width): leave tiles= out."
        )
    # (1, tiles, channels, height, width), or (1, 1, tiles, ...), to (tiles, channels, height, width)
    pixels = pixels.flatten(0, pixels.ndim - 4)
    tile = (pixels.shape[2], pixels.shape[3])
    rows, columns, whole = layout_of(processor, found, size, options, len(pixels), tile)
    one = {"pixel_values": pixels, "num_tiles": torch.tensor([len(pixels)])}
    for key in (key for key in found if key.endswith("mask")):
        mask = found[key].flatten(0, found[key].ndim - 3)  # (tiles, height, width)
        one[key] = mask
        if key == "pixel_attention_mask" and not bool(mask.bool().all()):
            raise ValueError(
                f"{where}: {type(processor).__name__} pads its tiles to one size, {tuple(mask.shape[1:])}, and an encoder of "
                "tiles takes no mask that tells: give the processor a fixed size (size={'height': ..., 'width': ...})."
            )
    one["tile_grids"] = torch.tensor([[rows, columns, whole]])
    if "image_sizes" in found and getattr(processor, PINPOINTS[0], None):
        one["tile_image_sizes"] = found["image_sizes"].reshape(1, 2)
    return one


def layout_of(
    processor: Any,
    found: Mapping[str, Tensor],
    size: tuple[int, int],
    options: Mapping[str, Any],
    count: int,
    tile: tuple[int, int],
) -> Layout:
    """How the `count` tiles of an image ``(height, width)`` lie, by what its processor emits; `UNKNOWN` where that is silent.

    `tile` is the height and width of a tile in pixels.
    """

    def setting(*keys: str) -> Any:
        given = [options.get(key, getattr(processor, key, None)) for key in keys]
        return next((value for value in given if value is not None), None)

    first = {key: value.flatten().tolist() for key, value in found.items() if key in _LAYOUTS}
    rows = columns = 0
    whole = count - 1  # last in Idefics 3, InternVL, GOT-OCR 2, Aya Vision and Llama 4
    if "rows" in first:
        (rows,), (columns,) = first["rows"], first["cols"]
    elif "grids" in first or "aspect_ratios" in first:
        rows, columns = first.get("grids") or first["aspect_ratios"]
        whole = 0 if "grids" in first else whole  # first in Ovis 2
    elif "num_crops" in first and first["num_crops"][0] == count - 1:  # Gemma 3 cuts along the longer side
        rows, columns = (1, count - 1) if size[1] >= size[0] else (count - 1, 1)
        rows, columns, whole = (rows, columns, 0) if count > 1 else (0, 0, 0)
    elif ("image_sizes" in first or "num_crops" in first) and (pinpoints := setting(*PINPOINTS)):
        best = select_best_resolution(size, pinpoints) if count > 1 else tile
        rows, columns = (-(-side // own) for side, own in zip(best, tile, strict=True))
        whole = 0  # first in LLaVA-NeXT and LLaVA-OneVision
    elif "num_patches" in first:
        rows, columns = _canvas(processor, size, tile, setting("min_patches"), setting("max_patches"), count)
    missing = count - rows * columns  # the whole image, where there is one
    return (rows, columns, whole if missing else -1) if missing in (0, 1) else UNKNOWN


_LAYOUTS = ("rows", "cols", "grids", "aspect_ratios", "num_crops", "image_sizes", "num_patches")


def _canvas(
    processor: Any, size: tuple[int, int], tile: tuple[int, int], least: int, most: int, count: int
) -> tuple[int, int]:
    """Rows and columns by the function with which the processor's own module chooses them; zeros where it has none."""
    choose = getattr(sys.modules[type(processor).__module__], "get_optimal_tiled_canvas", None)
    modules = [sys.modules[cls.__module__] for cls in type(processor).__mro__]
    choose = choose or next((f for m in modules if (f := getattr(m, "get_optimal_tiled_canvas", None))), None)
    if count == 1 or choose is None:
        return (1, 1) if count == 1 else (0, 0)
    columns, rows = choose(size, tile, least, most)
    return int(rows), int(columns)


TILERS["tiles"] = run_tiled
