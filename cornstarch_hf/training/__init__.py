"""Batches with labels, groups of parameters, and counts of what was trained on."""

from importlib import import_module
from typing import Any

_HOMES = {"BatchMetrics": "batch_metrics", "MultimodalCollator": "collator", "parameter_groups": "optimizer_groups"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the keys are texts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
