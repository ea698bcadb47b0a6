"""Tokens that attend to each other both ways, by the items of a prompt: pure rules, and where a composed model with
``config.mask`` follows one.

Checkpoints carry this file only where their configuration names a rule; `registries.STEPS` leads here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING,
    create_causal_mask,
    sliding_window_overlay,
)
from transformers.utils.generic import is_flash_attention_requested

from ..parts.adapters import unwrapped
from ..parts.registries import MASK_RULES, STEPS, Step, check_rule_options, register_mask_rule
from ..parts.signatures import forward_parameters
from ..parts.versions import CACHE, is_paged

# Of the configured mask itself, not of its rule.
OWN_OPTIONS = ("rule", "layers", "windowed")
# What native processors write for tokens of pictures and films; in Gemma 3 the name has no prefix.
TYPE_NAMES, SEEN = ("mm_token_type_ids", "token_type_ids"), (1, 2)
PROMPT = 4  # a value of the former that says in generation what is a prompt


def item_blocks(types: Tensor, marks: Tensor | None = None) -> Tensor:
    """Number the runs of features of each row from 0 on, -1 for text: ``(batch, length)`` (Gemma 3, Gemma Team 2025).

    >>> item_blocks(torch.tensor([[0, 1, 1, 0, 1]])).tolist()
    [[-1, 0, 0, -1, 1]]
    """
    seen = types != 0
    starts = seen & ~nn.functional.pad(seen, (1, 0))[:, :-1]
    return torch.where(seen, starts.long().cumsum(-1) - 1, -1)


def one_block(types: Tensor, marks: Tensor | None = None) -> Tensor:
    """All features of a row are one block (Molmo 2)."""
    return torch.where(types != 0, 0, -1)


def prefix(types: Tensor, marks: Tensor | None = None) -> Tensor:
    """The prompt of each row is one block: tokens marked 0, all where nothing is marked (PaliGemma, Beyer et al. 2024)."""
    return torch.zeros_like(types) if marks is None else torch.where(marks == 0, 0, -1)


prefix.masks_text = True  # type: ignore[attr-defined]
register_mask_rule("item_blocks", item_blocks)
register_mask_rule("one_block", one_block)
register_mask_rule("prefix", prefix)


# ---- where a composed model follows its rule


class Masks(Step):
    """Masks by the rule of ``config.mask``, at prefill and in training."""

    inputs = TYPE_NAMES

    def check(self, model: Any) -> None:
        rule = model.config.mask
        options = {key: value for key, value in rule.items() if key not in OWN_OPTIONS}
        check_rule_options("mask", MASK_RULES[rule.get("rule")], 2, options, model.config.encoders)
        layers, windowed, config = rule.get("layers") or [], rule.get("windowed", False), _text_config(model)
        if not isinstance(layers, (list, tuple)) or not all(isinstance(kind, str) for kind in layers):
            raise ValueError(f"mask: layers must be a list of types of layers, got {layers!r:.100}.")
        if not isinstance(windowed, bool):
            raise ValueError(f"mask: windowed must be True or False, got {windowed!r:.100}.")
        types = set(_layer_types(config) or ["full_attention"])
        if unknown := sorted(set(layers) - types):
            raise ValueError(
                f"mask: layers names {unknown}, the language model has layers of the types {sorted(types)}."
            )

    def before_language_model(self, model: Any, inputs: dict, masks: dict, outputs: dict, past: int) -> dict:
        rows = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        given = {name: inputs.get(name) for name in TYPE_NAMES}
        inputs = _without_types(model, inputs)
        mask = inputs.get("attention_mask")
        if rows.shape[1] == 1 and past:  # a step, which sees all that is there
            return inputs
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim > 2):  # the caller's own
            return inputs
        rule = MASK_RULES[model.config.mask["rule"]]
        if is_paged(inputs.get("cache")):  # text alone, of many requests
            if not getattr(rule, "masks_text", False):
                return inputs
            name = model.config.mask["rule"]
            raise ValueError(
                f"mask: continuous batching cannot follow the rule {name!r} of prompts: call generate() instead."
            )
        types, marks = _types(model, masks, rows, given), given["token_type_ids"]
        ids = given["mm_token_type_ids"]
        if ids is not None and bool((ids == PROMPT).any()):
            marks = torch.where(ids == PROMPT, 0, 1)
        for_text = getattr(rule, "masks_text", False)
        if not for_text and not outputs and all(value is None for value in given.values()):
            return inputs
        options = {key: value for key, value in model.config.mask.items() if key not in OWN_OPTIONS}
        blocks = rule(types, marks if marks is None else _tail(marks, types, 1), **options)  # (batch, length)
        if not isinstance(blocks, Tensor) or blocks.shape != types.shape:
            got = f"the shape {tuple(blocks.shape)}" if isinstance(blocks, Tensor) else type(blocks).__name__
            name = model.config.mask["rule"]
            raise ValueError(f"mask: the rule {name!r} must give (batch, length) = {tuple(types.shape)}, got {got}.")
        # What is in the cache was masked when it came; behind it a prompt is no prefix any more.
        blocks = torch.full_like(blocks, -1) if for_text and past else blocks
        return inputs | {"attention_mask": _layer_masks(model, inputs, rows, blocks, past)}

    def before_generation(
        self, model: Any, keywords: dict, masks: dict, outputs: dict, past: int, shape: tuple[int, int]
    ) -> dict:
        rows = torch.empty(shape, device=next((m.device for m in masks.values()), model.device))
        _types(model, masks, rows, {name: keywords.get(name) for name in TYPE_NAMES})
        if not getattr(MASK_RULES[model.config.mask["rule"]], "masks_text", False):
            return keywords
        # By the name whose values transformers continues with 0: answers and drafts are no part of a prompt.
        marks = keywords.get("token_type_ids")
        ids = torch.full(shape, PROMPT, device=rows.device) if marks is None else torch.where(marks == 0, PROMPT, 0)
        return {key: value for key, value in keywords.items() if key not in TYPE_NAMES} | {"mm_token_type_ids": ids}


def _text_config(model: Any) -> Any:
    return unwrapped(model.language_model).config.get_text_config()


def _layer_types(config: Any) -> list[str] | None:
    """Types of the layers of a language model that takes a mask for each; None for one that takes a single mask."""
    return getattr(config, "layer_types", None)


def _without_types(model: Any, inputs: dict) -> dict:
    takes = forward_parameters(model.language_model)
    return {key: value for key, value in inputs.items() if key not in TYPE_NAMES or key in takes}


def _tail(marks: Tensor, types: Tensor, blank: int = 0) -> Tensor:
    """Marks ``(batch, length)`` of the rows: the last ones of longer rows, `blank` for drafts behind shorter ones."""
    missing = types.shape[1] - marks.shape[1]
    return nn.functional.pad(marks[:, -types.shape[1] :], (0, max(missing, 0)), value=blank).to(types.device)


def _types(model: Any, masks: dict, rows: Tensor, given: dict) -> Tensor:
    """Int64 ``(batch, length)``: i where the i-th modality is seen, by its placeholders or by what the caller marked besides.

    ValueError for marks that leave out a placeholder.
    """
    config = model.config
    types = torch.zeros(rows.shape[:2], dtype=torch.long, device=rows.device)
    seen = [name for name in config.encoders if config.modality(name)["kind"] in ("image", "video")]
    for i, name in enumerate(config.encoders, 1):
        if name in masks and name in seen:
            types = types.masked_fill(masks[name].to(types.device), i)
    ids = given["mm_token_type_ids"] if given["mm_token_type_ids"] is not None else given["token_type_ids"]
    if ids is None or not seen or getattr(MASK_RULES[config.mask["rule"]], "masks_text", False):
        return types
    marked = torch.isin(_tail(ids, types), torch.tensor(SEEN, device=types.device))
    if not torch.compiler.is_compiling() and bool((lost := (types != 0) & ~marked).any()):
        sample = int(lost.any(-1).nonzero()[0, 0])
        raise ValueError(
            f"{' or '.join(TYPE_NAMES)}, sample {sample}: {int(lost[sample].sum())} of {int((types[sample] != 0).sum())} "
            "placeholder tokens are not marked as an image (1) or a video (2): pass what the processor gives, or neither."
        )
    return torch.where(marked & (types == 0), config.encoders.index(seen[0]) + 1, types)


def _layer_masks(model: Any, inputs: dict, rows: Tensor, blocks: Tensor, past: int) -> Any:
    """A mask for each type of layer by its name, or a single one; ValueError for flash attention, which has no such masks."""
    config, rule, cache = _text_config(model), model.config.mask, inputs.get("cache")
    if is_flash_attention_requested(config):
        raise ValueError(
            f"mask: {config._attn_implementation} cannot let tokens of a causal prompt attend both ways (config.mask): load "
            "the language model with attn_implementation='sdpa', 'eager' or 'flex_attention'."
        )
    embeds = rows if rows.is_floating_point() else torch.empty((*rows.shape, 0), dtype=model.dtype, device=rows.device)
    positions = inputs.get("position_ids")
    arguments = {
        "config": config, "inputs_embeds": embeds, "attention_mask": inputs.get("attention_mask"), CACHE or "cache": cache,
        "position_ids": positions if positions is None or positions.ndim == 2 else None,
    }  # fmt: skip
    overlay = _both_ways(_whole(blocks, past, cache))
    found = {}
    for kind in sorted(set(_layer_types(config) or ["full_attention"])):
        create: Any = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        if kind not in (rule.get("layers") or [kind]):
            found[kind] = create(**arguments)
        elif kind == "sliding_attention" and rule.get("windowed"):
            sliding = getattr(cache, "is_sliding", None) or [True]
            window = {"and_mask_function": sliding_window_overlay(config.sliding_window)}
            found[kind] = create_causal_mask(
                **arguments, or_mask_function=overlay, **window, layer_idx=sliding.index(True) if True in sliding else 0
            )
        else:
            found[kind] = create(**arguments, or_mask_function=overlay)
    return found if _layer_types(config) else found["full_attention"]


def _whole(blocks: Tensor, past: int, cache: Any) -> Tensor:
    """Blocks of all columns that a mask may have: -1 for those in the cache, and for those that are yet to come."""
    longest = max(
        [past + blocks.shape[1], *(getattr(layer, "max_cache_len", 0) or 0 for layer in getattr(cache, "layers", ()))]
    )
    return nn.functional.pad(blocks, (past, longest - past - blocks.shape[1]), value=-1)


def _both_ways(blocks: Tensor) -> Any:
    """Whether a query and a key are of one block, as transformers asks mask functions."""

    def same_block(batch: Any, head: Any, query: Any, key: Any) -> Any:
        own = blocks[batch, query]
        return (own == blocks[batch, key]) & (own >= 0)

    return same_block


STEPS["mask"] = Masks()
