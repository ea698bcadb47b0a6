"""What replace() is asked for, what it refuses before anything is loaded, and what of an encoder fits the one in its place."""

import copy
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from .checkpoints.described import same_settings
from .configuration_multimodal import MultimodalConfig
from .configuration_projector import CUSTOM_PROJECTION, MultimodalProjectorConfig
from .encoders.building import LOADING_KEYS, SELECTED, assign_input_names, check_dtype, found_width, is_path
from .encoders.counting import DEPTHS
from .encoders.module import ModalEncoderModule
from .encoders.tiles import PackedTiles
from .modeling_multimodal import MultimodalModel
from .parts.adapters import is_wrapped, unwrapped
from .parts.classes import constructor_options
from .parts.names import own_names, parameters_by_name
from .parts.signatures import forward_parameters
from .parts.stored_modules import SLOTS
from .parts.weightless import build_without_weights, without_dtypes
from .processing.subprocessors import sampling_rate_of
from .processing_multimodal import MultimodalProcessor
from .projectors.projector import UNSIZED, MultimodalProjector

TEXT_KEYS = ("model", "tokenizer", "chat_template", *LOADING_KEYS)
RULES = ("positions", "mask")
# What compose() takes by keyword, and where it is said here.
_ELSEWHERE = dict.fromkeys(("tokenizer", "chat_template", "revision"), "language_model={{'model': ..., {0!r}: ...}}")
_ELSEWHERE |= dict.fromkeys(("llm", "lm", "text_model", "decoder", "base_model"), "language_model=")
_ELSEWHERE |= {"processors": "name={{'model': ..., 'processor': ...}}, for each encoder", "freeze": "model.freeze(...)"}
_ELSEWHERE |= dict.fromkeys(RULES, "rules={{{0!r}: ...}}")


def sort_keywords(
    model: Any, encoders: Any, named: Mapping[str, Any], options: Mapping[str, Any], keywords: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said of encoders, by name, and options of loading; TypeError or ValueError for a keyword that is neither."""
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"replace() takes a MultimodalModel, got {type(model).__name__}.")
    if not isinstance(encoders, (Mapping, type(None))):
        raise TypeError(f"encoders must be a dict by name, {{'vision': ...}}, got {encoders!r:.100}.")
    known, here = list(keywords), model.config.encoders
    loading = {key: value for key, value in named.items() if key in known}
    by_name = {key: value for key, value in named.items() if key not in known}
    if twice := [key for key in here if key in loading or options.get(key) is not None]:
        raise ValueError(f"{twice[0]}= is an option, and an encoder of this model: say encoders={{{twice[0]!r}: ...}}.")
    for key in by_name:
        close = [] if key in here else difflib.get_close_matches(key, known, 1, cutoff=0.8)
        if (instead := _ELSEWHERE.get(key)) or close:
            instead = (instead or f"{close[0]}=").format(key)
            raise TypeError(
                f"replace() takes no {key}= (use {instead}); an encoder of that name: encoders={{{key!r}: ...}}."
            )
    if twice := sorted(set(by_name) & set(encoders or ())):
        raise TypeError(f"{twice[0]} was given twice, by encoders= and by {twice[0]}=.")
    given = {**(encoders or {}), **by_name}
    if unknown := [key for key, value in given.items() if value is None and key not in here]:
        raise ValueError(f"{unknown} are to be removed, but the model has the encoders {here}.")
    return given, {key: value for key, value in loading.items() if value is not None}


def text_spec(given: Any) -> dict[str, Any] | None:
    """What is said of a new language model, as a dict (TypeError, ValueError: an unknown key, or one that does nothing)."""
    if given is None:
        return None
    spec = dict(given) if isinstance(given, Mapping) else {"model": given}
    if unknown := sorted(set(spec) - set(TEXT_KEYS)):
        raise TypeError(f"language_model: unknown keys {unknown}, it takes {list(TEXT_KEYS)}.")
    if spec.get("model") is None:
        raise TypeError("language_model: a dict needs a model: a Hub id, a path or a live causal language model.")
    check_dtype(spec.get("dtype"), "language_model: ")
    # A tokenizer may be loaded where the model is not.
    live = isinstance(spec.get("tokenizer"), PreTrainedTokenizerBase)
    done = LOADING_KEYS if is_path(spec["model"]) else () if live else ("revision", "subfolder")
    if idle := [key for key in LOADING_KEYS if spec.get(key) is not None and key not in done]:
        raise ValueError(f"language_model: {idle} are for loading, but it is a live object: leave them out.")
    return spec


def check_given(model: Any, processor: Any, given: Mapping[str, Any], text: Any, options: Mapping[str, Any]) -> None:
    """Refuse a model or a processor that cannot be the one to change, and what would be lost or never done."""
    if not given and text is None and not any(options[key] is not None for key in ("tokens", "rules", "share_inputs")):
        raise TypeError("replace() needs a part to change: language_model=..., or an encoder by its name.")
    _check_joined(model.config.share_inputs, given, options["share_inputs"])
    if not isinstance(options["rules"], (Mapping, type(None))) or set(options["rules"] or ()) - set(RULES):
        raise TypeError(f"rules must be a dict with some of {list(RULES)}, got {options['rules']!r:.100}.")
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        raise ValueError("The model has adapters around the whole, which fit it alone: merge or unload them first.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "The model is quantized: replace parts of the plain one, save it, and quantize where that is loaded."
        )
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        raise ValueError("The model lies on several devices: load it on one, replace, save, and spread what is saved.")
    _check_processor(model, processor, given, text, options)
    for name, encoder in model.encoders.items():
        if name not in given and (lost := sorted(set(encoder.shares.values()) & set(given))):
            raise ValueError(
                f"{name} shares {sorted(encoder.shares)} with {lost[0]}: exchange or remove both, or make it one of its own, "
                f"{name}=ModalEncoderModule(copy.deepcopy(model.{name}_encoder.module), ...)."
            )
    known = model.config.frozen_parts or {}
    for where, part in exchanged_parts(model, given, text).items():
        if is_wrapped(part):
            raise ValueError(
                f"{where} has adapters, which would go with it: merge them (merge_and_unload()), or save them by PEFT and "
                "unload() them, before it is exchanged."
            )
        if frozen_in_parts(part) or set(known.get(where, ())) - {"off"}:
            raise ValueError(
                f"{where} is frozen in parts, by names that its successor may not have: unfreeze({where!r}) or freeze all of "
                "it before, and freeze parts of the new one."
            )


def _check_joined(groups: Sequence[Any], given: Mapping[str, Any], wanted: Any) -> None:
    """Refuse other encoders in a group whose features are joined, and other such groups: all of one stay, or all go."""
    told = "one projector is made for all of a group, which stay or go together: compose the parts anew."
    stay: list[Any] = []
    for group in (group for group in groups if isinstance(group, Mapping)):
        changed = [name for name in group["encoders"] if name in given]
        if not changed:
            stay.append(group)
        elif len(changed) < len(group["encoders"]) or any(given[name] is not None for name in changed):
            raise ValueError(f"Encoders that are joined cannot be exchanged, {changed} of {group['encoders']}: {told}")
    if wanted is not None:
        new = [group for group in ([wanted] if isinstance(wanted, Mapping) else wanted) if isinstance(group, Mapping)]
        if [group for group in new if group not in stay] or [group for group in stay if group not in new]:
            raise ValueError(
                f"Encoders that are joined cannot be exchanged, share_inputs joins {new}, the model {stay}: {told}"
            )


def frozen_in_parts(part: Any) -> bool:
    """Whether some of a part's parameters train and others, which its class does not hold back itself, do not."""
    part = getattr(part, "_orig_mod", part)  # in what torch.compile makes of it
    trains = {name: p.requires_grad for name, p in parameters_by_name(part)}
    if len(set(trains.values())) < 2:
        return False
    config = copy.deepcopy(part.config)
    options = constructor_options(part)
    made = build_without_weights(lambda: type(part)(without_dtypes(config), **options))
    return trains != {name: p.requires_grad for name, p in parameters_by_name(made)}


def _check_processor(
    model: Any, processor: Any, given: Mapping[str, Any], text: Any, options: Mapping[str, Any]
) -> None:
    """Refuse a processor of another model, and without one what only a processor does."""
    if processor is None:
        idle = ["tokens"] if options["tokens"] is not None else []
        idle += [
            f"language_model: {key}" for key in ("tokenizer", "chat_template") if (text or {}).get(key) is not None
        ]
        idle += [
            f"{n}: processor" for n, x in given.items() if isinstance(x, Mapping) and x.get("processor") is not None
        ]
        if idle:
            raise ValueError(f"{idle} are for the processor, and none was given: pass the model's, or leave them out.")
        return
    if not isinstance(processor, MultimodalProcessor):
        raise TypeError(f"processor must be a MultimodalProcessor, or None, got {type(processor).__name__}.")
    joined = model.config.joined  # which have no placeholders of their own
    ids = {name: model.config.modality(name)["token_id"] for name in model.config.encoders if name not in joined}
    if processor.placeholder_ids != ids:
        raise ValueError(
            f"The processor is not this model's: its placeholders have the ids {processor.placeholder_ids}, the model's {ids}. "
            "Build it by MultimodalProcessor(tokenizer, processors, model=model)."
        )
    if processor.native is not None:
        _check_native(processor)


def _check_native(processor: MultimodalProcessor) -> None:
    """Refuse a native processor that writes more than placeholders for an item, which a composed one would not."""
    for name, token in processor.tokens.items():
        own = processor.processors[name]
        rate = sampling_rate_of(own) or 16_000
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, rate // 4)
        items: dict[str, Any] = {
            "image": np.zeros((48, 64, 3), np.uint8), "video": np.zeros((4, 48, 64, 3), np.uint8),
            "audio": {"array": noise, "sampling_rate": rate},
        }  # fmt: skip
        item = items[processor.config.modality(name)["kind"]]
        ids = processor(text=[token], add_special_tokens=False, return_tensors="pt", **{name: [item]})["input_ids"]
        if not bool((ids == processor.placeholder_ids[name]).all()):
            raise ValueError(
                f"{name}: {processor.native.who} writes more than placeholders for an item, and the processor of an exchanged "
                "composition writes these alone: give processor=MultimodalProcessor(tokenizer, processors, model=model), by "
                "which the model then is trained, or None."
            )


def source_in(spec: Any) -> Any:
    """The live module that a part is to be made of, None where there is none."""
    source = spec.get("model") if isinstance(spec, Mapping) else spec
    return source if isinstance(source, nn.Module) else None


def exchanged_parts(
    model: MultimodalModel, given: Mapping[str, Any], text: Mapping[str, Any] | None
) -> dict[str, nn.Module]:
    """Parts of a model, by their names, in whose place others come."""
    found = {"language_model": model.language_model} if text and text["model"] is not model.language_model else {}
    for name, encoder in model.encoders.items():
        spec = given.get(name)
        partial = isinstance(spec, Mapping) and spec.get("model") is None
        same = getattr(source := source_in(spec), "module", source) is encoder.module
        if spec is not None and not partial and not same and "module" not in encoder.shares:
            found[f"{name}_encoder.module"] = encoder.module
    return found


# ---- what of an encoder fits one in its place


def inherited(name: str, new: ModalEncoderModule, old: ModalEncoderModule, stated: Collection[str]) -> dict[str, Any]:
    """Options of `ModalEncoderModule` for a new encoder in the place of an old one: what is not `stated` is the old one's.

    Relative layers fit any encoder.  Leading tokens, output fields and layers counted from the first one fit those of
    the same type, and as deep; callbacks and their arguments those of equal settings.  ValueError, with the remedy, for others.
    """
    same = _type(new) == _type(old)
    alike = same_settings(unwrapped(new.module).config, unwrapped(old.module).config)
    chosen, faults = old.selection, dict[str, Any]()
    options: dict[str, Any] = {"kind": new.kind, "trim": new.trim, "additional_args": new.additional_args}
    options |= {key: getattr(new.selection, key) for key in (*SELECTED, "data_format")} | new.callbacks
    if "kind" not in stated:
        if not same and (old.kind, new.kind) != ("video", "image") and old.kind != new.kind:
            faults["kind"] = old.kind
        options["kind"] = old.kind
    if {"layer", "output"}.isdisjoint(stated):
        counted = any(layer > 0 for layer in chosen.layers)  # from the first one
        if (chosen.output is not None and not same) or (counted and not (same and _depth(new) == _depth(old))):
            key = "layer" if chosen.output is None else "output"
            faults[key] = getattr(chosen, key)
        options |= {"layer": chosen.layer, "output": chosen.output}
        options["data_format"] = chosen.data_format if same else new.selection.data_format
    if "drop_prefix" not in stated:
        faults |= {"drop_prefix": chosen.drop_prefix} if chosen.drop_prefix and not same else {}
        options["drop_prefix"] = chosen.drop_prefix
    for slot, callback in old.callbacks.items():
        packs = isinstance(callback, PackedTiles)
        if callback is None or slot in stated or (packs and "tiles" in stated):
            continue
        faults |= {} if alike and options[slot] is None else {"tiles" if packs else slot: callback}
        options[slot] = callback
    if alike and "tiles" not in stated and "additional_args" not in stated:
        options["additional_args"] = list(old.additional_args)
    _refuse(name, faults, new, old)
    if any(old.merging.values()) and not same:
        raise ValueError(
            f"{name}: its features reach the language model by {_given(old.merging)}, which {_type(old)!r} gives and "
            f"{_type(new)!r} may not: pass a ModalEncoderModule, which says how its own do."
        )
    return options | (old.merging if same else {}) | {"input_names": old.input_names if same else new.input_names}


def _refuse(name: str, faults: dict[str, Any], new: ModalEncoderModule, old: ModalEncoderModule) -> None:
    if faults:
        say = ", ".join(f"{key!r}: ..." for key in faults)
        none = " (None for no callback)" if set(faults) & set(SLOTS) else ""
        raise ValueError(
            f"{name}: {_given(faults)} of the encoder that was there ({_type(old)!r}) may not fit the new one "
            f"({_type(new)!r}, of other settings): say what is to hold, {name}={{'model': ..., {say}}}{none}."
        )


def _given(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={getattr(value, '__qualname__', value)!s:.60}" for key, value in values.items() if value)


def _type(encoder: ModalEncoderModule) -> str:
    return unwrapped(encoder.module).config.model_type


def _depth(encoder: ModalEncoderModule) -> Any:
    return [getattr(unwrapped(encoder.module).config, key, None) for key in DEPTHS]


def chosen_names(
    encoders: Mapping[str, ModalEncoderModule], language_model: Any, config: MultimodalConfig
) -> dict[str, dict[str, str]]:
    """Keywords of a composition for inputs of its encoders that its author chose, ``{keyword: input}`` by modality."""
    parameters = {name: encoder.parameter_names for name, encoder in encoders.items()}
    kinds = {name: encoder.kind for name, encoder in encoders.items()}
    try:
        usual = assign_input_names(parameters, kinds, forward_parameters(unwrapped(language_model)))
    except ValueError:  # two would have one name, so its author chose
        usual = {key: {} for key in encoders}
    names = {name: own_names(config, name) for name in encoders}
    return {n: {k: p for k, p in given.items() if usual[n].get(k) != p} for n, given in names.items()}


def keeps_projector(new: ModalEncoderModule, old: ModalEncoderModule, width: int, before: int) -> bool:
    """Whether the projector of an encoder fits one in its place (itself, where only the language model is another).

    Args:
        width, before: of the language model's embeddings now, and of that for which the projector was made.

    Raises:
        ValueError: a callback behind the projector that is made for the old width.
    """
    config, callback = old.projector.config, new.postprocess_projector_callback
    if width != before and callback is not None and callback is old.postprocess_projector_callback:
        weights = isinstance(callback, nn.Module) and any(True for _ in callback.parameters())
        if weights or config.out_features != before:
            raise ValueError(
                f"{new.name}: its postprocess_projector_callback gives features of the old language model's width {before}, "
                f"the new one's is {width}: give another one, {new.name}={{'postprocess_projector_callback': ...}}, or None."
            )
    if width != before and config.out_features != width:
        return False
    if new.module is old.module and new.selection == old.selection:
        return True
    # A callback behind the module may change the width, for both encoders alike.
    between = old.postprocess_module_callback
    changed = between is not None and between is new.postprocess_module_callback
    needed = _width(old) if changed or config.in_features is None else config.in_features
    return needed is not None and needed == _width(new)


def _width(encoder: ModalEncoderModule) -> int | None:
    found = copy.copy(encoder)  # what is found out is not written into the encoder itself
    found.known_width = None
    return found_width(found)[0]


def projector_anew(name: str, old: MultimodalProjector) -> MultimodalProjector:
    """A projector of the type and with the options of another one, without sizes (ValueError: a type that has its own)."""
    config = old.config
    if config.projection_type in (CUSTOM_PROJECTION, *UNSIZED):
        raise ValueError(
            f"{name}: its projector (in_features={config.in_features}, out_features={config.out_features}) does not fit the "
            f"new part, and one of the type {config.projection_type!r} cannot be made in other sizes: choose what to make "
            "instead, projector='mlp', or by its name, {'projector': ...}."
        )
    options = {k: v for k, v in config.projection_kwargs.items() if k not in ("in_features", "out_features")}
    if options.get("hidden_size") == config.out_features:  # as wide as the language model was
        del options["hidden_size"]
    return MultimodalProjector(
        MultimodalProjectorConfig(
            projection_type=config.projection_type,
            activation=config.activation,
            projection_kwargs=options,
            kept_dtype=config.own_dtype,
        )
    )
