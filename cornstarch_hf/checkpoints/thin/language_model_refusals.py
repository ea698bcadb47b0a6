"""Which language models cannot be one of a composition: what a checkpoint names was one already."""

from typing import Any


def check_language_model(model: Any, masked: bool = False) -> None: ...


def check_no_language_model(model: Any) -> None: ...
