"""Videos for an encoder of images: frames as its items, and the frames' features joined again.  Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..processing.video import FRAME_MASK


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
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool()
    if tuple(mask.shape) != shape or bool((mask[:, 1:] & ~mask[:, :-1]).any()) or not bool(mask.any(-1).all()):
        raise ValueError(
            f"{name}: frame_mask must be {shape}, ones for the frames of an item and zeros after them, got "
            f"{mask.tolist()!r:.200}."
        )
    kept = mask.flatten().nonzero()[:, 0]
    whole = bool(mask.all())
    found: dict[str, Any] = {}
    for key, value in inputs.items():
        if key == FRAME_MASK:
            continue
        if isinstance(value, Tensor) and tuple(value.shape[:2]) == shape:
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
        packed = features.flatten(0, 1)
    else:
        per_frame = [int(n) for n in lengths]
        packed = features
        if features.ndim == 3:
            packed = torch.cat([rows[:n] for rows, n in zip(features, per_frame, strict=True)])
    starts = [sum(counts[:i]) for i in range(len(counts))]
    totals = [sum(per_frame[start : start + n]) for start, n in zip(starts, counts, strict=True)]
    if len(set(totals)) == 1:
        return packed.unflatten(0, (len(totals), totals[0])), None
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
    planes = grid_of(rows, per_frame)
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [(count, *planes[start]) for start, count in zip(starts, counts, strict=True)]
