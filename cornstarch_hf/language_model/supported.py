"""What is known of language models: which cannot be one of a composition, and why, and a row for each type that is unusual.

What a class's own `forward` and configuration tell is asked first; rows are left for what they do not tell.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..configuration_multimodal import MultimodalConfig
from ..parts.adapters import unwrapped
from ..parts.classes import language_model_class, resolve_class
from ..parts.signatures import forward_parameters
from ..parts.stored_adapters import wrap_again

OTHER = "Choose another language model."


@dataclass(frozen=True)
class LanguageModelType:
    """What is known of the language models of one `model_type` that neither their `forward` nor their configuration tells.

    Attributes:
        refused: why features among its tokens, left padding or generation step by step would go wrong; such a model is refused.
        refused_if: ``fn(model) -> bool``, whether that holds of a model; None where it holds of all of the type.
        reads_positions: its rotary embeddings are not all: it reads positions for themselves too, to scale attention by
            them, to cut blocks, to reset a state at 0.
        embedding_scale: attribute of its backbone by which it multiplies embeddings of ids, but not those that it is given.
    """

    refused: str | None = None
    refused_if: Callable[[Any], bool] | None = None
    reads_positions: bool = False
    embedding_scale: str | None = None


def language_model_type(config: Any) -> LanguageModelType:
    """The row of a language model, by its configuration; one of defaults where there is none."""
    return LANGUAGE_MODEL_TYPES.get(config.model_type, _USUAL)


def refusal(model: Any) -> str | None:
    """Why a model cannot be the language model of a composition, as a sentence with a remedy; None if it can.

    Args:
        model: a `transformers.PreTrainedModel`, not PEFT-wrapped.
    """
    for fails, reason in REFUSALS:
        if fails(model):
            return f"{type(model).__name__} {reason}"
    known = language_model_type(model.config)
    if known.refused is None or (known.refused_if is not None and not known.refused_if(model)):
        return None
    return f"{type(model).__name__} cannot be the language model of a composition: {known.refused}. {OTHER}"


def _lacks(name: str) -> Callable[[Any], bool]:
    return lambda model: name not in forward_parameters(model)


def _attends_both_ways(model: Any) -> bool:
    """BERT and its relatives, or Gemma, as long as their configuration does not make them causal."""
    config = model.config
    encoder = getattr(config, "is_decoder", None) is False and "encoder_hidden_states" in forward_parameters(model)
    return encoder or _is_true(config, "use_bidirectional_attention")


def _is_true(config: Any, name: str) -> bool:
    """Gemma 4 says "vision" where only images attend both ways, which is no obstacle."""
    return getattr(config, name, None) is True


def _is_torn_off(model: Any) -> bool:
    """The decoder of an encoder-decoder: it numbers positions from the row's start, and nobody can tell it others."""
    layers = getattr(model.config, "decoder_layers", getattr(model.config, "num_decoder_layers", None))
    return layers is not None and "position_ids" not in forward_parameters(model)


def _has_several_tables(model: Any) -> bool:
    return isinstance(model.get_input_embeddings(), nn.ModuleList)


def _routes_by_neighbours(model: Any) -> bool:
    """Doge with experts: transformers keeps a split of its router that mixes the tokens of a whole batch."""
    return _is_true(model.config, "is_moe")


def _turns_values(model: Any) -> bool:
    """RoFormer that turns values too: what a token gives then depends on where it stands, not on the distance alone."""
    return "position_ids" not in forward_parameters(model) and _is_true(model.config, "rotary_value")


_USUAL = LanguageModelType()
_READS_POSITIONS = LanguageModelType(reads_positions=True)
LANGUAGE_MODEL_TYPES: dict[str, LanguageModelType] = {
    **dict.fromkeys(("beam", "inkling2_text", "llama4_text", "minimax_m3_vl_text"), _READS_POSITIONS),
    **dict.fromkeys(("ministral3", "recurrent_gemma"), _READS_POSITIONS),
    "blt": LanguageModelType("it cuts bytes into patches by the ids themselves, which features do not have"),
    "deepseek_v4": LanguageModelType("it routes tokens to experts by a hash of their ids, which features do not have"),
    "doge": LanguageModelType(
        "it chooses the experts of a token by other tokens of the batch, those behind it included (its configuration has "
        "is_moe=True), so a batch differs from its single samples, and a prompt from the same prompt run token by token",
        refused_if=_routes_by_neighbours,
    ),
    "falcon_h1": LanguageModelType(embedding_scale="embedding_multiplier"),
    "git": LanguageModelType("it puts its own image before the text and widens every mask by it"),
    "reformer": LanguageModelType(
        "it attends within random hash buckets, which change with padding and from step to step"
    ),
    "roformer": LanguageModelType(
        "it counts positions from the start of a row, padding included, takes no `position_ids`, and turns values by them (its "
        "configuration has rotary_value=True), so a left-padded batch would differ from its single samples",
        refused_if=_turns_values,
    ),
    "rwkv": LanguageModelType(
        "it ignores the attention mask, so padding enters its state, and its state cannot be trained through"
    ),
    "xlm": LanguageModelType("it reads an attention mask as lengths, so padding on the left counts as text"),
    "xlnet": LanguageModelType(
        "it is trained on permutations of the text and does not predict the next token from those before"
    ),
}


# whether a model fails -> what is wrong with it, and the remedy
REFUSALS: list[tuple[Callable[[Any], bool], str]] = [
    (
        lambda model: model.config.is_encoder_decoder,
        "is an encoder-decoder: expected a causal (decoder-only) language model.",
    ),
    (
        lambda model: not model.can_generate(),
        "has no language-model head: pass the ...ForCausalLM class of the same checkpoint.",
    ),
    (
        _lacks("inputs_embeds"),
        "cannot take embeddings: its forward has no `inputs_embeds`, through which features reach a language model. "
        + OTHER,
    ),
    (
        lambda model: "shared_kv_states" in forward_parameters(model),
        "drafts tokens from another model's keys and values (its forward takes `shared_kv_states`): pass that model as "
        "the language model, and this one to generate as assistant_model=.",
    ),
    (
        _lacks("attention_mask"),
        "cannot tell padding from text: its forward has no `attention_mask`, so a padded batch would differ from its "
        "single samples. " + OTHER,
    ),
    (
        _has_several_tables,
        "has several tables of embeddings, one for each code book, and no text of which features could be a part. "
        + OTHER,
    ),
    (
        _attends_both_ways,
        "is not causal: its configuration lets tokens attend to those behind them. Load it with is_decoder=True (BERT "
        "and its relatives) or use_bidirectional_attention=False (Gemma).",
    ),
    (
        _is_torn_off,
        "is the decoder of an encoder-decoder model: it counts positions from the start of a row, padding included, and "
        "takes no `position_ids`, so a left-padded batch would differ from its single samples. " + OTHER,
    ),
]


def check_language_model(model: Any) -> None:
    """Refuse what cannot be the language model of a composition.

    Raises:
        TypeError: not an instance of a transformers model.
        ValueError: an encoder-decoder, no language-model head, no `inputs_embeds`, and what else `supported` tells.
    """
    if isinstance(model, type) or not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(f"language_model must be a transformers.PreTrainedModel instance, got {model!r:.100}.")
    if reason := refusal(unwrapped(model)):
        raise ValueError(reason)


def embedding_width(language_model: Any) -> int:
    """Width of a language model's input embeddings, which projected features must have."""
    embedding: Any = unwrapped(language_model).get_input_embeddings()
    return getattr(embedding, "embedding_dim", None) or embedding.weight.shape[-1]


def build_language_model(config: MultimodalConfig) -> nn.Module:
    """Build the language model, its adapters wrapped again."""
    text: Any = config.text_config
    cls: Any = language_model_class(text)
    if config.language_model_class is not None:
        cls = resolve_class(config.language_model_class, text, "language_model")
    if cls is None:
        raise ValueError(f"transformers has no causal language model for {type(text).__name__}.")
    model = cls(text, **(config.language_model_kwargs or {}))
    check_language_model(model)
    return wrap_again(model, config.adapters_of("language_model"), "language_model")
