"""What counting needs of live encoders and a configuration cannot hold: callbacks and projections that are not registered.

Never an encoder, and no weights: a processor keeps these, and travels to other processes with them.
"""

import copy
import pickle
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .callbacks import SLOTS, check_callbacks_storable, describe_callback
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import CUSTOM_PROJECTION
from .encoders import ModalEncoderModule
from .module_specs import NotStorable
from .projectors import MultimodalProjector, describe_projection
from .shape_probe import weights_to_meta


class OwnParts:
    """Of one modality, what its configuration cannot hold.

    Attributes:
        name: of the modality.
        callbacks: by their places; modules among them without weights.
        projector: without weights, None where its configuration tells all of it.
    """

    def __init__(self, name: str, callbacks: Mapping[str, Callable], projector: MultimodalProjector | None):
        self.name, self.callbacks, self.projector = name, dict(callbacks), projector

    def put_into(self, encoder: ModalEncoderModule) -> None:
        """Give an encoder that was built from the configuration copies of these parts (in place)."""
        if self.projector is not None:
            encoder.projector = copy.deepcopy(self.projector)
        for slot, callback in self.callbacks.items():
            setattr(encoder, slot, copy.deepcopy(callback) if isinstance(callback, nn.Module) else callback)

    def __getstate__(self) -> dict[str, Any]:
        if not _pickled_by_value():
            self._check_picklable()
        return dict(self.__dict__)

    def _check_picklable(self) -> None:
        parts = {**self.callbacks, "projector": self.projector}
        for place, part in parts.items():
            try:
                pickle.dumps(part)
            except Exception as error:
                raise TypeError(
                    f"{self.name}.{place} cannot be pickled for another process ({type(error).__name__}: {str(error)[:150]}): "
                    "define it at the top of a module that the other process can import, or make it known by "
                    "register_callback(name, fn) or register_projector(name, cls) before the processor is built."
                ) from error


def _pickled_by_value() -> bool:
    """Whether the pickle is being made by what can hold a lambda as well (a fingerprint of datasets), or for a copy."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if {"copy", "dill", "cloudpickle"} & set(str(frame.f_globals.get("__name__")).split(".")):
            return True
        frame = frame.f_back
    return False


def settle(config: MultimodalConfig, encoders: Mapping[str, ModalEncoderModule]) -> dict[str, OwnParts]:
    """Write the callbacks and projections of live encoders into a configuration (in place).

    Args:
        config: of their model, or a copy.
        encoders: by name.

    Returns:
        what the configuration cannot hold, of those encoders that have such parts.
    """
    found = {}
    for name, encoder in encoders.items():
        described, own = {}, {}
        for slot, callback in encoder.callbacks.items():
            if callback is None:
                continue
            try:
                described[slot] = describe_callback(callback)
            except NotStorable:
                own[slot] = _without_weights(callback) if isinstance(callback, nn.Module) else callback
        config.modality(name)["callbacks"] = described
        storable = _describe_projector(config, name, encoder.projector)
        if own or not storable:
            found[name] = OwnParts(name, own, None if storable else _without_weights(encoder.projector))
    return found


def settle_registered(config: MultimodalConfig, own: OwnParts) -> None:
    """Write parts into a configuration that have been registered since (in place).

    Raises:
        ValueError: a callback is still not registered; names the remedy.
    """
    callbacks = config.modality(own.name)["callbacks"] | check_callbacks_storable({**own.callbacks}, own.name)
    config.modality(own.name)["callbacks"] = {slot: callbacks[slot] for slot in SLOTS if slot in callbacks}
    if own.projector is not None:
        _describe_projector(config, own.name, own.projector)


def _describe_projector(config: MultimodalConfig, name: str, projector: Any) -> bool:
    """Say in a configuration what the projection is (in place); whether it can be said."""
    described: Any = getattr(config, f"{name}_projector_config")
    if projector.projection is None or described.projection_type != CUSTOM_PROJECTION:
        return True  # of a type that it was built by, or found to be when it was wrapped
    kind, options = describe_projection(projector.projection, projector.config)
    described.projection_type, described.projection_kwargs = kind, copy.deepcopy(options)
    return kind != CUSTOM_PROJECTION


def _without_weights(module: Any) -> Any:
    """A copy whose parameters are on the meta device; the weights themselves are never copied."""
    moved: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()
    }
    return weights_to_meta(copy.deepcopy(module, moved))
