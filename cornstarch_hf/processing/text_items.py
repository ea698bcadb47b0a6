"""Texts as items of an encoder (proteins, sentences): tokenized by the encoder's own tokenizer, never cut unasked."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Attributes of configurations whose encoders have no table of positions, or do not read it.
_UNBOUNDED: tuple[tuple[str, Any], ...] = (
    ("position_embedding_type", ("rotary", "relative_key", "relative_key_query")),
    ("position_biased_input", (False,)),
)
_ROTARY = ("rope_parameters", "rope_theta", "rotary_emb_base", "relative_attention_num_buckets")

# Types whose positions begin after the number of the padding token, as in RoBERTa.
_AFTER_PADDING = frozenset(
    [
        *(
            "camembert",
            "data2vec-text",
            "esm",
            "ibert",
            "layoutlmv3",
            "lilt",
            "longformer",
            "luke",
            "markuplm",
            "mpnet",
            "roberta",
        ),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        *("altclip_text_model", "bridgetower_text_model", "clap_text_model"),
    ]
)


def run_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any
) -> Mapping[str, Any]:
    """Tokenize the items of one modality, padded on the right.

    Args:
        tokenizer: of the encoder.
        name: the modality, for messages.
        items: strings.
        options: further arguments of the tokenizer's call; only ``truncation=True`` cuts.
        encoder_config: of the encoder; tells how many positions it has.

    Raises:
        TypeError: an item that is no string.
        ValueError: an item without a token, or with more than the encoder has positions.
    """
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(f"{name}, item {i}: expected a string, got {type(item).__name__}.")
    # Without the last one a tokenizer may cut by what its file says.
    call = {"padding": True, "padding_side": "right", "truncation": False} | dict(options)
    output = tokenizer(list(items), return_tensors="pt", **call)
    ids, mask = output["input_ids"], output.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    limit = position_limit(tokenizer, encoder_config)
    for i, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"{name}, item {i}: the text {items[i]!r} gives no token.")
        if limit is not None and length > limit:
            raise ValueError(
                f"{name}, item {i}: the text has {length} tokens, but the encoder has {limit} positions: split it, or pass "
                f"{name}_kwargs={{'truncation': True, 'max_length': {limit}}} to drop the rest."
            )
    return output


def position_limit(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """Tokens that an encoder with a table of positions takes, by its configuration and its tokenizer; None without one."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    unbounded = any(getattr(config, key, None) in values for key, values in _UNBOUNDED)
    after_padding = config.model_type in _AFTER_PADDING
    if unbounded or (not after_padding and any(getattr(config, key, None) is not None for key in _ROTARY)):
        return None
    if after_padding and config.pad_token_id is not None:
        positions -= config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)
