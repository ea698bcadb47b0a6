"""Generation on a composed model: every encoder runs once, before the prefill, and beams repeat whole samples."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import SuppressTokensLogitsProcessor

from .merging import group_by_sample


class MultimodalGenerationMixin:
    """Overrides of `transformers.GenerationMixin` for encoders of any kind (its own know images and videos)."""

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config
    ) -> dict[str, Any]:
        """Run the encoders and hand their outputs on, so that no step and no beam runs them again."""
        keywords = [key for name in self.config.encoders for key in self.config.modality(name)["input_names"]]
        given = {key: model_kwargs.pop(key) for key in keywords if key in model_kwargs}
        media, _ = self._route(given)
        outputs = self._encode(media, model_kwargs.get("mm_encoder_outputs"))
        is_ids = model_input_name != "inputs_embeds"
        masks = self._placeholder_masks(inputs_tensor if is_ids else None, None if is_ids else inputs_tensor)
        cache = model_kwargs.get("past_key_values")
        prefill = cache is None or cache.get_seq_length() == 0
        self._check_merge(masks, outputs, encoded_here=set(media), prefill=prefill)
        if outputs:
            model_kwargs["mm_encoder_outputs"] = outputs
        return model_kwargs

    def _expand_multimodal_outputs(
        self,
        input_ids: Tensor | None,
        mm_encoder_output: dict[str, Any],
        expand_size: int = 1,
        inputs_embeds: Tensor | None = None,
    ) -> dict[str, Any]:
        """Repeat the items of each sample together: beams of one sample stand side by side."""
        no_ids = input_ids is None or input_ids.numel() == 0
        masks = self._placeholder_masks(None if no_ids else input_ids, inputs_embeds if no_ids else None)
        expanded = {}
        for name, output in mm_encoder_output.items():
            name = self._named(name)
            groups = group_by_sample(output.pooler_output, masks[name].sum(-1).tolist())
            items = list(chain.from_iterable(group * expand_size for group in groups))
            expanded[name] = type(output)(pooler_output=items)
        return expanded

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As in transformers, and never generate a placeholder: there would be no features for it."""
        processors = super()._get_logits_processor(*args, **kwargs)
        head = self.get_output_embeddings()
        size = head.weight.shape[0] if head is not None else self.config.get_text_config().vocab_size
        ids = [self.config.modality(name)["token_id"] for name in self.config.encoders]
        ids = [token_id for token_id in ids if token_id is not None and token_id < size]
        if ids:
            processors.append(SuppressTokensLogitsProcessor(ids, device=torch.device(self.device)))
        return processors
