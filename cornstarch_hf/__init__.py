"""Compose a multimodal LLM from any HuggingFace encoders and any HuggingFace causal language model.

Importing this registers the composed model with transformers' Auto classes.
"""

import importlib

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .assembly import compose
from .checkpoints.plain_storage import PUSHERS
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import MultimodalProjectorConfig
from .conversion.steps import AnyResolution
from .encoders.joining import Join
from .encoders.module import ModalEncoderModule
from .encoders.precomputed import PrecomputedFeatures, PrecomputedFeaturesConfig
from .encoders.said_of_items import grids_of_items
from .hub.push import push_to_hub
from .language_model.inner_features import LayerFeatures
from .language_model.masks import Masks
from .language_model.positions import Positions
from .language_model.text_head import TextModelWithHead
from .modeling_multimodal import MultimodalModel
from .parts.known_encoders import register_encoder_type
from .parts.registries import (
    register_callback,
    register_feature_count,
    register_mask_rule,
    register_position_rule,
    register_projector,
)
from .processing.native_call import NativeCall
from .processing.own_processors import PrecomputedFeaturesProcessor, TimeSeriesProcessor
from .processing_multimodal import MultimodalProcessor
from .projectors.native import NativeProjection
from .projectors.projector import MultimodalProjector
from .projectors.qformer import QFormerProjection
from .projectors.reductions import FrameStackProjection, PixelShuffleProjection
from .projectors.resampler import ResamplerProjection
from .projectors.windows import AvgPoolProjection, ConvProjection
from .training.collator import MultimodalCollator
from .training.optimizer_groups import parameter_groups

__all__ = [
    "BatchMetrics", "ModalEncoderModule", "MultimodalCollator", "MultimodalConfig", "MultimodalModel",
    "MultimodalProcessor", "MultimodalProjector", "MultimodalProjectorConfig", "PrecomputedFeatures",
    "PrecomputedFeaturesConfig", "PrecomputedFeaturesProcessor", "TextModelWithHead", "TimeSeriesProcessor",
    "compose", "from_native", "parameter_groups", "push_to_hub", "register_callback", "register_encoder_type",
    "register_feature_count", "register_mask_rule", "register_position_rule", "register_projector", "replace",
    "save_ultravox", "to_native",
]  # fmt: skip
__version__ = "0.1.0"

# Their files register them as projection types, or put them where models and checkpoints look for them.
REDUCERS = (
    AvgPoolProjection, ConvProjection, FrameStackProjection, NativeProjection, PixelShuffleProjection, QFormerProjection,
    ResamplerProjection,
)  # fmt: skip
STEPS = (AnyResolution, grids_of_items, Join, LayerFeatures, Masks, NativeCall, Positions)
MODEL_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def register_auto_classes() -> None:
    """Make the Auto classes know composed models and projectors; calling it again changes nothing."""
    for config_class in (MultimodalConfig, MultimodalProjectorConfig, PrecomputedFeaturesConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in MODEL_CLASSES:
        auto_class.register(MultimodalConfig, MultimodalModel, exist_ok=True)
    AutoModel.register(MultimodalProjectorConfig, MultimodalProjector, exist_ok=True)
    AutoModel.register(PrecomputedFeaturesConfig, PrecomputedFeatures, exist_ok=True)
    AutoFeatureExtractor.register(PrecomputedFeaturesConfig, PrecomputedFeaturesProcessor, exist_ok=True)
    AutoProcessor.register(MultimodalConfig, MultimodalProcessor, exist_ok=True)


_LAZY = dict.fromkeys(("from_native", "to_native"), ".conversion.native") | {"replace": ".swapping"}
_LAZY |= {"native_selection": ".conversion.parts", "save_ultravox": ".conversion.ultravox"}


def __getattr__(name: str):
    if name in _LAZY:  # who converts nothing does not wait for it
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name == "BatchMetrics":  # Trainer's callbacks are slow to import, and few programs need them
        from .training.batch_metrics import BatchMetrics

        return BatchMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _later(name: str):
    return lambda *args, **kwargs: __getattr__(name)(*args, **kwargs)


PUSHERS.update({name: _later(name) for name in ("from_native", "native_selection")})
register_auto_classes()
