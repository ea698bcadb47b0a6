"""What the processor returns: a `BatchFeature` in which no label ever stands on a placeholder.

Collators everywhere, TRL's among them, make labels by copying `input_ids` and masking the padding.  On a placeholder
such a label would ask the language model to predict a token that stands for a feature, one that its head may not have.
"""

from typing import Any

import torch
from transformers import BatchFeature


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
        placeholders = torch.isin(ids, torch.tensor(self.placeholder_ids, device=ids.device)).to(labels.device)
        return labels.masked_fill(placeholders, -100) if labels.shape == ids.shape else labels

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "placeholder_ids": self.placeholder_ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.placeholder_ids = state.get("placeholder_ids", ())
