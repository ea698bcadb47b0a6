"""Which native types and models cannot be taken apart, with the reason; and the row of those that can."""

from typing import Any

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
