"""Whether a composition still computes what its native class does: what `to_native` refuses before it puts one together."""

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
