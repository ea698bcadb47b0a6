"""Items that are texts, as an encoder of texts takes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..parts.known_encoders import encoder_type
from .placeholder_text import check_filled, check_text

# Attributes of configurations whose positions are computed or relative, for texts of any length.
_ROTARY = ("rope_parameters", "rope_theta", "rotary_emb_base", "relative_attention_num_buckets")


def run_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any
) -> Mapping[str, Any]:
    """Tokenize the items of one modality, padded on the right; what is too long is refused without ``truncation=True``."""
    for i, item in enumerate(items):
        if not isinstance(item, str):
            raise TypeError(f"{name}, item {i}: expected a string, got {type(item).__name__}.")
        check_text(item, f"{name}, item {i}: ")
    # Without the last one a tokenizer may cut by what its file says.
    call = {"padding": True, "padding_side": "right", "truncation": False} | dict(options)
    check_filled(tokenizer, call, len(items), name)
    output = tokenizer(list(items), return_tensors="pt", **call)
    ids, mask = output["input_ids"], output.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(-1).tolist()
    limit = position_limit(tokenizer, encoder_config)
    for i, length in enumerate(lengths):
        if length == 0:
            raise ValueError(f"{name}, item {i}: the text {items[i]!r} gives no token.")
        if limit is not None and length > limit:
            found = f"the text has {length} tokens, but the encoder has {limit} positions"
            remedy = f"split it, or pass {name}_kwargs={{'truncation': True, 'max_length': {limit}}} to drop the rest."
            raise ValueError(f"{name}, item {i}: {found}: {remedy}")
    return output


def position_limit(tokenizer: PreTrainedTokenizerBase, config: Any) -> int | None:
    """Tokens that an encoder with a table of positions takes, by its configuration and its tokenizer; None without one."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # Encoders without a table of positions, or that do not read it.
    unbounded = getattr(config, "position_embedding_type", None) in ("rotary", "relative_key", "relative_key_query")
    unbounded = unbounded or getattr(config, "position_biased_input", True) is False
    after_padding = encoder_type(config).positions_after_padding
    if unbounded or (not after_padding and any(getattr(config, key, None) is not None for key in _ROTARY)):
        return None
    if after_padding and config.pad_token_id is not None:  # RoBERTa counts from behind the padding's row
        positions -= config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length)  # 10**30 where the tokenizer's files set no limit
