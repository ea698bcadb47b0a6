"""Parts to configuration and back: what live encoders and a language model are, and how they are built again."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .configuration_multimodal import MultimodalConfig, validate_encoder_names
from .encoders.building import build_encoder, complete_projector, modality_entry
from .encoders.input_names import assign_input_names
from .encoders.module import ModalEncoderModule
from .language_model.supported import build_language_model, check_language_model, embedding_width
from .parts.adapters import record_adapters, unwrapped
from .parts.classes import class_name, constructor_options, language_model_class
from .parts.origins import origin_of
from .parts.signatures import forward_parameters


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
