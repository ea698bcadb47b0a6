"""What to say of items of a size that an encoder does not take, which the package knows; its own error stands here."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def refused_size(module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str) -> str | None: ...
def refused_by(
    module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str, error: Exception | None = None
) -> str | None: ...
