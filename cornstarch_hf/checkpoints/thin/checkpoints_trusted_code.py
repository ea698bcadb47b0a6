"""Code of other checkpoints, which this code does not take over: the package does."""

from typing import Any


def with_shared_code(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options as they are."""
    return options


def load_shared_code(source: Any, auto_map: Any, options: dict[str, Any]) -> None: ...
