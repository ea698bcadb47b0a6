"""A conversation that goes on behind a cache: of its items, those whose features lie there are not encoded again."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..language_model.merging import items_behind_cache
from .counting import FeatureCounter
from .items import item_count, split_items, without_padding

# Of models: the configuration as it was, and a counter made of it.
_COUNTERS: Any = weakref.WeakKeyDictionary()


def items_to_encode(
    model: Any, media: Mapping[str, dict[str, Any]], masks: Mapping[str, Tensor], cached: int
) -> dict[str, dict[str, Any]]:
    """The encoders' inputs by modality without items of which all features are in the cache.

    Items that cannot be counted before they are encoded stay, as do those of rows that do not hold as many placeholders as
    there are features: `items_behind_cache` takes them from the features, or refuses them.

    Args:
        media: inputs by modality and name of the encoder's `forward`.
        masks: where placeholders stand, ``(batch, length)`` by modality; the first `cached` columns are in the cache.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, inputs in media.items():
        mask = masks.get(name)
        left = inputs if mask is None else _left(model, name, inputs, mask, cached)
        found |= {} if left is None else {name: left}
    return found


def _left(model: Any, name: str, inputs: dict[str, Any], mask: Tensor, cached: int) -> dict[str, Any] | None:
    if not bool(mask[:, :cached].any()):
        return inputs
    counter, settings = _counter_of(model), {k: v for k, v in inputs.items() if not isinstance(v, (Tensor, Sequence))}
    try:
        if counter.has_preprocessing(name) or name in model.config.joined.values():  # whose rows may be no items
            whole = counter.batch_count(name, _readable(inputs)) == int(mask.sum())
            return None if whole and not bool(mask[:, cached:].any()) else inputs
        items = split_items(inputs, item_count(inputs), name)
        lengths = [counter.count(name, without_padding(_readable(item), name) | settings) for item in items]
    except ValueError:  # the encoder tells, or says what is wrong
        return inputs
    behind = items_behind_cache(name, lengths, mask, cached)
    return chosen_inputs(inputs, items, behind) if behind else None


def _readable(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs whose whole numbers a counter can read: it asks of others the shapes alone."""
    return {k: v.cpu() if isinstance(v, Tensor) and not v.is_floating_point() else v for k, v in inputs.items()}


def _counter_of(model: Any) -> FeatureCounter:
    text = model.config.to_json_string(use_diff=False)
    known, counter = _COUNTERS.get(model, (None, None))
    if known != text:
        counter = FeatureCounter(model.config, model.encoders)
        _COUNTERS[model] = text, counter
    return counter


def chosen_inputs(inputs: dict[str, Any], items: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> dict[str, Any]:
    """Some `items` of a batch, by their positions, as a batch."""
    if len(chosen) == len(items):
        return inputs
    found = dict(inputs)
    for key in items[0]:
        value, parts = inputs[key], [item[key] for item in items]
        if not isinstance(value, Tensor):
            found[key] = [one for i in chosen for one in parts[i]]
            continue
        # The axis along which the items lie: the only one of which each has a part.
        axis = next(a for a in range(value.ndim) if sum(part.shape[a] for part in parts) == value.shape[a])
        found[key] = torch.cat([parts[i] for i in chosen], axis)
    return found
