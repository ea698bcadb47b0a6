"""Which language models cannot be one of a composition, and why, with a remedy.  What is known of types is in `supported`."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..configuration_multimodal import MEDIA_KINDS
from ..parts.adapters import unwrapped
from ..parts.signatures import forward_parameters

OTHER = "Choose another language model."
# Types with which features among their tokens, left padding or generation step by step would go wrong: why, and the setting
# that is True where that holds, None where it holds of all of the type.
REFUSED: dict[str, tuple[str, str | None]] = {
    "blt": ("it cuts bytes into patches by the ids themselves, which features do not have", None),
    "deepseek_v4": ("it routes tokens to experts by a hash of their ids, which features do not have", None),
    # transformers keeps a split of its router that mixes the tokens of a whole batch.
    "doge": (
        "it chooses the experts of a token by other tokens of the batch, those behind it included (its configuration has "
        "is_moe=True), so a batch differs from its single samples, and a prompt from the same prompt run token by token",
        "is_moe",
    ),
    "git": ("it puts its own image before the text and widens every mask by it", None),
    "reformer": ("it attends within random hash buckets, which change with padding and from step to step", None),
    # Where it turns values too, what a token gives depends on where it stands, not on the distance alone.
    "roformer": (
        "it counts positions from the start of a row, padding included, takes no `position_ids`, and turns values by them (its "
        "configuration has rotary_value=True), so a left-padded batch would differ from its single samples",
        "rotary_value",
    ),
    "rwkv": ("it ignores the attention mask, so padding enters its state, which cannot be trained through", None),
    "xlm": ("it reads an attention mask as lengths, so padding on the left counts as text", None),
    "xlnet": ("it is trained on permutations of the text and does not predict the next token from those before", None),
}


def refusal(model: Any, masked: bool = False) -> str | None:
    """Why a model, not PEFT-wrapped, cannot be the language model of a composition, with a remedy; None if it can.

    `masked` says whether a rule of masks decides which tokens attend both ways.
    """
    name, (reason, condition) = type(model).__name__, REFUSED.get(model.config.model_type, (None, None))
    if fault := next(_faults(model, masked), None):
        return f"{name} {fault}"
    if reason is None or (condition and getattr(model.config, condition, None) is not True):
        return None
    return f"{name} cannot be the language model of a composition: {reason}. {OTHER}"


def _faults(model: Any, masked: bool) -> Iterator[str]:
    """What keeps a model of any type from being a language model here, the remedy included."""
    config, takes = model.config, forward_parameters(model)
    if config.is_encoder_decoder:
        yield "is an encoder-decoder: expected a causal (decoder-only) language model."
    towers = [kind for kind in MEDIA_KINDS if model.get_encoder(kind) is not model]
    if towers and getattr(config, "text_config", None) is not None:
        yield (
            f"is multimodal already (it encodes {towers}): take it apart by from_native(model), and compose its language_model "
            "with other encoders."
        )
    if not model.can_generate():
        yield "has no language-model head: pass the ...ForCausalLM class of the same checkpoint."
    if "inputs_embeds" not in takes:
        yield f"cannot take embeddings: its forward has no `inputs_embeds`, by which features reach a language model. {OTHER}"
    if "shared_kv_states" in takes:
        yield (
            "drafts tokens from another model's keys and values (its forward takes `shared_kv_states`): pass that model as "
            "the language model, and this one to generate as assistant_model=."
        )
    if "attention_mask" not in takes:
        yield (
            "cannot tell padding from text: its forward has no `attention_mask`, so a padded batch would differ from its "
            f"single samples. {OTHER}"
        )
    if isinstance(model.get_input_embeddings(), nn.ModuleList):
        yield f"has several tables of embeddings, one for each code book, and no text for features to be a part of. {OTHER}"
    # BERT and its relatives, or Gemma, whose "vision" says that only images attend both ways, which is no obstacle.
    encoder = getattr(config, "is_decoder", None) is False and "encoder_hidden_states" in takes
    if encoder or (getattr(config, "use_bidirectional_attention", None) is True and not masked):
        yield (
            "is not causal: its configuration lets tokens attend to those behind them. Load it with is_decoder=True (BERT "
            "and its relatives) or use_bidirectional_attention=False (Gemma), or give a rule of masks, mask={'rule': 'prefix'}."
        )
    layers = getattr(config, "decoder_layers", getattr(config, "num_decoder_layers", None))
    if layers is not None and "position_ids" not in takes:  # nobody can tell it other positions
        yield (
            "is the decoder of an encoder-decoder model: it counts positions from the start of a row, padding included, and "
            f"takes no `position_ids`, so a left-padded batch would differ from its single samples. {OTHER}"
        )


def check_language_model(model: Any, masked: bool = False) -> None:
    """TypeError for what is no instance of a transformers model, ValueError for one with a `refusal`."""
    if isinstance(model, type) or not isinstance(unwrapped(model), PreTrainedModel):
        raise TypeError(f"language_model must be a transformers.PreTrainedModel instance, got {model!r:.100}.")
    if getattr(unwrapped(model).config, "return_dict", True) is False:
        raise ValueError(
            "The language model's configuration says return_dict=False, by which its own layers' outputs are tuples without "
            "names: set model.config.return_dict = True, or true in text_config."
        )
    if reason := refusal(unwrapped(model), masked):
        raise ValueError(reason)


# Settings of the whole that name the placeholders of items.
_PLACEHOLDERS = re.compile(r"(image|video|audio)_(token_id|token_index|patch_id)")


def check_no_language_model(model: Any) -> None:
    """ValueError for a multimodal language model as an encoder: it chooses a layer and drops tokens, which would go unsaid."""
    config: Any = getattr(model, "config", None)
    if not isinstance(model, PreTrainedModel) or config.is_encoder_decoder:
        return
    text = config.get_text_config()
    holds_text = text is not config and any(getattr(part, "config", None) is text for part in model.modules())
    if not holds_text or not any(_PLACEHOLDERS.fullmatch(key) for key in config.to_dict()):
        return  # two towers that were trained together (CLIP, BLIP), or a tower with its whole configuration
    kinds = [kind for kind in MEDIA_KINDS if model.get_encoder(kind) is not model]
    tower = (
        f"; or pass the tower itself, model.get_encoder({kinds[0]!r}), and choose layer= and drop_prefix="
        if kinds
        else ""
    )
    raise ValueError(
        f"{type(model).__name__} is a whole multimodal language model: take it apart by from_native(model); or adopt its "
        "tower, with the layer and the tokens that it chooses, by compose(..., encoders={name: {'model': ..., 'select': "
        f"'native'}}}}){tower}."
    )
