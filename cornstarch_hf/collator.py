"""Rows of conversations with media to padded batches with labels, for `transformers.Trainer`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .processing_multimodal import PLURALS, MultimodalProcessor

IGNORED = -100


class MultimodalCollator:
    """Rows of text or messages with media, to a padded batch with labels.

    A row has ``messages`` (labels on what the assistant wrote), or ``text`` (labels on all of it), or ``prompt`` and
    ``completion`` (labels on the completion), and media under modality names, kinds, or ``images``, ``videos``,
    ``audio``; in ``messages`` they may also stand inside the parts.  Rows may have different modalities, or none.

    Args:
        processor: of the composed model.
        padding_side: where rows are padded; ``"right"`` suits training.
        max_length: longest row in tokens; a longer one raises, nothing is cut.
        sampling_rate: of bare audio arrays, in Hz; by default what the feature extractor expects.
        pad_to_multiple_of: round the padded length up.

    Raises:
        ValueError: when called: a row without text, with unknown columns, too long, or with media that do not fit it;
            names the row.
    """

    def __init__(
        self,
        processor: MultimodalProcessor,
        padding_side: str = "right",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.processor, self.padding_side, self.max_length = processor, padding_side, max_length
        self.sampling_rate, self.pad_to_multiple_of = sampling_rate, pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows.

        Returns:
            `input_ids`, `attention_mask`, `labels` ``(batch, length)``, and the encoders' inputs; labels are -100 on
            placeholders, padding and everything that the assistant did not write.
        """
        if not rows:
            raise ValueError("The collator got no rows.")
        encoded = []
        for index, row in enumerate(rows):
            try:
                encoded.append(self._encode(dict(row)))
            except (TypeError, ValueError) as error:
                raise type(error)(f"row {index}: {error}") from error
        return self._batch(encoded)

    def _encode(self, row: dict[str, Any]) -> dict[str, Any]:
        """One row's ids, labels and encoder inputs."""
        media = self._media(row)
        if "messages" in row:
            out = self.processor.apply_chat_template(
                row.pop("messages"), tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **media
            )
            wanted = out.pop("assistant_masks")[0]
        elif "prompt" in row and "completion" in row:
            prompt, completion = row.pop("prompt"), row.pop("completion")
            llm = {"text": [prompt + completion], "assistant_spans": [[(len(prompt), len(prompt) + len(completion))]]}
            out = self.processor(llm_inputs=llm, **media)
            wanted = out.pop("assistant_masks")[0]
        elif "text" in row:
            out = self.processor(text=[row.pop("text")], **media)
            wanted = [1] * len(out["input_ids"][0])
        else:
            raise ValueError(
                f"expected 'messages', 'text', or 'prompt' and 'completion', got the columns {sorted(row)}."
            )
        if row:
            raise ValueError(f"unknown columns {sorted(row)}: remove them, or name them after a modality.")
        ids = out.pop("input_ids")[0]
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"the row has {len(ids)} tokens, max_length is {self.max_length}: shorten it or raise max_length."
            )
        out.pop("attention_mask")
        silent = {self.processor.config.modality(name)["token_id"] for name in self.processor.tokens}
        labels = [i if keep and i not in silent else IGNORED for i, keep in zip(ids, wanted, strict=True)]
        return {"input_ids": ids, "labels": labels, "media": dict(out)}

    def _media(self, row: dict[str, Any]) -> dict[str, Any]:
        config = self.processor.config
        media = {}
        for key in [*config.encoders, *PLURALS.values(), *PLURALS]:
            value = row.pop(key, None)
            if value is None or (isinstance(value, (list, tuple)) and not value):
                continue
            name = self.processor.modalities_for({v: k for k, v in PLURALS.items()}.get(key, key))
            for modality in name:
                media[modality] = [value if isinstance(value, (list, tuple)) else [value]]
        rate = row.pop("sampling_rate", self.sampling_rate) or self._expected_rate()
        return media | ({"sampling_rate": rate} if rate else {})

    def _expected_rate(self) -> int | None:
        audio = [self.processor.processors.get(name) for name in self.processor.config.modalities_of_kind("audio")]
        return next((p.sampling_rate for p in audio if hasattr(p, "sampling_rate")), None)

    def _batch(self, encoded: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        length = max(len(row["input_ids"]) for row in encoded)
        multiple = self.pad_to_multiple_of or 1
        length += -length % multiple
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        columns = {"input_ids": pad, "labels": IGNORED}
        batch = {
            key: torch.tensor([self._padded(row[key], length, value) for row in encoded])
            for key, value in columns.items()
        }
        masks = [self._padded([1] * len(row["input_ids"]), length, 0) for row in encoded]
        batch["attention_mask"] = torch.tensor(masks)
        for key in dict.fromkeys(key for row in encoded for key in row["media"]):
            batch[key] = join([row["media"][key] for row in encoded if key in row["media"]], key)
        return batch

    def _padded(self, values: list[int], length: int, blank: int) -> list[int]:
        fill = [blank] * (length - len(values))
        return fill + values if self.padding_side == "left" else values + fill


def join(parts: Sequence[torch.Tensor], key: str) -> torch.Tensor:
    """Rows' tensors as one, in order; sequences of different lengths are padded on the right.

    Args:
        parts: tensors ``(items, ...)`` whose shapes may differ in axis 1, and for packed patches in axis 0 only.
        key: the input's name, for the message.

    Raises:
        ValueError: shapes that differ elsewhere.
    """
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) == 1:
        return torch.cat(list(parts))
    if any(part.ndim < 2 or part.shape[2:] != parts[0].shape[2:] for part in parts):
        raise ValueError(
            f"{key}: the rows' tensors have the shapes {[tuple(p.shape) for p in parts]}, which do not join."
        )
    longest = max(part.shape[1] for part in parts)
    padding = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([torch.nn.functional.pad(p, pad) for p, pad in zip(parts, padding, strict=True)])
