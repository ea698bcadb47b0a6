"""A `forward` whose signature names the inputs of an instance's encoders: Trainer drops others, `generate` and PEFT read it."""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .adapters import unwrapped


@functools.lru_cache(maxsize=256)
def with_signature(function: Callable, removed: tuple[str, ...], added: tuple[str, ...]) -> Callable:
    """A copy of a function whose signature lacks some parameters and has further keyword parameters (default None)."""
    # A function of its own and no wrapper: `torch.compile` traces it whole, and it costs no call.
    parts = (function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied = functools.update_wrapper(types.FunctionType(*parts), function)
    del copied.__wrapped__  # `inspect.signature` would follow it to the original
    copied.__kwdefaults__ = function.__kwdefaults__
    parameters = {p.name: p for p in inspect.signature(function).parameters.values() if p.name not in removed}
    new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in added if n not in parameters]
    # Stable, so that only ``**kwargs`` moves, behind the new ones.
    copied.__signature__ = inspect.Signature(sorted([*parameters.values(), *new], key=lambda p: p.kind))
    return copied


class PerInstanceSignature:
    """Descriptor for a method whose signature an instance completes.

    The instance's ``signature_changes(method_name)`` gives the parameters to remove and to add, or None if it does not
    have the method at all.  Nothing is stored on the instance: it pickles, and may hold a `forward` of its own.

    Args:
        on_class: whether the class itself shows the method; transformers looks at classes to learn what models do.
    """

    def __init__(self, function: Callable, on_class: bool = True):
        self.function, self.on_class = function, on_class
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object | None, owner: type | None = None) -> Callable:
        if instance is None:
            if not self.on_class:
                raise AttributeError(f"{self.name!r} exists on instances that have such an encoder only")
            return self.function
        if torch.compiler.is_compiling():  # a tracer needs no signature
            return functools.partial(self.function, instance)
        changes = instance.signature_changes(self.name)
        if changes is None:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self.name!r}")
        removed, added = tuple(sorted(set(changes[0]))), tuple(dict.fromkeys(changes[1]))
        return types.MethodType(with_signature(self.function, removed, added), instance)


_KNOWN: Any = weakref.WeakKeyDictionary()  # of functions that are methods: what their signature goes by, and parameters


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """All parameters of a module's `forward`, looked up once per function: it takes as long as a small layer runs."""
    # PEFT's own `forward` is ``(*args, **kwargs)``, which would take anything.
    forward = unwrapped(module).forward
    function = getattr(forward, "__func__", None)
    # What somebody has put on the instance may be anything; and a tracer would guard what is kept of all functions.
    if not isinstance(function, types.FunctionType) or torch.compiler.is_compiling():
        return inspect.signature(forward).parameters
    told = (function.__code__, vars(function).get("__signature__"))
    known, found = _KNOWN.get(function, (None, {}))
    if known is None or any(a is not b for a, b in zip(known, told, strict=True)):
        found = inspect.signature(forward).parameters
        _KNOWN[function] = told, found
    return found


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """Named parameters of a module's `forward`; of a PEFT wrapper, of the model inside."""
    return {n: p for n, p in _parameters(module).items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether a module's `forward` has ``**kwargs``."""
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(module).values())


def accepts(module: nn.Module, name: str) -> bool:
    """Whether a module's `forward` takes a keyword."""
    return name in forward_parameters(module) or takes_any_keyword(module)
