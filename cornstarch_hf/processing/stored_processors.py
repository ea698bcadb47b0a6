"""The processors of single modalities as a checkpoint holds them: written into dictionaries, and built from those again.

`subprocessors` runs them; `processing_multimodal` saves and loads the whole.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from transformers import AutoTokenizer, FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import TextKwargs

from ..parts.stored_errors import explained
from .call import TEXT_OPTIONS
from .image_bounds import check_processor_settings
from .subprocessors import ITEM_PROCESSORS

# What every tokenizer can be built with, beside the parameters of its class.
_TOKENIZER_SETTINGS = ("additional_special_tokens", "clean_up_tokenization_spaces", "extra_special_tokens", "model_input_names",
                       "model_max_length", "model_specific_special_tokens", "padding_side", "split_special_tokens",
                       "truncation_side")  # fmt: skip
# Of `from_pretrained`: how files are found and read, and what is the whole processor's.
_LOADING = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder", "proxies", "code_revision",
            "trust_remote_code", "use_fast", "_from_auto", "_from_pipeline")  # fmt: skip
_OF_THE_WHOLE = ("chat_template", "return_unused_kwargs")

# `native_call` adds what holds a native processor, of which only some checkpoints have one.
NATIVE: dict[str, Any] = {}
# transformers' name for the part of a kind, under which its Auto classes find that in a checkpoint too.
PART_NAMES = {"image": "image_processor", "audio": "feature_extractor", "video": "video_processor"}
TYPE_KEYS = tuple(f"{part}_type" for part in PART_NAMES.values())


def describe_subprocessor(processor: Any, name: str) -> dict[str, Any] | None:
    """A JSON dictionary of a processor with its type (ValueError: it has none); None for a tokenizer, which has own files."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return None
    described = processor.to_dict() if hasattr(processor, "to_dict") else {}
    if not any(key in described for key in TYPE_KEYS):
        known = "image processor, feature extractor, video processor or tokenizer of transformers."
        raise ValueError(f"{name}: {type(processor).__name__} cannot be saved, it is no {known}")
    # JSON has no arrays.
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in described.items()}


def named_parts(described: Mapping[str, dict], kinds: Mapping[str, str]) -> dict[str, Any]:
    """Descriptions by modality as a checkpoint holds them: the only one of its kind under transformers' name.

    `kinds` are of all modalities; `parts_by_modality` is the way back.
    """
    alone = {part: only[0] for kind, part in PART_NAMES.items() if len(only := _of_kind(kinds, kind)) == 1}
    alone = {part: name for part, name in alone.items() if f"{part}_type" in described.get(name, {})}
    rest = {name: values for name, values in described.items() if name not in alone.values()}
    return {"processors": rest} | {part: described[name] for part, name in alone.items()}


def parts_by_modality(values: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint, or a caller, names as transformers does, by modality (ValueError: not one modality of that kind)."""
    found = dict(values.get("processors") or {})
    for kind, part in PART_NAMES.items():
        if (value := values.get(part)) is None:
            continue
        if len(names := _of_kind(kinds, kind)) != 1 or names[0] in found:
            told = f"{part} stands for the only modality of the kind {kind!r}, of which there are {names}"
            raise ValueError(f"{told}: name it once, by its modality, in processors={{...}}.")
        found[names[0]] = value
    return found


def _of_kind(kinds: Mapping[str, str], kind: str) -> list[str]:
    return [name for name, own in kinds.items() if own == kind]


def settings_of(described: Mapping[str, Any], name: str) -> set[str]:
    """Names of the settings that a described processor takes when it is built, as in transformers' `from_pretrained`."""
    cls = _described_class(described, name)
    own = {"backend", "use_fast"} if hasattr(cls, "backend") else set()
    valid = getattr(getattr(cls, "valid_kwargs", None), "__annotations__", ())
    return own | (set(described) | set(valid)) - {*TYPE_KEYS, "processor_class", "auto_map"}


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of what a tokenizer can be built with: its class's parameters, its tokens, and defaults of its calls."""
    classes: tuple[Any, ...] = type(tokenizer).__mro__
    parameters = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    named = {*parameters, *tokenizer.init_kwargs, *tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *_TOKENIZER_SETTINGS}
    return (named | TEXT_OPTIONS & set(TextKwargs.__annotations__)) - {
        "self",
        "args",
        "kwargs",
        "backend",
        "chat_template",
    }


def load_parts(
    source: str | os.PathLike, values: Mapping, kinds: Mapping[str, str], given: Mapping[str, Any], folder_of: Callable
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The tokenizer and the processors by modality of a checkpoint, and what was `given` and no part took.

    Args:
        source, values: the checkpoint, and what its `processor_config.json` holds.
        kinds: of each modality.
        given: arguments of `from_pretrained`: how to load, parts to take instead, settings for every part that has them;
            those of a tokenizer are the language model's.
        folder_of: the folder, within the checkpoint, of a modality's tokenizer.
    """
    loading = {key: value for key, value in given.items() if key in _LOADING}
    loading["trust_remote_code"] = bool(loading.get("trust_remote_code"))  # never asked for at a prompt
    options = {
        key: value for key, value in given.items() if key not in (*_LOADING, *_OF_THE_WHOLE) or key == "use_fast"
    }
    stated = {key: options.pop(key, None) for key in ("tokenizer", "processors", *PART_NAMES.values())}
    parts, used = parts_by_modality(stated, kinds), {"use_fast"}
    with explained(f"{source}: processor_config.json"):
        for name, described in parts_by_modality(values, kinds).items():
            settings = {key: options[key] for key in settings_of(described, name) & set(options)}
            if name not in parts:
                parts[name] = build_subprocessor(described, name, settings)
                used |= set(settings)
    load, subfolder = functools.partial(_load_tokenizer, source), loading.pop("subfolder", "")
    if (tokenizer := stated["tokenizer"]) is None:
        tokenizer = load(subfolder=subfolder, **loading)
        if settings := {key: options[key] for key in tokenizer_settings(tokenizer) & set(options) - {"use_fast"}}:
            tokenizer = load(subfolder=subfolder, **loading, **settings)
            used |= set(settings)
    for name, kind in kinds.items():
        if name not in parts and kind == "text":
            parts[name] = load(subfolder=os.path.join(subfolder, folder_of(name)), **loading)
    return tokenizer, parts, {key: value for key, value in options.items() if key not in used}


def native_of(described: Any, kinds: Mapping[str, str], tokenizer: Any, parts: Mapping[str, Any]) -> Any:
    """The native processor that a checkpoint describes, with parts of its own; None where it describes none."""
    if described is None:
        return None
    if "call" not in NATIVE:
        raise ValueError(
            "The processor holds a native one, of which the code of this checkpoint has nothing: save it again."
        )
    return NATIVE["call"].build(described, kinds, tokenizer, parts)


def _load_tokenizer(source: str | os.PathLike, subfolder: str, **options: Any) -> PreTrainedTokenizerBase:
    with explained(f"{source}: {os.path.join(subfolder, 'tokenizer_config.json')}, or the tokenizer's other files"):
        return AutoTokenizer.from_pretrained(source, subfolder=subfolder, **options)


def build_subprocessor(described: Mapping[str, Any], name: str, settings: Mapping[str, Any] | None = None) -> Any:
    """The processor that `describe_subprocessor` described, with some of `settings_of` set otherwise.

    ValueError: of no known type, one that does not take its settings, or a backend that is not there.
    """
    values, changes = dict(described), dict(settings or {})
    backend = "pil" if changes.pop("use_fast", None) is False else None
    backend = changes.pop("backend", backend)
    cls = _described_class(values, name, backend)
    check_processor_settings(values, name)
    try:
        made = cls.from_dict(values | changes)
    except (ValueError, ImportError, MemoryError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error!s:.200}"
        raise ValueError(f"{name}: {cls.__name__!r} does not take its stored settings ({cause}).") from error
    if backend not in (None, found := getattr(made, "backend", None)):
        raise ValueError(f"{name}: {cls.__name__} runs on the backend {found!r}, {backend!r} was asked for.")
    # Spectrograms of one band are taken for plain samples: transformers then pads along both of their axes.
    if 1 in np.shape(getattr(made, "mel_filters", ())):
        told = f"feature_size={described.get('feature_size')!r}, num_mel_bins={described.get('num_mel_bins')!r}"
        raise ValueError(f"{name}: its {cls.__name__} makes spectrograms of one band ({told}), expected more than one.")
    return made


def _described_class(described: Mapping[str, Any], name: str, backend: str | None = None) -> Any:
    """The class that a description names, Pillow's where that backend is asked for (ValueError: there is none, or several)."""
    kinds = [described[key] for key in TYPE_KEYS if isinstance(described.get(key), str)]
    if len(kinds) != 1:
        raise ValueError(
            f"{name}: expected one of {TYPE_KEYS} in its processor's description, got {sorted(described)}."
        )
    kind = f"{kinds[0].removesuffix('Pil')}Pil" if backend == "pil" else kinds[0]
    try:
        cls: Any = ITEM_PROCESSORS.get(kind) or ProcessorMixin.get_possibly_dynamic_module(kind)
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{name}: there is no processor class {kind!r:.100} in transformers.") from error
    if lacking := [one for one in getattr(cls, "_backends", ()) if isinstance(one, str)]:  # stands in for a class
        needs = f"{' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not installed"
        raise ValueError(f"{name}: {kind} needs {needs}: pip install {' '.join(lacking)}.")
    if not isinstance(cls, type) or not issubclass(cls, (ImageProcessingMixin, FeatureExtractionMixin)):
        raise ValueError(f"{name}: {kind!r} is no image processor or feature extractor.")
    return cls
