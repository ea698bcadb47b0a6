"""What some language models compute from token ids beside embeddings, or make of those alone; features have no ids.

Such a model, called with merged embeddings, cannot know the ids any more; these functions give it what it needs, with
placeholders treated as in the model family's own multimodal model.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..parts.adapters import unwrapped
from ..parts.signatures import forward_parameters

# model type -> attribute of the backbone by which it multiplies embeddings of ids, but not embeddings that it is given
SCALES = {"falcon_h1": "embedding_multiplier"}


def embed_ids(language_model: nn.Module, input_ids: Tensor) -> Tensor:
    """What a language model's first layer would be given for ids; most give it what their embedding module returns.

    Args:
        language_model: PEFT-wrapped or not.
        input_ids: ``(batch, length)``, all of them in its embedding table.

    Returns:
        ``(batch, length, hidden)``.
    """
    inner: Any = unwrapped(language_model)
    embeds = language_model.get_input_embeddings()(input_ids)  # type: ignore[operator]
    scale = SCALES.get(inner.config.model_type)
    return embeds if scale is None else embeds * getattr(inner.base_model, scale)


def id_input_names(language_model: nn.Module) -> list[str]:
    """Inputs that a language model's backbone needs beside embeddings; its own `forward` may merely pass them on."""
    backbone: Any = getattr(unwrapped(language_model), "base_model", None)
    return [
        name
        for name, (setting, _) in COMPUTED.items()
        if getattr(getattr(backbone, "config", None), setting, None) and name in forward_parameters(backbone)
    ]


def id_inputs(language_model: nn.Module, input_ids: Tensor | None, placeholders: Tensor, given: set[str]) -> dict:
    """Arguments of a language model's `forward` that go with merged embeddings.

    Args:
        language_model: PEFT-wrapped or not.
        input_ids: ``(batch, length)``, None where the caller gave embeddings.
        placeholders: bool ``(batch, length)``, where features stand.
        given: arguments that the caller gave already.

    Returns:
        the arguments by name, none for most language models.

    Raises:
        ValueError: it needs one, and there are no ids to compute it from.
    """
    missing = [name for name in id_input_names(language_model) if name not in given]
    if not missing:
        return {}
    if input_ids is None:
        raise ValueError(
            f"{type(unwrapped(language_model)).__name__} computes {missing[0]} from token ids, but it was given "
            f"inputs_embeds in which features replace some: pass input_ids instead, or {missing[0]}= as well."
        )
    backbone = unwrapped(language_model).base_model
    return {name: COMPUTED[name][1](backbone, input_ids, placeholders) for name in missing}


def _per_layer_inputs(backbone: Any, input_ids: Tensor, placeholders: Tensor) -> Tensor:
    """``(batch, length, layers, width)``: per-layer embeddings, of the padding token where a feature stands.

    Gemma 3n's own image tokens lie outside the table, and what does is read as token 0, its padding; Gemma 4 takes the
    padding token.
    """
    padding = getattr(backbone.config, "pad_token_id", None) or 0
    words = input_ids.masked_fill(placeholders, padding)
    both = (
        "inputs_embeds" in inspect.signature(backbone.get_per_layer_inputs).parameters
    )  # Gemma 4, of which one is None
    return backbone.get_per_layer_inputs(words, None) if both else backbone.get_per_layer_inputs(words)


def _own_ids(backbone: Any, input_ids: Tensor, placeholders: Tensor) -> Tensor:
    """``(batch, length)``: the ids as they are; Qwen4's n-grams hash the placeholders too."""
    return input_ids


# argument -> (setting of the configuration that asks for it, how it is computed)
COMPUTED: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], Tensor]]] = {
    "per_layer_inputs": ("hidden_size_per_layer_input", _per_layer_inputs),
    "ple_input_ids": ("ple_layer_ids", _own_ids),
}
