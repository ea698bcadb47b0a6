"""Where a part of a composed model came from: a repository on the Hub, the class that was loaded, the tower inside it."""

import os
import re
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from .adapters import unwrapped

COMMIT = re.compile(r"[0-9a-f]{40}")
_LIBRARY_CLASS = re.compile(r"transformers\.models\.\w+\.modeling_\w+\.\w+")
KEYS = ("repo_id", "revision", "requested_revision", "subfolder", "class", "select")


def names_repository(value: Any) -> bool:
    """Whether this is a ``user/name`` or ``name`` of the Hub."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return isinstance(value, str)


def is_repo_id(name: Any) -> bool:
    """Whether a text is the id of a repository, and no path of this machine."""
    return names_repository(name) and not os.path.exists(name)


def origin_of(given: Any, part: nn.Module) -> dict[str, Any] | None:
    """What a part was loaded from, None if that was not the Hub.

    Args:
        given: the model that was loaded.
        part: the module inside it that is used, or the model itself; either may be wrapped by PEFT.

    Returns:
        ``{"repo_id", "revision", "requested_revision", "subfolder", "class", "select"}``; `revision` is None, since a
        loaded model does not know its commit: whoever loads it may fill that in, and `references` looks it up.
    """
    root, inner = unwrapped(given), unwrapped(part)
    if not isinstance(root, PreTrainedModel) or not is_repo_id(root.name_or_path):
        return None
    select = next((name for name, module in root.named_modules() if module is inner), None)
    if select is None:
        return None
    path = f"{type(root).__module__}.{type(root).__qualname__}"
    name = path if _LIBRARY_CLASS.fullmatch(path) else type(root).__name__
    values = (root.name_or_path, None, None, "", name, select)
    return dict(zip(KEYS, values, strict=True))


def check_origins(origins: Any) -> dict[str, dict[str, Any]] | None:
    """The `origins` of a configuration, checked.

    Raises:
        ValueError: not ``{component: {key: text or None}}`` with the keys of `origin_of`.
    """
    if not origins:
        return None
    entries = list(origins.items()) if isinstance(origins, dict) else [("origins", origins)]
    for name, entry in entries:
        texts = isinstance(entry, dict) and all(value is None or isinstance(value, str) for value in entry.values())
        if not texts or set(entry) - set(KEYS) or not names_repository(entry.get("repo_id")):
            raise ValueError(
                f"origins[{name!r}] must be texts under some of {KEYS}, with a repo_id, got {entry!r:.200}."
            )
    return {name: dict(entry) for name, entry in entries}
