"""from_native() and to_native(): native multimodal models to compositions and back, with the tensors that they have."""

import copy
import functools
import os
import warnings
from typing import Any

import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..checkpoints.files import check_files
from ..checkpoints.finding import CONFIG, PLACES, CheckpointFiles
from ..checkpoints.storage import sync_config
from ..composition import take_checkpointing
from ..modeling_multimodal import MultimodalModel
from ..parts.adapters import is_wrapped
from ..parts.classes import FAMILIES
from ..parts.stored_errors import explained
from ..parts.stored_modules import KeptTensors
from ..parts.stored_values import check_kernels, check_values, without_implementations
from ..parts.weightless import WithoutInitializers, build_without_weights
from .configs import held_configs, native_config, outer_values
from .containers import contained
from .entries import Native, Part, setting
from .keys import REST, describe_tensors, hand_over, key_map, prefixes, tensors, with_buffers
from .parts import built, composed, own_parts
from .processors import composed_processor, loaded_processor, native_processor
from .refusals import check_model, check_same, entry_of


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
            `copy.deepcopy` to keep it); or ``(model, processor)``, whose processor is copied.
        revision, dtype, attn_implementation, **loading: as of `from_pretrained` of the native class, for an id or a path.
        drop_rest: whether tensors that no part uses are dropped, instead of kept for the way back.

    Returns:
        ``(model, processor)``, the latter a `MultimodalProcessor` that gives the native one's ids and tensors.  It is None
        for a live model alone, for a checkpoint without one, and with a warning where it cannot be loaded or held.

    Raises:
        ValueError: a type that cannot be composed or is not known, with the reason; a setting of a known type that cannot; a
            file that asks for kernels or says what a configuration must not.
        TypeError: a source, or a `config` for loading, that is none; options of loading for a live model.
    """
    asked = {"revision": revision, "dtype": dtype, "attn_implementation": attn_implementation}
    options = {key: value for key, value in (asked | loading).items() if value is not None}
    if options.pop("output_loading_info", False):
        raise TypeError("from_native returns no loading information: load the native class, and pass the model.")
    if isinstance(source, tuple) and len(source) != 2:
        raise TypeError(f"from_native takes (model, processor) as one argument, got {len(source)} values.")
    if not isinstance(drop_rest, bool):
        raise TypeError(f"drop_rest must be True or False, got {drop_rest!r:.100}.")
    source, processor = source if isinstance(source, tuple) else (source, None)
    if isinstance(source, (str, os.PathLike)):
        if processor is not None:
            raise TypeError("A checkpoint has its own processor: give its id or path alone, or (model, processor).")
        native = _loaded(source, options)
        model = take_apart(native, entry_of(native.config), drop_rest, own=True)
        return model, loaded_processor(source, model, options)
    if not isinstance(source, PreTrainedModel):
        raise TypeError(f"from_native takes a Hub id, a path or a model of transformers, got {source!r:.100}.")
    if options:
        raise TypeError(f"{sorted(options)} are for loading, but the model is live: change it, or pass its id.")
    if isinstance(source, MultimodalModel):
        raise ValueError("from_native takes a native model, and this is a composition already.")
    model = take_apart(source, entry_of(source.config), drop_rest)
    return model, None if processor is None else composed_processor(processor, model)


def _loaded(source: Any, options: dict[str, Any]) -> Any:
    """The native model of an id or a path."""
    # What a stranger's file may not ask for is refused before anything of it is built, as of compositions.
    where = f"{os.fspath(source)}: {CONFIG}"
    asked = [family for family in FAMILIES if isinstance(options.get(f"{family}_implementation"), str)]
    files = CheckpointFiles(source, options)
    values = dict(check_files(files, options.get("variant"), options))
    check_values(values, where, asked)
    check_kernels(without_implementations(values, asked), where)
    with explained(where):
        config = AutoConfig.from_pretrained(source, **files.options)
    given = options.get("config", config)
    if not isinstance(given, (PreTrainedConfig, str, os.PathLike)):
        raise TypeError(f"config must be a configuration, or the id or path of one, got {given!r:.100}.")
    if isinstance(given, PreTrainedConfig) and given.model_type != config.model_type:
        raise ValueError(f"config is of the type {given.model_type!r}, and {source} holds a {config.model_type!r}.")
    # The type is refused before its weights are loaded.
    architecture = entry_of(config).architecture
    cls = getattr(transformers, architecture)
    options |= files.options  # all is of the commit that the configuration is of
    if options.keys() <= {*PLACES, "dtype", "attn_implementation"}:
        options["config"] = config  # else it is read anew, with those options that are for it
    with explained(f"{os.fspath(source)}: {architecture}"):
        native, told = _loader(cls, config.model_type).from_pretrained(source, output_loading_info=True, **options)
    native.__class__ = cls
    if wrong := [*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])]:
        raise ValueError(
            f"{os.fspath(source)}: the files of weights have no tensors, or of another shape, for {sorted(wrong)[:4]} "
            f"({len(wrong)}) of {architecture}, which transformers would draw at random: restore the files."
        )
    return native


@functools.cache
def _loader(cls: Any, model_type: str) -> Any:
    """A native class, by name and place the same, to load a checkpoint of a type with.

    It reads the configuration of that type, where several types are of one class.  It is built without
    trying to initialise weights that are on meta, which takes a tenth of the time of loading; only building is in that mode,
    which costs every operation a little.
    """

    @functools.wraps(cls.__init__)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        with WithoutInitializers():
            cls.__init__(self, *args, **kwargs)

    own = {"__init__": build, "config_class": CONFIG_MAPPING[model_type]}
    return type(cls)(cls.__name__, (cls,), own | {"__module__": cls.__module__, "__doc__": cls.__doc__})


def take_apart(native: Any, entry: Native, drop_rest: bool = False, own: bool = False) -> MultimodalModel:
    """The composition of a native model's parts, by a row of the table; raises as `from_native` does.

    The native model stays as it is, unless it is nobody else's (`own`): then its tower and its language model are the
    composition's, and only what lies between them is built.
    """
    check_model(native, entry)
    held = held_configs(native, entry)
    values = {"model_type": native.config.model_type, "config": outer_values(native, entry, held), "parts": held}
    # Modules that are used as they are, and hold their tensors.
    live = own_parts(native, entry) if own else frozenset[nn.Module]()
    model = build_without_weights(lambda: composed(native, entry, live), live)
    pairs = prefixes(native, model, entry, live)
    names, rest = key_map(native, model, pairs, live)
    there = dict(tensors(native, without=live))
    kept = {} if drop_rest else {name: there[name] for name in rest}
    if kept:
        values["tensors"] = describe_tensors(kept)
        model.add_module(REST, KeptTensors(values["tensors"]))
        names |= {f"{REST}.{name}": name for name in kept}
    elif rest:
        _warn_of_dropped(native, {name: there[name] for name in rest})
        values["dropped"] = rest
    model.config.native = values
    hand_over(native, model, with_buffers(names, native, model, pairs, live), live)
    model.generation_config = copy.deepcopy(native.generation_config)
    for name, part in entry.parts_for(native.config).items():
        model.config.modality(name)["token_id"] = _token_id(native.config, part)
    take_checkpointing(native, model)
    return model.train(native.training)


def _token_id(config: Any, part: Part) -> int:
    """The id of a part's placeholders (ValueError for what is none)."""
    token_id = setting(config, part.token)
    if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
        raise ValueError(f"{part.token} of {type(config).__name__} is {token_id!r:.100}, expected the id of a token.")
    return token_id


def _warn_of_dropped(native: Any, rest: dict[str, Any]) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
    shown = ", ".join(list(rest)[:8]) + (", ..." if len(rest) > 8 else "")
    warnings.warn(
        f"{type(native).__name__}: {len(rest)} tensors of {size:,} bytes that no part uses were dropped, and to_native will "
        f"not have them: {shown}.",
        stacklevel=4,
    )


# ---- and back


def to_native(model: Any, processor: Any = None, *, model_type: str | None = None) -> Any:
    """Put a composition together as a native model of transformers that computes the same, to the bit.

    Args:
        model: a composition that came from `from_native`, changed as native classes allow it: other weights, more tokens;
            or one that never was native.
        processor: its processor, from `from_native`, or a composition's own where that class gives the same
            (``"llava"``, ``"deepseek_vl"``); a native one is given back as it is.
        model_type: what a composition that never was native becomes: ``"llava"``, ``"deepseek_vl"``, ``"internvl"``,
            ``"idefics3"``, ``"smolvlm"``, ``"voxtral"``, ``"qwen2_audio"`` or ``"audioflamingo3"``.

    Returns:
        the native model, or ``(native model, native processor)``; it shares the composition's tensors.

    Raises:
        ValueError: a composition that is no longer what its native class computes, or that the chosen one does not hold, with
            the reason and the remedy; none chosen, with the reasons of all; dropped tensors.
        TypeError: no composed model.
    """
    if not isinstance(model, MultimodalModel):
        raise TypeError(f"to_native takes a MultimodalModel, got {type(model).__name__}.")
    native = put_together(model, model_type)
    return native if processor is None else (native, native_processor(processor, native))


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
    never = model.config.native is None
    native = contained(model, model_type) if never else _as_it_was(model, model_type)
    native.generation_config = copy.deepcopy(model.generation_config)
    take_checkpointing(model, native)
    return native.train(model.training)


def _as_it_was(model: MultimodalModel, model_type: str | None) -> Any:
    """The native model that a composition was, with the tensors that it has now."""
    config, entry = native_config(model, model_type)
    with explained("config.native"):
        native = build_without_weights(lambda: built(getattr(transformers, entry.architecture), config))
    if (held := held_configs(native, entry)) != model.config.native["parts"]:
        raise ValueError(f"config.native: parts are {model.config.native['parts']}, {entry.architecture} has {held}.")
    usual = build_without_weights(lambda: composed(native, entry))
    check_same(model, usual, entry)
    pairs = prefixes(native, model, entry)
    names, rest = key_map(native, model, pairs)
    kept = dict(tensors(model.get_submodule(REST))) if hasattr(model, REST) else {}
    if lost := sorted(set(rest) - set(kept)):
        raise ValueError(
            f"{entry.architecture} has {len(lost)} tensors that this composition does not ({', '.join(lost[:4])}, ...): they "
            "were dropped. Convert the native checkpoint again without drop_rest=True."
        )
    names |= {f"{REST}.{name}": name for name in rest}
    names = with_buffers(names, native, model, pairs)
    hand_over(model, native, {of: name for name, of in names.items()})
    return native
