"""What counting needs of live encoders and a configuration cannot hold: callbacks and projections that are not registered.

Never an encoder, and no weights: a processor keeps these, and travels to other processes with them.  What a function closes
over cannot be seen, and travels where it can be pickled at all.
"""

import copy
import functools
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_multimodal import MultimodalConfig
from ..configuration_projector import CUSTOM_PROJECTION
from ..parts.stored_modules import SLOTS, NotStorable, check_callbacks_storable, describe_callback
from ..parts.weightless import weights_to_meta
from ..projectors.projector import MultimodalProjector, describe_projection
from .module import ModalEncoderModule


@dataclass(eq=False)
class OwnParts:
    """Of one modality, what its configuration cannot hold."""

    name: str
    callbacks: dict[str, Callable]  # by their places; modules among them without weights
    projector: MultimodalProjector | None  # without weights, None where its configuration tells all of it

    def put_into(self, encoder: ModalEncoderModule) -> None:
        """Give an encoder that was built from the configuration copies of these parts (in place)."""
        if self.projector is not None:
            encoder.projector = copy.deepcopy(self.projector)
        for slot, callback in self.callbacks.items():
            setattr(encoder, slot, copy.deepcopy(callback) if isinstance(callback, nn.Module) else callback)

    def __getstate__(self) -> dict[str, Any]:
        parts = {**self.callbacks, "projector": self.projector}
        for place, part in {} if _pickled_by_value() else parts.items():
            try:
                pickle.dumps(part)
            except Exception as error:  # which would not say which part it is
                raise TypeError(
                    f"{self.name}.{place} cannot be pickled for another process ({type(error).__name__}: {str(error)[:150]}): "
                    "define it at the top of a module that the other process can import, or make it known by "
                    "register_callback(name, fn) or register_projector(name, cls) before the processor is built."
                ) from error
        callbacks = {slot: _without_tensors(callback) for slot, callback in self.callbacks.items()}
        return {**self.__dict__, "callbacks": callbacks, "projector": _without_tensors(self.projector)}


def _pickled_by_value() -> bool:
    """Whether the pickle is being made by what can hold a lambda as well (a fingerprint of datasets), or for a copy."""
    callers = traceback.walk_stack(sys._getframe(1))  # who makes the pickle is among them
    packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in callers}
    return not packages.isdisjoint(("copy", "dill", "cloudpickle"))


def settle(config: MultimodalConfig, encoders: Mapping[str, ModalEncoderModule]) -> dict[str, OwnParts]:
    """Write callbacks and projections of live encoders into a configuration (in place); gives back what it cannot hold."""
    found = {}
    for name, encoder in encoders.items():
        described, own = {}, {}
        for slot, callback in encoder.own_callbacks.items():
            if callback is None:
                continue
            try:
                described[slot] = describe_callback(callback)
            except NotStorable:
                own[slot] = _without_weights(callback)
        config.modality(name)["callbacks"] = described
        storable = _describe_projector(config, name, encoder.projector)
        if own or not storable:
            found[name] = OwnParts(name, own, None if storable else _without_weights(encoder.projector))
    return found


def settle_registered(config: MultimodalConfig, own: OwnParts) -> None:
    """Write parts into a configuration that have been registered since (in place); ValueError for one that has not been."""
    callbacks = config.modality(own.name)["callbacks"] | check_callbacks_storable({**own.callbacks}, own.name)
    # In the order in which they run.
    config.modality(own.name)["callbacks"] = {slot: callbacks[slot] for slot in SLOTS if slot in callbacks}
    if own.projector is not None:
        _describe_projector(config, own.name, own.projector)


def _describe_projector(config: MultimodalConfig, name: str, projector: Any) -> bool:
    """Say in a configuration what the projection is (in place); whether it can be said."""
    described: Any = getattr(config, f"{name}_projector_config")
    if projector.projection is None or described.projection_type != CUSTOM_PROJECTION:
        return True  # of a type that it was built by, or found to be when it was wrapped
    try:
        kind, options = describe_projection(projector.projection, projector.config)
    except NotStorable:
        return False
    described.projection_type, described.projection_kwargs = kind, copy.deepcopy(options)
    return True


def _without_weights(part: Any) -> Any:
    """A copy in which the parameters of all modules are on the meta device; what holds no module is given back as it is."""
    parameters = [p for module in _modules_in(part) for p in module.parameters()]
    # deepcopy takes what its memo names for copied already: so the weights are replaced before they would be.
    moved = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in parameters}
    copied = copy.deepcopy(part, moved) if _modules_in(part) else part
    for module in _modules_in(copied):
        weights_to_meta(module)
    return copied


def _without_tensors(part: Any) -> Any:
    """A copy to be pickled, in which meta tensors are told by their shapes: a fingerprint reads the values of tensors."""
    modules = _modules_in(part)
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers()) if x.is_meta]
    return copy.deepcopy(part, {id(x): _MetaTensor(x) for x in tensors}) if modules else part


def _modules_in(part: Any) -> list[nn.Module]:
    """The outermost modules that a callback is, is a method of, or holds."""
    found: list[nn.Module] = []
    pending, seen = [part], set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue  # objects may hold one another in a circle
        seen.add(id(part))
        if isinstance(part, nn.Module):
            found.append(part)
        elif isinstance(part, functools.partial):
            pending += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, MethodType):
            pending.append(part.__self__)
        elif isinstance(part, (list, tuple, set, frozenset)):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
        elif not isinstance(part, (FunctionType, type)):  # any other object that can be called
            pending += getattr(part, "__dict__", {}).values()
    return found


class _MetaTensor:
    """Stands for a meta tensor in a pickle, from which that comes back."""

    def __init__(self, tensor: Tensor):
        self.told = (type(tensor) is nn.Parameter, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def __reduce__(self) -> tuple[Any, tuple]:
        return _meta_tensor, self.told


def _meta_tensor(is_parameter: bool, shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return nn.Parameter(tensor, requires_grad) if is_parameter else tensor
