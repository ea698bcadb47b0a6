"""One encoder with its projector, completed and written into a modality's entry of the configuration; `rebuilding` reads it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..configuration_projector import MultimodalProjectorConfig
from ..parts.adapters import unwrapped
from ..parts.constructors import class_name, constructor_options
from ..parts.known_encoders import ALL, LAST, encoder_type
from ..parts.versions import CACHE_NAMES
from ..projectors.projector import MultimodalProjector
from .feature_layout import find_feature_axes
from .grids import PLANE_KINDS
from .module import ModalEncoderModule, first_weight
from .towers import OWN_INPUTS, transformers_keywords

# Names that `generate`, Trainer or transformers' decoders give a meaning of their own.
TEXT_NAMES = frozenset([
    *OWN_INPUTS, *CACHE_NAMES, "token_type_ids", "mm_token_type_ids", "cache_position", "shift_labels", "inputs",
    "return_dict", "output_attentions", "output_hidden_states", "encoder_outputs", "return_loss",
])  # fmt: skip
# Towers of packed models name their inputs differently from what their processors emit.
PROCESSOR_NAMES = {
    "image": {"hidden_states": "pixel_values", "grid_thw": "image_grid_thw"},
    "video": {"hidden_states": "pixel_values_videos", "grid_thw": "video_grid_thw"},
}


def complete_projector(
    encoder: ModalEncoderModule, language_model: nn.Module, width: int, projection_type: str, activation: str
) -> None:
    """Create or complete an encoder's projector, on its device and in its dtype; ValueError for widths that do not fit."""
    name, module, (known, found) = encoder.name, unwrapped(encoder.module), found_width(encoder)
    if encoder.projector is None:
        config = MultimodalProjectorConfig(projection_type=projection_type, activation=activation)
        encoder.projector = MultimodalProjector(config)
    projector = encoder.projector
    # One that is built below gets the encoder's device and dtype; one that was brought along keeps its own.
    fresh = projector.projection is None
    if fresh and projector.config.in_features is None and known is None:
        raise ValueError(
            f"{name}: the configuration of {type(module).__name__} does not tell the width of its features: "
            "give projector=MultimodalProjector(MultimodalProjectorConfig(in_features=...))."
        )
    # Features of pictures lie in a plane: a reduction that takes `dims` works over height and width there.
    projector.complete(known, width, dims=2 if encoder.kind in PLANE_KINDS else 1)
    config = projector.config
    config.encoder_model_type = module.config.model_type
    config.language_model_type = unwrapped(language_model).config.model_type
    if fresh and (weight := first_weight(encoder.module)) is not None:
        projector.to(device=weight.device, dtype=weight.dtype)
    # Only then are the projected features those whose width was found: a callback or an output field may have any.
    as_encoded = found and known is not None and encoder.postprocess_module_callback is None
    if as_encoded and config.in_features not in (None, known):
        raise ValueError(
            f"{name}: the projector's in_features is {config.in_features}, but the encoder's features have width {known}: "
            "leave in_features out, or choose the right layer=."
        )
    # A callback behind the projector may be what makes the embeddings' width.
    if config.out_features != width and encoder.postprocess_projector_callback is None:
        raise ValueError(
            f"{name}: the projector's out_features is {config.out_features}, but the language model's embeddings have width "
            f"{width}: leave out_features out, or set it to {width}."
        )


def found_width(encoder: ModalEncoderModule) -> tuple[int | None, bool]:
    """Width of an encoder's selected features, None where nothing tells, and whether it is certain.

    What a dry run tells of their axes becomes part of the encoder's selection; without one, the configuration may speak of
    another width.
    """
    inner, selection = unwrapped(encoder.module), encoder.selection
    # Of a field or a layout of the user's choice the configuration says nothing.
    usual = selection.output is None and selection.data_format is None
    if usual and width_is_configured(inner.config, selection.layer):
        return encoder.feature_width(), True
    layout = find_feature_axes(inner, encoder.kind, selection, encoder.name)
    if layout is None:
        return encoder.feature_width(), False  # the configuration's word, which may be of another field or layer
    if selection.data_format is None:  # an axis that the user named stays
        encoder.selection = dataclasses.replace(selection, data_format=layout.data_format)
    return layout.width, True


def width_is_configured(config: Any, layer: Any) -> bool:
    """Whether the features of a layer are sequences of the width that an encoder's configuration names."""
    if getattr(config, "add_adapter", False):  # wav2vec 2.0's, which may have another width
        return False
    # Where the last layer alone has the configured width, it says nothing of earlier ones.
    return encoder_type(config).width_layers in ((LAST, ALL) if layer == -1 else (ALL,))


def modality_entry(encoder: ModalEncoderModule) -> dict[str, Any]:
    """The settings of one modality, as the configuration keeps them."""
    module, selection = unwrapped(encoder.module), encoder.selection
    return {
        "kind": encoder.kind,
        "encoder_class": class_name(type(module), module.config),
        "encoder_kwargs": constructor_options(module),
        **dataclasses.asdict(selection),
        "layer": selection.layer if isinstance(selection.layer, int) else list(selection.layer),  # JSON has no tuples
        "trim": encoder.trim,
        "additional_args": list(encoder.additional_args),
    }


def assign_input_names(
    parameters: Mapping[str, Iterable[str]], kinds: Mapping[str, str], language_model: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Give each encoder input its keyword: for each modality ``{keyword: parameter of the encoder}``.

    An input keeps the name that its processor emits while that is unique; where two encoders, or an encoder and the
    language model, want one name, every encoder's gets ``"{modality}_"`` in front (ValueError if that is taken too).

    >>> assign_input_names({"vision": ["pixel_values"], "audio": ["input_features", "attention_mask"]},
    ...                    {"vision": "image", "audio": "audio"}, ["input_ids", "attention_mask"])["audio"]
    {'input_features': 'input_features', 'audio_attention_mask': 'attention_mask'}
    """
    names_of = {name: PROCESSOR_NAMES.get(kind, {}) for name, kind in kinds.items()}
    emitted = {name: {p: names_of[name].get(p, p) for p in names} for name, names in parameters.items()}
    text = TEXT_NAMES | transformers_keywords() | set(language_model)
    wanted = [key for names in emitted.values() for key in names.values()]
    assigned: dict[str, dict[str, str]] = {}
    taken = dict.fromkeys(text, "the language model")
    for name, names in emitted.items():
        assigned[name] = {}
        for parameter, key in names.items():
            # Of two encoders that want one name both get the prefix, whichever comes first.
            keyword = f"{name}_{key}" if key in text or wanted.count(key) > 1 else key
            if keyword in taken:
                raise ValueError(f"{name}: its input {key!r} would be named {keyword!r}, which {taken[keyword]} uses.")
            taken[keyword] = f"the encoder {name!r}"
            assigned[name][keyword] = parameter
    return assigned
