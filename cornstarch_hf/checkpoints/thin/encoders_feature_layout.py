"""Ordinary items of encoders, which the package knows."""

from typing import Any

from torch import Tensor

from ...checkpoints.code_folder import needs_package


def find_stand_in(model: Any, name: str) -> dict[str, Tensor]:
    if model.encoders[name].stand_in is None:
        raise needs_package(f"What stands in for an item of {name}, of which this step has none")
    return model.encoders[name].stand_in
