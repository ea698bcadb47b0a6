"""What of a model trains: names and `requires_grad`.  How frozen parts run is beside it, in `frozen_modes`."""

import fnmatch
from collections.abc import Iterable

from torch import nn

from .adapters import adapter_parameter_names, is_wrapped
from .names import compress, matches


def select_parameters(model: nn.Module, patterns: Iterable[str]) -> set[str]:
    """Parameters at or below the modules and parameters that dotted names or globs name.

    Args:
        model: any module.
        patterns: e.g. ``"language_model"``, ``"vision_encoder.module"``, ``"*.projector"``, ``"*.layers.0.*"``.

    Raises:
        ValueError: a pattern names nothing; lists the model's parts.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    owners = [name for name, _ in model.named_modules() if name] + parameters
    chosen: set[str] = set()
    for pattern in patterns:
        named = set(fnmatch.filter(owners, pattern))
        below = {p for p in parameters if p in named or any(p.startswith(parent + ".") for parent in _roots(named))}
        if not named:  # a part without parameters has nothing to choose
            parts = [name for name in owners if name.count(".") <= 1 and name not in parameters]
            raise ValueError(
                f"{pattern!r} names no part with parameters, expected names or globs such as {parts[:12]}."
            )
        chosen |= below
    return chosen


def _roots(names: set[str]) -> set[str]:
    """Those names that have no other of the names above them."""
    roots: set[str] = set()
    for name in sorted(names):
        parts = name.split(".")
        if not any(".".join(parts[:n]) in roots for n in range(1, len(parts))):
            roots.add(name)
    return roots


def set_trainable(model: nn.Module, names: Iterable[str], trainable: bool) -> None:
    """Set `requires_grad` of the named parameters (floating-point ones; others cannot have gradients)."""
    wanted = set(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.requires_grad_(trainable)


def frozen_patterns(model: nn.Module) -> list[str]:
    """Patterns that match exactly the parameters that do not train."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return compress((name for name, p in parameters.items() if not p.requires_grad), parameters)


def restore_frozen(model: nn.Module, patterns: Iterable[str] | None) -> int:
    """Make exactly the parameters that match the patterns frozen and all others trainable; returns how many are frozen."""
    if patterns is None:
        return 0
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    frozen = matches(patterns, names)
    set_trainable(model, frozen, False)
    set_trainable(model, set(names) - frozen, True)
    return len(frozen)


def set_part_trainable(part: nn.Module, trainable: bool) -> None:
    """Train or freeze a part; of a PEFT-wrapped one only the adapters are ever trained."""
    names = {name for name, _ in part.named_parameters()}
    chosen = adapter_parameter_names(part) if trainable and is_wrapped(part) else names
    set_trainable(part, chosen, trainable)
