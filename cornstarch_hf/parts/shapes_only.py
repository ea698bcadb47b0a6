"""Run a module on shapes alone: weights and floating-point data on the meta device, everything else real.

Encoders compute positions, lengths and grids from integers; those stay real, so code that branches on them runs as
it would, while no arithmetic is done on features.  Knows no model and no configuration.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from .build_bounds import BoundedTensors
from .threads import ThreadDispatchMode, run_privately


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
        args, kwargs = tree_map(_to_meta, (args, kwargs))
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


def _to_meta(value: Any) -> Any:
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
