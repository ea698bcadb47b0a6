"""Checkpoints that refer to other repositories for their weights: the package makes them."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..code_folder import needs_package


def write_reference(
    model: PreTrainedModel,
    folder: str,
    referenced: Collection[str],
    bases: Mapping[str, str] | None,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """ImportError: what to install."""
    raise needs_package("What stores a model by reference (embed=False)")
