"""How the features of an item lie in the plane, told from its encoder's inputs and configuration.  Knows no model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

Grid = tuple[int, ...]
PLANE_KINDS = ("image", "video")
PIXELS = ("pixel_values_videos", "pixel_values")
# Attributes of configurations whose towers merge patches from stage to stage, one entry per stage.
STAGES = ("depths", "depth", "hidden_sizes", "embed_dims")


class GridQuery(NamedTuple):
    """What is known of a batch of items when their grids are asked for.

    Attributes:
        inputs: of the encoder's `forward`.
        config: of the encoder.
        kind: of the modality (``"image"``, ``"audio"``, ...).
        lengths: features of each item.
        changed: whether a callback made them another number than the encoder gave.
        dropped: leading tokens that were dropped already.
    """

    inputs: Mapping[str, Any]
    config: Any
    kind: str
    lengths: Sequence[int]
    changed: bool = False
    dropped: int = 0


def item_grids(query: GridQuery) -> list[Grid]:
    """``(height, width)`` or ``(frames, height, width)`` of each item's features, which lie in it row by row.

    Raises:
        ValueError: they lie in no grid, or it is not known; says what was expected and what to do.
    """
    for rule in GRID_RULES:
        grids = rule(query)
        if grids is not None:
            return grids
    return [_by_pixels(query, length) for length in query.lengths]


def _packed(query: GridQuery) -> list[Grid] | None:
    """Packed towers, which are told the patches of each item along each axis and merge squares of them."""
    grid = next((v for k, v in query.inputs.items() if k.endswith(("grid_thw", "grid_hws"))), None)
    if not isinstance(grid, Tensor):
        return None
    rows, columns = merged_patches(query.config)
    found = []
    for (*frames, height, width), length in zip(grid.tolist(), _per_row(query, len(grid)), strict=True):
        merged = (*frames, height // rows, width // columns)
        if math.prod(merged) != length:
            raise ValueError(
                f"An item of {' x '.join(map(str, (*frames, height, width)))} patches gave {length} features, but patches "
                f"merged {rows} x {columns} give {math.prod(merged)}: only merged features lie row by row, leave layer= and "
                f"output= at their defaults{_OR_STATE}"
            )
        found.append(merged)
    return found


def merged_patches(config: Any) -> tuple[int, int]:
    """Rows and columns of patches that a packed tower merges into one feature, by its configuration."""
    size = getattr(config, "spatial_merge_size", None) or getattr(config, "merge_kernel_size", None) or 1
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def _stated_shapes(query: GridQuery) -> list[Grid] | None:
    """Towers that take padded sequences of patches and the shape of each item (SigLIP 2)."""
    shapes = query.inputs.get("spatial_shapes")
    if not isinstance(shapes, Tensor):
        return None
    found: list[Grid] = [(int(h), int(w)) for h, w in shapes.tolist()]
    for (height, width), length in zip(found, _per_row(query, len(found)), strict=True):
        if height * width != length:
            raise ValueError(
                f"An item of {height} x {width} = {height * width} patches gave {length} features{_OR_STATE}"
            )
    return found


def _stated_sizes(query: GridQuery) -> list[Grid] | None:
    """Towers that take images padded to one size and the size of each in pixels (Pixtral), where those give the features."""
    sizes, patch = query.inputs.get("image_sizes"), _patch(query.config)
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or patch is None or len(sizes) != len(query.lengths):
        return None
    found: list[Grid] = [(int(h) // patch[0], int(w) // patch[1]) for h, w in sizes.tolist()]
    return found if [h * w for h, w in found] == list(query.lengths) else None


def _per_row(query: GridQuery, rows: int) -> Sequence[int]:
    if len(query.lengths) != rows:
        raise ValueError(f"{rows} grids were given for {len(query.lengths)} items{_OR_STATE}")
    return query.lengths


GRID_RULES: tuple[Callable[[GridQuery], list[Grid] | None], ...] = (_packed, _stated_shapes, _stated_sizes)
_OR_STATE = "; or set output['feature_grids'] to one (height, width) per item in postprocess_module_callback."


def _by_pixels(query: GridQuery, length: int) -> Grid:
    """From the size of the images and the configuration's patch size; without a patch size, of square images."""
    if query.kind not in PLANE_KINDS:
        raise ValueError(
            f"Features of the kind {query.kind!r} lie in a sequence of {length}, not in a grid: take frame_stack "
            f"or resampler, or dims=1 where the type has it{_OR_STATE}"
        )
    patches = patch_grid(query.inputs, query.config)
    if patches is None:
        return _square(query, length)
    whole = math.prod(patches)
    if whole == length:
        return patches
    merges = _patch(query.config) is None or any(
        isinstance(getattr(query.config, k, None), (list, tuple)) for k in STAGES
    )
    if merges and not query.changed:
        *frames, height, width = patches
        side = math.isqrt(whole // length) if length and whole % length == 0 else 0
        if side and side * side * length == whole and not height % side and not width % side:
            return (*frames, height // side, width // side)
        if height == width:
            return _square(query, length)
    raise ValueError(_mismatch(query, length, patches))


def _mismatch(query: GridQuery, length: int, patches: Grid) -> str:
    whole = math.prod(patches)
    text = f"{length} features do not fill the grid of {' x '.join(map(str, patches))} = {whole} patches"
    if length > whole and not query.changed:
        more = query.dropped + length - whole
        return f"{text}, {length - whole} too many: remove class and register tokens by drop_prefix={more}{_OR_STATE}"
    return text + _OR_STATE


def _square(query: GridQuery, length: int) -> Grid:
    side = math.isqrt(length)
    if query.changed or side * side != length or not length:
        more = query.dropped + length - side * side
        raise ValueError(
            f"The grid of {length} features is not known, and they are no square that an encoder gave (the next smaller one is "
            f"{side} x {side} = {side * side}): remove class and register tokens by drop_prefix={more}{_OR_STATE}"
        )
    return side, side


def patch_grid(inputs: Mapping[str, Any], config: Any) -> Grid | None:
    """Patches (of one pixel, where the configuration has no patch size) along each axis of an image or a video."""
    pixels = next((inputs[k] for k in PIXELS if isinstance(inputs.get(k), Tensor)), None)
    if pixels is None or pixels.ndim not in (4, 5):
        return None
    rows, columns = _patch(config) or (1, 1)
    *_, height, width = pixels.shape
    plane = (height // rows, width // columns)
    if pixels.ndim == 4:
        return plane
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or 3
    frames = pixels.shape[1] if pixels.shape[2] == channels else pixels.shape[2]
    tube = getattr(config, "tubelet_size", None) or getattr(config, "temporal_patch_size", None) or 1
    return (frames // int(tube[0] if isinstance(tube, (list, tuple)) else tube), *plane)


def _patch(config: Any) -> tuple[int, int] | None:
    size = getattr(config, "patch_size", None)
    if isinstance(size, (list, tuple)):
        return (int(size[-2]), int(size[-1])) if len(size) > 1 else (int(size[0]), int(size[0]))
    return (size, size) if isinstance(size, int) else None


def grids_of_tensor(grids: Any) -> list[Grid]:
    """Grids as a callback may state them, a tensor or nested lists, as tuples of integers.

    Raises:
        ValueError: not 2 or 3 numbers for each item.
    """
    rows = grids.tolist() if isinstance(grids, Tensor) else [list(row) for row in grids]
    found = [tuple(int(n) for n in row) for row in rows]
    if any(len(grid) not in (2, 3) for grid in found):
        raise ValueError(f"feature_grids must hold (height, width) or (frames, height, width) per item, got {found}.")
    return found
