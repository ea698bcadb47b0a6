"""Where a composed model with ``config.positions`` follows a rule of positions; `position_rules` has some.

Checkpoints carry both files only where their configuration names a rule; `registries.STEPS` leads here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parts.adapters import unwrapped
from ..parts.registries import POSITION_RULES, STEPS, Step, check_rule_options
from ..parts.signatures import forward_parameters
from ..parts.versions import CACHE_NAMES
from .extra_inputs import mask_positions
from .position_rules import PositionQuery

SECONDS = "second_per_grid_ts"  # seconds between frames of each video: what native processors call it
SECTIONS = "mrope_section"  # in rope_parameters, and on layers of those that have a default
# What native processors write in `mm_token_type_ids` for a feature of each kind; others may be any number but 0.
TYPE_IDS = {"image": 1, "video": 2, "audio": 3}


def types_of(masks: Mapping[str, Tensor], names: Sequence[str], like: Tensor) -> Tensor:
    """Int64 ``(batch, length)``: 0 for text, i at placeholders of the i-th modality; `like` is any tensor of such rows."""
    types = torch.zeros(like.shape[:2], dtype=torch.long, device=like.device)
    for i, name in enumerate(names, 1):
        if name in masks:
            types = types.masked_fill(masks[name].to(types.device), i)
    return types


def check_type_ids(given: Any, types: Tensor, kinds: Sequence[str]) -> None:
    """ValueError for `mm_token_type_ids` that do not mark the placeholders of a batch; None is right."""
    if given is None or torch.compiler.is_compiling():
        return
    given = given[..., -types.shape[1] :].to(types.device)
    expected = torch.zeros_like(types)
    for i, kind in enumerate(kinds, 1):
        number = TYPE_IDS.get(kind)
        expected = torch.where(types == i, given.where(given != 0, -1) if number is None else number, expected)
    if wrong := int((given != expected).sum()):
        sample = int((given != expected).any(-1).nonzero()[0, 0])
        marked, placeholders = (int((x[sample] != 0).sum()) for x in (given, types))
        raise ValueError(
            f"mm_token_type_ids, sample {sample}: {marked} tokens are marked, but {placeholders} are placeholders ({wrong} "
            f"tokens of the batch differ): leave them out, or pass what the processor gives, {TYPE_IDS} by kind."
        )


def _query(
    model: Any, types: Tensor, valid: Tensor, start: Tensor, outputs: Mapping[str, Any], **more: Any
) -> PositionQuery:
    """What the rule is asked; ValueError for items whose grid nobody states."""
    names, grids, seconds = model.config.encoders, {}, {}
    for name, output in outputs.items():
        given = output.get("feature_grids")
        if given is None and getattr(_rule(model), "needs_grids", True) and len(output.pooler_output):
            kind = model.config.modality(name)["kind"]
            raise ValueError(
                f"{name}: positions need the grid of each item's features, and these outputs have none: pass the encoder's "
                f"inputs, or what get_{kind}_features() gives; or state output['feature_grids'] in "
                "postprocess_projector_callback."
            )
        grids[name] = [] if given is None else [(1,) * (3 - len(g)) + tuple(g) for g in given.tolist()]
        if output.get(SECONDS) is not None:
            seconds[name] = [float(x) for x in output[SECONDS]]
    return PositionQuery(types, valid, start, names, grids, seconds, **more)


def _rule(model: Any) -> Any:
    return POSITION_RULES[model.config.positions.get("rule")]


def _options(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.config.positions.items() if key != "rule"}


def _positions(model: Any, query: PositionQuery) -> Tensor:
    found = _rule(model)(query, **_options(model))
    shape = tuple(query.types.shape)
    if not isinstance(found, Tensor) or found.ndim not in (2, 3) or tuple(found.shape[-2:]) != shape:
        got = f"the shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"positions: the rule {model.config.positions['rule']!r} must give (batch, length) = {shape}, or one such row for "
            f"each axis, got {got}."
        )
    return found


def _sections(language_model: Any) -> list[int] | None:
    """How a language model shares out its rotary embedding among several axes, by its layers or its configuration."""
    inner = unwrapped(language_model)
    parameters = getattr(inner.config.get_text_config(), "rope_parameters", None) or {}
    nested = next((x[SECTIONS] for x in parameters.values() if isinstance(x, Mapping) and SECTIONS in x), None)
    found = (getattr(module, SECTIONS, None) for module in inner.modules())
    sections = next((sections for sections in found if sections is not None), parameters.get(SECTIONS, nested))
    # Some have others for each type of layer, of as many axes.
    return next(iter(sections.values()), None) if isinstance(sections, Mapping) else sections


def _check_axes(model: Any, rule: Any) -> None:
    """ValueError where the rule gives positions along other axes than the language model turns tokens by."""
    if (axes := getattr(rule, "axes", None)) is None:
        return
    axes, name = _options(model).get("axes", axes), model.config.positions["rule"]
    sections, who = _sections(model.language_model), type(unwrapped(model.language_model)).__name__
    if sections is None:
        raise ValueError(
            f"positions: {who} turns tokens by one axis, its rope_parameters have no {SECTIONS!r}, so it cannot follow the "
            f"rule {name!r}: leave the rule out, or choose a model that was trained with it."
        )
    if len(sections) != axes:
        raise ValueError(
            f"positions: {who} turns tokens by {len(sections)} axes ({SECTIONS} {list(sections)}), and the rule {name!r} has "
            f"{axes}: choose the rule that belongs to the model."
        )


class Positions(Step):
    """Positions by the rule of ``config.positions``, wherever the caller gives none."""

    inputs = ("mm_token_type_ids",)

    def encoder_options(self, config: Any) -> dict[str, Any]:
        needs = getattr(POSITION_RULES[config.positions.get("rule")], "needs_grids", True)
        return {"say": ["grids"]} if needs else {}

    def check(self, model: Any) -> None:
        rule, who = _rule(model), type(unwrapped(model.language_model)).__name__
        if "position_ids" not in forward_parameters(model.language_model):
            raise ValueError(f"positions: {who} takes no `position_ids`: leave the rule out, or choose another model.")
        check_rule_options("positions", rule, 1, _options(model), model.config.encoders)
        _check_axes(model, rule)

    def before_language_model(self, model: Any, inputs: dict, masks: dict, outputs: dict, past: int) -> dict:
        rows = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        types = types_of(masks, model.config.encoders, rows)
        inputs = with_checked_types(model, inputs, types)
        numbers_text = getattr(_rule(model), "numbers_text", False)
        if inputs.get("position_ids") is not None or (not numbers_text and not past and not outputs):
            return inputs  # the caller's, or those of text alone
        if past and not numbers_text:
            raise ValueError(
                f"position_ids are needed with a cache ({past} tokens): this model's positions follow the grids of its items "
                f"(config.positions), which the cache does not tell. Pass position_ids (axes, batch, {rows.shape[1]}) that go "
                "on behind the last ones, or call generate(), which does."
            )
        start = torch.zeros(len(types), dtype=torch.long)
        query = _query(model, types, _valid(inputs.get("attention_mask"), types), start, outputs, past=past)
        return inputs | {"position_ids": _positions(model, query)}

    def after_language_model(self, model: Any, inputs: dict, output: Any, past: int) -> None:
        cache = next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
        if cache is None or past or torch.compiler.is_compiling():
            return
        rows = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        valid = _valid(inputs.get("attention_mask"), rows)
        remember(cache, _axes(model, inputs.get("position_ids")), mask_positions(valid), valid)

    def before_generation(
        self, model: Any, keywords: dict, masks: dict, outputs: dict, past: int, shape: tuple[int, int]
    ) -> dict:
        batch, new = shape  # behind the cache
        text = keywords.get("position_ids")
        device = keywords["attention_mask"].device if text is None else text.device
        types = types_of(masks, model.config.encoders, torch.empty(shape, device=device))
        keywords = with_checked_types(model, keywords, types)
        if text is None or text.ndim != 3 or len(text) != 1:  # the caller's own
            return keywords
        text = text[0].expand(batch, -1)  # (batch, length), the cached columns included
        valid = _valid(keywords.get("attention_mask"), text)  # (batch, length)
        offset = offset_of(keywords, past, batch).to(device)  # (batch, 1)
        start = valid[:, :-new].sum(-1) + offset[:, 0]
        found = _positions(
            model, _query(model, types, valid[:, -new:], start, outputs, counted=text[:, -new:], past=past)
        )  # (axes, batch, new), or (batch, new)
        before = (text + offset)[:, :-new].expand(*found.shape[:-1], -1)  # of tokens in the cache, which nothing reads
        positions = torch.cat([before, found], -1)
        if positions.ndim == 3 and getattr(_rule(model), "text_row", True):
            positions = torch.cat([text[None], positions])  # (1 + axes, batch, length)
        return keywords | {"position_ids": positions}

    def before_step(self, model: Any, keywords: dict, past: int, whole: bool) -> None:
        cache = next((keywords[name] for name in CACHE_NAMES if keywords.get(name) is not None), None)
        positions = keywords.get("position_ids")
        if cache is not None and positions is not None and positions.ndim == 3:
            valid = _valid(keywords.get("attention_mask"), positions[0])
            # The first row is that of plain text, in front of the axes or the first one of more than three.
            remember(cache, _axes(model, positions), positions[0], valid, 0 if whole else past)


def _axes(model: Any, positions: Tensor | None) -> Tensor | None:
    """Positions ``(axes, batch, length)`` without the row of text that `generate` puts before them; others as they are."""
    axes = model.config.positions.get("axes", 3)
    has_text = positions is not None and positions.ndim == 3 and getattr(_rule(model), "text_row", True)
    return positions[-axes:] if positions is not None and has_text else positions


def _valid(mask: Any, rows: Tensor) -> Tensor:
    """Bool ``(batch, length)``: which tokens of `rows` are no padding, by a mask that may cover a cache before them."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= rows.shape[1]:
        return mask[:, -rows.shape[1] :].bool()
    return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)


def with_checked_types(model: Any, inputs: dict, types: Tensor) -> dict:
    """The inputs without `mm_token_type_ids`, which are checked, unless the language model reads them itself."""
    config = model.config
    if config.mask:  # whose rule looks at them
        return inputs
    check_type_ids(inputs.get("mm_token_type_ids"), types, [config.modality(name)["kind"] for name in config.encoders])
    if "mm_token_type_ids" in forward_parameters(model.language_model):
        return inputs
    return {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}


# The cache itself holds how far its tokens' positions are from their number, since it alone lives as long as they do.
_OFFSET = "position_offset"


def remember(cache: Any, positions: Tensor | None, plain: Tensor, valid: Tensor, before: int = 0) -> None:
    """Keep with a cache how far its positions ``(axes, batch, length)`` went beyond plain ones ``(batch, length)``.

    And up to which column they are those of features: text behind that is as far.  `before` columns were there already.
    """
    if positions is None or positions.ndim != 3:
        setattr(cache, _OFFSET, (torch.zeros(len(plain), 1, dtype=torch.long), 0))
        return
    plain = plain.to(positions.device)
    last = plain.masked_fill(~valid, -1).amax(-1, keepdim=True)  # (batch, 1)
    offset = positions.masked_fill(~valid, 0).amax((0, 2))[:, None] - last  # (batch, 1)
    columns = ((positions != plain + offset) & valid).any(0).any(0).nonzero()
    setattr(cache, _OFFSET, (offset, before + int(columns[-1, 0]) + 1 if len(columns) else 0))


def offset_of(keywords: Mapping[str, Any], past: int, batch: int) -> Tensor:
    """How far positions of a cache's tokens went beyond their number, ``(batch, 1)``; ValueError where it does not tell."""
    if not past:
        return torch.zeros(batch, 1, dtype=torch.long)
    cache = next((keywords[name] for name in CACHE_NAMES if keywords.get(name) is not None), None)
    offset, columns = getattr(cache, _OFFSET, (None, 0))
    if offset is not None and len(offset) == batch and past >= columns:
        return offset
    reason = "was not filled by this model" if offset is None else f"has {len(offset)} rows, the prompt {batch}"
    reason = f"was cut to {past} tokens, before the last feature (token {columns})" if past < columns else reason
    raise ValueError(
        f"positions: the cache {reason}, so the positions of its tokens are not known: pass position_ids, or generate from the "
        "whole prompt without a cache."
    )


STEPS["positions"] = Positions()
