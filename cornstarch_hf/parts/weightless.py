"""Build modules without weights, to learn names, shapes and tables, and run them dry: seen by this thread alone."""

import contextlib
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_utils import get_torch_context_manager_or_global_device

from .build_bounds import BoundedTensors
from .names import modules_by_name
from .threads import DRAWS_IN_PLACE, PrivateRandom, ThreadDispatchMode, on_meta, run_privately

# transformers builds on meta too (`init_empty_weights`, `torch.device("meta")`), but then computed tables (rotary
# frequencies, masks) are lost, and while it builds it replaces the functions of `torch.nn.init` and the default dtype of
# the whole process, so that another thread's layers stay uninitialised.  Modes of this thread do the same work here:
# nothing of torch or transformers is patched, and no random number of anybody else is drawn.

# Both modules: transformers puts its own in place of torch's while it initialises a model.
_INITIALIZERS = frozenset(
    function
    for module in (torch.nn.init, initialization)
    for name, function in vars(module).items()
    if name.endswith("_") and not name.startswith("_")
)
# `torch.nn.Module.register_parameter` looks at a parameter's `grad_fn`: where a mode sees that it becomes a module's.
_GRAD_FN = Tensor.grad_fn.__get__
_FACTORIES = _device_constructors()
# Functions of `torch.nn.init` that a mode sees, and the methods that the others use.
_FILLS = frozenset(["uniform_", "normal_", "constant_", "trunc_normal_", "kaiming_uniform_", "zero_", "fill_"])
_current = threading.local()


def _filled(args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that an initialiser is to fill, its first argument."""
    return args[0] if args else kwargs.get("tensor")


class WithoutInitializers(TorchFunctionMode):
    """Within this mode layers do not initialise meta tensors, which have no values: to try takes much of a build's time."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = _filled(args, kwargs) if func in _INITIALIZERS else None
        return tensor if isinstance(tensor, Tensor) and tensor.is_meta else func(*args, **kwargs)


class KeepsInitialized(TorchFunctionMode):
    """Within this mode tensors that are marked as initialised keep their values: as in transformers'
    `guard_torch_init_functions`, which replaces functions of torch for all threads."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = _filled(args, kwargs) if getattr(func, "__name__", "") in _FILLS else None
        return tensor if getattr(tensor, "_is_hf_initialized", False) else func(*args, **kwargs)


class _Weightless(PrivateRandom):
    """Within this mode parameters are on meta as soon as a module has them, and nothing is initialised."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _GRAD_FN:
            _to_meta(args[0])
        elif func in _INITIALIZERS or func in DRAWS_IN_PLACE:
            tensor = _filled(args, kwargs)
            if isinstance(tensor, nn.Parameter) or tensor.is_meta:
                return tensor
        elif func in _FACTORIES and kwargs.get("device") is None and not (args and isinstance(args[0], Tensor)):
            # Made from nothing, whatever device is the default one; memory that is never touched costs nothing.
            kwargs["device"] = "meta" if func is torch.tensor and _transformers_asks(args, kwargs) else "cpu"
        return super().__torch_function__(func, types, args, kwargs)


def _to_meta(parameter: Any) -> None:
    """Put a parameter on meta, itself and not a copy of it: other places may hold it already."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or getattr(parameter, "_is_hf_initialized", False):
        return  # what has its values is a live module's, whose tie is made again
    twin = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    twin.__dict__.update(parameter.__dict__)
    with contextlib.suppress(RuntimeError):  # one that something else refers to weakly stays until all is built
        torch.utils.swap_tensors(parameter, twin)


def _transformers_asks(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers makes an empty tensor to see where a model is built; on meta it initialises nothing."""
    if len(args) != 1 or not isinstance(args[0], list) or args[0] or set(kwargs) - {"device"}:
        return False
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back  # up through the modes, to whoever called `torch.tensor([])`
    return frame.f_code is get_torch_context_manager_or_global_device.__code__


def initialize_weights(model: Any) -> None:
    """Initialise what of a model is not yet, as transformers' method of that name does, for this thread alone."""
    custom = model.is_custom_code()

    def initialize(module: Any, fill: Any) -> None:  # children first, models in it as their own classes do
        for child in module.children():  # a child that is no model is filled by the nearest model around it
            initialize(child, getattr(child, "_initialize_weights", fill))
        fill(module, is_custom_code=custom)

    with torch.no_grad(), KeepsInitialized():
        initialize(model, model._initialize_weights)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Modules made here by this thread have parameters on the meta device, and real buffers and tables."""
    before, _current.building = is_building(), True
    try:  # one mode is enough: parts are built within the building of the whole
        with contextlib.nullcontext() if before else _Weightless():
            yield
    finally:
        _current.building = before


def is_building() -> bool:
    """Whether this thread is within `without_weights`."""
    return getattr(_current, "building", False)


def build_without_weights(build: Callable[[], Any], live: Collection[nn.Module] = ()) -> Any:
    """Build a module with its parameters on the meta device; its buffers and tables are real and filled.

    Modules in `live`, which were there before, stay as they are.
    """
    with without_weights(), torch.no_grad():
        made = build()
        _fill_buffers(made, None, frozenset(live))
    return parameters_to_meta(made, live=live)  # those that could not be swapped while they were made


def _fill_buffers(module: nn.Module, owner: Any, live: Collection[nn.Module]) -> None:
    """Give buffers the values of their model's class (`owner` is the nearest model), as transformers does after building."""
    if module in live:
        return
    owner = module if isinstance(module, PreTrainedModel) else owner
    real = any(buffer is not None and not buffer.is_meta for buffer in module._buffers.values())
    if real and owner is not None and not getattr(module, "_is_hf_initialized", False):
        owner._init_weights(module)
    for child in module.children():
        _fill_buffers(child, owner, live)


def parameters_to_meta(
    module: nn.Module, compute_dtype: torch.dtype | None = None, live: Collection[nn.Module] = ()
) -> Any:
    """Move a module's parameters to the meta device (in place), shared ones shared, but for modules in `live`; with
    `compute_dtype` floating-point ones get that dtype, and none needs gradients."""
    moved: dict[int, nn.Parameter] = {}
    for child in dict.fromkeys(child for _, child in modules_by_name(module, live)):
        for name, parameter in child._parameters.items():
            if parameter is None or (parameter.is_meta and compute_dtype is None):
                continue
            if id(parameter) not in moved:
                dtype = compute_dtype if parameter.is_floating_point() else None
                trains = parameter.requires_grad and compute_dtype is None
                moved[id(parameter)] = nn.Parameter(parameter.detach().to("meta", dtype), trains)
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
    """A configuration whose parts name no dtype (in place): one of a part would be the whole process's while it is built."""
    pending, seen = [config], set()
    while pending:
        part = pending.pop()
        if isinstance(part, PreTrainedConfig) and id(part) not in seen:
            seen.add(id(part))
            part.dtype = None
            pending += vars(part).values()
    return config


# ---- dry runs: how many features a module gives, and how wide they are, without its weights or its arithmetic.  torch's
# fake tensors would hide values that code branches on (lengths, positions, masks), so those are computed for real here.


class ShapesOnly(ThreadDispatchMode):
    """Within this mode an operation on any meta tensor gives a meta tensor, and one on real tensors is computed.

    Tensors made from nothing (`torch.arange(n, device=features.device)`) are real: they hold positions and lengths.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not any(isinstance(x, Tensor) and x.is_meta for x in tree_flatten((args, kwargs))[0]):
            return run_privately(func, args, _real(kwargs), self.generator)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [_as_positions(index) for index in args[1]])
        args, kwargs = tree_map(on_meta, (args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


class RealConstants(TorchFunctionMode):
    """Within this mode tensors made from Python numbers are real, on the CPU, whatever device they are asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        constants = func in (torch.tensor, torch.as_tensor, torch.asarray)
        return func(*args, **_real(kwargs or {}) if constants else kwargs or {})


def _real(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that ask for the CPU where they asked for the meta device."""
    device = kwargs.get("device")
    return kwargs if device is None or torch.device(device).type != "meta" else kwargs | {"device": torch.device("cpu")}


def _as_positions(index: Tensor | None) -> Tensor | None:
    # A boolean index selects as many rows as it has true entries, which only real data can tell.
    is_mask = isinstance(index, Tensor) and index.dtype == torch.bool and index.ndim == 1 and not index.is_meta
    return index.nonzero()[:, 0] if is_mask else index


def to_shapes(value: Any) -> Any:
    """Floating-point tensors on the meta device, everything else unchanged (through lists and dicts)."""
    return tree_map(lambda x: on_meta(x) if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def weights_to_meta(module: nn.Module) -> nn.Module:
    """Move a module's parameters, as float32, and persistent buffers to the meta device (in place); other buffers stay real."""
    # As most inputs are: shapes do not depend on the dtype, and mixed ones could not be computed with.
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                child._buffers[name] = to_shapes(buffer)
    return parameters_to_meta(module, torch.float32)


def dry_run(module: Callable, inputs: dict[str, Any]) -> Any:
    """Call a module, or a method of it, whose weights are on meta; floating-point results are on meta too.

    Raises what the module raises, e.g. where it reads a feature's value.
    """
    shapes = to_shapes(inputs)  # before the modes begin: within them a move of real data to meta stays real
    with torch.no_grad(), BoundedTensors(), RealConstants(), ShapesOnly():
        return module(**shapes)
