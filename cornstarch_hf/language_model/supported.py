"""What is known of language models: which cannot be one of a composition, and why, and a row for each type that is unusual."""

from dataclasses import dataclass
from typing import Any

from ..parts.adapters import unwrapped


@dataclass(frozen=True)
class Facts:
    """What neither the `forward` nor the configuration of the language models of one `model_type` tells.

    Attributes:
        refused: why features among its tokens, left padding or generation step by step would go wrong; such a model is refused.
        refused_if: setting of its configuration that is True where that holds; None where it holds of all of the type.
        reads_positions: its rotary embeddings are not all: it reads positions for themselves too, to scale attention by
            them, to cut blocks, to reset a state at 0.
        embedding_scale: attribute of its backbone by which it multiplies embeddings of ids, but not those that it is given.
    """

    refused: str | None = None
    refused_if: str | None = None
    reads_positions: bool = False
    embedding_scale: str | None = None


_USUAL = Facts()
_READS_POSITIONS = Facts(reads_positions=True)
LANGUAGE_MODEL_TYPES: dict[str, Facts] = {
    **dict.fromkeys(("beam", "inkling2_text", "llama4_text", "minimax_m3_vl_text"), _READS_POSITIONS),
    **dict.fromkeys(("ministral3", "recurrent_gemma"), _READS_POSITIONS),
    "blt": Facts("it cuts bytes into patches by the ids themselves, which features do not have"),
    "deepseek_v4": Facts("it routes tokens to experts by a hash of their ids, which features do not have"),
    # transformers keeps a split of its router that mixes the tokens of a whole batch.
    "doge": Facts(
        "it chooses the experts of a token by other tokens of the batch, those behind it included (its configuration has "
        "is_moe=True), so a batch differs from its single samples, and a prompt from the same prompt run token by token",
        refused_if="is_moe",
    ),
    "falcon_h1": Facts(embedding_scale="embedding_multiplier"),
    "git": Facts("it puts its own image before the text and widens every mask by it"),
    "reformer": Facts("it attends within random hash buckets, which change with padding and from step to step"),
    # Where it turns values too, what a token gives depends on where it stands, not on the distance alone.
    "roformer": Facts(
        "it counts positions from the start of a row, padding included, takes no `position_ids`, and turns values by them (its "
        "configuration has rotary_value=True), so a left-padded batch would differ from its single samples",
        refused_if="rotary_value",
    ),
    "rwkv": Facts("it ignores the attention mask, so padding enters its state, which cannot be trained through"),
    "xlm": Facts("it reads an attention mask as lengths, so padding on the left counts as text"),
    "xlnet": Facts("it is trained on permutations of the text and does not predict the next token from those before"),
}


def language_model_type(config: Any) -> Facts:
    """The row of a language model, by its configuration; one of defaults where there is none."""
    return LANGUAGE_MODEL_TYPES.get(config.model_type, _USUAL)


def embedding_width(language_model: Any) -> int:
    """Width of a language model's input embeddings, which projected features must have."""
    embedding: Any = unwrapped(language_model).get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1]
