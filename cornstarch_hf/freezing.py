"""What of a model trains: names, `requires_grad`, and the mode in which frozen parts run."""

import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapters import adapter_parameter_names, is_wrapped
from .name_patterns import compress, matches


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


def keep_frozen_in_eval(parts: Mapping[str, nn.Module]) -> None:
    """Put the frozen regions of parts into evaluation mode: no dropout, no updates of norm statistics.

    A region is frozen when none of its parameters trains.  Layers that checkpoint activations stay in training mode,
    which is how they know to checkpoint; so do containers with anything that trains inside, and linear layers: mode
    means nothing to them, but quantized ones take evaluation for inference and change to a form without gradients.
    """
    for part in parts.values():
        _evaluate_frozen(part)


def _evaluate_frozen(module: nn.Module) -> bool:
    """Handle one subtree; returns whether anything in it trains."""
    trains = [_evaluate_frozen(child) for child in module.children()]
    if any(trains) or any(p.requires_grad for p in module.parameters(recurse=False)):
        return True
    if any(True for _ in module.parameters()):
        for inner in module.modules():
            checkpoints = getattr(inner, "gradient_checkpointing", False) is True
            inner.training = checkpoints or isinstance(inner, nn.Linear)
    return False


def keep_strided_layers(parts: Mapping[str, nn.Module]) -> None:
    """Have adapters that shorten what an encoder gives run all of their layers (in place).

    In training mode wav2vec 2.0's skip each at random (`layerdrop`), and an item then gives more features than it has
    placeholders.  Their layers stay in training mode.
    """
    for part in parts.values():
        for module in part.modules():
            if type(module).__name__.endswith("Adapter") and hasattr(module, "layerdrop"):
                module.training = False


def evaluate_frozen_layers_under_checkpointing(model: nn.Module) -> None:
    """Have checkpointing layers run in evaluation mode while they are frozen.

    Layers learn from their training mode that they are to checkpoint, so frozen ones stay in it (see
    `keep_frozen_in_eval`); dropout that a layer applies by itself must be off all the same.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        # Of its own layer, and not a closure: a copy of the model keeps to its own layers.
        layer._gradient_checkpointing_func = functools.partial(_checkpoint, layer._gradient_checkpointing_func, layer)


def require_grads(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook that has floating-point outputs require gradients, however many a module gives."""
    for value in tree_flatten(output)[0]:
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(True)


def _checkpoint(checkpoint: Callable, layer: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    if any(p.requires_grad for p in layer.parameters()):
        return checkpoint(function, *args, **kwargs)

    def evaluated(*inner):
        layer.training = False
        try:
            return function(*inner)
        finally:
            layer.training = True

    return checkpoint(evaluated, *args, **kwargs)
