"""What lets threads work beside each other: modes of torch that hold in one thread alone, and a lock that travels.

`TorchFunctionMode` is such a one as it stands.  A dispatch mode is not: on its way in and out torch writes flags of the
process, which threads that overlap leave set.
"""

import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

# Functions that draw random numbers and take a generator.
DRAWS_IN_PLACE = frozenset(
    getattr(Tensor, f"{name}_")
    for name in ("normal", "uniform", "random", "bernoulli", "cauchy", "exponential", "geometric", "log_normal")
)
_DRAWS = frozenset(
    function
    for owner in (torch, Tensor)
    for name in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "binomial")
    if (function := getattr(owner, name, None)) is not None
) | {torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.kaiming_uniform_}

# Those that take none in every version of torch, and what fills a tensor as they do.
_LIKE = {
    torch.rand_like: Tensor.uniform_,
    torch.randn_like: Tensor.normal_,
    torch.randint_like: Tensor.random_,
}


_RENEWING = threading.Lock()


class TravellingLock:
    """A lock for what threads share, entered by ``with``, again by the thread that holds it.

    It may be pickled, copied and hashed with its owner, and the process may fork: each copy is a free lock of its own.
    """

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            with _RENEWING:  # of several threads that come first, one makes the lock that all take
                if self._process != os.getpid():  # whoever held it when the process forked is not in this one
                    self._lock, self._process = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, tuple]:
        return TravellingLock, ()


class ThreadDispatchMode(TorchDispatchMode):
    """A dispatch mode that is known to its own thread alone."""

    def __enter__(self):
        _push_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _pop_mode()


class PrivateRandom(TorchFunctionMode):
    """Within this mode random numbers come from a generator of its own: those that anybody else draws stay the same."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, dict(kwargs or {}))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call a function of torch; a random one with the generator, if nobody gave one."""
        if (func in _DRAWS or func in DRAWS_IN_PLACE) and kwargs.get("generator") is None and _on_cpu(args, kwargs):
            kwargs["generator"] = self.generator
        if func in _LIKE and kwargs.get("generator") is None and _on_cpu(args, kwargs):
            bounds = [*args[1:], *(kwargs.pop(key) for key in ("low", "high") if key in kwargs)]
            bounds = [0, *bounds] if len(bounds) == 1 else bounds
            return _LIKE[func](torch.empty_like(*args[:1], **kwargs), *bounds, generator=self.generator)
        return func(*args, **kwargs)


def _on_cpu(args: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return all(x.device.type == "cpu" for x in args if isinstance(x, Tensor)) and (
        device is None or torch.device(device).type == "cpu"
    )


def run_privately(func: Any, args: Any, kwargs: dict[str, Any], generator: torch.Generator) -> Any:
    """Run an operation on tensors of the CPU; what it draws comes from the generator.

    The few that take none (dropout) give a meta tensor: nobody can tell its values beforehand.

    Args:
        func: an overload, as a dispatch mode gets it.
        args, kwargs: of it.
        generator: whose numbers are drawn.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    if not any(argument.name == "generator" for argument in func._schema.arguments):
        variants = ("generator",) if func._overloadname == "default" else _names_with_generator(func._overloadname)
        found = [name for name in variants if name in func.overloadpacket.overloads()]
        if not found:
            return _drawn_on_meta(func, args, kwargs)
        func = getattr(func.overloadpacket, found[0])
    return func(*args, **kwargs, generator=generator)


def _names_with_generator(overload: str) -> tuple[str, ...]:
    first, _, rest = overload.partition("_")
    return f"{overload}_generator", f"{first}_generator_{rest}"


def _drawn_on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    on_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
    if any(argument.name == "device" for argument in func._schema.arguments):
        kwargs = kwargs | {"device": torch.device("meta")}
    return func(*on_meta, **kwargs)
