"""Composing and describing take the package; a checkpoint's own code builds what its configuration says."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ...checkpoints.code_folder import needs_package
from ...configuration_multimodal import MultimodalConfig
from ...encoders.module import ModalEncoderModule


def compose_config(
    encoders: Mapping[str, ModalEncoderModule],
    language_model: PreTrainedModel,
    init_projector_type: str = "linear",
    init_activation: str = "gelu",
    rules: Mapping[str, Any] | None = None,
) -> MultimodalConfig:
    raise needs_package("What composes models of parts")


def describe_model(model: Any) -> str:
    raise needs_package("The table of a model's parts")
