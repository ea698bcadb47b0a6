"""Registration in transformers' Auto classes, and in the static tables that its tools consult besides."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto import modeling_auto

from .configuration_multimodal import MultimodalConfig
from .configuration_projector import MultimodalProjectorConfig
from .encoders.precomputed import PrecomputedFeatures, PrecomputedFeaturesConfig
from .modeling_multimodal import MultimodalModel
from .processing.own_processors import PrecomputedFeaturesProcessor
from .processing_multimodal import MultimodalProcessor
from .projectors.projector import MultimodalProjector
from .projectors.reductions import FrameStackProjection, PixelShuffleProjection
from .projectors.resampler import ResamplerProjection
from .projectors.windows import AvgPoolProjection, ConvProjection

MODEL_CLASSES = (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
# Their files register them as projection types.
REDUCERS = (AvgPoolProjection, ConvProjection, FrameStackProjection, PixelShuffleProjection, ResamplerProjection)
# `register` does not fill these: Trainer, pipelines and `transformers serve` read the names alone.
STATIC_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


def register_auto_classes() -> None:
    """Make the Auto classes know composed models and projectors; calling it again changes nothing."""
    AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig, exist_ok=True)
    AutoConfig.register(MultimodalProjectorConfig.model_type, MultimodalProjectorConfig, exist_ok=True)
    for auto_class in MODEL_CLASSES:
        auto_class.register(MultimodalConfig, MultimodalModel, exist_ok=True)
    AutoModel.register(MultimodalProjectorConfig, MultimodalProjector, exist_ok=True)
    AutoConfig.register(PrecomputedFeaturesConfig.model_type, PrecomputedFeaturesConfig, exist_ok=True)
    AutoModel.register(PrecomputedFeaturesConfig, PrecomputedFeatures, exist_ok=True)
    AutoFeatureExtractor.register(PrecomputedFeaturesConfig, PrecomputedFeaturesProcessor, exist_ok=True)
    AutoProcessor.register(MultimodalConfig, MultimodalProcessor, exist_ok=True)
    for table in STATIC_TABLES:
        getattr(modeling_auto, table).setdefault(MultimodalConfig.model_type, MultimodalModel.__name__)
