"""Build modules without weights, for this thread alone: parameters on the meta device, buffers and tables real.

Nothing of torch or transformers is patched, no random number of anybody else is drawn, and the functions that
transformers replaces for the process while it initialises a model are left alone.  Knows no model; `dry_run` runs
what is built here.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_utils import get_torch_context_manager_or_global_device

from .build_bounds import BoundedTensors
from .threads import DRAWS_IN_PLACE, PrivateRandom, ThreadDispatchMode, run_privately

# transformers puts its own in place of torch's while it initialises a model.
_INITIALIZERS = frozenset(
    function
    for module in (torch.nn.init, initialization)
    for name, function in vars(module).items()
    if name.endswith("_") and not name.startswith("_")
)
# `torch.nn.Module.register_parameter` looks at a parameter's `grad_fn`: where a mode sees that it becomes a module's.
_GRAD_FN = Tensor.grad_fn.__get__
_FACTORIES = _device_constructors()
_current = threading.local()


class WithoutInitializers(TorchFunctionMode):
    """Within this mode layers do not initialise meta tensors: there are no values to draw, and the attempt takes much of
    the time in which a model is built on the meta device (by those of `torch.nn.init` that torch lets a mode see)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _Weightless(PrivateRandom):
    """Within this mode parameters are on meta as soon as a module has them, and nothing is initialised."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func == _GRAD_FN:
            _to_meta(args[0])
        elif func in _INITIALIZERS or func in DRAWS_IN_PLACE:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter) or tensor.is_meta:
                return tensor
        elif func in _FACTORIES and kwargs.get("device") is None and not _copies(args):
            # Whatever device is the default one; memory that is never touched costs nothing.
            kwargs["device"] = "meta" if func is torch.tensor and _transformers_asks(args, kwargs) else "cpu"
        return super().call(func, args, kwargs)


def _to_meta(parameter: Any) -> None:
    """Put a parameter on meta, itself and not a copy of it: other places may hold it already."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return
    twin = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    with contextlib.suppress(RuntimeError):  # one that something else refers to weakly stays until all is built
        torch.utils.swap_tensors(parameter, twin)


def _copies(args: Any) -> bool:
    """Whether a tensor is made of another one, on whose device it stays."""
    return bool(args) and isinstance(args[0], Tensor)


def _transformers_asks(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers makes an empty tensor to see on which device a model is built; it initialises none on meta."""
    if len(args) != 1 or not isinstance(args[0], list) or args[0] or set(kwargs) - {"device"}:
        return False
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name in ("__torch_function__", "call"):
        frame = frame.f_back
    return frame.f_code is get_torch_context_manager_or_global_device.__code__


# Functions of `torch.nn.init` that a mode sees, and the methods that the others use.
_FILLS = frozenset(["uniform_", "normal_", "constant_", "trunc_normal_", "kaiming_uniform_", "zero_", "fill_"])


class KeepsInitialized(TorchFunctionMode):
    """Within this mode tensors that are marked as initialised keep their values.

    As `transformers.initialization.guard_torch_init_functions`, which replaces functions of torch for all threads.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if getattr(tensor, "_is_hf_initialized", False):
                return tensor
        return func(*args, **kwargs)


def initialize_weights(model: Any) -> None:
    """Initialise what of a model is not yet, children first, models in it as their own classes do.

    As transformers' method of that name, for this thread alone.
    """
    with torch.no_grad(), KeepsInitialized():
        _initialize(model, model._initialize_weights, model.is_custom_code())


def _initialize(module: Any, fill: Any, custom: bool) -> None:
    for child in module.children():
        _initialize(child, getattr(child, "_initialize_weights", fill), custom)
    fill(module, is_custom_code=custom)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here by this thread have parameters on the meta device, and real buffers and tables."""
    before, _current.building = is_building(), True
    try:
        with contextlib.nullcontext() if before else _Weightless():
            yield
    finally:
        _current.building = before


def is_building() -> bool:
    """Whether this thread is within `without_weights`."""
    return getattr(_current, "building", False)


def build_without_weights(build: Callable[[], Any]) -> Any:
    """Build a module with its parameters on the meta device; its buffers and tables are real and filled.

    Args:
        build: gives the module.

    Raises:
        whatever `build` raises.
    """
    with without_weights(), torch.no_grad():
        made = build()
        _fill_buffers(made)
    return parameters_to_meta(made)


def _fill_buffers(made: nn.Module) -> None:
    """Give buffers what their model's class gives them beside the weights, which transformers does once a model is built."""
    pending: list[tuple[nn.Module, Any]] = [(made, None)]
    while pending:
        module, owner = pending.pop()
        owner = module if isinstance(module, PreTrainedModel) else owner
        pending += [(child, owner) for child in module.children()]
        real = any(buffer is not None and not buffer.is_meta for buffer in module._buffers.values())
        if real and owner is not None and not getattr(module, "_is_hf_initialized", False):
            owner._init_weights(module)


def parameters_to_meta(module: nn.Module) -> Any:
    """Move a module's parameters to the meta device (in place), shared ones shared; gives the module."""
    moved: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and not parameter.is_meta:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
                child._parameters[name] = moved[id(parameter)]
    return module


def with_plain_kernels(config: Any) -> Any:
    """A configuration whose attention and experts run on any device (in place): kernels do not take shapes alone."""
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    return config


def without_dtypes(config: Any) -> Any:
    """A configuration whose parts name no dtype (in place): transformers makes a part's dtype the default one of the whole
    process while it builds the part."""
    pending, seen = [config], set()
    while pending:
        part = pending.pop()
        if id(part) not in seen and isinstance(part, PreTrainedConfig):
            seen.add(id(part))
            part.dtype = None
            pending += vars(part).values()
    return config


class ShapesOnly(ThreadDispatchMode):
    """Within this mode an operation on any meta tensor gives a meta tensor, and one on real tensors is computed.

    Tensors made from nothing (`torch.arange(n, device=features.device)`) are made real, on the CPU: they hold
    positions and lengths.  Random numbers come from a generator of the mode's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_meta = any(x.is_meta for x in tensors)
        if not on_meta:
            if _is_meta(kwargs.get("device")):
                kwargs["device"] = torch.device("cpu")
            return run_privately(func, args, kwargs, self.generator)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_as_positions(index) for index in args[1]])
        args, kwargs = tree_map(_on_meta, (args, kwargs))
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


class RealConstants(TorchFunctionMode):
    """Within this mode tensors made from Python numbers are real, whatever device they are asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_meta(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value


def _as_positions(index: Tensor | None) -> Tensor | None:
    # A boolean index selects as many rows as it has true entries, which only real data can tell.
    if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
        return index.nonzero(as_tuple=True)[0] if index.ndim == 1 else index
    return index


def to_shapes(value: Any) -> Any:
    """Floating-point tensors on the meta device, everything else unchanged (through lists and dicts)."""
    return tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def weights_to_meta(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module's parameters and persistent buffers to the meta device (in place); other buffers stay real.

    Floating-point parameters become float32, as `to_shapes` leaves most inputs: shapes do not depend on it, and mixed
    dtypes could not be computed with.
    """
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
                child._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta", dtype), requires_grad=False)
        for name, buffer in child._buffers.items():
            persistent = name not in child._non_persistent_buffers_set
            if buffer is not None and persistent and buffer.is_floating_point():
                child._buffers[name] = buffer.to("meta")
    return module


def dry_run(module: Callable, inputs: dict[str, Any]) -> Any:
    """Call a module whose weights are on the meta device, or a method of it; floating-point data of the result is on meta.

    This thread alone is touched, and random numbers that the module draws leave those drawn elsewhere the same.

    Raises:
        whatever the module raises, e.g. where it reads a feature's value.
    """
    shapes = to_shapes(inputs)
    with torch.no_grad(), BoundedTensors(), RealConstants(), ShapesOnly():
        return module(**shapes)
