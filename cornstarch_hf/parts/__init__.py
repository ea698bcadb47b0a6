"""The ground: between names in a configuration and live things, and what transformers itself leaves to be done.

Imports nothing of the package but `limits`; every other room may import its files.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "register_callback": "registries",
    "register_encoder_type": "known_encoders",
    "register_feature_count": "registries",
    "register_projector": "registries",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the keys are texts


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
