"""How many of an encoder's features belong to each item, where the shape of its output does not tell."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..parts.adapters import unwrapped
from ..parts.known_encoders import grid_of
from .grids import merged_patches
from .items import Padded, item_count
from .towers import counted_lengths

# Masks of an encoder's output by name, and whether their ones mark what is valid.
_OUTPUT_MASKS = {"attention_mask": True, "output_mask": True, "audio_mel_mask": False}


class ItemLengthsUnknown(Exception):
    """Neither an encoder's output nor its inputs tell which features belong to which item.

    Attributes:
        packed: whether the encoder left out padding by itself.
    """

    def __init__(self, packed: bool):
        super().__init__()
        self.packed = packed


def feature_lengths(
    features: Tensor,
    arguments: Mapping[str, Any],
    raw: Mapping[str, Any],
    module: nn.Module,
    padded: Padded | None,
    dropped: int = 0,
) -> list[int] | None:
    """Features of each item; None where the tensor's shape tells.

    Args:
        features: ``(items, tokens, width)``, ``(sum of tokens, width)``, or the latter as the only row of the former.
        arguments: of the encoder.
        raw: its output.
        module: the encoder.
        padded: padding of the inputs, None where there is none.
        dropped: leading tokens of each item that are no longer there.

    Raises:
        LengthsNotTold: nothing tells; the items alone would.
        ValueError: an item of no more tokens than were dropped.
    """
    if features.ndim == 2:
        return _packed(len(features), arguments, unwrapped(module).config)
    lengths = _padded(len(features), features.shape[1] + dropped, arguments, raw, module, padded)
    if dropped and lengths is not None and min(lengths) <= dropped:
        raise ValueError(f"drop_prefix={dropped} needs items of more tokens than that, got {lengths}.")
    return lengths and [length - dropped for length in lengths]


def is_packed_row(features: Tensor, items: int) -> bool:
    """Whether several items lie in one row of a tensor of rows."""
    return features.ndim == 3 and len(features) == 1 and items > 1


def _packed(count: int, arguments: Mapping[str, Any], config: Any) -> list[int] | None:
    items = item_count(arguments)
    if items == 1:
        return [count]
    patches = _patches_per_item(arguments, config)
    if patches is not None:
        rows, columns = merged_patches(config)
        for merged in (1, rows * columns):
            if sum(patches) == merged * count and not any(n % merged for n in patches):
                return [n // merged for n in patches]
    elif count == items and all(len(x) == items for x in arguments.values() if isinstance(x, Tensor) and x.ndim > 1):
        return [1] * items
    raise ItemLengthsUnknown(packed=True)


def _patches_per_item(arguments: Mapping[str, Any], config: Any) -> list[int] | None:
    """Patches of each item by its grid, with those merged that an input tells of, or by its size in pixels."""
    grid = grid_of(arguments)
    if grid is not None:
        merges = arguments.get("merge_sizes")
        patches = grid.prod(-1)
        return (patches // merges.to(patches) ** 2 if isinstance(merges, Tensor) else patches).tolist()
    sizes, patch = arguments.get("image_sizes"), getattr(config, "patch_size", None)
    if isinstance(sizes, Tensor) and isinstance(patch, int):
        return [math.prod(n // patch for n in size) for size in sizes.tolist()]
    return None


def _padded(
    items: int,
    tokens: int,
    arguments: Mapping[str, Any],
    raw: Mapping[str, Any],
    module: nn.Module,
    padded: Padded | None,
) -> list[int] | None:
    for name, ones_are_valid in _OUTPUT_MASKS.items():
        mask = raw.get(name)
        if isinstance(mask, Tensor) and mask.shape == (items, tokens):
            return _lengths_of(mask.bool() if ones_are_valid else ~mask.bool())
    pixels = arguments.get("pixel_attention_mask")
    if isinstance(pixels, Tensor) and pixels.shape == (items, tokens):
        return _lengths_of(pixels.bool())
    if (lengths := unpadded_patches(arguments, tokens)) is not None:
        return lengths
    if padded is None:
        return None
    if padded.size == tokens:
        return padded.lengths if min(padded.lengths) < padded.size else None
    counted = counted_lengths(module, torch.tensor(padded.lengths), padded.size, tokens)
    if counted is None and min(padded.lengths) < padded.size:
        raise ItemLengthsUnknown(packed=False)
    return counted


def unpadded_patches(inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
    """Tokens of each time series, where an input tells which values are padding; None without padding at the end.

    Args:
        inputs: of the encoder; `past_values_padding` ``(items, length)`` is 1 where a value is padding.
        tokens: of the longest series, each of equally many values.
    """
    padding = inputs.get("past_values_padding")
    if not isinstance(padding, Tensor) or padding.ndim != 2 or padding.shape[1] % tokens:
        return None
    patches = (padding == 0).unflatten(1, (tokens, -1)).any(-1)  # (items, tokens)
    return None if bool(patches.all()) else patches.sum(-1).tolist()


def _lengths_of(valid: Tensor) -> list[int] | None:
    return None if bool(valid.all()) else valid.sum(-1).tolist()
