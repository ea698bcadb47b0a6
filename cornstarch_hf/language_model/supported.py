"""What is known of language models: a row for each type that is unusual.  Which are refused is beside it, in `refusals`."""

from dataclasses import dataclass
from typing import Any

from ..parts.adapters import unwrapped


@dataclass(frozen=True)
class Facts:
    """What neither the `forward` nor the configuration of the language models of one `model_type` tells.

    Attributes:
        reads_positions: its rotary embeddings are not all: it reads positions for themselves too, to scale attention by
            them, to cut blocks, to reset a state at 0.
        embedding_scale: attribute of its backbone by which it multiplies embeddings of ids, but not those that it is given.
    """

    reads_positions: bool = False
    embedding_scale: str | None = None


_USUAL = Facts()
_READS_POSITIONS = Facts(reads_positions=True)
LANGUAGE_MODEL_TYPES: dict[str, Facts] = {
    **dict.fromkeys(("beam", "inkling2_text", "llama4_text", "minimax_m3_vl_text"), _READS_POSITIONS),
    **dict.fromkeys(("ministral3", "recurrent_gemma"), _READS_POSITIONS),
    "falcon_h1": Facts(embedding_scale="embedding_multiplier"),
}


def language_model_type(config: Any) -> Facts:
    """The row of a language model, by its configuration; one of defaults where there is none."""
    return LANGUAGE_MODEL_TYPES.get(config.model_type, _USUAL)


def embedding_width(language_model: Any) -> int:
    """Width of a language model's input embeddings, which projected features must have."""
    embedding: Any = unwrapped(language_model).get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1]
