"""Grids of features and frames of videos, neither of which this checkpoint asks for."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...checkpoints.code_folder import needs_package

Grid = tuple[int, ...]


class GridQuery(NamedTuple):
    """What is known of a batch of items when their grids are asked for."""

    inputs: Mapping[str, Any]
    config: Any
    kind: str
    lengths: Sequence[int]
    changed: bool = False
    dropped: int = 0


def found_grids(query: GridQuery, stated: Any, by_frame: bool, name: str, reason: str) -> list[Grid]:
    raise needs_package("What finds how features lie in the plane")


def frames_as_items(inputs: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[int]]:
    raise needs_package("What encodes the frames of videos")


def first_frames(inputs: Mapping[str, Any]) -> dict[str, Any]:
    raise needs_package("What encodes the frames of videos")


def joined_frames(features: Tensor, lengths: Sequence[int] | None, counts: Sequence[int]) -> tuple[Tensor, list | None]:
    raise needs_package("What encodes the frames of videos")
