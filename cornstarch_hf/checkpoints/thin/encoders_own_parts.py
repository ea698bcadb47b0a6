"""Callbacks and projections as a configuration names them; live ones that it cannot hold take the package."""

from collections.abc import Mapping

from ...checkpoints.code_folder import needs_package
from ...configuration_multimodal import MultimodalConfig
from ...configuration_projector import CUSTOM_PROJECTION
from ...encoders.module import ModalEncoderModule
from ...parts.stored_modules import check_callbacks_storable


class OwnParts:
    """Of one modality, what its configuration cannot hold; there is none."""


def settle(config: MultimodalConfig, encoders: Mapping[str, ModalEncoderModule]) -> dict[str, OwnParts]:
    """Write the callbacks of live encoders into a configuration (in place); ValueError for one that it cannot hold."""
    for name, encoder in encoders.items():
        config.modality(name)["callbacks"] = check_callbacks_storable(encoder.own_callbacks, name)
        if getattr(config, f"{name}_projector_config").projection_type == CUSTOM_PROJECTION:
            raise needs_package(f"What keeps the projection of {name}")
    return {}


def settle_registered(config: MultimodalConfig, own: OwnParts) -> None: ...
