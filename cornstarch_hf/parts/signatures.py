"""A `forward` whose signature names the inputs of an instance's encoders: Trainer drops others, `generate` and PEFT read it."""

import copy
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


# Of instances, by the method's name: what its signature was made by, and the function that has it.
_MADE: Any = weakref.WeakKeyDictionary()


class PerInstanceSignature:
    """Descriptor for a method whose signature an instance completes.

    The instance's ``signature_changes(method_name)`` gives the parameters to remove and to add, or None if it does not
    have the method at all.  One that has ``signature_state()`` is asked for them again only when that is another: values that
    are compared, and objects that have to be the same.  Nothing is stored on the instance: it pickles, and may hold a
    `forward` of its own.

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
        if (state := getattr(instance, "signature_state", None)) is None:
            return types.MethodType(self._completed(instance), instance)
        values, same = state()  # for every call of a model, so this is quick
        made = _MADE.setdefault(instance, {})
        known = made.get(self.name)
        if known is None or known[0] != values or any(ref() is not it for ref, it in zip(known[1], same, strict=True)):
            known = copy.deepcopy(values), [weakref.ref(each) for each in same], self._completed(instance)
            made[self.name] = known
        return types.MethodType(known[2], instance)

    def _completed(self, instance: Any) -> Callable:
        changes = instance.signature_changes(self.name)
        if changes is None:
            raise AttributeError(f"{type(instance).__name__!r} object has no attribute {self.name!r}")
        return with_signature(self.function, tuple(sorted(set(changes[0]))), tuple(dict.fromkeys(changes[1])))


_KNOWN: Any = weakref.WeakKeyDictionary()  # of functions that are methods: what their signature goes by, and parameters
# Those with a name, and whether there is ``**kwargs``.
Parameters = tuple[Mapping[str, inspect.Parameter], bool]


def _named(signature: inspect.Signature) -> Parameters:
    every = signature.parameters
    named = {n: p for n, p in every.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return types.MappingProxyType(named), any(p.kind is p.VAR_KEYWORD for p in every.values())


def _parameters(module: nn.Module) -> Parameters:
    """The parameters of a module's `forward`, looked up once per function: it takes as long as a small layer runs."""
    # PEFT's own `forward` is ``(*args, **kwargs)``, which would take anything.
    forward = unwrapped(module).forward
    function = getattr(forward, "__func__", None)
    # What somebody has put on the instance may be anything; and a tracer would guard what is kept of all functions.
    if not isinstance(function, types.FunctionType) or torch.compiler.is_compiling():
        return _named(inspect.signature(forward))
    told = (function.__code__, vars(function).get("__signature__"))
    known = _KNOWN.get(function)
    if known is None or known[0] is not told[0] or known[1] is not told[1]:
        known = _KNOWN[function] = (*told, _named(inspect.signature(forward)))
    return known[2]


def forward_function(module: nn.Module) -> Any:
    """What the parameters of a module's `forward` are those of: a function, or what somebody has put in its place."""
    forward = unwrapped(module).forward
    return getattr(forward, "__func__", forward)


def forward_parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Named parameters of a module's `forward`; of a PEFT wrapper, of the model inside."""
    return _parameters(module)[0]


def takes_any_keyword(module: nn.Module) -> bool:
    """Whether a module's `forward` has ``**kwargs``."""
    return _parameters(module)[1]


def accepts(module: nn.Module, name: str) -> bool:
    """Whether a module's `forward` takes a keyword."""
    named, others = _parameters(module)
    return others or name in named
