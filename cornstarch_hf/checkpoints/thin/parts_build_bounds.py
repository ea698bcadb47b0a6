"""Building without bounds, as transformers does: who runs a checkpoint's code trusts it."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

Shapes = Mapping[str, tuple[int, ...]]


class BoundedTensors(contextlib.nullcontext):
    """Bounds nothing."""


def bounded_tensors(*configs: Any) -> Any:
    """A context that bounds nothing."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def build_guard(shapes: Shapes | None = None, sized: bool = True, whose: str = "") -> Iterator[None]:
    """A context that bounds nothing."""
    yield


def check_built(model: nn.Module) -> None: ...


def checked_shapes(shapes: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The shapes by data type."""
    yield from shapes.items()
