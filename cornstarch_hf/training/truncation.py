"""Where the items of a row stand, and what is left of a row that is cut to whole items; `collator` cuts rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..encoders.items import split_items


@dataclass(frozen=True)
class PlacedItem:
    """One item's features in a row: the `index`-th item of its modality, from position `start` to before `stop`."""

    modality: str
    index: int
    start: int
    stop: int


def place_items(
    ids: Sequence[int], token_ids: Mapping[str, int], lengths: Mapping[str, Sequence[int]]
) -> list[PlacedItem]:
    """Where each item's features are in one row's ids, whose placeholders are repeated for them.

    `token_ids` are the placeholders by modality, `lengths` the features of each item, in order.

    >>> [(p.start, p.stop) for p in place_items([7, 9, 9, 9, 7], {"vision": 9}, {"vision": [2, 1]})]
    [(1, 3), (3, 4)]
    """
    placed = []
    for name, sizes in lengths.items():  # an item's placeholders follow one another, those of two items may touch
        positions = [i for i, token in enumerate(ids) if token == token_ids[name]]
        used, reached = 0, 0
        for index, size in enumerate(sizes):
            start = positions[used] if size else reached  # an item without features stands behind the last one
            reached, used = start + size, used + size
            placed.append(PlacedItem(name, index, start, reached))
    return placed


def whole_items_within(items: Sequence[PlacedItem], length: int, limit: int, side: str) -> tuple[int, int]:
    """Start and stop of what is kept of a row: at most `limit` of its `length` tokens, no item in part.

    `side` ``"right"`` cuts the end of the row, ``"left"`` its start.

    >>> whole_items_within([PlacedItem("vision", 0, 2, 6)], 8, 4, "right")
    (0, 2)
    """
    if length <= limit:
        return 0, length
    cut = limit if side == "right" else length - limit  # behind what is kept, or in front of it
    for item in items:
        if item.start < cut < item.stop:  # the item lies across the cut
            cut = item.start if side == "right" else item.stop
    return (0, cut) if side == "right" else (cut, length)


def inputs_within(
    inputs: Mapping[str, Any],
    names: Mapping[str, Sequence[Sequence[str]]],
    items: Sequence[PlacedItem],
    start: int,
    stop: int,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Encoders' inputs of the items between `start` and `stop` of a row, and how many items of each modality lie elsewhere.

    `names` are those of each modality's tensors among the `inputs`, a list for each encoder that sees its items; the rows of an
    encoder's tensors must tell the items apart (ValueError).
    """
    kept, dropped = dict(inputs), {}
    for modality, encoders in names.items():
        placed = sorted((item for item in items if item.modality == modality), key=lambda item: item.index)
        inside = [item.index for item in placed if start <= item.start and item.stop <= stop]
        if len(inside) == len(placed):
            continue  # its tensors stay as they are
        dropped[modality] = len(placed) - len(inside)
        for keys in encoders:
            if not (own := {key: inputs[key] for key in keys if key in inputs}):  # nobody asked for its tensors
                continue
            parts = split_items(own, len(placed), modality)  # of each item, (1, ...) or its own packed patches
            for key in own:
                del kept[key]
                if inside:  # else the batch has no such input
                    kept[key] = torch.cat([parts[index][key] for index in inside])
    return kept, dropped
