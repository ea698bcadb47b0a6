"""An encoder without weights, for features that were computed elsewhere: what goes in is what is projected.

Its processor is in `own_processors`; any number of features per item, counted without running anything.
"""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..limits import check_count


class PrecomputedFeaturesConfig(PreTrainedConfig):
    """Configuration of `PrecomputedFeatures`.

    Args:
        feature_size: width of the features; no model can be built without it.
        **kwargs: whatever `transformers.PreTrainedConfig` takes.

    Raises:
        ValueError: a size that is no positive integer.
    """

    model_type = "precomputed_features"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "feature_size"}
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}

    def __init__(self, feature_size: int | None = None, **kwargs):
        self.feature_size = None if feature_size is None else check_count(feature_size, "feature_size")
        super().__init__(**kwargs)


class PrecomputedFeatures(PreTrainedModel):
    """The identity as an encoder: features that another program computed go to the projector as they are.

    Args:
        config: a `PrecomputedFeaturesConfig` with its `feature_size`.

    Raises:
        ValueError: no `feature_size`.
    """

    config_class = PrecomputedFeaturesConfig
    base_model_prefix = "encoder"
    main_input_name = "features"
    input_modalities: Any = ("features",)
    supports_gradient_checkpointing = True  # there is nothing to keep

    def __init__(self, config: PrecomputedFeaturesConfig):
        super().__init__(config)
        if config.feature_size is None:
            raise ValueError("PrecomputedFeatures needs the width of the features, feature_size= of its configuration.")
        self.post_init()

    # transformers reads these from the first parameter.
    dtype = property(lambda self: self.config.dtype or torch.get_default_dtype())
    device = property(lambda self: torch.device("cpu"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, output_loading_info=False, **kwargs):
        """As in transformers, from a configuration alone: there are no weights, and no file of them is saved."""
        if not isinstance(config, PrecomputedFeaturesConfig):
            keys = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            hub = {key: kwargs[key] for key in keys if kwargs.get(key) is not None}
            config = PrecomputedFeaturesConfig.from_pretrained(config or pretrained_model_name_or_path, **hub)
        model = cls(config).eval()
        # Nothing was read, so nothing can be missing.
        info: dict = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, info) if output_loading_info else model

    def forward(
        self, features: torch.Tensor, attention_mask: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> BaseModelOutput | tuple[torch.Tensor]:
        """The features.

        Args:
            features: ``(items, most features, feature_size)``.
            attention_mask: ``(items, most features)``, 1 where a row is a feature and 0 for padding after them.
            return_dict: False for a tuple.

        Raises:
            ValueError: another rank or width, a mask of another shape or with a gap.
        """
        width, got = self.config.feature_size, tuple(features.shape)
        if features.ndim != 3 or got[-1] != width:
            raise ValueError(f"Expected features of shape (items, most features, {width}), got {got}.")
        if attention_mask is not None:
            if attention_mask.shape != got[:2]:
                mask = tuple(attention_mask.shape)
                raise ValueError(f"The attention mask of the features must be {got[:2]}, got {mask}.")
            if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):  # a step from 0 to 1 in some row
                raise ValueError("Features must be padded after the last one; this mask has zeros before ones.")
        return BaseModelOutput(last_hidden_state=features) if return_dict is not False else (features,)
