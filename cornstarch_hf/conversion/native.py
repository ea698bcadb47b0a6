"""from_native() and to_native(): native multimodal models to compositions and back, with the tensors that they have."""

import copy
import functools
import inspect
import os
import re
import warnings
from typing import Any

import transformers
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints.files import check_files
from ..checkpoints.finding import CONFIG, PLACES, CheckpointFiles, picked
from ..checkpoints.storage import sync_config
from ..configuration_multimodal import MEDIA_KINDS
from ..configuration_projector import MultimodalProjectorConfig
from ..encoders.module import ModalEncoderModule
from ..encoders.precomputed import PrecomputedFeatures, PrecomputedFeaturesConfig
from ..encoders.towers import resolve_tower
from ..language_model.text_head import TextModelWithHead
from ..modeling_multimodal import MultimodalModel
from ..parts.adapters import is_wrapped, unwrapped
from ..parts.classes import FAMILIES, constructor_options, language_model_class
from ..parts.stored_errors import explained
from ..parts.stored_modules import KeptTensors, build_callback
from ..parts.stored_values import check_kernels, check_values, without_implementations
from ..parts.weightless import build_without_weights, without_dtypes
from ..projectors.projector import UNSIZED, MultimodalProjector
from .comparing import check_same
from .configs import held_configs, native_config, outer_values
from .entries import Native, Part, resolved, setting
from .keys import REST, describe_tensors, hand_over, has_head, key_map, tensors, tower_of, with_buffers
from .refusals import check_model, entry_of


def from_native(
    source: Any,
    *,
    revision: str | None = None,
    dtype: Any = None,
    attn_implementation: Any = None,
    drop_rest: bool = False,
    **loading: Any,
) -> tuple[MultimodalModel, Any]:
    """Take a native multimodal model of transformers apart into a composition that computes the same, to the bit.

    Args:
        source: Hub id or path of its checkpoint, or a live model, which this call does not change: parts have configurations of
            their own, and share its tensors, so that training the composition trains the native model (give a
            `copy.deepcopy` to keep it); ``(model, processor)`` is taken too, its processor is left out for now.
        revision, dtype, attn_implementation, **loading: as of `from_pretrained` of the native class, for an id or a path.
        drop_rest: whether tensors that no part uses are dropped, instead of kept for the way back.

    Returns:
        ``(model, processor)``; the processor is None: prepare inputs by the native one, whose names the model takes.

    Raises:
        ValueError: a type that cannot be composed or is not known, with the reason; a setting of a known type that cannot; a
            file that asks for kernels or says what a configuration must not.
        TypeError: a source that is no model, id or path; options of loading for a live model.
    """
    asked = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
    options = {key: value for key, value in (asked | loading).items() if value is not None}
    if options.pop("output_loading_info", False):
        raise TypeError("from_native returns no loading information: load the native class, and pass the model.")
    if isinstance(source, tuple) and len(source) != 2:
        raise TypeError(f"from_native takes (model, processor) as one argument, got {len(source)} values.")
    if not isinstance(drop_rest, bool):
        raise TypeError(f"drop_rest must be True or False, got {drop_rest!r:.100}.")
    native = _loaded(source[0] if isinstance(source, tuple) else source, options)
    if isinstance(native, MultimodalModel):
        raise ValueError("from_native takes a native model, and this is a composition already.")
    return take_apart(native, entry_of(native.config), drop_rest), None


def _loaded(source: Any, options: dict[str, Any]) -> Any:
    """The native model, loaded where an id or a path was given."""
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, PreTrainedModel):
            raise TypeError(f"from_native takes a Hub id, a path or a model of transformers, got {source!r:.100}.")
        if options:
            raise TypeError(f"{sorted(options)} are for loading, but the model is live: change it, or pass its id.")
        return source
    # What a stranger's file may not ask for is refused before anything of it is built, as of compositions.
    where = f"{os.fspath(source)}: {CONFIG}"
    asked = [family for family in FAMILIES if isinstance(options.get(f"{family}_implementation"), str)]
    values = dict(check_files(CheckpointFiles(source, options), options.get("variant"), options))
    check_values(values, where, asked)
    check_kernels(without_implementations(values, asked), where)
    with explained(where):
        config = AutoConfig.from_pretrained(source, **picked(options, PLACES))
    # The type is refused before its weights are loaded.
    architecture = entry_of(config).architecture
    with explained(f"{os.fspath(source)}: {architecture}"):
        native, told = getattr(transformers, architecture).from_pretrained(source, output_loading_info=True, **options)
    if wrong := [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]:
        raise ValueError(
            f"{os.fspath(source)}: the files of weights have no tensors, or of another shape, for {sorted(wrong)[:4]} "
            f"({len(wrong)}) of {architecture}, which transformers would draw at random: restore the files."
        )
    return native


def take_apart(native: Any, entry: Native, drop_rest: bool = False) -> MultimodalModel:
    """The composition of a live native model's parts, by a row of the table; raises as `from_native` does."""
    check_model(native, entry)
    model = build_without_weights(lambda: _compose(native, entry))
    values = {
        "model_type": native.config.model_type,
        "config": outer_values(native, entry),
        "parts": held_configs(native, entry),
    }
    names, rest = key_map(native, model, entry)
    there = dict(tensors(native))
    kept = {} if drop_rest else {name: there[name] for name in rest}
    if kept:
        values["tensors"] = describe_tensors(kept)
        model.add_module(REST, KeptTensors(values["tensors"]))
        names |= {f"{REST}.{name}": name for name in kept}
    elif rest:
        _warn_of_dropped(native, {name: there[name] for name in rest})
        values["dropped"] = rest
    model.config.native = values
    hand_over(native, model, with_buffers(names, native, model, entry))
    _take_checkpointing(native, model)
    model._untied = frozenset()  # ties are those of the native model, which the text configuration tells
    model.generation_config = copy.deepcopy(native.generation_config)
    for name, part in entry.parts_for(native.config).items():
        model.config.modality(name)["token_id"] = _token_id(native.config, part)
    return model.train(native.training)


def _token_id(config: Any, part: Part) -> int:
    """The id of a part's placeholders (ValueError for what is none)."""
    token_id = setting(config, part.token)
    if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
        raise ValueError(f"{part.token} of {type(config).__name__} is {token_id!r:.100}, expected the id of a token.")
    return token_id


def _take_checkpointing(source: Any, target: Any) -> None:
    """Have a model trade time for memory in training where another one does, with that one's arguments (in place)."""
    if source.is_gradient_checkpointing:
        on = next(module for module in source.modules() if getattr(module, "gradient_checkpointing", False))
        function, options = getattr(on, "_gradient_checkpointing_func", None), dict[str, Any]()
        while isinstance(function, functools.partial):  # around transformers' own, where frozen parts need gradients
            options |= function.keywords
            function = function.args[0] if function.args else None
        target.gradient_checkpointing_enable(options or None)


def _warn_of_dropped(native: Any, rest: dict[str, Any]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
    shown = ", ".join(list(rest)[:8]) + (", ..." if len(rest) > 8 else "")
    warnings.warn(
        f"{type(native).__name__}: {len(rest)} tensors of {size:,} bytes that no part uses were dropped, and to_native will "
        f"not have them: {shown}.",
        stacklevel=4,
    )


# ---- the parts, without weights


def _compose(native: Any, entry: Native) -> MultimodalModel:
    made: dict[str, ModalEncoderModule] = {}
    for name, part in entry.parts_for(native.config).items():
        made[name] = _encoder(native, part, made)
    rules = {key: resolved(getattr(entry, key), native.config) for key in ("positions", "mask")}
    if rules["positions"] and "time_step" in rules["positions"]:
        steps = {name: step for name, step in rules["positions"]["time_step"].items() if name in made}
        rules["positions"] |= {"time_step": steps}
    return MultimodalModel(encoders=made, language_model=_language_model(native, entry), **rules)


def _encoder(native: Any, part: Part, made: dict[str, ModalEncoderModule]) -> ModalEncoderModule:
    config = native.config
    lender = made.get(part.shares or "")
    if lender is not None and part.tower is None:
        module: Any = lender.module
    elif part.tower is None:
        module = PrecomputedFeatures(PrecomputedFeaturesConfig(hidden_size=resolved(part.width, config)))
    else:
        tower = tower_of(native, part)
        module = built(type(tower), tower.config, **constructor_options(tower))
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


def _language_model(native: Any, entry: Native) -> Any:
    """The causal language model: the native one's own, its class by the text configuration, or a plain head over the stack."""
    text = native.get_submodule(entry.language_model)
    config = copy.deepcopy(text.config)
    if has_head(text):
        return built(type(text), config)
    # The outer configuration decides about ties, whatever the text's own says.
    head, table = native.get_output_embeddings(), text.get_input_embeddings()
    config.tie_word_embeddings = head.weight is table.weight
    factors = {"scale": resolved(entry.scale, native.config), "softcap": resolved(entry.softcap, native.config)}
    cls: Any = None if entry.plain_head or any(factors.values()) else language_model_class(config)
    model = built(cls, config) if cls is not None and _has_bare_head(cls) else None
    if model is not None and type(model.base_model) is type(text):
        return model
    return TextModelWithHead(built(type(text), config), **factors)


# What a ...ForCausalLM class of transformers does to hidden states where its head is linear and nothing else.
_BARE_HEAD = re.compile(r"logits = self\.lm_head\(hidden_states(\[:, slice_indices, :\])?\)\s*$", re.M)


def _has_bare_head(cls: Any) -> bool:
    """Whether a class makes of hidden states what the head of a native multimodal model does, which scales and caps nothing.

    About 28 of 189 classes do more (Cohere and Granite scale, Gemma 2 caps); only their source tells.
    """
    source = inspect.getsource(inspect.unwrap(cls.forward))
    return len(re.findall(r"^ +logits [*/+-]?= ", source, re.M)) == 1 and bool(_BARE_HEAD.search(source))


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


# ---- and back


def to_native(model: Any, processor: Any = None, *, model_type: str | None = None) -> Any:
    """Put a composition together again as the native model of transformers that it was, with the tensors that it has now.

    Args:
        model: a composition that came from `from_native`, changed as native classes allow it: other weights, more tokens.
        processor: given back as it is, beside the model.
        model_type: of the native model, for a composition that never was one.

    Returns:
        the native model, or ``(native model, processor)``; it shares the composition's tensors.

    Raises:
        ValueError: a composition that never was native, or is no longer what its native class computes; dropped tensors.
        TypeError: no composed model.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"to_native takes a MultimodalModel, got {type(model).__name__}.")
    native = put_together(model, model_type)
    return native if processor is None else (native, processor)


def put_together(model: MultimodalModel, model_type: str | None = None) -> Any:
    """The native model; raises as `to_native` does."""
    wrapped = [name for name, part in model._parts().items() if is_wrapped(part)]
    if wrapped or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{wrapped or 'The model'} has adapters, and native classes have none inside: merge them (merge_and_unload()), or "
            "save them by PEFT and unload them, and convert what is left."
        )
    # What is live counts, as it does in a checkpoint.
    sync_config(model, model.config, model.encoders, model.language_model)
    config, entry = native_config(model, model_type)
    with explained("config.native"):
        native = build_without_weights(lambda: built(getattr(transformers, entry.architecture), config))
    if (held := held_configs(native, entry)) != model.config.native["parts"]:
        raise ValueError(f"config.native: parts are {model.config.native['parts']}, {entry.architecture} has {held}.")
    usual = build_without_weights(lambda: _compose(native, entry))
    check_same(model, usual, entry)
    names, rest = key_map(native, model, entry)
    kept = dict(tensors(model.get_submodule(REST))) if hasattr(model, REST) else {}
    if lost := sorted(set(rest) - set(kept)):
        raise ValueError(
            f"{entry.architecture} has {len(lost)} tensors that this composition does not ({', '.join(lost[:4])}, ...): they "
            "were dropped. Convert the native checkpoint again without drop_rest=True."
        )
    names |= {f"{REST}.{name}": name for name in rest}
    names = with_buffers(names, native, model, entry)
    hand_over(model, native, {of: name for name, of in names.items()})
    native.generation_config = copy.deepcopy(model.generation_config)
    _take_checkpointing(model, native)
    return native.train(model.training)
