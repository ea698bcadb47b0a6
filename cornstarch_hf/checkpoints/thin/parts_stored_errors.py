"""Errors about stored values as they are raised: the package says more of them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """A context that changes no error."""
    yield


def make_config(
    make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any], where: str, whole: bool = False
) -> Any:
    """What `make` makes of the values."""
    return make(dict(values))


def build_part(cls: Any, config: PreTrainedConfig, options: Mapping[str, Any], part: str, key: str) -> Any:
    """A part of a model."""
    return cls(config, **options)
