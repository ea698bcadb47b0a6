"""Parts to configuration, to a table, and to copies in their memory: what live encoders and a language model are.

`rebuilding` builds them again.
"""

import copy
import functools
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_multimodal import SHARED_PARTS, MultimodalConfig, validate_encoder_names
from .encoders.building import assign_input_names, complete_projector, joined_names, modality_entry, parts_of_group
from .encoders.counting import FeatureCounter
from .encoders.item_sizes import typical_item
from .encoders.module import ModalEncoderModule
from .encoders.rebuilding import complete_marks
from .encoders.tiles import PackedTiles
from .language_model.refusals import check_language_model
from .language_model.supported import embedding_width
from .parts.adapters import is_wrapped, unwrapped
from .parts.classes import class_name, constructor_options, language_model_class, origin_of
from .parts.known_encoders import registered_facts
from .parts.names import parameters_by_name
from .parts.registries import STEPS, valid_groups
from .parts.signatures import forward_parameters
from .parts.stored_adapters import record_adapters


def compose_config(
    encoders: Mapping[str, ModalEncoderModule],
    language_model: PreTrainedModel,
    init_projector_type: str = "linear",
    init_activation: str = "gelu",
    rules: Mapping[str, Any] | None = None,
) -> MultimodalConfig:
    """Describe live parts, whose configurations become sub-configurations as they are; missing projectors are created.

    Raises TypeError for parts of wrong types, ValueError for names, widths, shared weights or an unusable language model.
    """
    # Refusals first: from `separate_configs` on the live parts are changed.
    check_language_model(language_model, masked=bool((rules or {}).get("mask")))
    share_parts(encoders)
    check_encoders(encoders, language_model)
    groups = valid_groups((rules or {}).get("share_inputs"), list(encoders))
    STEPS["join"].share_projectors(groups, encoders)
    separate_configs(encoders, language_model)
    warn_of_quantized(encoders, language_model)
    width = embedding_width(language_model)
    text = unwrapped(language_model)
    names = assign_input_names(
        {name: encoder.parameter_names for name, encoder in encoders.items()},
        {name: encoder.kind for name, encoder in encoders.items()},
        forward_parameters(text),
        {name: encoder.input_names for name, encoder in encoders.items()},
    )
    names = joined_names(groups, names)
    for name, encoder in encoders.items():
        encoder.name = name
    values: dict[str, Any] = {}
    for name, encoder in encoders.items():
        if encoder.join is None or encoder.join.others:  # else the first one of its group has the projector
            complete_projector(encoder, language_model, width, init_projector_type, init_activation)
        complete_marks(encoder)
        if isinstance(packing := encoder.postprocess_projector_callback, PackedTiles):
            packing.complete(encoder, width)
        if "module" not in encoder.shares:
            values[f"{name}_config"] = unwrapped(encoder.module).config
        if "projector" not in encoder.shares:
            values[f"{name}_projector_config"] = encoder.projector.config
        values[f"{name}_modality"] = modality_entry(encoder) | {"input_names": names[name]}
    config = MultimodalConfig(text_config=text.config, encoders=list(encoders), **values, **(rules or {}))
    if language_model_class(text.config) is not type(text):  # else the configuration alone tells the class
        config.language_model_class = class_name(type(text), text.config)
    config.language_model_kwargs = constructor_options(text)
    record_adapters(config, encoders, language_model)
    config.encoder_types = registered_facts([unwrapped(encoder.module).config for encoder in encoders.values()])
    origins = [(f"{name}_encoder", e.origin) for name, e in encoders.items() if "module" not in e.shares]
    origins.append(("language_model", origin_of(language_model, language_model)))
    config.origins = {name: origin for name, origin in origins if origin} or None
    return config


def share_parts(encoders: Any) -> None:
    """Have encoders that say so use the very module, or projector, of another one from there (in place), which is stored once.

    ValueError where they share neither, or name no encoder before them.
    """
    found = encoders.items() if isinstance(encoders, Mapping) else ()
    before: dict[str, ModalEncoderModule] = {}
    for name, encoder in found:
        other = getattr(encoder, "shares_with", None)
        if other is not None and encoder.shares == {}:
            lender: Any = before.get(other)
            same = [
                part for part in SHARED_PARTS if lender is not None and getattr(lender, part) is getattr(encoder, part)
            ]
            if not [part for part in same if getattr(encoder, part) is not None]:
                raise ValueError(
                    f"{name}: shares={other!r}, but it has neither the module nor the projector of an encoder of that name "
                    f"before it, one of {list(before)}: give it that very module, encoders[{other!r}].module."
                )
            for part in same:
                if isinstance(getattr(encoder, part), nn.Module):  # a function as a callback is no weight
                    encoder.share(part, other, lender)
        before[name] = encoder


def check_encoders(encoders: Any, language_model: nn.Module) -> None:
    """Refuse wrong types, bad names, and weights that two parts share in other ways than `share_parts` knows."""
    if not isinstance(encoders, Mapping):
        raise TypeError(f"encoders must be a dict of ModalEncoderModule by name, got {type(encoders).__name__}.")
    for name, encoder in encoders.items():
        if not isinstance(encoder, ModalEncoderModule):
            raise TypeError(
                f"{name!r} must be a ModalEncoderModule, got {type(encoder).__name__}: wrap it by ModalEncoderModule(model)."
            )
    validate_encoder_names(list(encoders))
    owners = {id(p): "the language model" for _, p in parameters_by_name(language_model)}
    for name, encoder in encoders.items():
        mine = {id(p) for _, p in parameters_by_name(encoder)} | {id(encoder)}
        own = encoder._modules.get("projector")
        mine |= {id(own)} if own is not None else set()  # whose weights may be yet to come
        if shared := owners.keys() & mine:
            raise ValueError(
                f"The encoder {name!r} shares weights with {owners[shared.pop()]}: give it a module of its own "
                "(copy.deepcopy), use one name, or say by shares= which encoder's it is."
            )
        owners |= dict.fromkeys(mine, f"the encoder {name!r}")


def warn_of_quantized(encoders: Mapping[str, ModalEncoderModule], language_model: nn.Module) -> None:
    """Say at once that what is composed of quantized parts runs and trains, but cannot be saved as a whole."""
    parts = {"language_model": language_model} | {
        f"{name}_encoder": encoder.module for name, encoder in encoders.items()
    }
    quantized = [
        name
        for name, part in parts.items()
        if getattr(unwrapped(part), "hf_quantizer", None) is not None
        or any(kind.__module__.startswith("bitsandbytes") for kind in {type(p) for _, p in parameters_by_name(part)})
    ]
    if quantized:
        warnings.warn(
            f"{quantized} were quantized before composing: the model runs and trains, but save_pretrained will refuse it. To "
            "save it, compose and save the plain parts, and quantize where that is loaded: "
            "MultimodalModel.from_pretrained(folder, quantization_config=...); adapters are saved by PEFT.",
            stacklevel=2,
        )


def separate_configs(encoders: Mapping[str, ModalEncoderModule], language_model: nn.Module) -> None:
    """Give each part a configuration object of its own, so that per-part settings stay apart."""
    seen = {id(unwrapped(language_model).config)}
    for encoder in encoders.values():
        if "module" in encoder.shares:
            continue
        old = unwrapped(encoder.module).config
        new = copy.deepcopy(old) if id(old) in seen else old
        seen.add(id(new))
        for module in encoder.module.modules() if new is not old else ():  # every layer holds the same object
            if getattr(module, "config", None) is old:
                setattr(module, "config", new)  # noqa: B010


def twins(modules: Mapping[str, nn.Module], same: Iterable[Any] = ()) -> dict[str, Any]:
    """Copies of modules, with configurations and parameters of their own, in the memory of those that are copied.

    What is done to a copy later (freezing, adapters, another device) is not done to what it was copied of; what is written into
    a weight, as a step of training does, is.  Modules and parameters that stand in several places do so in the copies.  What
    `torch.compile` has wrapped is copied without the wrapper.  Of objects in `same` no copy is made.
    """
    memo: dict[int, Any] = {id(each): each for each in same}
    compiled: list[Any] = []
    for module in (inner for part in modules.values() for inner in part.modules()):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:  # deepcopy takes what its memo names for copied already
                memo.setdefault(id(tensor), _shared(tensor))
        compiled += [module] if hasattr(module, "_orig_mod") else []
    for wrapper in reversed(compiled):  # inner ones first
        memo[id(wrapper)] = copy.deepcopy(wrapper._orig_mod, memo)
    return copy.deepcopy(dict(modules), memo)


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own in the same memory; itself, where its class keeps more than values (quantized weights)."""
    if type(tensor) is nn.Parameter:
        made = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        made.__dict__.update(tensor.__dict__)
        return made
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach()


def take_checkpointing(source: Any, target: Any) -> None:
    """Have a model trade time for memory in training where another one does, with that one's arguments (in place)."""
    on: Any = next((module for module in source.modules() if getattr(module, "gradient_checkpointing", False)), None)
    if on is not None:
        function, options = getattr(on, "_gradient_checkpointing_func", None), dict[str, Any]()
        while isinstance(function, functools.partial):  # around transformers' own, where frozen parts need gradients
            options |= function.keywords
            function = function.args[0] if function.args else None
        target.gradient_checkpointing_enable(options or None)


UNKNOWN_COUNT = "not known before a run"


class PartSummary(NamedTuple):
    """What a table says of a part: its class, projection, adapters, sizes and dtypes."""

    where: str
    class_name: str
    projection: str
    adapters: dict[str, Any]
    total: int
    trainable: int
    dtypes: str


def describe_model(model: Any) -> str:
    """One line per part of a composed model, and one per modality's token and selection."""
    rows = [("part", "class", "parameters", "trainable", "dtype")]
    for part in summaries(model):
        name = part.class_name + (f" + {'/'.join(part.adapters)}" if part.adapters else "")
        name += f" ({part.projection})" if part.projection else ""
        rows.append((part.where, name, f"{part.total:,}", f"{part.trainable:,}", part.dtypes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    for name in model.config.encoders:
        entry = model.config.modality(name)
        lines.append(
            f"{name}: {entry['kind']}, token {entry['token'] or '-'} (id {entry['token_id']}), layer {entry['layer']}"
            f"{', output ' + entry['output'] if entry['output'] else ''}, drop_prefix {entry['drop_prefix']}, "
            f"features per item {features_per_item(model, name)}, inputs {list(entry['input_names'])}"
        )
    return "\n".join(lines)


def summaries(model: Any) -> list[PartSummary]:
    """The parts of a composed model in order, and the whole as ``"total"``."""
    return [summary(where, part) for where, part in [*model._parts().items(), ("total", model)]]


def summary(where: str, part: Any) -> PartSummary:
    """Of one part, PEFT-wrapped or not; a dotted name `where` that ends in ``.projector`` is a projector's."""
    parameters, projection = list(part.parameters()), ""
    if where.endswith("projector"):
        projection = f"{part.config.projection_type}, {part.config.in_features} -> {part.config.out_features}"
    adapters = dict(part.peft_config) if is_wrapped(part) else {}
    total, trainable = sum(map(_size, parameters)), sum(_size(p) for p in parameters if p.requires_grad)
    dtypes = "/".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    return PartSummary(where, type(unwrapped(part)).__name__, projection, adapters, total, trainable, dtypes)


def _size(parameter: Any) -> int:
    """How many weights a parameter stands for: 4-bit ones are packed, sharded ones lie elsewhere."""
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(packed) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def features_per_item(model: Any, name: str) -> str:
    """How many features one item gives, where the encoder's configuration fixes it, else a note."""
    if (owner := model.config.joined.get(name)) is not None:
        return f"joined to those of {owner}"
    encoder, item = model.encoders[name], dict[str, Any]()
    for start, each in parts_of_group(name, encoder).items():
        own = typical_item(unwrapped(each.module).config, each.kind)
        # callbacks may change any number
        if own is None or each.trim or each.additional_args or any(each.callbacks.values()):
            return "depends on the item"
        item |= {f"{start}{key}": value for key, value in own.items()}
    try:
        return str(FeatureCounter(model.config, model.encoders).count(name, item))
    except ValueError as error:  # a table for people is no place to fail; the reason is shown instead
        return f"{UNKNOWN_COUNT} ({error})"
