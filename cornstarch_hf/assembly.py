"""compose(): from Hub ids, paths or live objects to a model and its processor in one call."""

import contextlib
import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub import resolve_revision
from huggingface_hub.errors import RevisionResolutionError
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .composition import check_encoders
from .configuration_multimodal import valid_groups
from .configuration_projector import MultimodalProjectorConfig
from .encoders.module import ModalEncoderModule
from .encoders.towers import packs_frames
from .modeling_multimodal import MultimodalModel
from .parts.adapters import is_wrapped, unwrapped
from .parts.stored_modules import SLOTS
from .processing.own_processors import default_processor
from .processing.subprocessors import sampling_rate_of
from .processing.video import video_processor_missing
from .processing_multimodal import MultimodalProcessor
from .projectors.projector import MultimodalProjector

LOADING_KEYS = ("revision", "dtype", "attn_implementation", "subfolder")
# What an encoder's dict may say: what it is made of, what of it is projected, its callbacks, how it is loaded.
_OPTIONS = ("model", "processor", "projector", "kind", "layer", "output", "drop_prefix", "trim", "additional_args")
ENCODER_KEYS = frozenset([*_OPTIONS, *SLOTS, *LOADING_KEYS])
Source = str | os.PathLike | PreTrainedModel


def compose(
    language_model: Source,
    encoders: Mapping[str, Any],
    projector: str | Mapping[str, Any] = "linear",
    tokens: Mapping[str, str] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    processors: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    freeze: Sequence[str] = (),
    share_inputs: Sequence[Sequence[str]] | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    **loading: Any,
) -> tuple[MultimodalModel, MultimodalProcessor]:
    """Compose a multimodal language model and its processor.

    Args:
        language_model: Hub id, path or live causal language model.
        encoders: by name: a Hub id, a path, a live model, a `ModalEncoderModule`, or a dict with `model` and any of
            `processor`, `projector`, `kind`, `layer`, `output`, `drop_prefix`, `trim`, `additional_args`, the callbacks, and
            for loading `revision`, `dtype`, `attn_implementation`, `subfolder`.  Sounds that a processor fills up to a window
            give features of their valid frames alone, where the encoder's mask tells them and projector and callbacks
            take any number; `trim` False keeps the window.
        projector: type of the projectors (`"linear"`, `"mlp"`, a registered one), or fields of `MultimodalProjectorConfig`.
        tokens: placeholder tokens by encoder name.
        tokenizer, processors: of the language model, and by encoder name; found beside what is loaded by id or path.
        dtype, device_map, attn_implementation, revision: for loading; `revision` is the language model's.
        freeze: names of parts that shall not train, as in `MultimodalModel.freeze`.
        share_inputs: groups of encoders that see the same items.
        chat_template: of the processor.
        trust_remote_code: whether code from the checkpoints may run.
        **loading: passed to every `from_pretrained` (`cache_dir`, `token`, `local_files_only`, ...).

    Returns:
        ``(model, processor)``; the model is in evaluation mode.

    Raises:
        TypeError: an unknown key, a source of a wrong type.
        ValueError: a live object without its tokenizer or processor, and whatever composing refuses.
    """
    loading = {k: v for k, v in loading.items() if v is not None} | {"trust_remote_code": trust_remote_code}
    common = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
    common = {key: value for key, value in common.items() if value is not None}
    text_loading = loading | ({"revision": revision} if revision else {})
    # What needs no weights comes first: a missing tokenizer or a misspelt key is told before anything large is loaded.
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        who, given = ("The language model", language_model) if tokenizer is None else ("The tokenizer", tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(_source(given, who, "tokenizer="), **text_loading)
    specs = {name: _spec(name, value) for name, value in encoders.items()}
    fields = dict(projector) if isinstance(projector, Mapping) else {"projection_type": projector}
    modules, found = {}, {}
    for name, spec in specs.items():
        modules[name] = _encoder(name, spec, fields, loading, common)
        _note_commit(modules[name].origin, spec, loading)
        found[name] = (processors or {}).get(name) or _processor(name, spec, modules[name], loading)
    live: Any = language_model
    if isinstance(language_model, (str, os.PathLike)):
        live = AutoModelForCausalLM.from_pretrained(language_model, **text_loading, **common)
    check_encoders(modules, live)
    model = MultimodalModel(encoders=modules, language_model=live)
    asked_for = {"model": language_model, "revision": revision}
    _note_commit((model.config.origins or {}).get("language_model"), asked_for, loading)
    model.config.share_inputs = valid_groups(share_inputs, model.config.encoders)
    if tokenizer.padding_side != "left":  # what decoder-only generation needs; the processor copies it
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"
    processor = MultimodalProcessor(tokenizer, found, model=model, tokens=tokens, chat_template=chat_template)
    for name, spec in specs.items():
        if not isinstance(spec["model"], ModalEncoderModule):  # which its author set
            _set_trim(name, spec.get("trim"), model, processor)
    if freeze:  # last: a name may mean a projector, which composing makes
        model.freeze(*([freeze] if isinstance(freeze, str) else freeze))
    return model.eval(), processor


def _note_commit(origin: dict[str, Any] | None, spec: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
    """Write into an origin which revision was asked for and which commit that was (in place); asks nothing of the Hub."""
    if origin is None or not isinstance(spec["model"], str):
        return
    requested, cache = spec.get("revision"), loading.get("cache_dir")
    try:  # what was just loaded is in the cache
        commit = resolve_revision(
            origin["repo_id"], revision=requested, local_files_only=True, cache_dir=cache
        ).resolved
    except (OSError, RevisionResolutionError):
        commit = None  # whoever needs the commit asks for it then
    origin |= {"requested_revision": requested, "revision": commit, "subfolder": spec.get("subfolder") or ""}


def _source(given: Any, who: str, remedy: str) -> str | os.PathLike:
    """The id or path that was given, or that a live model was loaded from (ValueError where there is none)."""
    source = given if isinstance(given, (str, os.PathLike)) else getattr(given, "name_or_path", None)
    if not source:
        raise ValueError(f"{who} is a live object that was not loaded from anywhere: pass {remedy}.")
    return source


def _spec(name: str, value: Any) -> dict[str, Any]:
    spec = dict(value) if isinstance(value, Mapping) else {"model": value}
    if unknown := sorted(set(spec) - ENCODER_KEYS):
        raise TypeError(f"{name}: unknown keys {unknown}, an encoder takes {sorted(ENCODER_KEYS)}.")
    if spec.get("model") is None:
        raise TypeError(f"{name}: an encoder needs a model: a Hub id, a path or a live model.")
    return spec


def _encoder(name: str, spec: dict, fields: dict, loading: dict, common: dict) -> ModalEncoderModule:
    source = spec["model"]
    if isinstance(source, ModalEncoderModule):
        if extra := sorted(set(spec) - {"model", "processor"}):
            raise TypeError(f"{name}: {extra} belong into the ModalEncoderModule that was given.")
        encoder = source
    else:
        if isinstance(source, (str, os.PathLike)):
            # What an encoder says of itself wins over what the call says of all.
            own = {key: spec[key] for key in LOADING_KEYS if spec.get(key) is not None}
            source = AutoModel.from_pretrained(source, **{**loading, **common, **own})
        elif not isinstance(source, PreTrainedModel) and not is_wrapped(source):
            raise TypeError(f"{name}: expected a Hub id, a path or a model, got {type(source).__name__}.")
        options = {k: v for k, v in spec.items() if k not in (*LOADING_KEYS, "model", "processor", "projector", "trim")}
        given = spec.get("projector")
        options["trim"] = bool(spec.get("trim"))
        encoder = ModalEncoderModule(source, given if isinstance(given, MultimodalProjector) else None, **options)
        if given is not None and not isinstance(given, MultimodalProjector):
            fields = dict(given) if isinstance(given, Mapping) else {"projection_type": given}
    if encoder.projector is None:  # its sizes are filled in when the model is composed
        encoder.projector = MultimodalProjector(MultimodalProjectorConfig(**fields))
    return encoder


def _set_trim(name: str, asked: bool | None, model: MultimodalModel, processor: MultimodalProcessor) -> None:
    """Leave out a window's padding (in place), where the encoder can and nothing needs the whole; ValueError: it cannot."""
    encoder = model.encoders[name]
    if asked is None:  # a callback may be made for the window, and so may a projector that does not take any number
        free = encoder.kind == "audio" and not any(encoder.callbacks.values()) and _takes_any_number(encoder.projector)
        encoder.trim = free and _trims(name, processor)
    elif asked and not _trims(name, processor):
        told = "a mask leaves out nothing of what its processor and its encoder make of a short sound"
        raise ValueError(f"{name}: trim=True, but {told}: leave it out.")
    for config in (model.config, processor.config):
        config.modality(name)["trim"] = encoder.trim


def _takes_any_number(projector: MultimodalProjector) -> bool:
    """Whether a projector takes the features of any but the very shortest sounds."""
    try:
        for count in range(8, 72):
            projector.feature_count(count)
    except ValueError:
        return False
    return True


def _trims(name: str, processor: MultimodalProcessor) -> bool:
    """Whether a mask leaves out what an extractor adds to a sound to fill up its window (Whisper's 30 seconds)."""
    extractor = processor.processors.get(name)
    parameters = (
        inspect.signature(extractor.__call__).parameters if isinstance(extractor, FeatureExtractionMixin) else {}
    )
    if "return_attention_mask" not in parameters or parameters["padding"].default != "max_length":
        return False
    half = (getattr(extractor, "n_samples", None) or sampling_rate_of(extractor) or 16_000) // 2
    try:
        whole, valid = (processor.features_of_sound(name, half, {"return_attention_mask": x}) for x in (False, True))
    except ValueError:  # the encoder does not take the mask as its extractor makes it
        return False
    return valid < whole


def _processor(name: str, spec: dict, encoder: ModalEncoderModule, loading: dict) -> Any:
    kind, given = encoder.kind, spec.get("processor")
    if given is None and (ours := default_processor(kind, unwrapped(encoder.module).config)) is not None:
        return ours  # for items that transformers has no processor for
    if given is not None and not isinstance(given, (str, os.PathLike)):
        return given
    source = spec["model"] if given is None else given
    source = source.module if isinstance(source, ModalEncoderModule) else source
    remedy = f"its processor, encoders={{{name!r}: {{'model': ..., 'processor': ...}}}}"
    source = _source(source, f"{name}: the encoder", remedy)
    own = {key: spec[key] for key in ("revision", "subfolder") if spec.get(key) is not None}
    options = loading | own  # processors have no dtype and no attention
    if kind == "video" and not packs_frames(encoder.module):
        with contextlib.suppress(OSError, ValueError, ImportError):  # there may be a video processor beside the encoder
            return AutoImageProcessor.from_pretrained(source, **options)  # it is run frame by frame
    if kind == "video":
        try:
            return AutoVideoProcessor.from_pretrained(source, **options)
        except (OSError, ValueError, ImportError) as error:
            raise video_processor_missing(source, error) from error
    auto = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor, "text": AutoTokenizer}.get(kind, AutoProcessor)
    return auto.from_pretrained(source, **options)
