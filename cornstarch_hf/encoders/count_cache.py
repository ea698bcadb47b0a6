"""Counts that were found before, by what of an item's inputs they depend on; the latest few thousand of them."""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

MOST = 4_096


class CountCache:
    """Numbers by key, of which the one that was asked for longest ago goes when there are too many.

    Threads may share it.
    """

    def __init__(self, most: int = MOST):
        self.most = most
        self._counts: OrderedDict[Any, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def get(self, key: Any) -> int | None:
        """The number, None if it is not known."""
        count = self._counts.get(key)
        if count is not None:
            with contextlib.suppress(KeyError):  # another thread has just put it out
                self._counts.move_to_end(key)
        return count

    def put(self, key: Any, count: int) -> None:
        """Remember a number."""
        self._counts[key] = count
        while len(self._counts) > self.most:
            self._counts.popitem(last=False)


def key_of(name: str, inputs: Mapping[str, Any]) -> tuple:
    """What an item's count depends on: of floating-point inputs the shape, of others all."""
    return name, *sorted((key, _signature(value)) for key, value in inputs.items())


def _signature(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_floating_point():
        return tuple(value.shape), str(value.dtype)
    return tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).digest()
