"""Compose a multimodal LLM from any HuggingFace encoders and any HuggingFace causal language model."""

from .assembly import compose
from .auto import register_auto_classes
from .collator import MultimodalCollator
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import MultimodalProjectorConfig
from .encoders import ModalEncoderModule
from .hub import push_to_hub
from .item_processors import PrecomputedFeaturesProcessor, TimeSeriesProcessor
from .modeling_multimodal import MultimodalModel
from .precomputed_features import PrecomputedFeatures, PrecomputedFeaturesConfig
from .processing_multimodal import MultimodalProcessor
from .projectors import MultimodalProjector
from .registries import register_callback, register_feature_count, register_projector
from .training import parameter_groups

__all__ = [
    "BatchMetrics",
    "ModalEncoderModule",
    "MultimodalCollator",
    "MultimodalConfig",
    "MultimodalModel",
    "MultimodalProcessor",
    "MultimodalProjector",
    "MultimodalProjectorConfig",
    "PrecomputedFeatures",
    "PrecomputedFeaturesConfig",
    "PrecomputedFeaturesProcessor",
    "TimeSeriesProcessor",
    "compose",
    "parameter_groups",
    "push_to_hub",
    "register_callback",
    "register_feature_count",
    "register_projector",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "BatchMetrics":  # Trainer's callbacks are slow to import, and few programs need them
        from .batch_metrics import BatchMetrics

        return BatchMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_auto_classes()
