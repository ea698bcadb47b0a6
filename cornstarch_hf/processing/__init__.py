"""Raw inputs to what encoders and the language model take: media, the processors of single modalities, placeholders, chats.

Knows configurations; knows no encoder and no language model.
"""

from importlib import import_module
from typing import Any

_HOMES = {"PrecomputedFeaturesProcessor": "own_processors", "TimeSeriesProcessor": "own_processors"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the keys are texts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
