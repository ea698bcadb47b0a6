"""How the features of an item lie in the plane, told from its encoder's inputs and configuration.  Knows no model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parts.known_encoders import PATCH_GRIDS, grid_of, patch_size
from ..processing.video import FRAME_MASK

Grid = tuple[int, ...]
PLANE_KINDS = ("image", "video")
# Attributes of configurations whose towers merge patches from stage to stage, one entry per stage.
STAGES = ("depths", "depth", "hidden_sizes", "embed_dims")
PIXELS = ("pixel_values_videos", "pixel_values")


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
    grid = grid_of(query.inputs, PATCH_GRIDS)
    if grid is None:
        return None
    rows, columns = merged_patches(query.config)
    found = []
    for (*frames, height, width), length in zip(grid.tolist(), _per_row(query, len(grid)), strict=True):
        merged = (*frames, height // rows, width // columns)  # of features, one for `rows` x `columns` patches
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
    # Qwen2-VL has one number for both sides, Kimi-VL's `merge_kernel_size` one for each.
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
    sizes, patch = query.inputs.get("image_sizes"), patch_size(query.config)
    if not isinstance(sizes, Tensor) or sizes.ndim != 2 or patch is None or len(sizes) != len(query.lengths):
        return None
    found: list[Grid] = [(int(h) // patch[0], int(w) // patch[1]) for h, w in sizes.tolist()]
    return found if [h * w for h, w in found] == list(query.lengths) else None  # merged further: another rule must tell


def _per_row(query: GridQuery, rows: int) -> Sequence[int]:
    if len(query.lengths) != rows:
        raise ValueError(f"{rows} grids were given for {len(query.lengths)} items{_OR_STATE}")
    return query.lengths


# In this order: what the inputs say of single items comes before what the size of the pixels suggests.
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
    # Towers without a patch size, or with stages, may have merged patches on the way.
    merges = patch_size(query.config) is None or is_staged(query.config)
    if merges and not query.changed:  # `side` x `side` patches have become one feature
        *frames, height, width = patches
        side = math.isqrt(whole // length) if length and whole % length == 0 else 0
        if side and side * side * length == whole and not height % side and not width % side:
            return (*frames, height // side, width // side)
        if height == width:  # rounding on the way keeps a square a square
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
    # A callback may leave any number of features: one that happens to be a square is no grid.
    if query.changed or side * side != length or not length:
        more = query.dropped + length - side * side
        raise ValueError(
            f"The grid of {length} features is not known, and they are no square that an encoder gave (the next smaller one is "
            f"{side} x {side} = {side * side}): remove class and register tokens by drop_prefix={more}{_OR_STATE}"
        )
    return side, side


def is_staged(config: Any) -> bool:
    """Whether a tower merges patches from stage to stage."""
    return any(isinstance(getattr(config, stages, None), (list, tuple)) for stages in STAGES)


def patch_grid(inputs: Mapping[str, Any], config: Any) -> Grid | None:
    """Patches (of one pixel, where the configuration has no patch size) along each axis of an image or a video."""
    pixels = next((inputs[k] for k in PIXELS if isinstance(inputs.get(k), Tensor)), None)
    if pixels is None or pixels.ndim not in (4, 5):
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
    """Grids as a callback may state them, a tensor or nested lists, as tuples of integers.

    Raises:
        ValueError: not 2 or 3 numbers for each item.
    """
    rows = grids.tolist() if isinstance(grids, Tensor) else [list(row) for row in grids]
    found = [tuple(int(n) for n in row) for row in rows]
    if any(len(grid) not in (2, 3) for grid in found):
        raise ValueError(f"feature_grids must hold (height, width) or (frames, height, width) per item, got {found}.")
    return found


def frames_as_items(inputs: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[int]]:
    """Inputs with one row per frame, and how many frames each item has.

    Args:
        inputs: tensors ``(items, frames, ...)``; `frame_mask` ``(items, frames)``, True for frames that are no padding, is
            taken out.  What is no tensor stays as it is.
        name: the modality, for messages.

    Raises:
        ValueError: no tensor of at least five axes, or a mask that does not fit it or has a gap.
    """
    mask = inputs.get(FRAME_MASK)
    pixels = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim >= 5), None)
    if pixels is None:
        shapes = {key: tuple(v.shape) for key, v in inputs.items() if isinstance(v, Tensor)}
        raise ValueError(
            f"{name}: expected the frames of videos, (items, frames, channels, height, width), got {shapes}."
        )
    shape = tuple(pixels.shape[:2])
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()  # (items, frames)
    # A one behind a zero is a gap, and an item without a frame has no features to stand for it.
    if tuple(mask.shape) != shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask.any(-1).all()):
        raise ValueError(
            f"{name}: frame_mask must be {shape}, ones for the frames of an item and zeros after them, got "
            f"{mask.tolist()!r:.200}."
        )
    kept = mask.flatten().nonzero()[:, 0]  # positions of frames among (items * frames)
    whole = bool(mask.all())  # then there is nothing to leave out, and nothing to copy
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == FRAME_MASK:
            continue
        if (
            isinstance(value, Tensor) and tuple(value.shape[:2]) == shape
        ):  # (items, frames, ...) -> (frames of all, ...)
            value = value.flatten(0, 1) if whole else value.flatten(0, 1)[kept.to(value.device)]
        found[key] = value
    return found, mask.sum(-1).tolist()


def joined_frames(
    features: Tensor, lengths: Sequence[int] | None, counts: Sequence[int]
) -> tuple[Tensor, list[int] | None]:
    """Features of each item from those of its frames, in order.

    Args:
        features: ``(frames of all items, tokens, width)``, or packed ``(tokens of all frames, width)``.
        lengths: features of each frame, where the tensor does not tell.
        counts: frames of each item.

    Returns:
        ``(items, tokens of an item, width)`` and None where all items have as many, else ``(tokens of all items, width)`` and
        the tokens of each item.
    """
    if lengths is None:
        per_frame = [features.shape[1]] * len(features)
        packed = features.flatten(0, 1)  # (frames, tokens, width) -> (tokens of all frames, width)
    else:
        per_frame = [int(n) for n in lengths]
        packed = features
        if features.ndim == 3:
            # (tokens of all frames, width)
            packed = torch.cat([rows[:n] for rows, n in zip(features, per_frame, strict=True)])
    starts = [sum(counts[:i]) for i in range(len(counts))]  # each item's first frame among all frames
    totals = [sum(per_frame[start : start + n]) for start, n in zip(starts, counts, strict=True)]
    if len(set(totals)) == 1:
        return packed.unflatten(0, (len(totals), totals[0])), None  # (items, tokens of an item, width)
    return packed, totals


def frame_grids(
    inputs: Mapping[str, Any],
    lengths: Sequence[int],
    name: str,
    grid_of: Callable[[dict[str, Any], list[int]], list[tuple[int, ...]]],
) -> list[tuple[int, ...]]:
    """The grid of each item's features, frames first.

    Args:
        inputs: as in `frames_as_items`.
        lengths: features of each item.
        name: the modality, for messages.
        grid_of: the grids of frames, from inputs with one row per frame and the features of each.

    Raises:
        ValueError: features that do not divide among the frames; what `grid_of` raises.
    """
    rows, counts = frames_as_items(inputs, name)
    for length, count in zip(lengths, counts, strict=True):
        if length % count:
            raise ValueError(f"{length} features do not divide among {count} frames.")
    per_frame = [length // count for length, count in zip(lengths, counts, strict=True) for _ in range(count)]
    planes = grid_of(rows, per_frame)  # (height, width) of each frame
    starts = [sum(counts[:i]) for i in range(len(counts))]
    # All frames of an item have the size of its first one.
    return [(count, *planes[start]) for start, count in zip(starts, counts, strict=True)]
