"""Sounds, of which this checkpoint takes none."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...checkpoints.code_folder import needs_package


def ready_audio(item: Any, where: str, expected: int | None, given: int | None) -> np.ndarray:
    raise needs_package("What reads sounds")


def check_padding_of_sounds(processor: Any, options: Mapping[str, Any], name: str) -> None:
    raise needs_package("What reads sounds")


def refuse_short(
    items: list[Any], name: str, expected: int | None, given: int | None, features: Callable[[int], int]
) -> None:
    raise needs_package("What reads sounds")
