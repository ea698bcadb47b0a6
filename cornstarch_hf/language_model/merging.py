"""Pure tensor functions that put features where placeholder tokens stand.  Knows no model and no configuration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import torch_compilable_check


def placeholder_mask(input_ids: Tensor, token_id: int) -> Tensor:
    """Where a placeholder token stands.

    Args:
        input_ids: ``(batch, length)``.
        token_id: the placeholder's id.

    Returns:
        bool ``(batch, length)``.

    >>> placeholder_mask(torch.tensor([[1, 9, 9, 2]]), 9).tolist()
    [[False, True, True, False]]
    """
    return input_ids == token_id


def embedded_placeholder_mask(inputs_embeds: Tensor, embedding: Tensor) -> Tensor:
    """Where rows of `inputs_embeds` equal a placeholder's embedding.

    Args:
        inputs_embeds: ``(batch, length, hidden)``.
        embedding: ``(hidden,)``.

    Returns:
        bool ``(batch, length)``.
    """
    return (inputs_embeds == embedding).all(-1)


def without_placeholders(input_ids: Tensor, mask: Tensor, safe_id: int = 0) -> Tensor:
    """`input_ids` in which masked positions hold an id that every embedding table has; the input is not changed."""
    return input_ids.masked_fill(mask, safe_id)


def check_counts(name: str, token: str, mask: Tensor, lengths: Sequence[int]) -> None:
    """Raise unless each sample has as many placeholders as its items have features.

    Items belong to samples in order, so every sample's placeholders must be the sum of the next whole items.

    Args:
        name: the modality, for the message.
        token: the placeholder token, for the message.
        mask: bool ``(batch, length)``.
        lengths: features of each item, in order.

    Raises:
        ValueError: with the modality, the sample and both numbers.
    """
    needed = mask.sum(-1).tolist()
    if sum(needed) != sum(lengths):
        raise ValueError(
            f"{name}: the text has {sum(needed)} placeholder tokens ({token}), but the encoder gave {sum(lengths)} "
            f"features for {len(lengths)} item(s) {_short(lengths)}; placeholders per sample: {_short(needed)}. "
            f"{_COUNT_REMEDY}"
        )
    item = 0
    for sample, count in enumerate(needed):
        start, given = item, 0
        while given < count:
            given, item = given + lengths[item], item + 1
        if given != count:
            raise ValueError(
                f"{name}, sample {sample}: {count} placeholder tokens ({token}), but its items {start}..{item - 1} give "
                f"{given} features {_short(lengths[start:item])}: an item cannot be split between samples. {_COUNT_REMEDY}"
            )


_COUNT_REMEDY = (
    "Let the processor of this model expand the placeholders; if a callback changes the number of features, declare "
    "it with register_callback(name, fn, feature_count=...)."
)


def _short(values: Sequence[int]) -> str:
    values = list(values)
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"


def shifted_left(values: Tensor, blank: bool | int = False) -> Tensor:
    """A mask or labels aligned with the predictions: position t holds what t + 1 held, the last one `blank`.

    Args:
        values: ``(batch, length)``.
        blank: False for masks, -100 for labels.

    Returns:
        ``(batch, length)``.

    >>> shifted_left(torch.tensor([[False, True, False]])).tolist()
    [[True, False, False]]
    >>> shifted_left(torch.tensor([[-100, 5, 7]]), -100).tolist()
    [[5, 7, -100]]
    """
    return torch.nn.functional.pad(values[:, 1:], (0, 1), value=blank)


def mask_labels(placeholders: Tensor, labels: Tensor | None) -> Tensor | None:
    """Labels ``(batch, length)`` with -100 where a placeholder stands; the input is not changed."""
    if labels is None or labels.shape != placeholders.shape:
        return labels
    return labels.masked_fill(placeholders.to(labels.device), -100)


def check_labels(
    placeholders: Tensor,
    token_ids: Sequence[int],
    labels: Tensor | None,
    shift_labels: Tensor | None,
    counted: bool,
) -> None:
    """Refuse labelled placeholders whose number has gone into the loss's denominator already.

    Masking them in the model would be too late then: the loss would be divided by too much.  Shifted labels that are
    a copy of the ids, placeholders included, are refused too: whoever shifted them has counted them.

    Args:
        placeholders: bool ``(batch, length)``.
        token_ids: the placeholders' ids.
        labels: ``(batch, length)`` or None.
        shift_labels: labels aligned with the logits, or None; they replace `labels`.
        counted: whether the caller passes the number of labels (`num_items_in_batch`).

    Raises:
        ValueError: with the number of labelled placeholders.
    """
    if shift_labels is not None and shift_labels.shape == placeholders.shape:
        where, given = shifted_left(placeholders), shift_labels
    elif labels is not None and counted:
        where, given = placeholders, labels
    else:
        return
    where = where.to(given.device)
    wrong = int((where & (given != -100)).sum())
    copied = int((where & torch.isin(given, torch.tensor(list(token_ids), device=given.device))).sum())
    if wrong and (counted or 2 * copied > int(where.sum())):
        raise ValueError(
            f"{wrong} of {int(where.sum())} placeholder tokens are labelled in "
            f"{'labels' if given is labels else 'shift_labels'}, which were counted already, and features give no loss: set "
            "those labels to -100 before the batch is counted (MultimodalCollator does)."
        )


def scatter_features(inputs_embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """Replace the masked rows of `inputs_embeds` by `features`, in reading order.

    Args:
        inputs_embeds: ``(batch, length, hidden)``; not changed.
        mask: bool ``(batch, length)`` with as many set positions as there are features.
        features: ``(num_features, hidden)``.

    Returns:
        ``(batch, length, hidden)``.

    >>> x = torch.zeros(1, 3, 2)
    >>> scatter_features(x, torch.tensor([[False, True, True]]), torch.tensor([[1., 2.], [3., 4.]])).tolist()
    [[[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]]
    """
    torch_compilable_check(
        mask.sum() * inputs_embeds.shape[-1] == features.numel(),
        f"placeholders and features do not match: features {tuple(features.shape)}",
    )
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.to(inputs_embeds))


def split_features(features: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Split concatenated features ``(sum(lengths), hidden)`` into one ``(n_i, hidden)`` tensor per item."""
    return list(features.split([int(n) for n in lengths]))


def group_by_sample(items: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """Assign items to samples in order; `counts` are the samples' placeholder numbers (see `check_counts`)."""
    groups: list[list[Tensor]] = []
    item = 0
    for count in counts:
        group: list[Tensor] = []
        while sum(len(x) for x in group) < count:
            group.append(items[item])
            item += 1
        groups.append(group)
    return groups


def cached_columns(length: int, mask_length: int, past: int) -> int:
    """How many columns of a prompt stand for tokens that are in the cache: transformers takes whole rows, or new tokens.

    Args:
        length: of the prompt's rows.
        mask_length: of the attention mask, which covers the cache too; equal to `length` for whole rows.
        past: tokens in the cache.

    >>> cached_columns(length=9, mask_length=9, past=6), cached_columns(length=3, mask_length=9, past=6)
    (6, 0)
    """
    return min(past, length) if mask_length == length else 0


def items_behind_cache(name: str, items: Sequence[Tensor], mask: Tensor, cached: int) -> list[Tensor]:
    """Of the items of whole rows those whose placeholders are not in the cache; of other rows all items.

    Args:
        name: the modality, for the message.
        items: one ``(n_i, hidden)`` tensor per item, in order.
        mask: bool ``(batch, length)``, where the rows' placeholders stand.
        cached: columns of the rows that are in the cache.

    Raises:
        ValueError: an item that is in the cache in part.
    """
    if cached == 0 or sum(len(item) for item in items) != int(mask.sum()):
        return list(items)
    left = []
    counts, done = mask.sum(-1).tolist(), mask[:, :cached].sum(-1).tolist()
    for sample, group in enumerate(group_by_sample(items, counts)):
        start, passed = 0, 0
        while passed < done[sample]:
            passed, start = passed + len(group[start]), start + 1
        if passed != done[sample]:
            raise ValueError(
                f"{name}, sample {sample}: {done[sample]} of its placeholders are in the cache, but its first {start} item(s) "
                f"have {passed} features: cut the cache between items, or generate without it."
            )
        left += group[start:]
    return left


def check_lengths(length: int, attention_mask: Any, labels: Tensor | None) -> None:
    """Refuse labels of another length than the tokens, and a two-dimensional mask that is shorter than they are.

    Raises:
        ValueError: names the argument and both lengths.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has the length {attention_mask.shape[1]}, but there are {length} tokens in a row: pass the mask "
            "that the processor made with them."
        )
    if labels is not None and labels.shape[-1] != length:
        raise ValueError(
            f"labels have the length {labels.shape[-1]}, but there are {length} tokens in a row: give each token a label, "
            "-100 where no loss is wanted."
        )
