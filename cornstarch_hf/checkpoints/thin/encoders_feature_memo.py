"""In a checkpoint's own code each item is encoded whenever it comes, with the same results."""

from typing import Any

from ...checkpoints.code_folder import needs_package
from ...parts.registries import ALONE, encoder_options


class FeatureMemo:
    """Features that are kept; there are none."""


class FeatureMemoMixin:
    """How a composed model runs its encoders."""

    config: Any

    def remember_features(self, max_bytes: int = 256 * 2**20) -> FeatureMemo:
        raise needs_package("What remembers features")

    def forget_features(self) -> None: ...

    def _run_encoder(self, encoder: Any, inputs: dict[str, Any]) -> Any:
        return encoder(**inputs, **encoder_options(self.config, ALONE))
