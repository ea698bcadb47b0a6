"""Native processors to composed ones and back."""

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import PROCESSOR_NAME

from ..checkpoints.finding import CheckpointFiles
from ..configuration_multimodal import MultimodalConfig
from ..processing.native_call import NativeCall
from ..processing.rendering import DEFAULT_TEMPLATE
from ..processing_multimodal import MultimodalProcessor

# Files of which a checkpoint with a processor has one.
_FILES = (PROCESSOR_NAME, "preprocessor_config.json", "video_preprocessor_config.json")


def composed_processor(native: Any, model: Any) -> MultimodalProcessor:
    """The processor of a composition that does what a native one does (TypeError, ValueError for one that it cannot hold).

    Its tokenizer and its processors of items are copies, so that the native one stays as it is.
    """
    if not isinstance(native, ProcessorMixin) or isinstance(native, MultimodalProcessor):
        raise TypeError(f"The processor must be a native one of transformers, got {type(native).__name__}.")
    config: MultimodalConfig = model.config
    kinds = {name: config.modality(name)["kind"] for name in config.encoders}
    tokenizer = getattr(native, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{type(native).__name__} has a {type(tokenizer).__name__}, which is no tokenizer of transformers."
        )
    call = NativeCall(native, kinds)
    parts = {name: copy.deepcopy(getattr(native, part)) for part, name in call.places.items()}
    if lacking := [name for name in kinds if name not in parts]:
        raise ValueError(f"{type(native).__name__} has nothing for the modalities {lacking} of the composition.")
    template = getattr(native, "chat_template", None) or tokenizer.chat_template
    return MultimodalProcessor(tokenizer, parts, model=model, chat_template=template, native=call)


def native_processor(processor: Any) -> Any:
    """The native processor that a composed one holds, with its tokenizer and processors of items as they are now."""
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(f"The processor must be a MultimodalProcessor or a native one, got {type(processor).__name__}.")
    if not isinstance(processor, MultimodalProcessor):
        return processor
    if processor.native is None:
        raise ValueError(
            "This processor never was a native one, so to_native does not know which one it is: build the native class from "
            "its tokenizer and its processors."
        )
    native = processor.native.whole(copy.deepcopy(processor.tokenizer), processor.processors)
    plain = processor.chat_template == DEFAULT_TEMPLATE  # which stands for none
    native.chat_template = None if plain else processor.chat_template
    if plain:
        native.tokenizer.chat_template = None
        native.tokenizer.init_kwargs.pop("chat_template", None)
    return native


def loaded_processor(source: Any, model: Any, options: Mapping[str, Any]) -> MultimodalProcessor | None:
    """What a native checkpoint's processor does, for its composition; None where it has none.

    None with a warning where it needs a package that is not installed, or cannot be part of a composition.
    """
    files, name = CheckpointFiles(source, dict(options)), PROCESSOR_MAPPING_NAMES.get(model.config.native["model_type"])
    if name is None or not any(files.find(file) for file in _FILES):
        return None
    try:
        native = getattr(transformers, name).from_pretrained(os.fspath(source), **files.options)
        return composed_processor(native, model)
    except (ImportError, ValueError) as error:  # the composition is whole without it
        told = f"{source}: its {name} was left out, and the processor is None"
        warnings.warn(f"{told} ({type(error).__name__}: {error!s:.300}).", stacklevel=3)
        return None
