"""Processors run as they are: a checkpoint's own code bounds the images that it is given, and not what is made of them."""

import contextlib
from collections.abc import Mapping
from typing import Any


def bounded_processor(processor: Any, options: Mapping[str, Any], items: int, frames: int = 1) -> tuple[Any, Any]:
    """The processor, and a context that bounds nothing."""
    return processor, contextlib.nullcontext()


def check_processor_settings(values: Mapping[str, Any], name: str) -> None: ...
