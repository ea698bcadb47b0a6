"""What some language models need beside tokens or embeddings: positions (`generate` gives its own), inputs made of ids."""

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..parts.adapters import unwrapped
from ..parts.signatures import forward_parameters
from .supported import language_model_type

# (only distances count, first position) of each language model: its modules are searched once, not at every token.
_counting: WeakKeyDictionary[Any, tuple[bool, int]] = WeakKeyDictionary()


def mask_positions(attention_mask: Tensor, first: int = 0) -> Tensor:
    """Number the valid tokens of each row of a mask ``(batch, length)`` from `first` on, in int64; padding gets `first`.

    >>> mask_positions(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 0]]
    """
    valid = attention_mask.long()  # (batch, length)
    return (valid.cumsum(-1) - 1).masked_fill(valid == 0, 0) + first


def _how_counted(inner: Any) -> tuple[bool, int]:
    if torch.compiler.is_compiling():  # a tracer would guard what is kept of all models
        return only_distances_count(inner), first_position(inner)
    if inner not in _counting:
        _counting[inner] = only_distances_count(inner), first_position(inner)
    return _counting[inner]


def first_position(language_model: nn.Module) -> int:
    """The position that a language model gives to its first token: 0, but behind the padding token's row in models whose
    table of positions keeps such a row (RoBERTa, Liu et al. 2019, and its relatives)."""
    modules: Any = unwrapped(language_model).modules()
    table = next((m for m in modules if hasattr(type(m), "create_position_ids_from_inputs_embeds")), None)
    return 0 if table is None else table.padding_idx + 1


def only_distances_count(language_model: nn.Module) -> bool:
    """Whether a shift of all positions of a row changes nothing, as with rotary embeddings (Su et al. 2021)."""
    inner: Any = unwrapped(language_model)
    rotary = any("Rotary" in type(module).__name__ for module in inner.modules())
    # Frequencies of these follow the largest position of a batch.
    stretched = _rope_types(inner.config) & {"dynamic", "longrope"}
    return rotary and not stretched and not language_model_type(inner.config).reads_positions


def crosses_longrope_limit(language_model: nn.Module, past: int, length: int) -> bool:
    """Whether a row has grown past the length at which LongRoPE (Ding et al. 2024) takes its other frequencies.

    The keys of the `past` tokens in the cache were turned by the former ones then, so all `length` tokens of the row, the
    new ones included, have to be run again.
    """
    config: Any = unwrapped(language_model).config
    if "longrope" not in _rope_types(config):
        return False
    name = "original_max_position_embeddings"
    limit = getattr(config, name, None) or config.rope_parameters.get(name)
    return limit is not None and past <= limit < length


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embeddings of a configuration, which may hold one for each type of layers."""
    found = getattr(config, "rope_parameters", None) or {}
    return {rope.get("rope_type", "default") for rope in (found, *found.values()) if isinstance(rope, dict)}


def with_positions(language_model: nn.Module, arguments: dict[str, Any], past: int) -> dict[str, Any]:
    """The arguments with `position_ids` ``(batch, length)`` where there are none and the language model would count otherwise.

    That is where rows are padded on the left and more than distances count, or where the first position is not 0: such
    models number embeddings anew at every call, cached tokens or not.  With `past` tokens in the cache an `attention_mask` is
    ``(batch, past + length)``.
    """
    if arguments.get("position_ids") is not None or "position_ids" not in forward_parameters(language_model):
        return arguments
    distances, first = _how_counted(unwrapped(language_model))
    if distances:  # it is right as it is, and gives the same bits as it does on its own
        return arguments
    embeds = arguments.get("inputs_embeds")
    tokens = arguments["input_ids"] if embeds is None else embeds  # (batch, length), or (batch, length, hidden)
    length, mask = tokens.shape[1], arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + length:
        # A row that starts with a valid token has no padding on its left; a tracer cannot look.
        if first or torch.compiler.is_compiling() or not bool(mask[:, 0].all()):
            return arguments | {"position_ids": mask_positions(mask, first)[:, past:]}  # (batch, length)
    elif first and mask is None:
        positions = torch.arange(past, past + length, device=tokens.device) + first  # (length,)
        return arguments | {"position_ids": positions.expand(tokens.shape[0], -1)}  # (batch, length)
    return arguments


def embed_ids(language_model: nn.Module, input_ids: Tensor) -> Tensor:
    """The input of a language model's first layer, ``(batch, length, hidden)``, for ids ``(batch, length)`` in its table."""
    inner: Any = unwrapped(language_model)
    embeds = language_model.get_input_embeddings()(input_ids)  # type: ignore[operator]  # (batch, length, hidden)
    scale = language_model_type(inner.config).embedding_scale  # None for most
    return embeds if scale is None else embeds * getattr(inner.base_model, scale)


def id_input_names(language_model: nn.Module) -> list[str]:
    """Inputs that a language model's backbone needs beside embeddings; its own `forward` may merely pass them on."""
    backbone: Any = getattr(unwrapped(language_model), "base_model", None)
    config = getattr(backbone, "config", None)
    wanted = [name for name, (setting, _) in COMPUTED.items() if getattr(config, setting, None)]
    return [name for name in wanted if name in forward_parameters(backbone)]


def id_inputs(language_model: nn.Module, input_ids: Tensor | None, placeholders: Tensor, given: set[str]) -> dict:
    """Compute those arguments of a language model's `forward` that go with merged embeddings; none for most.

    Args:
        input_ids: ``(batch, length)``, None where the caller gave embeddings (ValueError, if it needs any).
        placeholders: bool ``(batch, length)``, where features stand.
        given: arguments that the caller gave already.
    """
    missing = [name for name in id_input_names(language_model) if name not in given]
    inner = unwrapped(language_model)
    if not missing:
        return {}
    if input_ids is None:
        raise ValueError(
            f"{type(inner).__name__} computes {missing[0]} from token ids, but it was given inputs_embeds in which features "
            f"replace some: pass input_ids instead, or {missing[0]}= as well."
        )
    return {name: COMPUTED[name][1](inner.base_model, input_ids, placeholders) for name in missing}


def _per_layer_inputs(backbone: Any, input_ids: Tensor, placeholders: Tensor) -> Tensor:
    """``(batch, length, layers, width)``: per-layer embeddings, of the padding token where a feature stands."""
    # Gemma 3n's own image tokens lie outside the table, and what does is read as token 0, its padding; Gemma 4 takes the
    # padding token.
    padding = getattr(backbone.config, "pad_token_id", None) or 0
    words = input_ids.masked_fill(placeholders, padding)  # (batch, length)
    # Gemma 4 takes ids and embeddings, of which one is None.
    both = "inputs_embeds" in inspect.signature(backbone.get_per_layer_inputs).parameters
    return backbone.get_per_layer_inputs(words, *([None] if both else []))


# argument -> (setting of the configuration that asks for it, how it is computed)
COMPUTED: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "per_layer_inputs": ("hidden_size_per_layer_input", _per_layer_inputs),
    # (batch, length): the ids as they are; Qwen4's n-grams hash the placeholders too.
    "ple_input_ids": ("ple_layer_ids", lambda backbone, input_ids, placeholders: input_ids),
}
