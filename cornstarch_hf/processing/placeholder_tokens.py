"""Placeholder tokens: which one stands for each modality, and adding them to a tokenizer."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase

from ..configuration_multimodal import MEDIA_KINDS, MultimodalConfig


def placeholder_tokens(config: MultimodalConfig, chosen: Mapping[str, str]) -> dict[str, str]:
    """The placeholder token of each modality.

    A chosen one comes first, then the one in the configuration, then ``<image>``, ``<audio>`` or ``<video>`` where
    one modality has that kind, else ``<{name}>``.

    Raises:
        ValueError: an unknown modality, an empty token, or one token for two modalities.
    """
    if unknown := sorted(set(chosen) - set(config.encoders)):
        raise ValueError(f"tokens names {unknown}, the model has the encoders {config.encoders}.")
    tokens: dict[str, str] = {}
    for name in config.encoders:
        entry = config.modality(name)
        # `<image>` where one modality alone has that kind, else its own name.
        alone = entry["kind"] in MEDIA_KINDS and len(config.modalities_of_kind(entry["kind"])) == 1
        token = chosen.get(name) or entry["token"] or f"<{entry['kind'] if alone else name}>"
        if not isinstance(token, str) or not token.strip() or token != token.strip():
            raise ValueError(f"{name}: a placeholder token must be text without spaces around it, got {token!r}.")
        if token in tokens.values():
            raise ValueError(f"{name}: the placeholder token {token!r} stands for another modality already.")
        tokens[name] = token
    return tokens


def add_placeholder_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> dict[str, int]:
    """Make each token one special token of the tokenizer (in place) and return the ids by modality.

    A token that exists keeps its id.

    Raises:
        ValueError: a token that has another special meaning (end of sequence, padding, ...), or does not stay whole.
    """
    named = {
        getattr(tokenizer, f"{kind}_token", None): kind for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    }
    ids: dict[str, Any] = {}
    for name, token in tokens.items():
        if token in named:
            raise ValueError(
                f"{name}: {token!r} is the tokenizer's {named[token]} token, choose another placeholder token."
            )
        if token not in tokenizer.all_special_tokens or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        ids[name] = tokenizer.convert_tokens_to_ids(token)
        if tokenizer.encode(token, add_special_tokens=False) != [ids[name]]:  # a normalizer may still split it
            raise ValueError(
                f"{name}: the tokenizer does not keep {token!r} as one token, choose another placeholder token."
            )
    return ids


class MultimodalBatch(BatchFeature):
    """A `BatchFeature` that masks labels on placeholders as they are put into it.

    Args:
        data, tensor_type, skip_tensor_conversion: as in `BatchFeature`.
        placeholder_ids: token ids of the modalities' placeholders.
    """

    placeholder_ids: tuple[int, ...] = ()

    def __init__(
        self, data: dict[str, Any] | None = None, tensor_type=None, skip_tensor_conversion=None, placeholder_ids=()
    ):
        self.placeholder_ids = tuple(placeholder_ids)
        super().__init__(data, tensor_type, skip_tensor_conversion)

    def __setitem__(self, key: str, value: Any) -> None:
        """As in a dict; of `labels` that fit the `input_ids` ``(batch, length)`` in it, a masked copy is kept."""
        ids = self.data.get("input_ids")
        if key == "labels" and isinstance(ids, torch.Tensor) and isinstance(value, torch.Tensor):
            value = self._masked(value, ids)
        super().__setitem__(key, value)

    def _masked(self, labels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # (batch, length), True on placeholders, which are not predicted
        placeholders = torch.isin(ids, torch.tensor(self.placeholder_ids, device=ids.device)).to(labels.device)
        return labels.masked_fill(placeholders, -100) if labels.shape == ids.shape else labels

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "placeholder_ids": self.placeholder_ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.placeholder_ids = state.get("placeholder_ids", ())
