"""Compose a multimodal LLM from any HuggingFace encoders and any HuggingFace causal language model."""

from .assembly import compose
from .auto import register_auto_classes
from .collator import MultimodalCollator
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import MultimodalProjectorConfig
from .encoders import ModalEncoderModule
from .modeling_multimodal import MultimodalModel
from .processing_multimodal import MultimodalProcessor
from .projectors import MultimodalProjector
from .registries import register_callback, register_feature_count, register_projector

__all__ = [
    "ModalEncoderModule",
    "MultimodalCollator",
    "MultimodalConfig",
    "MultimodalModel",
    "MultimodalProcessor",
    "MultimodalProjector",
    "MultimodalProjectorConfig",
    "compose",
    "register_callback",
    "register_feature_count",
    "register_projector",
]
__version__ = "0.1.0"

register_auto_classes()
