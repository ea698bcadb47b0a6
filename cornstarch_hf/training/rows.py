"""Rows of a batch: what was read of them, where their items stand, what a cut leaves of them, how their inputs are joined.

`collator` makes rows.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..configuration_multimodal import MultimodalConfig
from ..encoders.items import split_items
from ..parts.names import own_names
from ..processing.media import LIST_DEPTHS, flatten
from ..processing.subprocessors import tells_by_size
from ..processing.video import FRAME_MASK

Row = Mapping[str, Tensor]
Spans = list[tuple[int, int]]
IGNORED = -100  # a label that no loss counts


class ReadRow(NamedTuple):
    """What a row's columns say, before the processor sees it."""

    text: str
    spans: Spans | None  # of what is to be learnt, in characters; None for all of it
    media: dict[str, list]  # items by modality
    in_front: dict[str, Any]  # options for the tokens in front of the text
    options: dict[str, Any]  # of the processor's call


def are_alike(rows: Sequence[ReadRow], processor: Any) -> bool:
    """Whether one call of a processor may take all rows: without media, or with pictures that are each made to one size.

    Of what cannot be read twice (files, addresses) nothing is, and nothing where items of a batch may change one another.
    """
    first, names = rows[0], {name for row in rows for name in row.media}
    if any(
        (row.in_front, row.options, row.spans is None) != (first.in_front, first.options, first.spans is None)
        for row in rows
    ):
        return False
    if not all(_is_at_hand(item) for row in rows for items in row.media.values() for item in items):
        return False
    config, parts = processor.config, [processor.processors.get(name) for name in names]
    # Sizes, masks or grids beside the pixels would tell of pictures that are not made to one size.
    plain = all(
        tells_by_size(p) and p.model_input_names == ["pixel_values"] and not getattr(p, "do_pad", 0) for p in parts
    )
    kinds = {config.modality(name)["kind"] for name in names} <= {"image"} and not names & {*config.joined.values()}
    return plain and kinds and processor.native is None and not any(map(processor.counter.has_preprocessing, names))


def _is_at_hand(item: Any) -> bool:
    """Whether a picture can be read as often as one likes."""
    if isinstance(item, Mapping):  # as a table has one
        item = item.get("bytes") if item.get("image") is None else None
    return isinstance(item, (Image.Image, np.ndarray, Tensor, bytes))


def split_tensors(
    tensors: Row, counts: Sequence[Mapping[str, int]], config: MultimodalConfig
) -> list[dict[str, Tensor]] | None:
    """Tensors ``(items of all rows, channels, height, width)`` by row, not copied; None where one has another form.

    `counts` are each row's items by modality.
    """
    found: list[dict[str, Tensor]] = [{} for _ in counts]
    for name in counts[0]:
        sizes = [row[name] for row in counts]
        for key in own_names(config, name).keys() & tensors.keys():
            if tensors[key].ndim != 4 or len(tensors[key]) != sum(sizes):
                return None
            for row, part in zip(found, tensors[key].split(sizes), strict=True):
                row |= {key: part} if len(part) else {}
    return found if set(tensors) == {key for row in found for key in row} else None


def string_of(name: str, value: Any, what: str) -> str:
    """A column that holds a text (TypeError: it does not)."""
    if not isinstance(value, str):
        raise TypeError(f"expected {name!r} to be {what}, got {type(value).__name__}.")
    return value


def items_of(value: Any, kind: str) -> list:
    """A cell's items in order; the missing ones of a table are left out."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in (flatten(value, kind)[0] if kind in LIST_DEPTHS else listed) if item is not None]


def without_gaps(value: Any) -> Any:
    """A nested value without keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_gaps(item) for key, item in value.items() if item is not None}
    return [without_gaps(item) for item in value] if isinstance(value, (list, tuple)) else value


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
            left = {key: torch.cat([parts[index][key] for index in inside]) for key in own if inside}
            for key in own:
                del kept[key]  # the batch has no such input where no item is left
            kept |= _without_margins(left, _sizes_in_pixels(own))
    return kept, dropped


def _without_margins(inputs: dict[str, Any], filled: list[int] | None) -> dict[str, Any]:
    """Images that were filled up to a height and width `filled`, cut to the largest ones among them."""
    sizes = _sizes_in_pixels(inputs)
    if filled is None or sizes is None or filled == sizes:
        return inputs
    padded = [key for key, x in inputs.items() if x.ndim > 3 and list(x.shape[-2:]) == filled]
    return inputs | {key: inputs[key][..., : sizes[0], : sizes[1]] for key in padded}


# ---- one tensor of those of all rows, filled up where something tells what is padding


def join_rows(rows: Sequence[Row], config: MultimodalConfig) -> dict[str, Tensor]:
    """Inputs ``(items of all rows, ...)`` of encoders, of those of rows, ``(items, ...)`` each; a row may lack some.

    What differs in size is filled up at its end where a mask, or sizes in pixels, tell.  Videos whose frames are encoded one
    by one get a `frame_mask` where they differ in number.

    Raises:
        ValueError: tensors that differ otherwise; names the row.
    """
    batch: dict[str, Tensor] = {}
    for name in config.encoders:
        names, kind = own_names(config, name), config.modality(name)["kind"]
        own: Sequence[Row] = [{key: row[key] for key in names if key in row} for row in rows]
        mask = next((key for key, taken in names.items() if taken == FRAME_MASK), None)
        own = own if mask is None else _with_frames_told(own, mask)
        there = {i: row for i, row in enumerate(own) if row}
        for key in dict.fromkeys(key for row in own for key in row):
            if lacking := [i for i, row in there.items() if key not in row]:
                raise ValueError(
                    f"row {lacking[0]}: {name}: there is no {key}, which others have: put these rows into different batches."
                )
            batch[key] = _joined({i: row for i, row in enumerate(own) if key in row}, key, kind, name)
    return batch


def _with_frames_told(rows: Sequence[Row], mask: str) -> Sequence[Row]:
    """The rows with a mask ``(videos, frames)`` of that name where they have several numbers of frames, and none."""
    shapes = [next((x.shape[:2] for x in row.values() if x.ndim >= 5), None) for row in rows]
    if len({shape[1] for shape in shapes if shape is not None}) < 2:
        return rows
    return [
        row if shape is None else {mask: torch.ones(shape, dtype=torch.bool)} | row
        for row, shape in zip(rows, shapes, strict=True)
    ]


def _joined(rows: Mapping[int, Row], key: str, kind: str, name: str) -> Tensor:
    """The tensors of that keyword, by the number of their row, as one."""
    parts = {i: row[key] for i, row in rows.items()}
    first, one = next(iter(parts.items()))
    if len(parts) == 1:
        return one
    if all(part.shape[1:] == one.shape[1:] for part in parts.values()):
        return torch.cat(list(parts.values()))  # (items of all rows, ...)
    for i, part in parts.items():
        differ = {a for a in range(1, one.ndim) if part.ndim == one.ndim and part.shape[a] != one.shape[a]}
        told = _told(rows[first], key, kind) & _told(rows[i], key, kind)
        if part.ndim != one.ndim or not differ <= told:
            shapes = f"{key} has the shape {tuple(part.shape)}, in row {first} {tuple(one.shape)}"
            reason = "nothing would tell the encoder what is padding"
            remedy = f"{_remedy(kind)}, or put these rows into different batches"
            raise ValueError(f"row {i}: {name}: {shapes}, and {reason} in a batch of both: {remedy}.")
    sizes = [max(part.shape[a] for part in parts.values()) for a in range(1, one.ndim)]
    blank = 1 if key.endswith("_padding") else 0  # such a mask is 1 where a value is padding
    return torch.cat([_filled_up(part, sizes, blank) for part in parts.values()])


def _told(row: Row, key: str, kind: str) -> set[int]:
    """Axes of a row's tensor along which other inputs of its items, or its own kind, tell what padding is."""
    tensor, others = row[key], {other: x for other, x in row.items() if other != key}
    if key.endswith(("mask", "_padding")):
        return set(range(1, tensor.ndim))
    last = tensor.ndim - 1
    masks = [x for other, x in others.items() if other.endswith(("mask", "_padding")) and x.ndim > 1]
    # (images, tiles, channels, height, width): the encoder's own inputs, or empty tiles, tell; of frames of videos a mask.
    told = {1} if kind == "image" and tensor.ndim > 4 else set[int]()
    told |= {1} if any(x.shape[1] == tensor.shape[1] for x in masks) else set()
    for mask in masks:  # (items, length), or (items, ..., height, width)
        axes = range(tensor.ndim - min(mask.ndim - 1, 2), tensor.ndim)
        if all(tensor.shape[a] == mask.shape[a - tensor.ndim] for a in axes):
            told |= set(axes)
    if last > 1 and _sizes_in_pixels(others) == list(tensor.shape[-2:]):
        told |= {last - 1, last}
    return told


def _sizes_in_pixels(inputs: Row) -> list[int] | None:
    """The largest height and width that `image_sizes` ``(items, 2)`` state, None where there are none."""
    sizes = next((x for key, x in inputs.items() if key.endswith("image_sizes") and x.ndim == 2 and len(x)), None)
    return None if sizes is None else sizes.amax(0).tolist()


def _filled_up(part: Tensor, sizes: Iterable[int], blank: int) -> Tensor:
    """A tensor ``(items, ...)`` with these sizes of its other axes."""
    missing = [(0, size - have) for size, have in zip(sizes, part.shape[1:], strict=True)]
    return torch.nn.functional.pad(part, [n for pair in reversed(missing) for n in pair], value=blank)


def _remedy(kind: str) -> str:
    if kind == "video":
        return "sample as many frames of each (num_frames=)"
    size = "give its processor a fixed size (size={'height': ..., 'width': ...})"
    return size if kind == "image" else "give items of one size"


# ---- labels


def learnable(labels: Sequence[int]) -> bool:
    """Whether a row's loss counts any of its labels: the first one stands behind no token that could predict it.

    >>> learnable([5, 6]), learnable([5, -100]), learnable([])
    (True, False, False)
    """
    return any(label != IGNORED for label in labels[1:])


def why_not_learnable(labels: Sequence[int], spans: Spans | None) -> str:
    """The reason why nothing of a row is learnt, and the remedy."""
    if any(label != IGNORED for label in labels):
        told = "the only label is that of the row's first token, before which no token stands that could predict it"
        return f"{told}. Put text in front of it, or the tokenizer's bos_token."
    if spans is None:
        return "expected text in 'text', there is none beside placeholders, which are not learned."
    told = "expected a turn of the assistant, or a completion, with text in it"
    return f"{told}. If there is one, the chat template's generation marks leave it out."


def check_labels(batch: Mapping[str, torch.Tensor], placeholders: Mapping[str, int]) -> None:
    """Refuse a batch with a label that is not its own token, or on padding or a placeholder (ValueError with the position)."""
    ids, labels = batch["input_ids"], batch["labels"]
    silent = torch.tensor(list(placeholders.values()), dtype=ids.dtype)
    wrong = (labels != IGNORED) & ((labels != ids) | (batch["attention_mask"] == 0) | torch.isin(ids, silent))
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: the label at position {position} is {labels[row, position]}, expected {IGNORED} or the token "
            f"{ids[row, position]} there, and {IGNORED} on padding and placeholders {dict(placeholders)}."
        )
