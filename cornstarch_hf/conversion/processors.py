"""Native processors to composed ones and back."""

import copy
import os
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import PROCESSOR_NAME

from ..checkpoints.finding import CheckpointFiles
from ..configuration_multimodal import MultimodalConfig
from ..processing.call import PLURALS
from ..processing.chats import with_media
from ..processing.native_call import NativeCall
from ..processing.rendering import DEFAULT_TEMPLATE
from ..processing.subprocessors import image_channels, sampling_rate_of
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


def native_processor(processor: Any, native_model: Any) -> Any:
    """The native processor that a composed one holds, with its tokenizer and processors of items as they are now.

    Of one that never was native, a native one that gives the same, for the container that the model became.

    Raises:
        TypeError: no processor.
        ValueError: the native class gives something else, or the placeholder has another id in the model; says why.
    """
    if not isinstance(processor, ProcessorMixin):
        raise TypeError(f"The processor must be a MultimodalProcessor or a native one, got {type(processor).__name__}.")
    if not isinstance(processor, MultimodalProcessor):
        return processor
    if processor.native is None:
        native = _contained(processor, native_model)
    else:
        native = processor.native.whole(copy.deepcopy(processor.tokenizer), processor.processors)
    if processor.native is None:
        native.chat_template = _template(processor)
        return native
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


# ---- of processors that never were native

_AROUND = "it writes tokens of its own around the placeholders of an image"
# What a native class writes beside placeholders, or needs, so that it never gives what a composition's processor gives.
_MORE = {
    "internvl": _AROUND,
    "idefics3": _AROUND,
    "smolvlm": _AROUND,
    "voxtral": "it reads text by the tokenizer of mistral-common, in which the placeholder has the id 24",
}
_CONTAINED = ("llava", "deepseek_vl", "qwen2_audio", "audioflamingo3")  # types whose processors may give the same
_SIZES = ((40, 30), (33, 50), (64, 64))  # of images, by which processors are compared
_SECONDS = (0.5, 0.2, 0.9)  # of sounds


def _contained(processor: MultimodalProcessor, model: Any) -> Any:
    """A native processor that gives what one of a composition gives, for the native model that holds it (ValueError)."""
    model_type = model.config.model_type
    who = PROCESSOR_MAPPING_NAMES.get(model_type, f"a processor of {model_type!r}")
    lead = f"This processor never was a native one, and {who} does not give the same"
    remedy = "convert the model alone, to_native(model, model_type=...), and make its inputs by this processor"
    if model_type not in _CONTAINED:
        raise ValueError(f"{lead}: {_MORE.get(model_type, 'it makes text of items in a way of its own')}; {remedy}.")
    if len(processor.tokens) != 1:
        raise ValueError(
            f"{lead}: it has one placeholder, this one has {processor.tokens}: give the model's own processor."
        )
    ((name, token),) = processor.tokens.items()
    if name not in processor.processors:
        raise ValueError(f"{lead}: this one has none for {name}; {remedy}.")
    kind, token_id = processor.config.modality(name)["kind"], processor.placeholder_ids[name]
    if token_id != (expected := getattr(model.config, f"{kind}_token_id", None)):
        raise ValueError(
            f"{name}: {token!r} has the id {token_id} in this processor, and the model's placeholder is {expected}: give the "
            "processor that was made with the model."
        )
    items, native = _images(processor, name) if kind == "image" else _sounds(processor, name), None
    rate = {"sampling_rate": sampling_rate_of(processor.processors[name])} if kind == "audio" else {}
    # Each alone, for they may become of different sizes, and one of them in a batch with text.
    calls: list[dict[str, Any]] = [{"text": [f"{token} a b"], PLURALS[kind]: [item]} for item in items]
    calls.append({"text": [f"c {token}{token}", "d", f" {token}"], PLURALS[kind]: [items[0]] * 3})
    for call in calls:
        call |= {"padding": True, "return_tensors": "pt"} | rate
        ours = processor(**call)
        if native is None:
            count = int((ours["input_ids"] == token_id).sum())
            native = _built(who, processor, name, kind, _arguments(model.config, token, count, ours))
        try:
            theirs = native(**call)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{lead}: it refuses an item of the kind {kind!r} ({error!s:.300}); {remedy}.") from error
        if (told := _difference(ours, theirs, token_id)) is not None:
            raise ValueError(f"{lead}: {told}; {remedy}.")
    return native


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], token_id: int) -> str | None:
    """What a native processor gives otherwise than ours, None for nothing."""
    for key in dict.fromkeys([*ours, *theirs]):
        if key not in ours or key not in theirs:
            return f"{key} is given by {'it' if key in theirs else 'ours'} alone"
        if not torch.equal(ours[key], theirs[key]):
            counts = [int((given["input_ids"] == token_id).sum()) for given in (theirs, ours)]
            told = f"of an item it makes {counts[0]} placeholders, and this one {counts[1]}"
            return told if counts[0] != counts[1] else f"its {key} differ"
    return None


def _built(who: str, processor: MultimodalProcessor, name: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    """A native processor of copies of what ours holds."""
    part = "image_processor" if kind == "image" else "feature_extractor"
    tokenizer = copy.deepcopy(processor.tokenizer)
    for key in ("padding_side", "truncation_side"):  # as they are now, in its files too
        tokenizer.init_kwargs[key] = getattr(tokenizer, key)
    if who == "DeepseekVLProcessor":  # which asks its tokenizer for the placeholder
        tokenizer = _naming(tokenizer, f"{kind}_token", processor.tokens[name])
    own = {part: copy.deepcopy(processor.processors[name]), "tokenizer": tokenizer}
    return getattr(transformers, who)(**own, **arguments)


def _images(processor: MultimodalProcessor, name: str) -> list[Any]:
    """Three pictures of different sizes, with as many channels as the tower takes."""
    mode = "L" if image_channels(getattr(processor.config, f"{name}_config")) == 1 else "RGB"
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode) for size in _SIZES]


def _sounds(processor: MultimodalProcessor, name: str) -> list[Any]:
    """Three sounds of different lengths."""
    rate = sampling_rate_of(processor.processors[name])
    rng = np.random.default_rng(0)
    return [rng.standard_normal(int(seconds * rate)).astype(np.float32) for seconds in _SECONDS]


def _arguments(config: Any, token: str, count: int, ours: Mapping[str, Any]) -> dict[str, Any]:
    """What builds a container's processor, of a placeholder that is repeated `count` times for the first item."""
    if config.model_type == "llava":
        patch, strategy = config.vision_config.patch_size, config.vision_feature_select_strategy
        patch = (
            patch if isinstance(patch, int) else patch[0]
        )  # its class knows squares alone; others do not give the same
        height, width = ours["pixel_values"].shape[-2:]
        dropped = 1 if strategy == "default" else 0
        return {
            "patch_size": patch, "vision_feature_select_strategy": strategy, "image_token": token,
            "num_additional_image_tokens": count + dropped - (height // patch) * (width // patch),
        }  # fmt: skip
    return {"num_image_tokens": count} if config.model_type == "deepseek_vl" else {"audio_token": token}


def _template(processor: MultimodalProcessor) -> Any:
    """The chat template, or named ones, that write the placeholders of parts themselves, as native processors ask."""
    given = processor.chat_template
    named: Mapping[str, Any] = given if isinstance(given, Mapping) else {"": given}
    where = processor.tokens, processor.config.modalities_for, processor._kinds()
    whole = {name: with_media(template, *where) for name, template in named.items()}
    return whole if isinstance(given, Mapping) else whole[""]


def _naming(tokenizer: Any, name: str, token: str) -> Any:
    """A copy of a tokenizer that names a token, as its files then say."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        named = type(tokenizer).from_pretrained(folder, **{name: token})
    for key in ("name_or_path", "padding_side", "truncation_side", "model_input_names", "model_max_length"):
        setattr(named, key, getattr(tokenizer, key))
    return named
