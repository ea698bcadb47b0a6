"""Another part than was composed is refused; the package looks at more, and can exchange parts."""

from collections.abc import Mapping
from typing import Any

from ...checkpoints.code_folder import needs_package
from ...parts.adapters import unwrapped


def check_replaced(config: Any, parts: Mapping[str, Any]) -> None:
    """ImportError where a part has another configuration than the one that was composed."""
    for name, part in parts.items():
        inner = getattr(unwrapped(getattr(part, "module", part)), "config", None)
        key = "text_config" if name == "language_model" else f"{name.removesuffix('_encoder')}_config"
        if inner is not None and inner != getattr(config, key):
            raise needs_package(f"What exchanges the {name} for another one")


def check_projector(config: Any, name: str, projector: Any) -> None: ...


def check_settings(encoders: Any, described: Any) -> None: ...
