"""One folder to one commit on the Hub, with a card that says what the model is made of."""

from importlib import import_module
from typing import Any

_HOMES = {"push_to_hub": "push"}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the keys are texts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
