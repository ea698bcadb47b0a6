"""From an encoder's features to embeddings of the language model's width, fewer of them where a type reduces."""

from importlib import import_module
from typing import Any

_HOMES = {"MultimodalProjector": "projector"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the keys are texts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
