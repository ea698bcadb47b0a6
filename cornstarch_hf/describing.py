"""A table of a composed model for people: parts, classes, parameters, what trains, tokens."""

from typing import Any

from .adapters import is_wrapped, unwrapped
from .feature_counts import FeatureCounter, typical_item


def describe_model(model: Any) -> str:
    """One line per part of a composed model, and one per modality's token and selection."""
    rows = [("part", "class", "parameters", "trainable", "dtype")]
    rows += [_row(where, part) for where, part in model._parts().items()]
    rows.append(_row("total", model))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines + [_modality(model, name) for name in model.config.encoders])


def _row(where: str, part: Any) -> tuple[str, str, str, str, str]:
    parameters = list(part.parameters())
    total, trainable = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
    name = type(unwrapped(part)).__name__ + (f" + {'/'.join(part.peft_config)}" if is_wrapped(part) else "")
    if where.endswith(".projector"):
        config = part.config
        name = f"{name} ({config.projection_type}, {config.in_features} -> {config.out_features})"
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return where, name, f"{total:,}", f"{trainable:,}", "/".join(dtypes)


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
        return f"not known before a run ({error})"
