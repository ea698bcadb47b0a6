"""Features where placeholder tokens stand: pure tensor functions, and the mixin by which a composed model uses them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, torch_compilable_check

from ..configuration_multimodal import MEDIA_KINDS
from ..limits import check_count
from ..parts.registries import STEPS, check_steps
from .extra_inputs import embed_ids, id_inputs

_COUNT_REMEDY = (
    "Let the processor of this model expand the placeholders; if a callback changes the number of features, declare "
    "it with register_callback(name, fn, feature_count=...)."
)


def check_tensors(**inputs: Any) -> None:
    """TypeError for lists of numbers, which a processor gives that was not asked for tensors."""
    for name, value in inputs.items():
        if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
            what = type(value).__name__
            raise TypeError(f"{name} must be a tensor, got a {what}: call the processor with return_tensors='pt'.")


def embedded_placeholder_mask(inputs_embeds: Tensor, embedding: Tensor) -> Tensor:
    """Where embeddings ``(batch, length, hidden)`` equal a placeholder's ``(hidden,)``: bool ``(batch, length)``."""
    return (inputs_embeds == embedding).all(-1)


def items_of_samples(lengths: Sequence[int], counts: Sequence[int]) -> Iterator[range]:
    """Positions of each sample's items: the next ones in order, until they have as many features as it has placeholders.

    From features of each item and placeholders of each sample; lazy, since a sample whose items have more leaves too few for
    those behind it: check each before taking the next.

    >>> list(items_of_samples([2, 3, 4], [5, 0, 4]))
    [range(0, 2), range(2, 2), range(2, 3)]
    """
    stop = 0
    for count in counts:
        start, features = stop, 0
        while features < count:
            if stop == len(lengths):  # of several rows that go on from a cache, beams ask for those in the cache too
                told = f"samples have {list(counts)} placeholders, and items {list(lengths)} features"
                raise ValueError(f"{told}: of rows with a cache and new items ask for one answer each, without beams.")
            features, stop = features + lengths[stop], stop + 1
        yield range(start, stop)


def check_counts(name: str, token: str, needed: Sequence[int], lengths: Sequence[int]) -> None:
    """ValueError unless the next items of each sample have as many features (`lengths`) as it `needed` for placeholders."""
    if sum(needed) != sum(lengths):
        raise ValueError(
            f"{name}: the text has {sum(needed)} placeholder tokens ({token}), but the encoder gave {sum(lengths)} features "
            f"for {len(lengths)} item(s) {_short(lengths)}; placeholders per sample: {_short(needed)}. {_COUNT_REMEDY}"
        )
    for sample, (count, items) in enumerate(zip(needed, items_of_samples(lengths, needed), strict=True)):
        own = lengths[items.start : items.stop]
        if sum(own) != count:
            raise ValueError(
                f"{name}, sample {sample}: {count} placeholder tokens ({token}), but its items {items.start}..{items[-1]} give "
                f"{sum(own)} features {_short(own)}: an item cannot be split between samples. {_COUNT_REMEDY}"
            )


def _short(values: Sequence[int]) -> str:
    return f"[{', '.join(map(str, values[:12]))}{', ...' if len(values) > 12 else ''}]"


def merged(model: Any, name: str, embeds: Tensor, mask: Tensor, features: Tensor, input_ids: Any) -> Tensor:
    """As `scatter_features`, which the features of most modalities need alone."""
    return scatter_features(embeds, mask, features)


def shifted_left(values: Tensor, blank: bool | int = False) -> Tensor:
    """A mask or labels ``(batch, length)`` aligned with the predictions: position t holds what t + 1 held, the last `blank`.

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
    placeholders: Tensor, token_ids: Sequence[int], labels: Tensor | None, shift_labels: Tensor | None, counted: bool
) -> None:
    """Refuse labelled placeholders whose number has gone into the loss's denominator already (ValueError).

    Masking them in the model would be too late then: the loss would be divided by too much.  Shifted labels that are
    a copy of the ids, placeholders included, are refused too: whoever shifted them has counted them.
    `placeholders`, bool ``(batch, length)``, says where `token_ids` stand; `counted`, whether the caller passes the number of
    labels (`num_items_in_batch`).
    """
    if shift_labels is not None and shift_labels.shape == placeholders.shape:
        where, given = shifted_left(placeholders).to(shift_labels.device), shift_labels
    elif labels is not None and counted:
        where, given = placeholders.to(labels.device), labels
    else:
        return
    same = torch.stack([given == token_id for token_id in token_ids]).any(0)
    # One answer of the device to all three questions.
    wrong, copied, there = torch.stack([(where & (given != -100)).sum(), (where & same).sum(), where.sum()]).tolist()
    # Where most placeholders are labelled with a placeholder's id, the labels are a copy of the ids.
    if wrong and (counted or 2 * copied > there):
        raise ValueError(
            f"{wrong} of {there} placeholder tokens are labelled in {'' if given is labels else 'shift_'}labels, which were "
            "counted already, and features give no loss: set those labels to -100 before the batch is counted "
            "(MultimodalCollator does)."
        )


def scatter_features(inputs_embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """A copy of embeddings ``(batch, length, hidden)`` with features ``(num_features, hidden)`` where the mask is set.

    The mask, bool ``(batch, length)``, has as many set positions, which are filled in reading order.

    >>> x = torch.zeros(1, 3, 2)
    >>> scatter_features(x, torch.tensor([[False, True, True]]), torch.tensor([[1., 2.], [3., 4.]])).tolist()
    [[[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]]]
    """
    # Unlike an `if`, this check compiles: `masked_scatter` would take the first features of too many in silence.
    fits = mask.sum() * inputs_embeds.shape[-1] == features.numel()
    torch_compilable_check(fits, f"placeholders and features do not match: features {tuple(features.shape)}")
    features = features.to(inputs_embeds)  # its dtype and device
    # (batch, length, 1) spreads over hidden, and features are taken in reading order: row by row, left to right.
    return inputs_embeds.masked_scatter(mask.unsqueeze(-1), features)  # (batch, length, hidden)


# What outputs of encoders say of each item, beside its features.
PER_ITEM = ("feature_grids", "second_per_grid_ts")


def chosen_items(output: Any, positions: Sequence[int]) -> Any:
    """An encoder's output with some of its items alone, in this order, and what it says of them."""
    chosen = type(output)(pooler_output=[output.pooler_output[i] for i in positions])
    if (levels := output.get("deepstack_features")) is not None:
        chosen["deepstack_features"] = [[level[i] for i in positions] for level in levels]
    for key in PER_ITEM:
        if isinstance(output.get(key), Tensor):
            chosen[key] = output[key][list(positions)]
    return chosen


def cached_columns(length: int, mask_length: int, past: int) -> int:
    """How many of the `length` columns of a prompt stand for the `past` tokens in the cache.

    >>> cached_columns(length=9, mask_length=9, past=6), cached_columns(length=3, mask_length=9, past=6)
    (6, 0)
    """
    # transformers takes whole rows, or new tokens alone: the attention mask, which covers the cache too, is longer then.
    return min(past, length) if mask_length == length else 0


def items_behind_cache(name: str, lengths: Sequence[int], mask: Tensor | None, cached: int) -> list[int]:
    """Which items of whole rows, by their numbers of features, have no placeholder in the cache; of other rows all items.

    `mask` says where the rows' placeholders stand, None if no token stands for the modality; the first `cached` columns of
    the rows are in the cache.  ValueError for an item that is there in part.
    """
    # Items of new turns alone are fewer than the placeholders of whole rows: none of them is in the cache.
    if mask is None or cached == 0 or sum(lengths) != int(mask.sum()):
        return list(range(len(lengths)))
    left: list[int] = []
    counts, done = mask.sum(-1).tolist(), mask[:, :cached].sum(-1).tolist()  # placeholders per sample: all, cached ones
    for sample, items in enumerate(items_of_samples(lengths, counts)):
        own = [lengths[i] for i in items]
        (passed,) = items_of_samples(own, [done[sample]])
        features = sum(own[: passed.stop])
        if features != done[sample]:
            raise ValueError(
                f"{name}, sample {sample}: {done[sample]} of its placeholders are in the cache, but its first {passed.stop} "
                f"item(s) have {features} features: cut the cache between items, or generate without it."
            )
        left += items[passed.stop :]
    return left


def check_lengths(length: int, attention_mask: Any, labels: Tensor | None) -> None:
    """Refuse labels of another length than the tokens, and a two-dimensional mask that is shorter (ValueError)."""
    # A longer mask covers the cache too; masks of more dimensions are made by hand, and theirs to answer for.
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and attention_mask.shape[1] < length:
        name, given, remedy = "attention_mask has", attention_mask, "pass the mask that the processor made with them"
    elif labels is not None and labels.shape[-1] != length:
        name, given, remedy = "labels have", labels, "give each token a label, -100 where no loss is wanted"
    else:
        return
    raise ValueError(f"{name} the length {given.shape[-1]}, but there are {length} tokens in a row: {remedy}.")


def check_text_requests(model: Any, prompts: Sequence[Sequence[int]], keywords: Any = None) -> None:
    """Refuse what continuous batching cannot take (ValueError): placeholders in prompts of ids, and inputs beside ids."""
    batching, remedy = "continuous batching (generate_batch) takes the ids of text alone", "call generate() instead"
    for name, token_id in model.placeholder_ids(text_only=True).items():
        for sample, ids in enumerate(prompts):
            if count := sum(int(x) == token_id for x in ids):
                raise ValueError(
                    f"{name}, sample {sample}: {batching}, but the prompt has {count} placeholder tokens: {remedy}."
                )
    given = {key: value for key, value in (keywords or {}).items() if value is not None and key != "input_ids"}
    if wrong := sorted(set(given) - {"attention_mask"}):
        names = [n for n in model.config.encoders if set(wrong) & set(model.config.modality(n)["input_names"])]
        raise ValueError(f"{', '.join(names) or 'generate_batch()'}: {batching}, got {wrong}: {remedy}.")
    if "attention_mask" in given and not bool(given["attention_mask"].all()):
        raise ValueError(f"attention_mask: {batching}: leave the padding out of them.")


@dataclass(repr=False)
class TextRequests:
    """The manager of continuous batching of a composed model: requests with placeholders raise, all else is transformers'."""

    _model: Any
    _manager: Any

    def add_request(self, input_ids: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        check_text_requests(self._model, [input_ids])
        return self._manager.add_request(input_ids, *args, **kwargs)

    def add_requests(self, inputs: Sequence[Sequence[int]], *args: Any, **kwargs: Any) -> Any:
        check_text_requests(self._model, inputs)
        return self._manager.add_requests(inputs, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_manager"), name)


class _Unused(torch.autograd.Function):
    """Embeddings as they are; features that take part in the backward pass, with gradients that are exactly zero."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, *features: Tensor) -> Tensor:
        ctx.features = [(x.shape, x.dtype, x.device) for x in features]
        return embeddings.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        zeros: Iterator = (torch.zeros(shape, dtype=kind, device=place) for shape, kind, place in ctx.features)
        return (*gradients, *zeros)


def with_unused(embeddings: Tensor, features: list[Tensor]) -> Tensor:
    """Embeddings ``(batch, length, hidden)``, equal to the bit, whose backward pass runs through features besides."""
    used = [x for x in features if x.requires_grad]
    return _Unused.apply(embeddings, *used) if used and torch.is_grad_enabled() else embeddings


class MergingMixin(PreTrainedModel):
    """How a composed model puts features in the places of its placeholders."""

    config: Any
    language_model: Any
    # Whether a placeholder without input is refused although no processor has named its token.
    _strict_placeholders = False

    def set_modality_token_ids(self, token_ids: Mapping[str, int]) -> None:
        """Say which token id stands for each modality's features (a processor made with `model=` does it itself).

        An id may be outside the embedding table; ValueError for one that is used twice, and for an unknown modality.
        """
        used = {self.config.modality(n)["token_id"]: n for n in self.config.encoders if n not in token_ids}
        for name, token_id in token_ids.items():
            self.config.modality(name)
            self.config.modalities_for(name)
            check_count(token_id, f"{name}: a placeholder's token id", least=0)
            if token_id in used:
                raise ValueError(f"{name}: the token id {token_id} already stands for {used[token_id]!r}.")
            used[token_id] = name
        for name, token_id in token_ids.items():
            self.config.modality(name)["token_id"] = token_id
        check_steps(self)
        self._strict_placeholders = True

    def placeholder_ids(self, text_only: bool = False) -> dict[str, int]:
        """Token id of each modality's placeholder; in text alone an id that no processor named is an ordinary word."""
        entries = {name: self.config.modality(name) for name in self.config.encoders}
        if text_only and not self._strict_placeholders:
            entries = {name: entry for name, entry in entries.items() if entry["token"] is not None}
        return {name: entry["token_id"] for name, entry in entries.items() if entry["token_id"] is not None}

    def _placeholder_masks(self, input_ids, inputs_embeds, text_only: bool) -> dict[str, Tensor]:
        """Where each modality's placeholders stand, by name: bool ``(batch, length)``."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        ids = self.placeholder_ids(text_only)
        if input_ids is not None:
            return {name: input_ids == token_id for name, token_id in ids.items()}
        embed: Any = self.get_input_embeddings()
        rows = getattr(embed, "num_embeddings", None) or embed.weight.shape[0]
        # An id behind the table has no embedding, so none of the caller's can be it.
        inside = {name: torch.tensor(i, device=inputs_embeds.device) for name, i in ids.items() if i < rows}
        return {name: embedded_placeholder_mask(inputs_embeds, embed(token_id)) for name, token_id in inside.items()}

    def _check_merge(self, masks: dict, outputs: dict[str, Any], encoded_here: set[str], prefill: bool) -> None:
        """Refuse features without placeholders, placeholders without features, and other numbers of them (ValueError)."""
        for name in outputs:
            token_id = self.config.modality(name)["token_id"]
            if name not in masks and token_id is not None:
                raise ValueError(
                    f"{name}: inputs_embeds cannot hold its placeholder: the id {token_id} has no row in the table of "
                    f"embeddings: pass input_ids, or call resize_token_embeddings({token_id + 1}) first."
                )
            if name not in masks:
                raise ValueError(
                    f"{name}: there are features but no placeholder token: build the processor with model=, or call "
                    f"set_modality_token_ids({{{name!r}: token_id}})."
                )
        if torch.compiler.is_compiling():  # the numbers are known on the device only; `scatter_features` checks the sum
            return
        asked = [name for name in masks if name in encoded_here or (prefill and name not in outputs)]
        # One answer of the device for all modalities.
        counts = torch.stack([masks[name].sum(-1) for name in asked]).tolist() if asked else []
        for name, needed in zip(asked, counts, strict=True):
            entry = self.config.modality(name)
            token = entry["token"] or f"id {entry['token_id']}"
            if name in encoded_here:  # else features come ready, of one chunk of the prompt perhaps: the sum is checked
                check_counts(name, token, needed, [len(item) for item in outputs[name].pooler_output])
            elif any(needed):
                raise ValueError(
                    f"{name}: the text has {sum(needed)} placeholder tokens ({token}) but there is no input for the "
                    f"encoder (0 features): pass {list(entry['input_names'])}."
                )

    def _merge(self, input_ids, inputs_embeds, outputs: dict, masks: dict[str, Tensor], text: dict[str, Any], unused):
        """``(input_ids, None, text)`` for text alone, else ``(None, embeddings with the features in them, text)``.

        `unused` features get gradients, which are zero, and are nowhere.
        """
        if not outputs and (not unused or input_ids is None):
            return input_ids, with_unused(inputs_embeds, unused) if unused else inputs_embeds, text
        # (modalities, batch, length) -> (batch, length)
        every = torch.stack(list(masks.values())).any(0) if masks else torch.zeros_like(input_ids, dtype=torch.bool)
        # Those of the language model's other inputs that it computes from the ids, which are gone then.
        given = {key for key, value in text.items() if value is not None}
        text = text | id_inputs(self.language_model, input_ids, every, given)
        ids, add = input_ids, [name for name in masks if self.config.modality(name)["merge"] == "add"]
        if inputs_embeds is None:  # a placeholder's id may have no row in the embedding table
            # Those to whose embeddings features are added keep them.
            kept = torch.stack([masks[name] for name in add]).any(0) if add else None
            replaced = every if kept is None else every & ~kept
            # By 0, an id that every table has.
            inputs_embeds = embed_ids(self.language_model, input_ids.masked_fill(replaced, 0))
        # inputs_embeds: (batch, length, hidden)
        for name, output in outputs.items():
            features = output.pooler_output  # items of (n_i, hidden), or (items, n, hidden)
            features = torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, -2)
            # features: (all of the modality's, hidden), in the order of their placeholders
            merge = STEPS["merge"].merge if "merge" in self.config.steps else merged
            inputs_embeds = merge(self, name, inputs_embeds, masks[name].to(inputs_embeds.device), features, ids)
        return None, with_unused(inputs_embeds, unused), text

    def _without_placeholder_labels(self, labels, masks: dict[str, Tensor], text: dict[str, Any]) -> Tensor | None:
        """Labels ``(batch, length)`` with -100 at placeholders; so are the `shift_labels` in `text` (in place)."""
        shifted = text.get("shift_labels")
        if not masks or (labels is None and shifted is None):
            return labels
        placeholders = torch.stack(list(masks.values())).any(0)  # (batch, length)
        if not torch.compiler.is_compiling():
            ids = [self.config.modality(name)["token_id"] for name in masks]
            check_labels(placeholders, ids, labels, shifted, counted=text.get("num_items_in_batch") is not None)
        if shifted is not None:
            text["shift_labels"] = mask_labels(shifted_left(placeholders), shifted)
        return mask_labels(placeholders, labels)

    def _attach_features(self, output: ModelOutput, outputs: dict[str, Any]) -> None:
        """Say what each encoder gave (in place), None without items: `output.image_outputs`, ..., by name where kinds clash."""
        # Attributes: Trainer would gather keys as predictions, DistributedDataParallel wait for gradients of all behind them.
        names, values = self.config.encoders, vars(self.config)
        kinds = {name: values[f"{name}_modality"]["kind"] for name in names}
        for name, kind in kinds.items():
            alone = kind in MEDIA_KINDS and (len(names) == 1 or self.config.modalities_of_kind(kind) == [name])
            # Another encoder may have the kind as its name.
            by_kind = alone and (kind == name or kind not in names)
            object.__setattr__(output, f"{kind if by_kind else name}_outputs", outputs.get(name))
