"""Videos, of which this checkpoint takes none."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...checkpoints.code_folder import needs_package

FRAME_MASK = "frame_mask"
SAMPLING = ("num_frames", "fps", "source_fps")


def run_on_frames(
    processor: Any, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any, channels: int
) -> dict[str, torch.Tensor]:
    raise needs_package("What processes videos")


def video_of_size(
    processor: Any, name: str, image: Any, count: int, options: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    raise needs_package("What processes videos")


def named_for_encoder(output: Mapping[str, Any], name: str, keyword: Callable[[str], str | None]) -> dict[str, Any]:
    """The tensors under the names that they have."""
    return dict(output)


def is_video_processor(processor: Any) -> bool:
    """No processor of this checkpoint is one."""
    return False


def run_video_processor(
    processor: Any, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any, channels: int
) -> dict[str, torch.Tensor]:
    raise needs_package("What processes videos")
