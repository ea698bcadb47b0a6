"""Tensors that adapters inside parts bring along or stand in front of: names, ties, buffers that no checkpoint holds."""

import sys
from typing import Any

import torch
from torch import nn

from .adapters import is_adapted, is_wrapped, tuner_layers
from .names import modules_by_name

_TOKEN_ROWS = "trainable_tokens_original"
# Where PEFT keeps the module that an adapter stands in front of.
_WRAPPED_AS = ("original_module", "token_adapter", "base_layer")


def current_name(model: nn.Module, name: str) -> str:
    """The present name of a weight that was called `name` before adapters were put in front of its module."""
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return name
    # "head.weight" is "head.base_layer.weight" behind LoRA, and one level deeper behind each further wrapper.
    while not hasattr(module, "_parameters") or module._parameters.get(key) is None:
        inner = next((w for w in _WRAPPED_AS if isinstance(module._modules.get(w), nn.Module)), None)
        if inner is None:
            return name
        module, path = getattr(module, inner), f"{path}.{inner}"
    return f"{path}.{key}"


def shared_by_adapters(model: nn.Module) -> dict[str, str]:
    """Tensors that several layers of wrapped parts share (VeRA's projections, tied layers): ``{name: first name}``."""
    shared: dict[str, str] = {}
    if "peft" not in sys.modules:
        return shared
    for prefix, part in modules_by_name(model):
        if is_wrapped(part):
            first: dict[int, str] = {}
            # The tensors themselves and no views of them: they are told apart by identity.
            for name, tensor in part.state_dict(keep_vars=True).items():
                full = f"{prefix}.{name}" if prefix else name
                if first.setdefault(id(tensor), full) != full:
                    shared[full] = first[id(tensor)]
    return shared


def adapter_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers of adapters that no checkpoint holds: tables and projections made when the adapter is."""
    found: dict[str, torch.Tensor] = {}
    for prefix, part in model.named_modules():
        if is_wrapped(part):
            saved = part.state_dict().keys()
            lost = [(name, buffer) for name, buffer in part.named_buffers() if name not in saved]
            found |= {f"{prefix}.{name}": buffer for name, buffer in lost if _of_an_adapter(part, name)}
    return found


def check_buffers_restorable(made: nn.Module) -> None:
    """Refuse adapters whose unsaved buffers cannot be made again (VeRA and others with `save_projection=False`).

    Args:
        made: the model as its configuration builds it, without weights.

    Raises:
        ValueError: names the first of the buffers.
    """
    # A buffer that is real was computed while its adapter was made, as loading will; `restore_token_rows` fills the rest.
    lost = [n for n, b in adapter_buffers(made).items() if b.is_meta and _TOKEN_ROWS not in n.split(".")]
    if lost:
        raise ValueError(
            f"A checkpoint would not hold the buffers {lost[:2]} ({len(lost)}) that adapters need, and loading cannot make "
            "them again: use save_projection=True in the adapter configuration, or merge_and_unload() the part before saving."
        )


def restore_token_rows(model: nn.Module) -> None:
    """Fill the rows that adapters of single tokens keep of the embeddings, to unmerge them (in place)."""
    for layer in tuner_layers(model):
        for name, rows in getattr(layer, _TOKEN_ROWS, {}).items():
            if name not in layer.merged_adapters:
                rows.copy_(layer.get_base_layer().weight.data[layer.token_indices[name]])


def _of_an_adapter(part: Any, name: str) -> bool:
    owner, _, _ = name.rpartition(".")
    # PEFT keeps an adapter's tensors under its name: `lora_A.default.weight`.
    return is_adapted(part.get_submodule(owner)) or bool(set(part.peft_config) & set(name.split(".")))
