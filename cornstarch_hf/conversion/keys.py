"""Which tensor of a composition is which of a native model, and how they change places without being copied."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..encoders.towers import resolve_tower
from ..parts.names import modules_by_name
from .entries import Native, Part

REST = "native_rest"


def path_of(root: nn.Module, module: nn.Module, without: Collection[nn.Module] = ()) -> str:
    """The dotted name of a module below another one and not below those in `without` (ValueError where it is not there)."""
    for name, each in modules_by_name(root, without):
        if each is module:
            return name
    raise ValueError(f"{type(module).__name__} is no part of {type(root).__name__}.")


def tower_of(native: nn.Module, part: Part) -> Any:
    """The encoder of a part, as a composition takes it: without what lies around it."""
    return resolve_tower(native.get_submodule(part.tower or ""), part.kind)


def has_head(text: Any) -> bool:
    """Whether the language model within a native one is a whole causal language model."""
    return text.get_output_embeddings() is not None


def prefixes(native: Any, model: Any, entry: Native, without: Collection[nn.Module] = ()) -> dict[str, str]:
    """``{name of ours: name of the native model's}`` of modules and single tensors; all below them have equal names.

    Modules in `without`, which both sides have, are left out.
    """
    found: dict[str, str] = {}
    for name, part in entry.parts_for(native.config).items():
        ours = f"{name}_encoder"
        if part.tower is not None and (tower := tower_of(native, part)) not in without:
            found[f"{ours}.module"] = path_of(native, tower)
        names = part.projector.names if part.projector is not None else {}
        found |= {f"{ours}.projector.projection.{a}".rstrip("."): b for a, b in names.items()}
        for slot, step in part.steps.items():
            found |= {f"{ours}.{slot}.{a}": b for a, b in step.tensors.items()}
    text = native.get_submodule(entry.language_model)
    if has_head(text):
        return found | {"language_model": entry.language_model}
    if text not in without:
        found[path_of(model, model.language_model.base_model)] = entry.language_model
    heads = model.language_model.get_output_embeddings(), native.get_output_embeddings()
    found[path_of(model, heads[0], without)] = path_of(native, heads[1], without)
    return found


def native_name(name: str, pairs: Mapping[str, str]) -> str | None:
    """The native name of a tensor of ours, by the longest name above it; None where nothing says it."""
    head, tail = name, ""
    while True:
        if head in pairs:
            return f"{pairs[head]}{tail}" if pairs[head] else tail.removeprefix(".")
        head, dot, last = head.rpartition(".")
        if not dot:
            return None
        tail = f".{last}{tail}"


def tensors(
    model: nn.Module, persistent: bool = False, without: Collection[nn.Module] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by each of its names, but for those of modules in `without`; with `persistent` those alone
    that a checkpoint holds."""
    for name, module in modules_by_name(model, without):
        prefix = f"{name}." if name else ""
        left_out = module._non_persistent_buffers_set if persistent else ()
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and key not in left_out:
                yield prefix + key, value


def key_map(
    native: Any, model: Any, pairs: Mapping[str, str], without: Collection[nn.Module] = (), unused: tuple[str, ...] = ()
) -> tuple[dict[str, str], list[str]]:
    """``{our tensor: native tensor}`` of all that checkpoints hold, by their `prefixes`, and native tensors that no part uses.

    Those of modules in `without`, which both sides have, are left out, and ours whose names begin as `unused` say.  ValueError
    where a tensor of ours has no native one, or two have the same: the row does not fit the model.
    """
    there = dict(tensors(native, persistent=True, without=without))
    mine = (name for name, _ in tensors(model, persistent=True, without=without))
    found: Any = {name: native_name(name, pairs) for name in mine if not name.startswith((REST, *unused))}
    wrong = [name for name, of in found.items() if of not in there]
    if wrong or len(set(found.values())) != len(found):
        raise ValueError(
            f"{type(native).__name__} is not built as its conversion expects: no native tensors for {wrong[:4]} "
            f"({len(wrong)} of {len(found)})."
        )
    return found, sorted(there.keys() - set(found.values()))


def describe_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list[int]]]:
    """``{dtype: {name: shape}}`` of tensors, as a configuration holds it."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        found.setdefault(str(tensor.dtype).removeprefix("torch."), {})[name] = list(tensor.shape)
    return found


def with_buffers(
    names: Mapping[str, str], native: Any, model: Any, pairs: Mapping[str, str], without: Collection[nn.Module] = ()
) -> dict[str, str]:
    """The map with those tensors besides that no checkpoint holds (computed tables), where both sides have them."""
    there = {name for name, _ in tensors(native, without=without)}
    mine = (name for name, _ in tensors(model, without=without))
    others = {name: native_name(name, pairs) for name in mine if name not in names}
    return {**names, **{name: of for name, of in others.items() if of in there}}


def hand_over(
    source: nn.Module, target: nn.Module, names: Mapping[str, str], without: Collection[nn.Module] = ()
) -> None:
    """Give modules of `target` the tensors of `source`, ``{name in the target: name in the source}`` (in place).

    Memory is shared, parameters are new ones: what is done to one side's later is done to its own.  Those that are one
    parameter in the source are one in the target.  Buffers that no checkpoint holds go along, where both sides have them.
    Where some modules, those in `without`, are both sides' already, so is what else is given.
    """
    given, made = dict(tensors(source, without=without)), dict[int, Any]()
    for name, of in names.items():
        parent, _, key = name.rpartition(".")
        module, tensor = target.get_submodule(parent), given[of]
        place: Any = module._parameters if key in module._parameters else module._buffers
        if (
            (had := place[key]) is not None
            and had.shape != tensor.shape
            and type(tensor) in (nn.Parameter, torch.Tensor)
        ):
            raise ValueError(
                f"{type(target).__name__}: {name} has the shape {tuple(had.shape)} by the configuration, but {of} of "
                f"{type(source).__name__} has {tuple(tensor.shape)}: change sizes in the native model, and take that apart."
            )
        place[key] = tensor if without else made.setdefault(id(tensor), _shared(tensor))
        place[key]._is_hf_initialized = True


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    return tensor if isinstance(tensor, nn.Parameter) else tensor.detach()
