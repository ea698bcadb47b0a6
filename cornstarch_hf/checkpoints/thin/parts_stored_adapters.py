"""Adapters inside parts, of which this checkpoint has none."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...checkpoints.code_folder import needs_package
from ...parts.adapters import is_wrapped, tuner_layers


def record_adapters(config: Any, encoders: Mapping[str, Any], language_model: nn.Module) -> None:
    """Say that there are no adapters; ImportError where a part has been wrapped since."""
    if any(map(is_wrapped, [language_model, *(encoder.module for encoder in encoders.values())])):
        raise needs_package("What stores adapters inside parts")
    config.adapters = None


def check_not_injected(model: nn.Module, where: str) -> None:
    """ImportError where a part has been given adapters since."""
    if tuner_layers(model):
        raise needs_package(f"What stores the adapters of {where}")


def check_no_views(model: nn.Module) -> None: ...  # of adapters, of which there are none


def wrap_again(model: PreTrainedModel, described: dict[str, Any] | None, where: str) -> nn.Module:
    """The model itself; ImportError where a configuration describes adapters."""
    if described:
        raise needs_package(f"What builds the adapters of {where}")
    return model
