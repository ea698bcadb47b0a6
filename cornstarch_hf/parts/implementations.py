"""Which attention and experts implementations the parts of a configuration have, as a checkpoint keeps them."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

FAMILIES = ("attn", "experts")


def part_implementations(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """The implementations of each part, for its own configuration and for those below that differ.

    Returns:
        ``{part: {"attn": value, "experts": value}}``; a value is a name, or ``{"": name, part below: value}``, the form
        in which transformers takes several.
    """
    found = {}
    for key in config.sub_configs:
        part = getattr(config, key, None)
        values = {family: _implementation(part, family) for family in FAMILIES}
        kept = {family: value for family, value in values.items() if value}
        if kept and not key.endswith("_projector_config"):
            found[key] = kept
    return found


def _implementation(part: Any, family: str) -> Any:
    own = getattr(part, f"_{family}_implementation_internal", None)
    # A kernel repository is code: it is never taken from a checkpoint, so none is written.
    own = own if isinstance(own, str) and "/" not in own else None
    parts = {key: getattr(part, key, None) for key in getattr(part, "sub_configs", None) or {}}
    below = {key: _implementation(x, family) for key, x in parts.items() if isinstance(x, PreTrainedConfig)}
    if all(value == own for value in below.values()):
        return own
    return {key: value for key, value in {"": own, **below}.items() if value}


def apply_implementations(config: PreTrainedConfig, stored: Mapping[str, Any]) -> None:
    """Give parts the implementations that were stored, where they have none yet (in place).

    Raises:
        ValueError: no such part, no name of an implementation, or a repository of kernels.
    """
    for key, values in stored.items():
        part = getattr(config, key, None) if key in config.sub_configs else None
        if not isinstance(values, dict) or not isinstance(part, PreTrainedConfig) or not set(values) <= set(FAMILIES):
            raise ValueError(
                f"part_implementations names {key!r}: {values!r}, expected some of {list(config.sub_configs)}."
            )
        for family, value in values.items():
            _check_names(value, key, family)
            if getattr(part, f"_{family}_implementation_internal", None) is None:
                setattr(part, f"_{family}_implementation", value)


def _check_names(value: Any, key: str, family: str) -> None:
    if isinstance(value, dict) and value:
        for below, each in value.items():
            _check_names(each, f"{key}.{below}" if below else key, family)
    elif not isinstance(value, str) or "/" in value:
        raise ValueError(
            f"{key} asks for the {family} implementation {value!r}: kernels from a repository are code, pass "
            f"attn_implementation={value!r} yourself if you trust it."
        )
