"""Features that reach the language model in other ways than in the place of a placeholder: into its first layers (DeepStack,
Meng et al. 2024), added to embeddings, with learnt tokens around them.

Checkpoints carry this file only where a modality's entry asks for one of these; `registries.STEPS` leads here.
"""

from typing import Any

import torch
from torch import Tensor

from ..parts.adapters import unwrapped
from ..parts.registries import STEPS, Step
from ..parts.signatures import forward_parameters
from .merging import embedded_placeholder_mask, scatter_features

# Parameters of text stacks that take such features: where they stand, and one tensor per layer.
WHERE, LEVELS = "visual_pos_masks", "deepstack_visual_embeds"


def joined_levels(levels: list[list[Tensor]], masks: list[Tensor]) -> list[Tensor]:
    """Of each level the features of several modalities, ``(features, hidden)``, in reading order.

    Args:
        levels: of each modality one tensor ``(its features, hidden)`` per level.
        masks: where its placeholders stand, bool ``(batch, length)``.
    """
    if len(levels) == 1:
        return levels[0]
    union = torch.stack(masks).any(0)
    own = [mask[union] for mask in masks]  # each (all features,)
    found = []
    for parts in zip(*levels, strict=True):
        joint = parts[0].new_zeros(len(own[0]), parts[0].shape[-1])
        for where, part in zip(own, parts, strict=True):
            joint[where] = part.to(joint)
        found.append(joint)
    return found


class LayerFeatures(Step):
    """Features for the first layers of the language model, of those modalities whose encoder gives some."""

    def check(self, model: Any) -> None:
        takes = forward_parameters(model.language_model)
        if not {WHERE, LEVELS} <= set(takes):
            name = next(n for n in model.config.encoders if model.config.modality(n)["layer_features"])
            who = type(unwrapped(model.language_model)).__name__
            raise ValueError(
                f"{name}: layer_features needs a language model whose forward takes {WHERE} and {LEVELS}, {who} does not: "
                "leave it out, or take one that does (Qwen3-VL's)."
            )

    def before_language_model(self, model: Any, inputs: dict, masks: dict, outputs: dict, past: int) -> dict:
        names = [name for name in outputs if model.config.modality(name)["layer_features"]]
        if not names:
            return inputs
        device, levels = inputs["inputs_embeds"].device, []
        for name in names:
            given = outputs[name].get("deepstack_features")
            if given is None:
                kind = model.config.modality(name)["kind"]
                raise ValueError(
                    f"{name}: the language model's layers need features of their own, and these outputs have none: pass the "
                    f"encoder's inputs, or what get_{kind}_features() gives."
                )
            levels.append([torch.cat(list(level)) for level in given])
        if len({len(each) for each in levels}) > 1:
            counts = dict(zip(names, map(len, levels), strict=True))
            raise ValueError(f"layer_features: all modalities need features for as many layers, got {counts}.")
        where = [masks[name].to(device) for name in names]
        return inputs | {WHERE: torch.stack(where).any(0), LEVELS: joined_levels(levels, where)}


class Merge(Step):
    """Features that are added to the embeddings of their placeholders, and learnt tokens that stand around items."""

    def check(self, model: Any) -> None:
        table: Any = model.get_input_embeddings()
        rows = getattr(table, "num_embeddings", None) or table.weight.shape[0]
        for name in model.config.encoders:
            entry = model.config.modality(name)
            if entry["merge"] == "add" and (entry["token_id"] or 0) >= rows:
                raise ValueError(
                    f"{name}: features are added to the embedding of token {entry['token_id']}, which the table of {rows} rows "
                    f"does not have: call resize_token_embeddings({entry['token_id'] + 1}) first."
                )
            if entry["marks"] and (last := max(entry["marks"].values())) >= (
                size := len(mark_table(model.encoders[name]))
            ):
                raise ValueError(f"{name}: marks name the row {last} of a table of {size} learnt tokens.")

    def merge(self, model: Any, name: str, embeds: Tensor, mask: Tensor, features: Tensor, input_ids: Any) -> Tensor:
        """Embeddings ``(batch, length, hidden)`` with one modality's features ``(num_features, hidden)``, and its marks."""
        entry = model.config.modality(name)
        if entry["merge"] == "add":
            features = embeds[mask] + features.to(embeds)
        embeds = scatter_features(embeds, mask, features)
        for token_id, row in entry["marks"].items():
            if input_ids is None:
                word = torch.tensor(token_id, device=embeds.device)
                where = embedded_placeholder_mask(embeds, model.get_input_embeddings()(word))
            else:
                where = (input_ids == token_id).to(embeds.device)  # (batch, length)
            learnt = mark_table(model.encoders[name])[row].to(embeds)  # (hidden,)
            embeds = torch.where(where.unsqueeze(-1), learnt, embeds)
        return embeds


def mark_table(encoder: Any) -> Tensor:
    """The learnt tokens of an encoder ``(rows, hidden)``: the weight of its projection's `mark_table`, or of its own."""
    projection: Any = unwrapped(encoder.projector.projection)
    own = getattr(projection, "mark_table", None)
    return (encoder.mark_table if own is None else own).weight


STEPS["layer_features"], STEPS["merge"] = LayerFeatures(), Merge()
