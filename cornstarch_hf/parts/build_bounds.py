"""While parts are built from a checkpoint's configuration: no endless number of layers, no huge tensor made.

Parameters are built on the meta device and cost nothing; tables and masks that a constructor computes are real, so the
size of each is found on the meta device first.
"""

import contextlib
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

from ..limits import cap, check
from .names import parameters_by_name
from .threads import ThreadDispatchMode, on_meta

Shapes = Mapping[str, tuple[int, ...]]
_active = threading.local()
_FACTORIES = _device_constructors()


class BoundedTensors(ThreadDispatchMode):
    """Within this mode operations make no more than `MAX_BUILD_BYTES` of real tensors in all (ValueError before that)."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if made := made_bytes(func, args, kwargs):
            self.made += made
            what = f"By {func} the bytes of tensors that the configuration asks to compute are"
            check(self.made, "MAX_BUILD_BYTES", what)
        return func(*args, **kwargs)


def made_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes of new memory that an operation of torch is about to fill."""
    return _bytes(func, args, kwargs) if _makes_real(func, args, kwargs) else 0


def _makes_real(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation fills new memory: it works on no meta tensor, reserves nothing and returns no view."""
    if any(isinstance(x, Tensor) and x.is_meta for x in args):  # nearly all of them: a quick look first
        return False
    device = kwargs.get("device")
    asks_meta = device is not None and torch.device(device).type == "meta"
    reserves = func._schema.name.startswith(("aten::empty", "aten::detach"))
    if asks_meta or reserves or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return False
    return not any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, kwargs)))


def _bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes of an operation's outputs, found by running it on the meta device; 0 where it cannot run there."""
    # The same operation without memory tells shapes and data types of its outputs.
    args, kwargs = tree_map(on_meta, (args, kwargs))
    device = {"device": "meta"} if any(argument.name == "device" for argument in func._schema.arguments) else {}
    try:
        outputs = func(*args, **kwargs | device)
    except ValueError:
        raise
    except Exception:  # what depends on values has no meta form; it is bounded by its inputs
        return 0
    return sum(x.numel() * x.element_size() for x in tree_leaves(outputs) if isinstance(x, Tensor))


def bounded_tensors(*configs: Any) -> Any:
    """A context of `BoundedTensors` within `build_guard`, where what is built from holds a number that could need it, or
    is not given.  Numbers up to `MAX_PLAIN_SIZE`, and sizes of stored tensors, need no bound."""
    expected = getattr(_active, "expected", None)
    if expected is None:
        return contextlib.nullcontext()
    sizes = {size for shape in (expected[0] or {}).values() for size in shape}  # a table of these is stored anyway
    return BoundedTensors() if not configs or _has_large(configs, sizes) else contextlib.nullcontext()


def _has_large(values: Any, sizes: set[int]) -> bool:
    """Whether a configuration names a number above `MAX_PLAIN_SIZE` that is no token's and no size of a stored tensor."""
    most, pending = cap("MAX_PLAIN_SIZE"), [("", values)]
    while pending:
        key, value = pending.pop()
        key = str(key)  # numbers are keys in the tables of labels
        if isinstance(value, int) and value > most and value not in sizes and not key.endswith(("_id", "_theta")):
            return True
        if isinstance(value, (list, tuple)):
            pending += [(key, item) for item in value]
        elif isinstance(value, Mapping) or hasattr(value, "model_type"):
            pending += (value if isinstance(value, Mapping) else vars(value)).items()
    return False


class _CountedTensors(TorchFunctionMode):
    """Within this mode no more than so many tensors are made: each layer with weights or tables makes some."""

    def __init__(self, stored: int) -> None:
        super().__init__()
        self.stored, self.made = stored, 0
        # A layer makes some tensors, computed ones too, for each that is stored.
        self.allowed = cap("MIN_MODULES") + cap("MAX_MODULES_PER_TENSOR") * stored

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _FACTORIES:
            self.made += 1
            if self.made > self.allowed:
                raise ValueError(
                    f"The configuration builds over {self.allowed:,} tensors, but the checkpoint holds {self.stored:,}: they "
                    "do not belong together. If that is meant, set cornstarch_hf.limits.MIN_MODULES higher."
                )
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def build_guard(shapes: Shapes | None = None, sized: bool = True, whose: str = "") -> Iterator[None]:
    """Bound what this thread builds within: layers by what is stored, computed tensors by `MAX_BUILD_BYTES` (ValueError).

    Args:
        shapes: of everything that will be loaded, by name; None where that is not known (nothing is compared then).
        sized: whether `check_built` compares shapes, not only names and numbers (not for quantized weights).
        whose: the file that describes what is built, with which each ValueError then begins.
    """
    before = getattr(_active, "expected", None)
    _active.expected = (shapes, sized)
    try:
        with _CountedTensors(len(shapes or ())):
            yield
    except ValueError as error:
        if whose in str(error):  # it is said already, or there is no file
            raise
        raise ValueError(f"{whose}: {error}") from error
    finally:
        _active.expected = before


def check_built(model: nn.Module) -> None:
    """Compare a model that was just built, its parameters named as in the checkpoint, with what `build_guard` was given.

    Raises:
        ValueError: tensors of other shapes than stored, or more elements without stored values than are plausible.
    """
    shapes, sized = getattr(_active, "expected", None) or (None, True)
    if shapes is None:
        return
    built = {n: p.shape for n, p in parameters_by_name(model)}
    wrong = sorted(n for n in built if n in shapes and sized and built[n] != tuple(shapes[n]))
    if wrong:
        examples = ", ".join(f"{n}: {tuple(built[n])} here, {tuple(shapes[n])} stored" for n in wrong[:3])
        raise ValueError(
            f"The configuration describes {len(wrong)} tensors of other shapes than the checkpoint holds ({examples}): they do "
            "not belong together. Restore the configuration that was saved with the weights."
        )
    # What is not stored may be tied to something that is, or be new, and then small.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = {n: math.prod(shape) for n, shape in built.items() if n not in shapes and n not in tied}
    stored, unstored = sum(map(math.prod, shapes.values())), sum(missing.values())
    if unstored > 8 * stored + cap("MAX_UNSTORED_ELEMENTS"):
        largest = max(missing, key=missing.__getitem__)
        raise ValueError(
            f"The configuration describes {len(missing)} tensors of {unstored:,} elements that the checkpoint does not hold "
            f"(it holds {stored:,} elements), largest {largest} {tuple(built[largest])}: they do not belong together."
        )


# What modules have themselves, and more values than any tensor has.
_HIDES, _MOST_VALUES = frozenset(dir(nn.Module())), 2**40


def checked_shapes(shapes: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """``{dtype: {name: shape}}`` of tensors that a file names, item by item; ValueError for what is none."""
    expected = "expected {dtype: {name: shape}}"
    if not isinstance(shapes, Mapping) or not all(isinstance(names, Mapping) for names in shapes.values()):
        raise ValueError(f"native_rest: {expected}, got {shapes!r:.200}.")
    for dtype, names in shapes.items():
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"native_rest names the dtype {dtype!r}, which torch does not have.")
        for name, shape in names.items():
            # Each part of a name becomes a module, or a buffer of one, and must hide nothing that modules have.
            if not all(part.isidentifier() or part.isdigit() for part in name.split(".")) or _HIDES & set(
                name.split(".")
            ):
                raise ValueError(f"native_rest names a tensor {name!r:.200}, which no module can have.")
            sizes = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n >= 0 for n in shape)
            if not sizes or math.prod(shape) > _MOST_VALUES:
                raise ValueError(f"native_rest: {name} has the shape {shape!r:.200}, expected sizes; {expected}.")
        yield dtype, names
