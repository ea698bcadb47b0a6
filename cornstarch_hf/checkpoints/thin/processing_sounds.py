"""Sounds, of which this checkpoint takes none."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ...checkpoints.code_folder import needs_package


def ready_audio(item: Any, where: str, expected: int | None, given: int | None) -> np.ndarray:
    raise needs_package("What reads sounds")


def refuse_short(
    items: list[Any], name: str, expected: int | None, given: int | None, features: Callable[[int], int]
) -> None:
    raise needs_package("What reads sounds")


def audio_options(
    processor: Any, name: str, items: list, options: Mapping, masked: bool, rate: int | None
) -> dict[str, Any]:
    raise needs_package("What reads sounds")


def run_extractor(
    processor: Any,
    name: str,
    items: list,
    options: dict[str, Any],
    rate: int | None,
    masked: bool,
    maskless: bool,
    calls: tuple[Callable, Callable],
) -> dict[str, torch.Tensor]:
    raise needs_package("What reads sounds")
