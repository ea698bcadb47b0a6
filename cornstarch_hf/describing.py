"""A composed model for people: parts, classes, parameters, what trains, tokens; as a table, or in numbers for a card."""

import math
from typing import Any, NamedTuple

from .encoders.counting import FeatureCounter, typical_item
from .parts.adapters import is_wrapped, unwrapped

UNKNOWN_COUNT = "not known before a run"


class PartSummary(NamedTuple):
    """What a table says of a part: its class, projection, adapters, sizes and dtypes."""

    where: str
    class_name: str
    projection: str
    adapters: dict[str, Any]
    total: int
    trainable: int
    dtypes: str


def describe_model(model: Any) -> str:
    """One line per part of a composed model, and one per modality's token and selection."""
    rows = [("part", "class", "parameters", "trainable", "dtype")]
    rows += [_row(summary) for summary in summaries(model)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines + [_modality(model, name) for name in model.config.encoders])


def summaries(model: Any) -> list[PartSummary]:
    """The parts of a composed model in order, and the whole as ``"total"``."""
    return [summary(where, part) for where, part in [*model._parts().items(), ("total", model)]]


def summary(where: str, part: Any) -> PartSummary:
    """Of one part.

    Args:
        where: its dotted name; one that ends in ``.projector`` is a projector.
        part: the module, PEFT-wrapped or not.
    """
    parameters = list(part.parameters())
    config, projection = getattr(part, "config", None), ""
    if where.endswith("projector"):
        projection = f"{config.projection_type}, {config.in_features} -> {config.out_features}"
    return PartSummary(
        where,
        type(unwrapped(part)).__name__,
        projection,
        dict(part.peft_config) if is_wrapped(part) else {},
        sum(map(_size, parameters)),
        sum(_size(p) for p in parameters if p.requires_grad),
        "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
    )


def _size(parameter: Any) -> int:
    """How many weights a parameter stands for: 4-bit ones are packed, sharded ones lie elsewhere."""
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(packed) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def _row(part: PartSummary) -> tuple[str, str, str, str, str]:
    name = part.class_name + (f" + {'/'.join(part.adapters)}" if part.adapters else "")
    name += f" ({part.projection})" if part.projection else ""
    return part.where, name, f"{part.total:,}", f"{part.trainable:,}", part.dtypes


def _modality(model: Any, name: str) -> str:
    entry = model.config.modality(name)
    count = features_per_item(model, name)
    return (
        f"{name}: {entry['kind']}, token {entry['token'] or '-'} (id {entry['token_id']}), layer {entry['layer']}"
        f"{', output ' + entry['output'] if entry['output'] else ''}, drop_prefix {entry['drop_prefix']}, "
        f"features per item {count}, inputs {list(entry['input_names'])}"
    )


def features_per_item(model: Any, name: str) -> str:
    """How many features one item gives, where the encoder's configuration fixes it, else a note."""
    encoder = model.encoders[name]
    item = typical_item(unwrapped(encoder.module).config, encoder.kind)
    if item is None or encoder.additional_args or any(encoder.callbacks.values()):
        return "depends on the item"
    try:
        return str(FeatureCounter(model.config, model.encoders).count(name, item))
    except ValueError as error:  # a table for people is no place to fail; the reason is shown instead
        return f"{UNKNOWN_COUNT} ({error})"
