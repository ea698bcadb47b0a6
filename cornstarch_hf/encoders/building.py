"""One encoder as compose() is told of it, with its projector, and as the configuration holds it; `module` reads that."""

import copy
import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_multimodal import MEDIA_KINDS, validate_encoder_names
from ..configuration_projector import MultimodalProjectorConfig
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.classes import class_name, constructor_options
from ..parts.known_encoders import ALL, LAST, encoder_type
from ..parts.registries import PROJECTORS, valid_groups
from ..parts.stored_modules import SLOTS
from ..parts.versions import CACHE_NAMES
from ..parts.weightless import is_building
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

LOADING_KEYS = ("revision", "dtype", "attn_implementation", "subfolder")
# What an encoder's dict may say: what it is made of, what of it is projected, its callbacks, how it is loaded.
SELECTED = ("layer", "output", "drop_prefix")
_OPTIONS = ("model", "processor", "projector", "kind", *SELECTED, "select", "tiles", "trim", "additional_args")
ENCODER_KEYS = frozenset([*_OPTIONS, *SLOTS, *LOADING_KEYS])
# Kinds that an encoder of such a name can have, unless another one is stated.
_KINDS_BY_NAME: dict[str, tuple[str, ...]] = {"vision": ("image", "video"), "video": ("image", "video")}
_KINDS_BY_NAME |= {"image": ("image",), "audio": ("audio",), "speech": ("audio",), "sound": ("audio",)}


def is_path(source: Any) -> bool:
    """Whether something is to be loaded: a Hub id or a path."""
    return isinstance(source, (str, os.PathLike))


def check_names(what: str, given: Any, encoders: Mapping[str, Any]) -> None:
    """Refuse what is no dict by the encoders' names (TypeError, ValueError)."""
    if given is not None and not isinstance(given, Mapping):
        first = next(iter(encoders), "vision")
        raise TypeError(f"{what} must be a dict by encoder, {{{first!r}: ...}}, got {given!r:.100}.")
    if unknown := [name for name in given or () if name not in encoders]:
        raise ValueError(f"{what} names {unknown}, the model has the encoders {list(encoders)}.")


def encoder_specs(encoders: Any, projector: Any, processors: Any, groups: Any = None) -> dict[str, dict[str, Any]]:
    """What is said of each encoder, by name: a dict with its model, its projector and, if it is given, its processor."""
    if not isinstance(encoders, Mapping):
        raise TypeError(f"encoders must be a dict by names that you choose, {{'vision': ...}}, got {encoders!r:.100}.")
    validate_encoder_names(list(encoders))
    check_names("processors", processors, encoders)
    specs = {name: _spec(name, value) for name, value in encoders.items()}
    joined = [group["encoders"] for group in valid_groups(groups, list(specs)) if isinstance(group, dict)]
    others = {name for names in joined for name in names[1:]}
    for name, spec in specs.items():
        if (processors or {}).get(name) is not None:
            if spec.get("processor") is not None:
                raise ValueError(
                    f"{name}: its processor was given twice, by processors= and in its dict: give one of them."
                )
            spec["processor"] = processors[name]
        own = spec.get("projector")
        if own is None and name in others:  # the first one of its group has the projector
            continue
        if not isinstance(own, MultimodalProjector) and not _has_projector(spec["model"]):
            spec["projector"] = make_projector(own, f"{name}: ") if own is not None else make_projector(projector)
    return specs


def _spec(name: str, value: Any) -> dict[str, Any]:
    spec = dict(value) if isinstance(value, Mapping) else {"model": value}
    if unknown := sorted(set(spec) - ENCODER_KEYS):
        raise TypeError(f"{name}: unknown keys {unknown}, an encoder takes {sorted(ENCODER_KEYS)}.")
    source = spec.get("model")
    if source is None:
        raise TypeError(f"{name}: an encoder needs a model: a Hub id, a path or a live model.")
    if isinstance(source, ModalEncoderModule):
        if extra := sorted(set(spec) - {"model", "processor"}):
            raise TypeError(f"{name}: {extra} belong into the ModalEncoderModule that was given.")
    elif not is_path(source) and not isinstance(source, PreTrainedModel) and not is_wrapped(source):
        what = f"the class {source.__name__}" if isinstance(source, type) else type(source).__name__
        raise TypeError(f"{name}: expected a Hub id, a path or a model, got {what}.")
    _check_select(name, spec)
    return spec


def _check_select(name: str, spec: Mapping[str, Any]) -> None:
    if spec.get("select") not in (None, "native"):
        raise ValueError(f"{name}: select must be 'native', or left out, got {spec['select']!r:.100}.")
    if twice := [key for key in SELECTED if spec.get("select") and spec.get(key) is not None]:
        raise ValueError(
            f"{name}: select='native' takes {list(SELECTED)} of the native model: leave out {twice}, or it."
        )


def _has_projector(source: Any) -> bool:
    return isinstance(source, ModalEncoderModule) and source.projector is not None


def make_projector(given: Any, who: str = "") -> MultimodalProjector:
    """A projector by its type, its fields or its configuration, without sizes that these leave out.

    TypeError and ValueError, which begin with `who`, for what is none of them.
    """
    if isinstance(given, MultimodalProjectorConfig):
        return MultimodalProjector(copy.deepcopy(given))
    fields = dict(given) if isinstance(given, Mapping) else {"projection_type": given}
    try:
        config = MultimodalProjectorConfig(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}{error}") from error
    takes = inspect.signature(PROJECTORS[config.projection_type]).parameters.values()
    if "activation" in fields and not any(p.name in ("activation", "config") or p.kind is p.VAR_KEYWORD for p in takes):
        raise TypeError(
            f"{who}the {config.projection_type!r} projector has no activation: choose 'mlp', or leave it out."
        )
    return MultimodalProjector(config)


def check_dtype(dtype: Any, who: str) -> None:
    """ValueError, which begins with `who`, for what is no dtype to load a model in."""
    # A dict of them is by part of a model, as transformers takes it.
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    floating = isinstance(named, torch.dtype) and named.is_floating_point
    if not floating and dtype not in ("auto", None) and not isinstance(dtype, Mapping):
        expected = "'bfloat16', 'float16', 'float32', 'auto' or a torch.dtype like them"
        raise ValueError(f"{who}dtype must be {expected}, got {dtype!r}.")


def takes_any_number(projector: MultimodalProjector) -> bool:
    """Whether a projector takes the features of any but the very shortest sounds."""
    try:
        for count in range(8, 72):
            projector.feature_count(count)
    except ValueError:
        return False
    return True


def check_kind(name: str, encoder: ModalEncoderModule) -> None:
    """ValueError for an encoder of media or texts whose name says another kind than it was found to have."""
    kinds, found = _KINDS_BY_NAME.get(name), encoder.kind
    if kinds and found in (*MEDIA_KINDS, "text") and found not in kinds:
        raise ValueError(
            f"{name}: {type(unwrapped(encoder.module)).__name__} encodes items of the kind {found!r}, which its name does not "
            f"say: pass an encoder of the kind {kinds[0]!r}, choose another name, or state {{'kind': {found!r}}}."
        )


def complete_projector(
    encoder: ModalEncoderModule, language_model: nn.Module, width: int, projection_type: str, activation: str
) -> None:
    """Create or complete an encoder's projector, on its device, in its dtype or the projector's own (ValueError: widths)."""
    name, module, group = encoder.name, unwrapped(encoder.module), list(parts_of_group(encoder.name, encoder).values())
    widths = [found_width(each) for each in group]
    known = None if any(width is None for width, _ in widths) else sum(width or 0 for width, _ in widths)
    found = all(certain for _, certain in widths)
    if encoder.projector is None:
        config = MultimodalProjectorConfig(projection_type=projection_type, activation=activation)
        encoder.projector = MultimodalProjector(config)
    projector = encoder.projector
    # One that is built below gets the encoder's device and dtype, if it gets weights; one that was brought along keeps its own.
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
    if fresh and not is_building() and (weight := first_weight(encoder.module)) is not None:
        projector.to(device=weight.device, dtype=projector.config.own_dtype or weight.dtype)
    # Only then are the projected features those whose width was found: a callback or an output field may have any.
    as_encoded = found and known is not None and all(each.postprocess_module_callback is None for each in group)
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


def parts_of_group(name: str, encoder: ModalEncoderModule) -> dict[str, ModalEncoderModule]:
    """The encoder and those that are joined to it, by what stands before the names of their inputs."""
    others = {} if encoder.join is None else encoder.join.others
    return {"": encoder} | {f"{other}.": each for other, each in others.items()}


def joined_names(groups: Iterable[Any], names: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Inputs by keyword, where the first encoder of a group that is joined has those of all.

    >>> joined_names([{"encoders": ["a", "b"]}], {"a": {"a_pixels": "pixels"}, "b": {"b_pixels": "pixels"}})
    {'a': {'a_pixels': 'pixels', 'b_pixels': 'b.pixels'}, 'b': {}}
    """
    found = {name: dict(own) for name, own in names.items()}
    for first, *others in (group["encoders"] for group in groups if isinstance(group, Mapping)):
        for other in others:
            found[first] |= {key: f"{other}.{parameter}" for key, parameter in found[other].items()}
            found[other] = {}
    return found


def found_width(encoder: ModalEncoderModule) -> tuple[int | None, bool]:
    """Width of an encoder's selected features, None where nothing tells, and whether it is certain.

    What a dry run tells of their axes becomes part of the encoder's selection; without one, the configuration may speak of
    another width.
    """
    inner, selection = unwrapped(encoder.module), encoder.selection
    if encoder.known_width is not None:
        return encoder.known_width or None, bool(encoder.known_width)
    # Of a field or a layout of the user's choice the configuration says nothing.
    usual = selection.output is None and selection.data_format is None
    known = usual and width_is_configured(inner.config, selection.layer)
    if known and not selection.needs_hidden_states:
        return encoder.feature_width(), True
    layout = find_feature_axes(inner, encoder.kind, selection, encoder.name)  # raises for a layer that does not exist
    if known:
        return encoder.feature_width(), True
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
        **encoder.merging,
        "shares": encoder.shares,
    }


def assign_input_names(
    parameters: Mapping[str, Iterable[str]],
    kinds: Mapping[str, str],
    language_model: Iterable[str],
    given: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, dict[str, str]]:
    """Give each encoder input its keyword: for each modality ``{keyword: parameter of the encoder}``.

    An input keeps the name that its processor emits while that is unique; where two encoders, or an encoder and the
    language model, want one name, every encoder's gets ``"{modality}_"`` in front (ValueError if that is taken too).  Keywords
    that are `given`, by modality, are taken as they are.

    >>> assign_input_names({"vision": ["pixel_values"], "audio": ["input_features", "attention_mask"]},
    ...                    {"vision": "image", "audio": "audio"}, ["input_ids", "attention_mask"])["audio"]
    {'input_features': 'input_features', 'audio_attention_mask': 'attention_mask'}
    """
    chosen = {name: {p: keyword for keyword, p in (given or {}).get(name, {}).items()} for name in kinds}
    names_of = {name: {**PROCESSOR_NAMES.get(kind, {}), **chosen[name]} for name, kind in kinds.items()}
    emitted = {name: {p: names_of[name].get(p, p) for p in names} for name, names in parameters.items()}
    text = TEXT_NAMES | transformers_keywords() | set(language_model)
    wanted = [key for names in emitted.values() for key in names.values()]
    assigned: dict[str, dict[str, str]] = {}
    taken = dict.fromkeys(text, "the language model")
    for name, names in emitted.items():
        assigned[name] = {}
        for parameter, key in names.items():
            # Of two encoders that want one name both get the prefix, whichever comes first.
            clashes = (key in text or wanted.count(key) > 1) and parameter not in chosen[name]
            keyword = f"{name}_{key}" if clashes else key
            if keyword in taken:
                raise ValueError(f"{name}: its input {key!r} would be named {keyword!r}, which {taken[keyword]} uses.")
            taken[keyword] = f"the encoder {name!r}"
            assigned[name][keyword] = parameter
    return assigned


def check_texts(freeze: Any, chat_template: Any) -> None:
    """TypeError for names of parts that shall not train, or a chat template, of other types."""
    if not isinstance(freeze, (str, list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in freeze):
        raise TypeError(f"freeze must be a list of names of parts, ['vision_encoder'], got {freeze!r:.100}.")
    if not isinstance(chat_template, (str, Mapping, type(None))):
        raise TypeError(f"chat_template must be the text of a template, got {type(chat_template).__name__}.")
