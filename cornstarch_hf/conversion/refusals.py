"""What cannot be converted, with the reason: native types and their models, and compositions that no native class computes."""

import inspect
from typing import Any

from ..checkpoints.storage import layers_of
from ..configuration_projector import MultimodalProjectorConfig
from ..encoders.building import modality_entry
from ..encoders.module import ModalEncoderModule
from ..modeling_multimodal import MultimodalModel
from ..parts.classes import constructor_options
from ..parts.registries import PROJECTORS
from ..parts.stored_modules import describe_callback
from .entries import Native, setting
from .table import NATIVE

_CROSS = "its text attends to images by cross attention within the language model, which a composition has no place for"
_ENCODER_DECODER = (
    "its text is made by the decoder of an encoder-decoder, and a composition has a decoder-only language model"
)
_DISCRETE = "its images are tokens of the language model's own vocabulary, so there are no features to project"
OUTSIDE: dict[str, str] = {
    **dict.fromkeys(("mllama", "idefics", "blip", "evolla"), _CROSS),
    **dict.fromkeys(("florence2", "pix2struct", "pp_formulanet"), _ENCODER_DECODER),
    **dict.fromkeys(("udop", "t5gemma2", "vision-encoder-decoder"), _ENCODER_DECODER),
    **dict.fromkeys(("chameleon", "emu3"), _DISCRETE),
    "git": "it puts its image before the text by itself and widens every mask by it",
    "diffusion_gemma": "it fills in blocks of text by diffusion and does not predict one token after the other",
    "pi0": "it gives actions of a robot by flow matching, and no text",
    "kyutai_speech_to_text": "its sounds are codes whose embeddings are added at every position of the text",
    "voxtral_realtime": "features of its sound are added at every position of the text, and not put in places of their own",
    "mistral4": "it is a language model of text alone: pass it to compose() as language_model=",
}  # fmt: skip

# What of a modality's entry decides what is computed; its names and tokens may be others.
_COMPUTED = (
    "output",
    "layer",
    "drop_prefix",
    "data_format",
    "trim",
    "additional_args",
    "layer_features",
    "merge",
    "marks",
)


def entry_of_type(model_type: Any) -> Native:
    """The row of a model type; ValueError with the reason, or the known types, where it has none."""
    if model_type in NATIVE:
        return NATIVE[model_type]
    if model_type in OUTSIDE:
        raise ValueError(f"{model_type!r} cannot be composed of encoders and a language model: {OUTSIDE[model_type]}.")
    raise ValueError(f"The native type {model_type!r} is not known, expected one of {sorted(NATIVE)}.")


def entry_of(config: Any) -> Native:
    """The row of a native configuration; ValueError as of `entry_of_type`, and for a setting that cannot be converted."""
    entry = entry_of_type(config.model_type)
    for path, only in entry.only.items():
        if (value := setting(config, path)) != only:
            raise ValueError(
                f"{config.model_type!r} with {path}={value!r} cannot be converted, expected {path}={only!r}."
            )
    return entry


def check_model(native: Any, entry: Native) -> None:
    """ValueError for another class than the row's, adapters inside, weights in a packed form or on several devices."""
    name = type(native).__name__
    if name != entry.architecture:
        raise ValueError(f"from_native takes the whole {entry.architecture}, got {name}: load that class.")
    if getattr(native, "_hf_peft_config_loaded", False):
        raise ValueError(f"{name} has adapters inside: merge or unload them first.")
    if getattr(native, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{name} is quantized: convert the plain checkpoint, save it, and quantize where that is loaded "
            "(MultimodalModel.from_pretrained(folder, quantization_config=...))."
        )
    if len(places := set(map(str, (getattr(native, "hf_device_map", None) or {}).values()))) > 1:
        raise ValueError(
            f"{name} lies on several devices, {sorted(places)}, between which its own modules move what they compute: convert "
            "it on one, save the composition, and spread that where it is loaded "
            "(MultimodalModel.from_pretrained(folder, device_map=...))."
        )


def check_same(model: MultimodalModel, usual: MultimodalModel, entry: Native, text: bool = True) -> None:
    """Refuse a composition that computes something else than the one that its native class would be taken apart into.

    Without `text` language models are not compared.
    """
    for name in usual.config.encoders:
        found, expected = (modality_entry(m.encoders[name]) for m in (model, usual))
        pairs: dict[str, tuple[Any, Any]] = {key: (found[key], expected[key]) for key in _COMPUTED}
        mine, theirs = (projector_options(m.encoders[name].projector.config) for m in (model, usual))
        pairs |= {f"projector {key}": (mine.get(key), theirs.get(key)) for key in {**theirs, **mine}}
        mine, theirs = (layers_of(m.encoders[name].projector.projection) for m in (model, usual))
        pairs["projection"] = (mine, theirs)
        pairs["callbacks"] = (_callbacks(model.encoders[name]), _callbacks(usual.encoders[name]))
        for key, (got, want) in pairs.items():
            if got != want:
                raise ValueError(
                    f"{name}: its {key} is {got!r:.200}, and {entry.architecture} computes what it does with {want!r:.200}: a "
                    "native checkpoint cannot hold the difference."
                )
    for key in ("positions", "mask"):
        got, want = (getattr(m.config, key, None) or None for m in (model, usual))
        if got != want:
            raise ValueError(f"The {key} of the composition are {got!r:.200}, {entry.architecture} has {want!r:.200}.")
    if text:
        _check_same_text(model.language_model, usual.language_model, entry)


def projector_options(config: MultimodalProjectorConfig) -> dict[str, Any]:
    """All that decides what a projector computes beside its sizes: the type and its options, defaults filled in."""
    target = PROJECTORS.get(config.projection_type)
    takes = inspect.signature(target).parameters if target is not None else {}
    options = {p.name: p.default for p in takes.values() if p.default is not p.empty}
    options |= {"activation": config.activation} if "activation" in takes else {}
    options |= config.projection_kwargs  # which outdo fields, as where it is built
    if options.get("num_layers", 1) != 1 and options.get("hidden_size") is None:
        options["hidden_size"] = config.out_features
    return {"projection_type": config.projection_type} | options


def _check_same_text(model: Any, usual: Any, entry: Native) -> None:
    """Refuse a language model of another class than the native one's parts have, or with other factors of logits."""
    found, expected = ((type(m), constructor_options(m)) for m in (model, usual))
    if found != expected:
        got, want = (f"{cls.__name__} {options or ''}".rstrip() for cls, options in (found, expected))
        raise ValueError(f"The language model is {got}, and {entry.architecture} computes what {want} does.")


def _callbacks(encoder: ModalEncoderModule) -> dict[str, Any]:
    """What a checkpoint says of an encoder's own callbacks, by their places; ValueError for one that none can hold."""
    named = {slot: callback for slot, callback in encoder.own_callbacks.items() if callback is not None}
    return {slot: describe_callback(callback) for slot, callback in named.items()}
