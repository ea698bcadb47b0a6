"""In a checkpoint's own code encoders run whole, with the same results."""

from typing import Any

from torch import nn


class Picklable(nn.Module): ...


def states_alone(encoder: Any, inputs: dict, options: dict, wanted: dict) -> Any: ...
