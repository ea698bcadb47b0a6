"""Texts for an encoder, of which this checkpoint takes none."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...checkpoints.code_folder import needs_package


def run_tokenizer(
    tokenizer: PreTrainedTokenizerBase, name: str, items: Sequence[Any], options: Mapping[str, Any], encoder_config: Any
) -> Mapping[str, Any]:
    raise needs_package("What reads texts for an encoder")
