"""Whether a composition still computes what its native class does: what `to_native` refuses before it puts one together."""

from typing import Any

from ..checkpoints.storage import layers_of
from ..encoders.building import modality_entry
from ..encoders.module import ModalEncoderModule
from ..modeling_multimodal import MultimodalModel
from ..parts.classes import constructor_options
from ..parts.stored_modules import describe_callback
from .entries import Native

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


def check_same(model: MultimodalModel, usual: MultimodalModel, entry: Native) -> None:
    """Refuse a composition that computes something else than the one that its native class would be taken apart into."""
    for name in usual.config.encoders:
        found, expected = (modality_entry(m.encoders[name]) for m in (model, usual))
        projectors = [m.encoders[name].projector.config.to_dict() for m in (model, usual)]
        pairs: dict[str, tuple[Any, Any]] = {key: (found[key], expected[key]) for key in _COMPUTED}
        pairs |= {
            f"projector {key}": (projectors[0].get(key), projectors[1][key])
            for key in ("projection_type", "activation", "projection_kwargs")
        }
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
    _check_same_text(model.language_model, usual.language_model, entry)


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
