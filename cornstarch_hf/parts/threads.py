"""What lets threads work beside each other: modes of torch that hold in one thread alone, and a lock that travels."""

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
_LIKE = {torch.rand_like: Tensor.uniform_, torch.randn_like: Tensor.normal_, torch.randint_like: Tensor.random_}
_RENEWING = threading.Lock()


class TravellingLock:
    """A lock entered by ``with``, again by the thread that holds it; pickled, copied or forked it is a free one of its own."""

    def __init__(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        # A fork copies a held lock, but not the thread that would release it: the child starts with a free one.
        if self._process != os.getpid():
            with _RENEWING:  # of several threads that come first, one makes the lock that all take
                if self._process != os.getpid():
                    self._lock, self._process = threading.RLock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, tuple]:
        return TravellingLock, ()


# torch keeps two stacks of modes, both of them per thread.  Entering a `TorchFunctionMode` touches its stack alone.
# Entering a `TorchDispatchMode` also writes flags of the process and restores them on leaving: where two threads overlap,
# the one that leaves last restores what the other had set, and the flags stay set for good.  So `ThreadDispatchMode`
# pushes itself on the stack and leaves the flags alone.


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
        kwargs = dict(kwargs or {})
        draws = func in _DRAWS or func in DRAWS_IN_PLACE or func in _LIKE
        draws = draws and kwargs.get("generator") is None
        devices = [*(x.device for x in args if isinstance(x, Tensor)), kwargs.get("device")] if draws else []
        # The generator is the CPU's, and does not draw on other devices.
        if draws and all(device is None or torch.device(device).type == "cpu" for device in devices):
            if func in _LIKE:
                bounds = [*args[1:], *(kwargs.pop(key) for key in ("low", "high") if key in kwargs)]
                bounds = [0, *bounds] if len(bounds) == 1 else bounds  # `randint_like(x, 7)` draws from 0 on
                return _LIKE[func](torch.empty_like(*args[:1], **kwargs), *bounds, generator=self.generator)
            kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def run_privately(func: Any, args: Any, kwargs: dict[str, Any], generator: torch.Generator) -> Any:
    """Run an operation (an overload, as dispatch modes get it) on tensors of the CPU; what it draws is the generator's.

    The few that take none (dropout) give a meta tensor: nobody can tell its values beforehand.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
        return func(*args, **kwargs)
    taken = {argument.name for argument in func._schema.arguments}
    if "generator" not in taken:
        # An overload without a generator may have a twin with one: `rand` has `rand.generator`, `randint.low` has
        # `randint.low_generator`, others have it in the middle of their name.
        own = func._overloadname
        first, _, rest = own.partition("_")
        twins = ("generator",) if own == "default" else (f"{own}_generator", f"{first}_generator_{rest}")
        found = [name for name in twins if name in func.overloadpacket.overloads()]
        if not found:
            device = {"device": torch.device("meta")} if "device" in taken else {}
            return func(*map(on_meta, args), **kwargs | device)
        func = getattr(func.overloadpacket, found[0])
    return func(*args, **kwargs | {"generator": generator})


def on_meta(value: Any) -> Any:
    """A tensor on the meta device: its shape, dtype and strides without its values.  Anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) else value
