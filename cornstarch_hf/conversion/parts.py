"""A composition of a native model's parts, which hold no tensors yet or, where nobody else has the model, are its own."""

import copy
import functools
import inspect
import re
from collections.abc import Collection
from typing import Any

import transformers
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from ..configuration_multimodal import MEDIA_KINDS
from ..configuration_projector import MultimodalProjectorConfig
from ..encoders.module import ModalEncoderModule
from ..encoders.precomputed import PrecomputedFeatures, PrecomputedFeaturesConfig
from ..encoders.towers import resolve_tower
from ..language_model.text_head import TextModelWithHead
from ..modeling_multimodal import MultimodalModel
from ..parts.adapters import unwrapped
from ..parts.classes import constructor_options, language_model_class
from ..parts.gathering import SETS
from ..parts.stored_modules import build_callback, same_structure
from ..parts.weightless import without_dtypes
from ..projectors.projector import UNSIZED, MultimodalProjector
from .entries import Native, Part, resolved
from .keys import has_head, tower_of
from .refusals import entry_of


def own_parts(native: Any, entry: Native) -> frozenset[nn.Module]:
    """The towers of a native model, and its language model or text stack."""
    towers = [tower_of(native, part) for part in entry.parts_for(native.config).values() if part.tower is not None]
    return frozenset([native.get_submodule(entry.language_model), *towers])


def composed(native: Any, entry: Native, live: Collection[nn.Module] = ()) -> MultimodalModel:
    """The composition without weights, but for modules in `live`, which it takes as they are."""
    made: dict[str, ModalEncoderModule] = {}
    for name, part in entry.parts_for(native.config).items():
        made[name] = _encoder(native, part, made, live)
    rules = {key: resolved(getattr(entry, key), native.config) for key in ("positions", "mask")}
    if rules["positions"] and "time_step" in rules["positions"]:
        steps = {name: step for name, step in rules["positions"]["time_step"].items() if name in made}
        rules["positions"] |= {"time_step": steps}
    return MultimodalModel(encoders=made, language_model=_language_model(native, entry, live), **rules)


def _encoder(
    native: Any, part: Part, made: dict[str, ModalEncoderModule], live: Collection[nn.Module]
) -> ModalEncoderModule:
    config = native.config
    lender = made.get(part.shares or "")
    if lender is not None and part.tower is None:
        module: Any = lender.module
    elif part.tower is None:
        module = PrecomputedFeatures(PrecomputedFeaturesConfig(hidden_size=resolved(part.width, config)))
    else:
        tower = tower_of(native, part)
        module = tower if tower in live else built(type(tower), tower.config, **constructor_options(tower))
    callbacks: Any = {
        slot: build_callback({"name": step.name, "arguments": resolved(step.arguments, config)}, slot)
        for slot, step in part.steps.items()
    }
    callbacks |= {slot: getattr(lender, slot) for slot in part.shared_steps}
    layer = resolved(part.layer, config)
    projector = lender.projector if lender is not None and part.projector is None else _projector(native, part)
    encoder = ModalEncoderModule(
        module, projector, list(part.additional_args), kind=part.kind, layer=layer, output=part.output,
        drop_prefix=resolved(part.drop_prefix, config), input_names=dict(part.input_names), shares=part.shares,
        data_format=part.data_format,
        layer_features=part.layer_features, merge=part.merge, marks=resolved(part.marks, config), **callbacks,
    )  # fmt: skip
    # The native model runs, so nothing has to be found out by a dry run, which takes longer than loading a small one.
    encoder.known_width = lender.known_width if projector is getattr(lender, "projector", 0) else _width(native, part)
    return encoder


def _width(native: Any, part: Part) -> int:
    """Width of the features that a projector takes, by its first weight; 0 where its type needs none."""
    if part.projector is None or part.projector.kind in UNSIZED:
        return resolved(part.projector.width, native.config) or 0 if part.projector is not None else 0
    options = resolved(part.projector.options, native.config)
    first = native.get_submodule(next(iter(part.projector.names.values())))
    return first.weight.shape[-1] // (options.get("scale_factor", 1) ** 2 * options.get("stack_factor", 1))


def _projector(native: Any, part: Part) -> MultimodalProjector | None:
    if part.projector is None:
        return None
    options = resolved(part.projector.options, native.config)
    activation = options.pop("activation", "gelu")
    if options.get("num_layers") == 1:  # which has no width between layers
        options.pop("hidden_size", None)
    width = resolved(part.projector.width, native.config)
    return MultimodalProjector(
        MultimodalProjectorConfig(
            projection_type=part.projector.kind, activation=activation, in_features=width, projection_kwargs=options
        )
    )


def _language_model(native: Any, entry: Native, live: Collection[nn.Module]) -> Any:
    """The causal language model: the native one's own, its class by the text configuration, or a plain head over the stack."""
    text = native.get_submodule(entry.language_model)
    own = text in live
    config = text.config if own else copy.deepcopy(text.config)
    if has_head(text):
        return text if own else built(type(text), config)
    # The outer configuration decides about ties, whatever the text's own says.
    head, table = native.get_output_embeddings(), text.get_input_embeddings()
    config.tie_word_embeddings = head.weight is table.weight
    factors = {"scale": resolved(entry.scale, native.config), "softcap": resolved(entry.softcap, native.config)}
    cls: Any = None if entry.plain_head or any(factors.values()) else language_model_class(config)
    if cls is not None and has_bare_head(cls):
        model = _around(text, cls, config) if own else built(cls, config)
        if type(model.base_model) is type(text) and same_structure(model.get_output_embeddings(), head):
            return model
    return TextModelWithHead(text if own else built(type(text), config), **factors)


def _around(text: Any, cls: Any, config: Any) -> Any:
    """A model of a class with a head, without weights, whose text stack is a live one, and whose configuration is that one's.

    The stack that its constructor makes is of one layer, for it is exchanged: that of all takes longer than loading.
    """
    short = copy.copy(config)
    short.num_hidden_layers = 1
    model = built(cls, short)
    if type(model.base_model) is type(text):
        if any(getattr(model.base_model, key, None) != getattr(text, key, None) for key in SETS):
            model = built(cls, config)  # what the whole knows of its layers' names depends on their number
        setattr(model, model.base_model_prefix, text)
        model.config = config
    return model


# What a ...ForCausalLM class of transformers does to hidden states where its head is linear and nothing else.
_BARE_HEAD = re.compile(r"logits = self\.lm_head\(hidden_states(\[:, slice_indices, :\])?\)\s*$", re.M)
# And what none does to them before: an operation, or a layer of its own (MiniCPM 3 divides them).
_CHANGED = re.compile(r"^ +hidden_states (?:[*/+-]=|= .*(?: [*/+-] |self\.))", re.M)


# What some do where their configuration has a bound of logits.
_CAP = re.compile(r"^ +if self\.config\.final_logit_softcapping is not None:\n(?:^ +logits = .*\n)+", re.M)


@functools.cache
def has_bare_head(cls: Any, caps: bool = True) -> bool:
    """Whether a class makes of hidden states what the head of a native multimodal model does, which scales and caps nothing.

    About 29 of 189 classes do more (Cohere and Granite scale, Gemma 2 caps); only their source tells.  Where `caps` is False
    the configuration has no bound of logits, so that classes which have a choice do not cap.
    """
    source = inspect.getsource(inspect.unwrap(cls.forward))
    source = source if caps else _CAP.sub("", source)
    once = len(re.findall(r"^ +logits [*/+-]?= ", source, re.M)) == 1
    return once and bool(_BARE_HEAD.search(source)) and not _CHANGED.search(source)


def built(cls: Any, config: PreTrainedConfig, **options: Any) -> Any:
    """A model without weights, of a copy of a configuration whose dtypes stay with it."""
    model = cls(without_dtypes(copy.deepcopy(config)), **options)
    _give_dtypes(config, model.config)
    return model


def _give_dtypes(source: Any, target: Any) -> None:
    target.dtype = source.dtype
    for key, value in vars(source).items():
        if isinstance(value, PreTrainedConfig) and isinstance(vars(target).get(key), PreTrainedConfig):
            _give_dtypes(value, vars(target)[key])


def native_selection(model: Any, kind: str | None = None, who: str = "") -> tuple[Any, dict[str, Any]]:
    """The tower of a whole native model, and what the model projects of it, as options of `ModalEncoderModule`.

    `kind` chooses between several towers.  ValueError, which begins with `who`, for a type that is not known, another class of
    it, and a kind of which there is no tower; TypeError for one that is no name.
    """
    try:
        return _selection(model, kind)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{who}{error}") from error


def _selection(model: Any, kind: str | None) -> tuple[Any, dict[str, Any]]:
    if kind is not None and not isinstance(kind, str):
        raise TypeError(f"kind must be a name, {sorted(MEDIA_KINDS)}, got {kind!r:.100}.")
    model = unwrapped(model)
    config, entry = model.config, entry_of(model.config)
    towers = {part.kind: part for part in entry.parts_for(config).values() if part.tower is not None}
    whole = getattr(transformers, entry.architecture)
    headless: Any = MODEL_MAPPING.get(type(config), ())
    if not isinstance(model, whole) and not isinstance(model, headless):
        raise ValueError(
            f"select='native' takes a {whole.__name__}, or it without its head, got {type(model).__name__}."
        )
    if not towers:
        raise ValueError(f"{whole.__name__} has no tower: its items are projected as they are, see from_native.")
    if kind not in towers and (kind is not None or len(towers) != 1):
        raise ValueError(f"{type(model).__name__} has towers for {sorted(towers)}: choose one by kind=, got {kind!r}.")
    part = towers[kind or next(iter(towers))]
    # A model without its head has the same towers, one level higher.
    path = part.tower if isinstance(model, whole) else str(part.tower).removeprefix("model.")
    tower = resolve_tower(model.get_submodule(str(path)), part.kind)
    chosen = {"layer": resolved(part.layer, config), "drop_prefix": resolved(part.drop_prefix, config)}
    return tower, chosen | {"kind": part.kind, "output": part.output, "data_format": part.data_format}
