"""Compose a multimodal LLM from any HuggingFace encoders and any HuggingFace causal language model."""

from .assembly import compose
from .auto import register_auto_classes
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import MultimodalProjectorConfig
from .encoders.module import ModalEncoderModule
from .encoders.precomputed import PrecomputedFeatures, PrecomputedFeaturesConfig
from .hub.hub import push_to_hub
from .modeling_multimodal import MultimodalModel
from .parts.known_encoders import register_encoder_type
from .parts.registries import register_callback, register_feature_count, register_projector
from .processing.own_processors import PrecomputedFeaturesProcessor, TimeSeriesProcessor
from .processing_multimodal import MultimodalProcessor
from .projectors.projector import MultimodalProjector
from .training.collator import MultimodalCollator
from .training.optimizer_groups import parameter_groups

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
    "register_encoder_type",
    "register_feature_count",
    "register_projector",
]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "BatchMetrics":  # Trainer's callbacks are slow to import, and few programs need them
        from .training.batch_metrics import BatchMetrics

        return BatchMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_auto_classes()
