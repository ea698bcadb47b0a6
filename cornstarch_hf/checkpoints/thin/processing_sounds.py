"""Sounds, of which this checkpoint takes none."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ...checkpoints.code_folder import needs_package


def ready_audio(item: Any, where: str, expected: int | None, given: int | None) -> np.ndarray:
    raise needs_package("What reads sounds")


def fewest_samples(features: Callable[[int], int], most: int) -> int | None:
    raise needs_package("What reads sounds")
