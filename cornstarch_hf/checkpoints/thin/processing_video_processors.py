"""Processors of videos, of which this checkpoint has none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...checkpoints.code_folder import needs_package


def is_video_processor(processor: Any) -> bool:
    """No processor of this checkpoint is one."""
    return False


def run_video_processor(
    processor: Any, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any, channels: int
) -> dict[str, torch.Tensor]:
    raise needs_package("What processes videos")
