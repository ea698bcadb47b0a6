"""Parts to configuration and back: what live encoders and a language model are, and how they are built again."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .adapters import describe_adapters, is_wrapped, unwrapped, wrap_again
from .callbacks import SLOTS, build_callback
from .classes import class_name, constructor_options, language_model_class, resolve_class
from .configuration_multimodal import MultimodalConfig, validate_encoder_names
from .configuration_projector import MultimodalProjectorConfig
from .encoders import ModalEncoderModule
from .grids import PLANE_KINDS
from .input_names import assign_input_names
from .layouts import find_layout
from .origins import origin_of
from .precomputed_features import PrecomputedFeaturesConfig
from .projectors import MultimodalProjector
from .refusals import refusal
from .towers import forward_parameters

# Model types whose features are sequences of the width that their configuration names: no run on shapes is needed to know.
REGULAR = frozenset(
    [
        *("clip_vision_model", "dinov2", "siglip_vision_model", "vit", "qwen2_vl_vision", "whisper", "wav2vec2", "esm"),
        *("bert", PrecomputedFeaturesConfig.model_type),
    ]
)
# Those of which that holds only after patches were merged.
REGULAR_AT_LAST = frozenset(["qwen2_vl_vision"])


def check_language_model(model: Any) -> None:
    """Refuse what cannot be the language model of a composition.

    Raises:
        TypeError: not an instance of a transformers model.
        ValueError: an encoder-decoder, no language-model head, no `inputs_embeds`, and what else `refusals` tells.
    """
    if isinstance(model, type) or not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(f"language_model must be a transformers.PreTrainedModel instance, got {model!r:.100}.")
    if reason := refusal(unwrapped(model)):
        raise ValueError(reason)


def embedding_width(language_model: Any) -> int:
    """Width of a language model's input embeddings, which projected features must have."""
    embedding: Any = unwrapped(language_model).get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1]


def compose_config(
    encoders: Mapping[str, ModalEncoderModule],
    language_model: PreTrainedModel,
    init_projector_type: str = "linear",
    init_activation: str = "gelu",
) -> MultimodalConfig:
    """Describe live parts; creates the projectors that are missing or lack their sizes.

    The parts' configurations become sub-configurations as they are, not copies.

    Raises:
        TypeError: a part is of the wrong type.
        ValueError: names, widths, shared weights, or a language model that cannot be used.
    """
    check_language_model(language_model)
    check_encoders(encoders, language_model)
    separate_configs(encoders, language_model)
    width = embedding_width(language_model)
    values: dict[str, Any] = {}
    for name, encoder in encoders.items():
        encoder.name = name
        complete_projector(encoder, language_model, width, init_projector_type, init_activation)
        values[f"{name}_config"] = unwrapped(encoder.module).config
        values[f"{name}_projector_config"] = encoder.projector.config
        values[f"{name}_modality"] = modality_entry(encoder)
    text = unwrapped(language_model)
    names = assign_input_names(
        {name: encoder.parameter_names for name, encoder in encoders.items()},
        {name: encoder.kind for name, encoder in encoders.items()},
        forward_parameters(text),
    )
    for name in encoders:
        values[f"{name}_modality"]["input_names"] = names[name]
    config = MultimodalConfig(text_config=text.config, encoders=list(encoders), **values)
    if language_model_class(text.config) is not type(text):
        config.language_model_class = class_name(type(text), text.config)
    config.language_model_kwargs = constructor_options(text)
    record_adapters(config, encoders, language_model)
    origins = {f"{name}_encoder": encoder.origin for name, encoder in encoders.items()}
    origins["language_model"] = origin_of(language_model, language_model)
    config.origins = {name: origin for name, origin in origins.items() if origin} or None
    return config


def check_encoders(encoders: Any, language_model: nn.Module) -> None:
    """Refuse wrong types, bad names, and weights that two parts share (a checkpoint would store them once)."""
    if not isinstance(encoders, Mapping):
        raise TypeError(f"encoders must be a dict of ModalEncoderModule by name, got {type(encoders).__name__}.")
    for name, encoder in encoders.items():
        if not isinstance(encoder, ModalEncoderModule):
            raise TypeError(
                f"The encoder {name!r} must be a ModalEncoderModule, got {type(encoder).__name__}: wrap it by "
                "ModalEncoderModule(model)."
            )
    validate_encoder_names(list(encoders))
    owners = {id(p): "the language model" for p in language_model.parameters()}
    for name, encoder in encoders.items():
        mine = {id(p) for p in encoder.parameters()}
        if shared := mine & set(owners):
            raise ValueError(
                f"The encoder {name!r} shares weights with {owners[shared.pop()]}: give it a module of its own "
                "(copy.deepcopy), or use one name."
            )
        owners |= dict.fromkeys(mine, f"the encoder {name!r}")


def separate_configs(encoders: Mapping[str, ModalEncoderModule], language_model: nn.Module) -> None:
    """Give each part a configuration object of its own, so that per-part settings stay apart."""
    seen = {id(unwrapped(language_model).config)}
    for encoder in encoders.values():
        old = unwrapped(encoder.module).config
        if id(old) in seen:
            new = copy.deepcopy(old)
            for module in encoder.module.modules():
                if getattr(module, "config", None) is old:
                    setattr(module, "config", new)  # noqa: B010
        seen.add(id(unwrapped(encoder.module).config))


def complete_projector(
    encoder: ModalEncoderModule, language_model: nn.Module, width: int, projection_type: str, activation: str
) -> None:
    """Create or complete an encoder's projector, on the encoder's device and in its dtype, and check its widths.

    Raises:
        ValueError: the projector's widths do not fit, or the encoder's width is not known.
    """
    name, (known, found) = encoder.name, found_width(encoder)
    if encoder.projector is None:
        config = MultimodalProjectorConfig(projection_type=projection_type, activation=activation)
        encoder.projector = MultimodalProjector(config)
    projector = encoder.projector
    if projector.config.in_features is None and known is None and projector.projection is None:
        raise ValueError(
            f"{name}: the configuration of {type(unwrapped(encoder.module)).__name__} does not tell the width of its "
            "features: give projector=MultimodalProjector(MultimodalProjectorConfig(in_features=...))."
        )
    fresh = projector.projection is None
    projector.complete(known, width, dims=2 if encoder.kind in PLANE_KINDS else 1)
    projector.config.encoder_model_type = unwrapped(encoder.module).config.model_type
    projector.config.language_model_type = unwrapped(language_model).config.model_type
    if fresh:
        weight = next((p for p in encoder.module.parameters() if p.is_floating_point()), None)
        if weight is not None:
            projector.to(device=weight.device, dtype=weight.dtype)
    got = projector.config.in_features
    as_encoded = encoder.postprocess_module_callback is None and (found or encoder.selection.output is None)
    if as_encoded and found and known is not None and got not in (None, known):
        raise ValueError(
            f"{name}: the projector's in_features is {got}, but the encoder's features have width {known}: leave "
            "in_features out, or choose the right layer=."
        )
    if projector.config.out_features != width and encoder.postprocess_projector_callback is None:
        raise ValueError(
            f"{name}: the projector's out_features is {projector.config.out_features}, but the language model's "
            f"embeddings have width {width}: leave out_features out, or set it to {width}."
        )


def found_width(encoder: ModalEncoderModule) -> tuple[int | None, bool]:
    """Width of an encoder's selected features, by a run on shapes, else by its configuration; None where neither tells.

    What the run tells of their axes becomes part of the encoder's selection.

    Returns:
        the width, and whether it is certain: a configuration may speak of another one.
    """
    inner = unwrapped(encoder.module)
    usual = encoder.selection.output is None and encoder.selection.data_format is None
    if usual and is_regular(inner.config, encoder.selection.layer):
        return encoder.feature_width(), True
    layout = find_layout(inner, encoder.kind, encoder.selection, encoder.name)
    if layout is None:
        return encoder.feature_width(), False
    if encoder.selection.data_format is None and layout.data_format is not None:
        encoder.selection = dataclasses.replace(encoder.selection, data_format=layout.data_format)
    return layout.width, True


def is_regular(config: Any, layer: Any) -> bool:
    """Whether the features of a layer are sequences of the width that an encoder's configuration names."""
    merges = config.model_type in REGULAR_AT_LAST and layer != -1
    adapted = getattr(config, "add_adapter", False)  # wav2vec 2.0's, which may have another width
    return config.model_type in REGULAR and not merges and not adapted


def modality_entry(encoder: ModalEncoderModule) -> dict[str, Any]:
    """The settings of one modality, as the configuration keeps them."""
    module, selection = unwrapped(encoder.module), encoder.selection
    return {
        "kind": encoder.kind,
        "encoder_class": class_name(type(module), module.config),
        "encoder_kwargs": constructor_options(module),
        "output": selection.output,
        "layer": selection.layer if isinstance(selection.layer, int) else list(selection.layer),
        "drop_prefix": selection.drop_prefix,
        "data_format": selection.data_format,
        "additional_args": list(encoder.additional_args),
    }


def record_adapters(config: MultimodalConfig, encoders: Mapping[str, ModalEncoderModule], language_model) -> None:
    """Write the adapters of PEFT-wrapped parts into the configuration."""
    parts = {"language_model": language_model} | {f"{n}_encoder.module": e.module for n, e in encoders.items()}
    found = {where: describe_adapters(part, where) for where, part in parts.items() if is_wrapped(part)}
    config.adapters = found or None


def build_parts(config: MultimodalConfig) -> tuple[dict[str, ModalEncoderModule], nn.Module]:
    """Build what a configuration describes, with fresh weights.

    Raises:
        ValueError: an empty configuration, an unknown class, callback or projector.
    """
    if config.text_config is None:
        raise ValueError(
            "This MultimodalConfig is empty: it has no text_config, so there is no language model to build. Compose one by "
            "MultimodalModel(encoders=..., language_model=...) or compose(...)."
        )
    encoders = {name: build_encoder(config, name) for name in config.encoders}
    return encoders, build_language_model(config)


def build_encoder(config: MultimodalConfig, name: str) -> ModalEncoderModule:
    """Build one encoder with its projector and callbacks."""
    entry, encoder_config = config.modality(name), getattr(config, f"{name}_config")
    cls: Any = resolve_class(entry["encoder_class"], encoder_config, name)
    module = wrap_again(
        cls(encoder_config, **entry["encoder_kwargs"]), _adapters(config, f"{name}_encoder.module"), name
    )
    if unknown := sorted(set(entry["callbacks"]) - set(SLOTS)):
        raise ValueError(f"{name}: unknown callback places {unknown}, expected some of {list(SLOTS)}.")
    callbacks: Any = {slot: build_callback(d, f"{name}.{slot}") for slot, d in entry["callbacks"].items()}
    encoder = ModalEncoderModule(
        module,
        MultimodalProjector(getattr(config, f"{name}_projector_config")),
        entry["additional_args"],
        **callbacks,
        kind=entry["kind"],
        layer=entry["layer"],
        output=entry["output"],
        drop_prefix=entry["drop_prefix"],
        data_format=entry["data_format"],
    )
    encoder.name = name
    return encoder


def build_language_model(config: MultimodalConfig) -> nn.Module:
    """Build the language model, its adapters wrapped again."""
    text: Any = config.text_config
    cls: Any = language_model_class(text)
    if config.language_model_class is not None:
        cls = resolve_class(config.language_model_class, text, "language_model")
    if cls is None:
        raise ValueError(f"transformers has no causal language model for {type(text).__name__}.")
    model = cls(text, **(config.language_model_kwargs or {}))
    check_language_model(model)
    return wrap_again(model, _adapters(config, "language_model"), "language_model")


def _adapters(config: MultimodalConfig, where: str) -> dict[str, Any] | None:
    return (config.adapters or {}).get(where)
