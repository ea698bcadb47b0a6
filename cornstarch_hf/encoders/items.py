"""Which part of an encoder's batch belongs to which item, and what of it is padding.  Knows no model.

Items are rows, or lie one after the other along an axis (packed), with their sizes in another input.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..parts.adapters import unwrapped
from ..parts.known_encoders import encoder_type, grid_of, merged_patches, patch_size, unpadded_patches
from .towers import TRUE_ON_PADDING, counted_lengths

# Masks ``(items, length)`` of inputs.
MASKS = ("attention_mask", "padding_mask", "input_features_mask", "mask", "audio_mel_mask")
OUTPUT_MASKS = ("attention_mask", "output_mask", "audio_mel_mask")  # of what an encoder gives


class Padded(NamedTuple):
    """Padding of a batch."""

    mask: str  # name of the mask
    size: int  # of the padded axis
    lengths: list[int]  # valid positions of each item


def packed_sizes(inputs: Mapping[str, Any]) -> list[int] | None:
    """Patches or frames of each item where several lie along one axis; None where items are rows."""
    if (grid := grid_of(inputs)) is not None:
        return grid.prod(-1).tolist()  # (items, 2 or 3) -> patches of each item
    frames = (v for k, v in inputs.items() if k.endswith("feature_lens") and isinstance(v, Tensor))
    return next((lengths.tolist() for lengths in frames), None)


def item_count(inputs: Mapping[str, Any]) -> int:
    """Items of a batch: rows of its grids, else of its first tensor."""
    if (sizes := packed_sizes(inputs)) is not None:
        return len(sizes)
    return next((len(v) for v in inputs.values() if isinstance(v, Tensor) and v.ndim), 1)


def split_items(inputs: Mapping[str, Any], count: int, where: str) -> list[dict[str, Any]]:
    """A batch, one dict per item; each tensor keeps its axes.  ValueError for one that does not tell whose what is."""
    sizes = next((v.tolist() for k, v in inputs.items() if k.endswith("num_tiles")), None) or packed_sizes(inputs)
    items: list[dict[str, Any]] = [{} for _ in range(count)]
    for key, value in inputs.items():
        if not isinstance(value, (Tensor, Sequence)) or isinstance(value, str):
            continue  # a setting of the call, which belongs to no item
        parts = _parts(value, count, sizes)
        if parts is None:
            remedy = (
                "choose tiles= of its encoder, or turn it off (crop_to_patches=False, do_pan_and_scan=False, slice_mode=False)"
                if sizes is None
                else f"their grids or lengths say {sizes}, {sum(sizes)} together; pass those of the same items"
            )
            raise ValueError(f"{where}: {key!r} has {len(value)} rows for {count} items: {remedy}.")
        for item, part in zip(items, parts, strict=True):
            item[key] = part
    return items


def _parts(value: Any, count: int, sizes: list[int] | None) -> Sequence[Any] | None:
    if len(value) == count:  # (items, ...)
        return [value[i : i + 1] for i in range(count)]
    if sizes is None or not isinstance(value, Tensor):
        return None
    total = sum(sizes)
    if len(value) == total:  # (patches of all items, ...)
        return value.split(sizes)
    # (channels, frames), or all of them in one row, (1, patches, ...)
    if value.ndim > 1 and value.shape[1] == total and (value.ndim == 2 or len(value) == 1):
        return value.split(sizes, dim=1)
    # small images side by side, (1, channels, height, width)
    if value.ndim == 4 and len(value) == 1 and value.shape[3] % total == 0:
        return value.split([n * (value.shape[3] // total) for n in sizes], dim=3)
    return None


def padding_of(inputs: Mapping[str, Any], where: str) -> Padded | None:
    """The padding that a mask tells of, ValueError unless it is on the right; None without a mask of an axis of the items."""
    for name in MASKS:
        mask = inputs.get(name)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_meta:
            continue  # no mask of items, or one without values, in a dry run
        if not any(_axes(value, mask) for key, value in inputs.items() if key not in MASKS):
            continue  # a mask of something that no input has as an axis
        valid = mask.bool() != (name in TRUE_ON_PADDING)  # (items, length)
        lengths = valid.sum(-1)
        # Ones for the first `lengths` positions are the only mask of items that are padded on the right.
        if not torch.equal(valid, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
            has = "ones before zeros" if name in TRUE_ON_PADDING else "zeros before ones"
            raise ValueError(f"{where}: items of an encoder must be padded on the right; the {name} has {has}.")
        return Padded(name, mask.shape[1], lengths.tolist())
    return None


def _axes(value: Any, mask: Tensor) -> list[int]:
    """Axes of an input, after that of the items, that a mask speaks of."""
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(mask):
        return []
    return [a for a in range(1, value.ndim) if value.shape[a] == mask.shape[1]]


def is_raw_sequence(inputs: Mapping[str, Any], padded: Padded) -> bool:
    """Whether the items are sequences of numbers or ids, of the mask's own shape: their encoders read the padding."""
    plain = [inputs[key] for key in ("input_values", "input_ids") if isinstance(inputs.get(key), Tensor)]
    return any(value.shape == inputs[padded.mask].shape for value in plain)


def groups_by_length(padded: Padded) -> dict[int, list[int]]:
    """Positions of items by their valid length."""
    groups: dict[int, list[int]] = {}
    for position, length in enumerate(padded.lengths):
        groups.setdefault(length, []).append(position)
    return groups


def select_items(inputs: Mapping[str, Any], padded: Padded, positions: Sequence[int]) -> dict[str, Any]:
    """Some items of one length without padding, by their positions.

    Their masks stay: an encoder may attend otherwise without one (Moonshine Streaming sees the whole sound then, instead of
    windows).  ValueError where several axes of an input are as long as the mask, so that it is not known which is padded.
    """
    mask, length = inputs[padded.mask], padded.lengths[positions[0]]
    found = dict(inputs)
    for key, value in inputs.items():
        if not isinstance(value, Tensor) or not value.ndim or len(value) != len(mask):
            continue
        # (items of this length, ...); no copy where that is every item
        rows = value if len(positions) == len(value) else value[torch.tensor(positions, device=value.device)]
        axes = _axes(value, mask) if length < padded.size else []
        if len(axes) > 1:
            raise ValueError(
                f"{key} of shape {tuple(value.shape)} has several axes as long as its mask {tuple(mask.shape)}: pad the "
                "batch to another length."
            )
        # (items of this length, ..., padded.size, ...) -> (items of this length, ..., length, ...)
        found[key] = rows.narrow(axes[0], 0, length) if axes else rows
    return found


def parts_of(inputs: Mapping[str, Any], padded: Padded | None, where: str) -> list[tuple[dict[str, Any], list[int]]]:
    """A batch by length, unpadded, or item by item; each part with the positions of its items."""
    if padded is not None:  # what an item gives never depends on its neighbours
        return [(select_items(inputs, padded, positions), positions) for positions in groups_by_length(padded).values()]
    return [(item, [i]) for i, item in enumerate(split_items(inputs, item_count(inputs), where))]


def without_padding(inputs: dict[str, Any], where: str = "item") -> dict[str, Any]:
    """One item's inputs without the padding that a batch gave it, where it is a sequence of numbers or ids.

    Others keep their mask: some encoders take items of one padded size alone, and their output tells what is valid.
    """
    padded = padding_of(inputs, where)
    return select_items(inputs, padded, [0]) if padded is not None and is_raw_sequence(inputs, padded) else inputs


class ItemLengthsUnknown(Exception):
    """Neither an encoder's output nor its inputs tell which features belong to which item."""

    def __init__(self, packed: bool):
        self.packed = packed  # whether the encoder left out padding by itself


def feature_lengths(
    features: Tensor, arguments: Mapping, raw: Mapping, module: nn.Module, padded: Padded | None, dropped: int = 0
) -> list[int] | None:
    """How many features, ``(items, tokens, width)`` or ``(sum of tokens, width)``, each item has; None where the shape tells.

    `raw` is what the encoder made of its arguments; `dropped` leading tokens of each item are no longer there (ValueError if
    that is all of one).  ItemLengthsUnknown where nothing tells, and the items alone would.
    """
    if features.ndim == 2:
        return _packed(len(features), arguments, unwrapped(module).config)  # (sum of tokens, width)
    # Masks and lengths count the dropped tokens too, which are taken off at the end.
    items, tokens = len(features), features.shape[1] + dropped
    # The encoder's own mask comes first, then that of patches, each of which gave one.
    masks = {name: raw.get(name) for name in OUTPUT_MASKS}
    masks["patches"] = arguments.get("pixel_attention_mask")
    fitting = {k: m for k, m in masks.items() if isinstance(m, Tensor) and m.shape == (items, tokens)}
    if fitting:
        name, mask = next(iter(fitting.items()))
        valid = mask.bool() != (name in TRUE_ON_PADDING)  # (items, tokens)
        lengths = None if bool(valid.all()) else valid.sum(-1).tolist()  # None: every row is as long as the tensor
    elif (lengths := unpadded_patches(arguments, tokens)) is None and padded is not None:
        is_padded = min(padded.lengths) < padded.size
        if padded.size == tokens:
            lengths = padded.lengths if is_padded else None
        else:  # the encoder leaves fewer features than positions, and may have a method that tells how many
            lengths = counted_lengths(module, torch.tensor(padded.lengths), padded.size, tokens)
            if lengths is None and is_padded:
                raise ItemLengthsUnknown(packed=False)
    if dropped and lengths is not None and min(lengths) <= dropped:
        raise ValueError(f"drop_prefix={dropped} needs items of more tokens than that, got {lengths}.")
    return lengths and [length - dropped for length in lengths]


def _packed(count: int, arguments: Mapping[str, Any], config: Any) -> list[int] | None:
    items = item_count(arguments)
    if items == 1:
        return [count]
    patches = _patches_per_item(arguments, config)
    if patches is not None:
        rows, columns = merged_patches(config)
        for merged in (1, rows * columns):  # patches of one feature: in layers before they are merged, and after
            if sum(patches) == merged * count and not any(n % merged for n in patches):
                return [n // merged for n in patches]
        if (lengths := _framed_rows(arguments, rows, columns)) and sum(lengths) == count:
            return lengths
    elif count == items and all(len(x) == items for x in arguments.values() if isinstance(x, Tensor) and x.ndim > 1):
        return [1] * items  # one vector each
    if (known := encoder_type(config).count) is not None:
        lengths = [known(item, config) or 0 for item in split_items(arguments, items, "")]
        if sum(lengths) == count:
            return lengths
    raise ItemLengthsUnknown(packed=True)


def _framed_rows(arguments: Mapping[str, Any], rows: int, columns: int) -> list[int]:
    """Features of each item whose rows end in one more, with one before and one behind all of them (HunYuan-VL)."""
    grid = grid_of(arguments)
    sides = [] if grid is None else grid.tolist()
    return [height // rows * (width // columns + 1) + 2 for *_, height, width in sides]


def _patches_per_item(arguments: Mapping[str, Any], config: Any) -> list[int] | None:
    """Patches of each item by its grid, with those merged that an input tells of, or by its size in pixels."""
    if (grid := grid_of(arguments)) is not None:
        patches, merges = grid.prod(-1), arguments.get("merge_sizes")
        # A square of patches becomes one token: the side of it is what `merge_sizes` says.
        return (patches // merges.to(patches) ** 2 if isinstance(merges, Tensor) else patches).tolist()
    places, side = arguments.get("pixel_position_ids"), getattr(config, "pooling_kernel_size", None)
    if isinstance(places, Tensor) and side is not None:  # -1 for patches of padding; a square of patches is one token
        return ((places != -1).all(-1).sum(-1) // side**2).tolist()
    sizes, patch = arguments.get("image_sizes"), patch_size(config)
    if isinstance(sizes, Tensor) and patch is not None:
        return [(height // patch[0]) * (width // patch[1]) for height, width in sizes.tolist()]
    return None
