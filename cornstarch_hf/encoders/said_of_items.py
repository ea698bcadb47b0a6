"""What the output of an encoder says of its items beside their features, where a composition asks for it: how features lie in
the plane, for positions; features for inner layers of the language model.

Checkpoints carry this file only where their configuration asks; `registries.SAID` leads here.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts.adapters import unwrapped
from ..parts.known_encoders import PATCH_GRIDS, grid_of
from ..parts.registries import SAID
from .grids import OR_STATE, Grid, GridQuery, found_grids
from .selection import Features

SECONDS = "second_per_grid_ts"  # seconds between frames of each video: what native processors call it


def grids_of_items(
    encoder: Any,
    inputs: Mapping[str, Any],
    raw: Any,
    output: Features,
    encoded: Sequence[int] | None,
    lengths: list[int],
) -> dict[str, Any]:
    """`feature_grids` of an encoder's items, by its inputs; see `final_grids`."""
    query = GridQuery(inputs, unwrapped(encoder.module).config, encoder.kind, lengths)
    return final_grids(query, output.feature_grids, encoded, encoder.by_frame, encoder.name)


def final_grids(
    query: GridQuery, stated: Any, encoded: Sequence[int] | None, by_frame: bool, name: str
) -> dict[str, Tensor]:
    """``{"feature_grids": (items, 2 or 3)}`` of projected features, and seconds between frames where they are among the inputs.

    Where a projector leaves fewer than were `encoded` (of each item), it is as many along height as along width.  ValueError
    where nothing tells; names the modality.
    """
    lengths, reason = query.lengths, "positions need the grid of each item's features"
    # A packed tower's own grid tells of merged patches, whoever merged them.
    if (
        stated is not None
        or encoded is None
        or list(encoded) == list(lengths)
        or grid_of(query.inputs, PATCH_GRIDS) is not None
    ):
        found = found_grids(query, stated, by_frame, name, reason)
    else:
        before = found_grids(query._replace(lengths=encoded), None, by_frame, name, reason)
        found = [_smaller(*each, name) for each in zip(before, encoded, lengths, strict=True)]
    said = {"feature_grids": torch.tensor(found)}
    if (seconds := query.inputs.get(SECONDS)) is not None:  # numbers of Python, or a tensor of them
        said[SECONDS] = seconds if isinstance(seconds, Tensor) else torch.tensor(seconds, dtype=torch.float64)
    return said


def _smaller(grid: Grid, before: int, after: int, name: str) -> Grid:
    *frames, height, width = grid
    side = math.isqrt(before // after)
    if side * side * after != before or height % side or width % side:
        told = "positions need the grid of each item's features, but"
        raise ValueError(f"{name}: {told} {height} x {width} became {after}, which tells no sides{OR_STATE}")
    return (*frames, height // side, width // side)


def levels_of_items(
    encoder: Any,
    inputs: Mapping[str, Any],
    raw: Any,
    output: Features,
    encoded: Sequence[int] | None,
    lengths: list[int],
) -> dict[str, Any]:
    """`deepstack_features` of an encoder's items; see `split_levels`."""
    return split_levels(raw, encoder.merging["layer_features"], lengths, encoder.name)


def split_levels(output: Mapping[str, Any], field: str, lengths: Sequence[int], name: str) -> dict[str, Any]:
    """``{"deepstack_features": ...}`` for layers of the language model: of each level one ``(n_i, hidden)`` tensor per item.

    From an output field with one tensor ``(sum of n_i, hidden)`` per level, or a list by item.  ValueError where an encoder's
    output has none, or others.
    """
    levels = output.get(field)
    if not isinstance(levels, (list, tuple)) or not levels:
        raise ValueError(
            f"{name}: layer_features={field!r} needs that field, a list of tensors, in the encoder's output, which has "
            f"{list(output)}: name another one, or leave it out."
        )
    found = []
    for level in levels:
        rows = level if isinstance(level, Tensor) else torch.cat(list(level))
        rows = rows.flatten(0, -2)  # (features of all items, hidden)
        if len(rows) != sum(lengths):
            raise ValueError(f"{name}: {field} has {len(rows)} features in a level, its items have {sum(lengths)}.")
        found.append(list(rows.split(list(lengths))))
    return {"deepstack_features": found}


SAID["grids"], SAID["levels"] = grids_of_items, levels_of_items
