"""Counts the places where a program waits for its device; on a CPU too, by the operations that would wait.

Used by tests and, by its path, by the benchmarks.  What waits on a CUDA device is what `torch.cuda.set_sync_debug_mode` reports: a
value that Python reads, a result whose size hangs on values, and a copy of Python's numbers to the device.
"""

import traceback
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that read a value, or whose result is as large as values say.
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
SIZED = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "argwhere"}
# Methods that bring a tensor to Python or to the CPU; where it lies on the CPU already, no operation tells of them.
BROUGHT = {"tolist", "numpy", "cpu", "__array__"}
COPY = "tensor from numbers"  # to the device
PACKAGES = ("cornstarch_hf", "transformers", "accelerate")


def where() -> str:
    """The innermost line of a package that is asked about: ``file:line code``."""
    lines = [f for f in traceback.extract_stack() if any(name in f.filename for name in PACKAGES)]
    return f"{lines[-1].filename.rsplit('/', 1)[-1]}:{lines[-1].lineno} {lines[-1].line}" if lines else "outside"


def waits_for_sizes(name: str, overload: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the size of what an operation works on hangs on values."""
    if name == "repeat_interleave":  # by counts in a tensor, unless their sum is said
        return "Tensor" in overload and kwargs.get("output_size") is None
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return name in SIZED
    # A mask of bools as an index; one number put there fills it, which needs no size.
    masks = [t for t in args[1] if t is not None and t.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and (name == "index" or args[2].numel() != 1)


class Operations(TorchDispatchMode):
    """Notes operations that wait."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        # `torch.tensor([...], device=...)`: Python's numbers go to the device; an empty tensor has none.
        copied = name == "lift_fresh" and args[0].numel() > 0
        if copied or name in READS or waits_for_sizes(name, function._overloadname, args, kwargs):
            self.seen.append(f"{COPY if copied else name} in {where()}")
        return function(*args, **kwargs)


class Methods(TorchFunctionMode):
    """Notes methods of tensors that wait."""

    def __init__(self, seen: list[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        moved = name == "to" and "cpu" in [x for x in (*args[1:], *(kwargs or {}).values()) if isinstance(x, str)]
        if moved or name in BROUGHT:
            self.seen.append(f"{name} in {where()}")
        before = len(self.seen)
        result = function(*args, **(kwargs or {}))
        if name == "__setitem__" and isinstance(args[2], (bool, int, float)):  # on a device one number is filled in
            self.seen[before:] = [text for text in self.seen[before:] if not text.startswith(COPY)]
        return result


@contextmanager
def counted():
    """A list that fills with the waits of what runs inside, one text each: the operation and the line of code."""
    seen: list[str] = []
    with Methods(seen), Operations(seen):
        yield seen


def waits_of(run: Callable[[], Any]) -> list[str]:
    """The waits of one run, one text each."""
    with counted() as seen:
        run()
    return seen
