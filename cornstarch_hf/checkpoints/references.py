"""Checkpoints that store only what was trained: split a model into bases and changes, and put it together again.

A part whose source is a reference takes its tensors from another repository (`bases`), pinned by commit and by hashes; all
others lie in `composition.safetensors`.  Every tensor comes from exactly one of the two.
"""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..parts.adapters import current_name, is_wrapped, unwrapped
from ..parts.classes import KEYS, is_repo_id
from ..parts.names import compress, matches
from .bases import Base, base_files, check_base, checked_entry, part_tensors, read_base
from .finding import DELTA, Bases, Options
from .manifest import components_of


def part_path(component: str) -> str:
    """The module of a composed model that a component means."""
    return component if component == "language_model" else f"{component}.module"


def split_by_base(
    model: PreTrainedModel, referenced: Collection[str], bases: Bases, options: Options
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What a reference checkpoint of a composed model stores, and `components` for its `composition.json`.

    Of `referenced` components tensors that are as in their base are left out.

    Raises:
        ValueError: a component that did not come from the Hub, or whose base cannot be pinned.
        OSError: a base that cannot be read.
    """
    state = model.state_dict()
    if offloaded := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(
            f"{offloaded[0]} and {len(offloaded) - 1} more are offloaded: load the model whole, or save with embed=True."
        )
    groups = _names_by_tensor(model)
    live = {name for names in groups for name in names}
    provided: dict[str, Tensor] = {}
    found: dict[str, tuple[dict[str, str], Base]] = {}
    for component in referenced:
        part = unwrapped(model.get_submodule(part_path(component)))
        dtypes = [p.dtype for p in part.parameters() if p.is_floating_point()]
        dtype = (
            max(set(dtypes), key=dtypes.count) if dtypes else torch.float32
        )  # what most are: norms may be in float32
        base = read_base(component, _known_origin(model, component, bases), dtype, options)
        # Of the base's tensors those that the model still has, by the model's names.
        names = {key: name for key in base.tensors if (name := _name_in_model(model, component, key)) in live}
        found[component] = names, base
        provided |= {name: base.tensors[key] for key, name in names.items()}
    taken: set[str] = set()
    stored: dict[str, Tensor] = {}
    ties = model.all_tied_weights_keys or {}
    for same in groups:  # of tensors with several names all go one way
        offered = provided.keys() & set(same)
        pairs = [(provided[name], state[name].cpu()) for name in offered]
        if offered and all(base.dtype == live.dtype and torch.equal(base, live) for base, live in pairs):
            taken |= offered  # unchanged, under all names that the base knows
        else:
            # Under the name that loading reads: those in `ties` are filled from it.
            name = next((name for name in same if name not in ties), same[0])
            stored[name] = state[name].cpu().contiguous()
    components: dict[str, dict[str, Any]] = {name: {"source": "embedded"} for name in components_of(model.config)}
    for component, (names, base) in found.items():
        keys = [key for key, name in names.items() if name in taken]
        components[component] = base.entry | {"tensors": compress(keys, base.tensors)}
    return stored, components


def _names_by_tensor(model: nn.Module) -> list[list[str]]:
    """Names of all saved tensors, those of one tensor together."""
    groups: dict[int, list[str]] = {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or set()
    # Without `keep_vars` a tensor would be another object under each of its names.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored:
            groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _name_in_model(model: nn.Module, component: str, key: str) -> str:
    """The name in a composed model of a part's tensor, adapters in front of it or not."""
    path = part_path(component)
    part = model.get_submodule(path)
    inner = f"{path}.base_model.model" if is_wrapped(part) else path
    return f"{inner}.{current_name(unwrapped(part), key)}"


def _known_origin(model: PreTrainedModel, component: str, bases: Bases) -> dict[str, Any]:
    """Where a component came from, or what the caller says of it (ValueError where neither names a repository)."""
    origin = (model.config.origins or {}).get(component)
    if (given := (bases or {}).get(component)) is not None:
        part: Any = unwrapped(model.get_submodule(part_path(component)))
        repo_id, _, revision = given.partition("@")
        # Of a base that the user names only this is known; its class is the part's.
        made = dict.fromkeys(KEYS) | {"subfolder": "", "select": "", "class": type(part).__name__}
        origin = (origin or made) | {"repo_id": repo_id, "revision": None, "requested_revision": revision or None}
    if origin is None or not is_repo_id(origin["repo_id"]):
        raise ValueError(
            f"{component} did not come from the Hub, so far as is known ({origin and origin['repo_id']!r}), and a checkpoint "
            f"cannot refer to it: say where it lies, bases={{{component!r}: 'user/name'}}, or store its weights, "
            f"embed=[{component!r}]."
        )
    return origin


def assemble_state(
    build: Callable[[dict[str, tuple[int, ...]]], PreTrainedModel],
    stored: Mapping[str, Tensor],
    references: Mapping[str, Mapping[str, Any]],
    bases: Bases,
    options: Options,
    verify: bool,
) -> dict[str, Tensor]:
    """All tensors of a model that was stored by reference, by its own names.

    Args:
        build: makes the model as its configuration describes it, without weights, bounded by the shapes of all there is.
        stored: what `composition.safetensors` holds.
        references: the components that lie elsewhere, as `composition.json` describes them.
        verify: whether every base is hashed, also one that the Hub's cache names by its hash.

    Raises:
        ValueError: a tensor that has no source, two, or another shape; a base that is not the one that was saved.
        OSError: a base that cannot be read.
    """
    if unknown := sorted(set(bases or {}) - set(references)):
        raise ValueError(f"bases names {unknown}, this checkpoint refers to {sorted(references)}.")
    source = dict.fromkeys(stored, DELTA)  # where each tensor is from, for messages
    merged, parts = dict(stored), {}
    # To bound what is built only shapes count; names in the model are known once it is there.
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for component, entry in references.items():
        entry = checked_entry(component, entry)
        files = base_files(component, entry, (bases or {}).get(component), options)
        check_base(component, entry, files, verify)
        tensors = part_tensors(component, files, entry, getattr(torch, entry["dtype"]), options)
        parts[component] = entry["repo_id"], {key: tensors[key] for key in sorted(matches(entry["tensors"], tensors))}
        shapes |= {f"{component}: {key}": tuple(tensor.shape) for key, tensor in parts[component][1].items()}
    skeleton = build(shapes)
    for component, (repo_id, tensors) in parts.items():
        for key, tensor in tensors.items():
            name = _name_in_model(skeleton, component, key)
            if name in source:
                raise ValueError(
                    f"{component}: {name} comes from {source[name]} and from {repo_id!r}: expected one source."
                )
            source[name], merged[name] = repo_id, tensor
    _check_complete(skeleton, merged, source)
    return merged


def _check_complete(skeleton: PreTrainedModel, merged: Mapping[str, Tensor], source: Mapping[str, str]) -> None:
    """Compare names and shapes with what the configuration builds (ValueError)."""
    expected = {n: tuple(t.shape) for n, t in skeleton.state_dict().items() if isinstance(t, Tensor)}
    ignored = skeleton._keys_to_ignore_on_save or set()
    tied = {name for names in _names_by_tensor(skeleton) if set(names) & merged.keys() for name in names}
    tied |= {name for name, first in (skeleton.all_tied_weights_keys or {}).items() if first in merged}
    missing = sorted(expected.keys() - merged.keys() - tied - ignored)
    surplus = sorted(merged.keys() - expected.keys())
    other = [n for n, t in merged.items() if n in expected and tuple(t.shape) != expected[n]]
    if missing or surplus or other:
        shapes = [(n, source[n], tuple(merged[n].shape), expected[n]) for n in other[:3]]
        raise ValueError(
            f"This checkpoint and its bases do not make up the model: without a source {missing[:3]} ({len(missing)}); in no "
            f"part {[(n, source[n]) for n in surplus[:3]]} ({len(surplus)}); of another shape {shapes} (source, got, expected)."
        )


def write_reference(
    model: PreTrainedModel, folder: str, referenced: Collection[str], bases: Bases, options: Options
) -> dict[str, dict[str, Any]]:
    """Write a reference checkpoint's configuration and changed tensors; returns its components, raises as `split_by_base`."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "A quantized model cannot be stored by reference: its weights differ from its bases'. Save with embed=True."
        )
    tensors, components = split_by_base(model, referenced, bases, options)
    origins = {name: {key: components[name][key] for key in KEYS} for name in referenced}  # with the commits
    model.config.origins = {**(model.config.origins or {}), **origins}
    # What transformers' `save_pretrained` would write into the configuration by itself.
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    save_file(tensors, os.path.join(folder, DELTA), metadata={"format": "pt"})
    return components
