"""How the features of an item lie in the plane, told from its encoder's inputs and configuration.  Knows no model.

A checkpoint's own code has it where something asks for grids: a reduction over them, positions, tiles, or frames of videos.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parts.known_encoders import PATCH_GRIDS, grid_of, is_staged, merged_patches, patch_size
from ..processing.video import FRAME_MASK

Grid = tuple[int, ...]
PLANE_KINDS = ("image", "video")
OR_STATE = "; or set output['feature_grids'] to one (height, width) per item in postprocess_module_callback."


class GridQuery(NamedTuple):
    """What is known of a batch of items when their grids are asked for."""

    inputs: Mapping[str, Any]  # of the encoder's `forward`
    config: Any  # of the encoder
    kind: str  # of the modality (``"image"``, ``"audio"``, ...)
    lengths: Sequence[int]  # features of each item
    changed: bool = False  # whether a callback made them another number than the encoder gave
    dropped: int = 0  # leading tokens that were dropped already


def item_grids(query: GridQuery) -> list[Grid]:
    """``(height, width)`` or ``(frames, height, width)`` of each item's features, which lie in it row by row.

    ValueError where they lie in no grid, or it is not known; says what was expected and what to do.
    """
    # What the inputs say of single items comes before what the size of the pixels suggests.
    return _by_patches(query) or _by_sizes(query) or [_by_pixels(query, length) for length in query.lengths]


def found_grids(query: GridQuery, stated: Any, by_frame: bool, name: str, reason: str) -> list[Grid]:
    """The grids that a callback `stated`, else as `item_grids`; ValueError where nothing tells, with the `reason` to ask."""
    try:
        if stated is not None:
            return grids_of_tensor(stated)  # (items, 2 or 3)
        return frame_grids(query, name) if by_frame else item_grids(query)
    except ValueError as error:
        raise ValueError(f"{name}: {reason}. {error}") from error


def _by_patches(query: GridQuery) -> list[Grid] | None:
    """Towers that are told the patches of each item along each axis: of packed items, or of padded sequences (SigLIP 2)."""
    packed = grid_of(query.inputs, PATCH_GRIDS)
    grid = query.inputs.get("spatial_shapes") if packed is None else packed
    if not isinstance(grid, Tensor):
        return None
    if len(query.lengths) != len(grid):
        raise ValueError(f"{len(grid)} grids were given for {len(query.lengths)} items{OR_STATE}")
    rows, columns = (1, 1) if packed is None else merged_patches(query.config)
    found = []
    for (*frames, height, width), length in zip(grid.tolist(), query.lengths, strict=True):
        merged = (*frames, height // rows, width // columns)  # of features, one for `rows` x `columns` patches
        if (whole := math.prod(merged)) != length:
            axes = " x ".join(map(str, (*frames, height, width)))
            wrong = f"{axes} = {whole} patches gave {length} features"
            if packed is not None:
                wrong = (
                    f"{axes} patches gave {length} features, but patches merged {rows} x {columns} give {whole}: only merged "
                    "features lie row by row, leave layer= and output= at their defaults"
                )
            raise ValueError(f"An item of {wrong}{OR_STATE}")
        found.append(merged)
    return found


def _by_sizes(query: GridQuery) -> list[Grid] | None:
    """Towers that take images padded to one size and the size of each in pixels (Pixtral), where those give the features."""
    sizes, patch = query.inputs.get("image_sizes"), patch_size(query.config)
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or patch is None:
        return None
    found: list[Grid] = [(int(h) // patch[0], int(w) // patch[1]) for h, w in sizes.tolist()]
    return found if [h * w for h, w in found] == list(query.lengths) else None  # merged further: pixels must tell


def _by_pixels(query: GridQuery, length: int) -> Grid:
    """From the size of the images and the configuration's patch size; without a patch size, of square images."""
    if query.kind not in PLANE_KINDS:
        raise ValueError(
            f"Features of the kind {query.kind!r} lie in a sequence of {length}, not in a grid: take frame_stack "
            f"or resampler, or dims=1 where the type has it{OR_STATE}"
        )
    patches = patch_grid(query.inputs, query.config)
    if patches is None:
        return _square(query, length)
    whole = math.prod(patches)
    if whole == length:
        return patches
    # Towers without a patch size, or with stages, may have merged patches on the way.
    if not query.changed and (patch_size(query.config) is None or is_staged(query.config)):
        *frames, height, width = patches
        side = math.isqrt(whole // length) if length and whole % length == 0 else 0
        if side and side * side * length == whole and not height % side and not width % side:
            return (*frames, height // side, width // side)  # `side` x `side` patches have become one feature
        if height == width:  # rounding on the way keeps a square a square
            return _square(query, length)
    text = f"{length} features do not fill the grid of {' x '.join(map(str, patches))} = {whole} patches"
    if (surplus := length - whole) > 0 and not query.changed:
        text += f", {surplus} too many: remove class and register tokens by drop_prefix={query.dropped + surplus}"
    raise ValueError(text + OR_STATE)


def _square(query: GridQuery, length: int) -> Grid:
    side = math.isqrt(length)
    # A callback may leave any number of features: one that happens to be a square is no grid.
    if query.changed or side * side != length or not length:
        raise ValueError(
            f"The grid of {length} features is not known, and they are no square that an encoder gave (the next smaller one is "
            f"{side} x {side} = {side * side}): remove class and register tokens by "
            f"drop_prefix={query.dropped + length - side * side}{OR_STATE}"
        )
    return side, side


def patch_grid(inputs: Mapping[str, Any], config: Any) -> Grid | None:
    """Patches (of one pixel, where the configuration has no patch size) along each axis of an image or a video."""
    videos = inputs.get("pixel_values_videos")
    pixels = videos if isinstance(videos, Tensor) else inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        return None
    rows, columns = patch_size(config) or (1, 1)
    *_, height, width = pixels.shape  # (items, channels, height, width), with frames before or after the channels
    plane = (height // rows, width // columns)
    if pixels.ndim == 4:
        return plane
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3
    # (items, frames, channels, height, width), or with the channels before the frames
    frames = pixels.shape[1] if pixels.shape[2] == channels else pixels.shape[2]
    # How many frames one patch takes in.
    tube = getattr(config, "tubelet_size", None) or getattr(config, "temporal_patch_size", None) or 1
    return (frames // int(tube[0] if isinstance(tube, (list, tuple)) else tube), *plane)


def grids_of_tensor(grids: Any) -> list[Grid]:
    """Grids as a callback may state them, a tensor or nested lists, as tuples; ValueError for other than 2 or 3 numbers."""
    rows = grids.tolist() if isinstance(grids, Tensor) else grids  # at once: each number would wait for the device
    found = [tuple(int(n) for n in row) for row in rows]
    if any(len(grid) not in (2, 3) for grid in found):
        raise ValueError(f"feature_grids must hold (height, width) or (frames, height, width) per item, got {found}.")
    return found


def frames_as_items(inputs: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[int]]:
    """Inputs with one row per frame, from tensors ``(items, frames, ...)``, and how many frames each item has.

    A `frame_mask` ``(items, frames)``, True for frames that are no padding, is taken out.  ValueError without a tensor of at
    least five axes, and for a mask that does not fit it or has a gap.
    """
    mask, tensors = inputs.get(FRAME_MASK), {key: v for key, v in inputs.items() if isinstance(v, Tensor)}
    shape = next((tuple(v.shape[:2]) for v in tensors.values() if v.ndim >= 5), None)
    if shape is None:
        shapes = {key: tuple(v.shape) for key, v in tensors.items()}
        raise ValueError(
            f"{name}: expected the frames of videos, (items, frames, channels, height, width), got {shapes}."
        )
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()  # (items, frames)
    # A one behind a zero is a gap, and an item without a frame has no features to stand for it.
    if tuple(mask.shape) != shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask.any(-1).all()):
        got = f"{mask.tolist()!r:.200}"
        raise ValueError(
            f"{name}: frame_mask must be {shape}, ones for the frames of an item and zeros after them, got {got}."
        )
    kept = mask.flatten().nonzero()[:, 0]  # positions of frames among (items * frames)
    whole = bool(mask.all())  # then there is nothing to leave out, and nothing to copy
    found = {key: value for key, value in inputs.items() if key != FRAME_MASK}
    for key, value in tensors.items():
        if key != FRAME_MASK and tuple(value.shape[:2]) == shape:
            rows = value.flatten(0, 1)  # (items, frames, ...) -> (frames of all, ...)
            found[key] = rows if whole else rows[kept.to(value.device)]
    return found, mask.sum(-1).tolist()


def first_frames(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The first frame of each item as an image, of tensors ``(items, frames, channels, height, width)``."""
    return {key: x[:, 0] if isinstance(x, Tensor) and x.ndim == 5 else x for key, x in inputs.items()}


def joined_frames(features: Tensor, lengths: Sequence[int] | None, counts: Sequence[int]) -> tuple[Tensor, list | None]:
    """Features of each item, ``(items, tokens, width)``, or packed with the tokens of each, from those of its frames.

    These are ``(frames of all items, tokens, width)``, or packed with `lengths`; `counts` are the frames of each item.
    """
    per_frame = [features.shape[1]] * len(features) if lengths is None else lengths
    if features.ndim == 3:  # -> (tokens of all frames, width)
        features = torch.cat([rows[:n] for rows, n in zip(features, per_frame, strict=True)])
    remaining = iter(per_frame)
    totals = [sum(itertools.islice(remaining, count)) for count in counts]
    if len(set(totals)) == 1:
        return features.unflatten(0, (len(totals), totals[0])), None  # (items, tokens of an item, width)
    return features, totals


def frame_grids(query: GridQuery, name: str) -> list[Grid]:
    """``(frames, height, width)`` of each item's features, with inputs as in `frames_as_items`; raises as `item_grids` does."""
    rows, counts = frames_as_items(query.inputs, name)
    for length, count in zip(query.lengths, counts, strict=True):
        if length % count:
            raise ValueError(f"{length} features do not divide among {count} frames.")
    per_frame = [n // count for n, count in zip(query.lengths, counts, strict=True) for _ in range(count)]
    planes = item_grids(query._replace(inputs=rows, lengths=per_frame))  # (height, width) of each frame
    starts = itertools.accumulate(counts[:-1], initial=0)
    # All frames of an item have the size of its first one.
    return [(count, *planes[start]) for start, count in zip(starts, counts, strict=True)]
