"""Positions along several axes, told from the grids of items (M-RoPE, Wang et al. 2024, and its relatives): pure rules.

`positions` has composed models follow them.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parts.registries import register_position_rule

Grid = tuple[int, ...]
MOST_AXES = 16  # of any language model


class PositionQuery(NamedTuple):
    """What a position rule is asked about, one column per token of the rows.

    Attributes:
        types: int64 ``(batch, length)``, 0 for text, i where a feature of the i-th modality stands (counted from 1).
        valid: bool ``(batch, length)``, False for padding.
        start: int64 ``(batch,)``, the position of each row's first token; above 0 behind a cache.
        names: the modalities, in order.
        grids: ``(frames, height, width)`` of each item's features, by modality, in reading order.
        seconds: seconds between frames of each item, by modality, where they are known.
        counted: int64 ``(batch, length)``, positions as `generate` counts them, None in a plain call.
        past: how many tokens of each row are in the cache.
    """

    types: Tensor
    valid: Tensor
    start: Tensor
    names: Sequence[str]
    grids: Mapping[str, Sequence[Grid]]
    seconds: Mapping[str, Sequence[float]]
    counted: Tensor | None = None
    past: int = 0


def mrope(
    query: PositionQuery, *, axes: int = 3, frames_apart: bool = False, time_step: Mapping[str, float] | None = None
) -> Tensor:
    """Time, height and width of each token, ``(3, batch, length)``: text counts on along all three, and goes on behind the
    longer side of an item (Qwen2-VL, Wang et al. 2024).

    Args:
        query: the tokens.
        axes: 3.
        frames_apart: whether each frame of an item is a grid of its own, between other tokens (Qwen3-VL, GLM-4V).
        time_step: by modality, how far a second moves the time of its frames (Qwen2.5-VL); else each frame is one further.

    Raises:
        ValueError: a run of placeholders that is not filled by grids; another number of axes.
    """
    _check_mrope(query.names, axes, frames_apart, time_step)
    steps = time_step or {}
    items = {name: _pieces(query, name, frames_apart, steps.get(name)) for name in query.names}
    positions = torch.zeros(3, *query.types.shape, dtype=torch.long)
    for row, (types, valid) in enumerate(zip(query.types.cpu(), query.valid.cpu(), strict=True)):
        place, parts = int(query.start[row]), []
        for kind, group in itertools.groupby(types[valid].tolist()):
            count = len(list(group))
            if kind == 0:
                parts.append((torch.arange(count) + place).expand(3, -1))  # (3, count)
                place += count
                continue
            name = query.names[kind - 1]
            for grid, step in _filling(items[name], count, name, row):
                parts.append(_grid_positions(grid, place, step))  # (3, features of the grid)
                place += max(grid[1:])
        if parts:
            positions[:, row, valid] = torch.cat(parts, 1)
    return positions.to(query.types.device)


def _check_mrope(names: Sequence[str], axes: Any = 3, frames_apart: Any = False, time_step: Any = None) -> None:
    if axes != 3:
        raise ValueError(f'positions: the rule "mrope" has 3 axes, got axes={axes!r:.100}.')
    _check_switch("frames_apart", frames_apart)
    steps = time_step.values() if isinstance(time_step, Mapping) else [None]
    if time_step is not None and not all(_is_number(step) and step >= 0 for step in steps):
        raise ValueError(
            f"positions: time_step must be numbers from 0 on by modality, {{'video': 2}}, got {time_step!r:.100}."
        )
    if unknown := sorted(set(time_step or ()) - set(names)):
        raise ValueError(f"positions: time_step names {unknown}, the model has the modalities {list(names)}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"positions: {name} must be True or False, got {value!r:.100}.")


def _check_xdrope(names: Sequence[str], axes: Any = 4, newline: Any = True) -> None:
    if not isinstance(axes, int) or isinstance(axes, bool) or not 3 <= axes <= MOST_AXES:
        raise ValueError(f'positions: the rule "xdrope" has 3 to {MOST_AXES} axes, got axes={axes!r:.100}.')
    _check_switch("newline", newline)


def _check_counted(names: Sequence[str], first: Any = 0) -> None:
    if not isinstance(first, int) or isinstance(first, bool) or not 0 <= first < 2**31:
        raise ValueError(f'positions: the rule "counted" counts from a number from 0 on, got first={first!r:.100}.')


def _pieces(query: PositionQuery, name: str, frames_apart: bool, step: float | None) -> Iterator[tuple[Grid, float]]:
    """The grids of a modality's features in reading order, and how far apart in time their frames are."""
    grids, seconds = query.grids.get(name, ()), query.seconds.get(name)
    for i, (frames, height, width) in enumerate(grids):
        interval = 1 if step is None else step * (1 if seconds is None else seconds[i])
        yield from [((1, height, width), interval)] * frames if frames_apart else [((frames, height, width), interval)]


def _filling(items: Iterator[tuple[Grid, float]], count: int, name: str, row: int) -> Iterator[tuple[Grid, float]]:
    """The next grids, until they have as many features as a run of placeholders (ValueError where that is never)."""
    filled = 0
    while filled < count:
        grid, step = next(items, ((0, 0, 0), 1))
        size = math.prod(grid)
        if not size or filled + size > count:
            shape = " x ".join(map(str, grid))
            raise ValueError(
                f"{name}, sample {row}: a run of {count} placeholder tokens, but the grids of its items have "
                f"{filled + size} features"
                + (f" with the next one ({shape})." if size else ", and there are no more.")
                + " Let "
                "the processor of this model expand the placeholders, each item (each frame, with frames_apart) as a whole."
            )
        filled += size
        yield grid, step


def _grid_positions(grid: Grid, place: int, step: float) -> Tensor:
    """Positions ``(3, frames * height * width)`` of a grid that begins at a place."""
    frames, height, width = (torch.arange(n) for n in grid)
    axes = torch.meshgrid((frames * step).long(), height, width, indexing="ij")  # as in transformers: rounded down
    return torch.stack(axes).flatten(1) + place


def xdrope(query: PositionQuery, *, axes: int = 4, newline: bool = True) -> Tensor:
    """Positions of text along all axes ``(axes, batch, length)``; on the last three, features have their column, row and the
    number of their image (HunYuan-VL).

    Args:
        query: the tokens; rows of an image end with one more feature where `newline` holds, and two may stand around it.
        axes: how many the language model turns by.
        newline: whether each row of features has one more at its end.

    Raises:
        ValueError: a run of placeholders that does not fit its grid; images behind a cache, whose number nothing tells.
    """
    _check_xdrope(query.names, axes, newline)
    if query.past and bool(query.types.any()):
        raise ValueError(
            'positions: the rule "xdrope" numbers images from the start: generate from the prompt without a cache.'
        )
    positions = torch.zeros(axes, *query.types.shape, dtype=torch.long)
    items = {name: iter(query.grids.get(name, ())) for name in query.names}
    number = itertools.count()
    for row, (types, valid) in enumerate(zip(query.types.cpu(), query.valid.cpu(), strict=True)):
        own = (torch.arange(int(valid.sum())) + int(query.start[row])).repeat(axes, 1)  # (axes, tokens of the row)
        place = 0
        for kind, group in itertools.groupby(types[valid].tolist()):
            count = len(list(group))
            if kind:
                _, height, width = next(items[query.names[kind - 1]], (0, 0, 0))
                rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width + newline), indexing="ij")
                first, tokens = place + (count - rows.numel()) // 2, rows.numel()
                if count - tokens not in (0, 2):
                    raise ValueError(
                        f"{query.names[kind - 1]}, sample {row}: a run of {count} placeholder tokens, but the grid {height} x "
                        f"{width} of its item has {tokens}, or {tokens + 2} with those around it."
                    )
                marks = torch.stack([columns.flatten(), rows.flatten(), torch.full((tokens,), next(number))])
                own[axes - 3 :, first : first + tokens] = marks
            place += count
        positions[:, row, valid] = own
    return positions.to(query.types.device)


def counted(query: PositionQuery, *, first: int = 0) -> Tensor:
    """Positions ``(batch, length)`` of plain text that count from `first` on (PaliGemma: 1)."""
    if query.counted is not None:
        return query.counted + first
    places = torch.arange(query.past, query.past + query.types.shape[1], device=query.types.device)
    return (places + first).expand(query.types.shape[0], -1)


# What the rules say of themselves: checks of their options, how many axes the language model must turn by, and more.
mrope.check, mrope.axes = _check_mrope, 3  # type: ignore[attr-defined]
xdrope.check, xdrope.axes = _check_xdrope, 4  # type: ignore[attr-defined]
counted.check = _check_counted  # type: ignore[attr-defined]
xdrope.text_row = False  # type: ignore[attr-defined]
counted.numbers_text = True  # type: ignore[attr-defined]
counted.needs_grids = False  # type: ignore[attr-defined]
register_position_rule("mrope", mrope)
register_position_rule("xdrope", xdrope)
register_position_rule("counted", counted)
