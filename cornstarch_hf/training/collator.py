"""Turns rows of conversations with media into padded batches with labels, for Trainer; rows that are too long are cut."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from numbers import Real
from typing import Any

import jinja2
import numpy as np
import torch

from ..limits import check_count
from ..parts.names import own_names, place_of
from ..parts.registries import MASK_RULES
from ..processing.call import PLURALS, TEXT_OPTIONS, check_arguments, mapped
from ..processing.media import LIST_DEPTHS
from ..processing.opening import foreign, local_allowed
from ..processing_multimodal import MultimodalProcessor
from .rows import (
    IGNORED,
    ReadRow,
    Spans,
    are_alike,
    check_labels,
    inputs_within,
    items_of,
    join_rows,
    learnable,
    place_items,
    split_tensors,
    string_of,
    whole_items_within,
    why_not_learnable,
    without_gaps,
)

TRUNCATIONS = ("raise", "right", "left")
# Arguments of the processor's call that the collator gives itself; `add_special_tokens` is the only one of texts that it takes.
_OWN_ARGUMENTS = (TEXT_OPTIONS - {"add_special_tokens"}) | {
    *("text", "text_kwargs", "common_kwargs", "encoder_inputs", "llm_inputs", "sampling_rate")
}
# Columns of rows beside those of media.
_COLUMNS = {"messages", "text", "prompt", "completion", "tools", "chat_template_kwargs", "sampling_rate"}
# What to do about columns of other names, as tables for other trainers have them.
_REMEDY = (
    "rename them (dataset.rename_column), make messages of them (dataset.map(lambda row: {'messages': [{'role': 'user', "
    "'content': [...]}, {'role': 'assistant', 'content': ...}]})), and remove the rest (dataset.remove_columns)."
)


class MultimodalCollator:
    """Rows of text or messages with media, to a padded batch with labels.

    A row has one of

    - ``messages``: labels on what the assistant wrote, which is what the template writes behind the generation prompt
      (or inside of its generation marks), tool calls and the marker that ends the turn included;
    - ``prompt`` and ``completion`` as lists of messages: the same, in the completion alone;
    - ``prompt`` and ``completion`` as strings: labels on the completion as it is written, so end it with the tokenizer's
      ``eos_token`` where the model shall learn to stop;
    - ``text``: labels on all of it.

    Conversations may have ``tools`` (a list, or JSON) and ``chat_template_kwargs``.  Media stand inside the parts of
    messages, or in columns under modality names, kinds, or ``images``, ``videos``, ``audio``, from which parts without an
    item, like ``{"type": "image"}``, are filled in order.  A placeholder is one in ``text``, ``prompt`` and ``completion``,
    and mere text in messages.  Rows may have different modalities, or none; None counts as missing, as in tables.

    Args:
        processor: of the composed model.
        padding_side: ``"right"``, which suits training, or ``"left"``, where a row's first token has no label: no token
            stands before it that could predict it.
        max_length: longest row in tokens, features included.
        sampling_rate: of bare audio arrays, in Hz; by default what the feature extractor expects.
        pad_to_multiple_of: round the padded length up.
        truncation: of longer rows.  ``"raise"``: an error.  ``"right"`` or ``"left"``: a cut on that side, where an item that
            does not fit whole goes with its placeholders, its tensors and what is beyond it; a warning tells once how much.
        processor_kwargs: further arguments of the processor's call, such as ``{"images_kwargs": {"do_rescale": False}}``.
        length_column_name: column of numbers that is left out, as Trainer's option of that name says; see `lengths`.
        local_media: whether rows may name files of this machine, and addresses in its networks; by default
            `limits.LOCAL_MEDIA` at each call.

    Raises:
        TypeError: a tokenizer or anything else that is not the processor of a composed model.
        ValueError: an unknown option, an argument of the processor's call that the collator gives itself; when called: a row
            without text, with unknown columns, too long, with media that do not fit it or cannot be decoded, or without
            anything to learn (no label behind its first token), cut or not; names the row.
        TimeoutError: when called: an address takes too long; names the row.
        TypeError: when called: a row or an item of a wrong type; names the row.
    """

    def __init__(
        self,
        processor: MultimodalProcessor,
        padding_side: str = "right",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: str = "raise",
        processor_kwargs: Mapping[str, Any] | None = None,
        length_column_name: str = "length",
        local_media: bool | None = None,
    ):
        if not hasattr(processor, "read_labelled"):
            raise TypeError(
                f"MultimodalCollator takes the processor of a composed model, got {type(processor).__name__}: compose() "
                "returns one, AutoProcessor.from_pretrained(folder) loads one."
            )
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side must be 'right' or 'left', got {padding_side!r}.")
        if truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {truncation!r}.")
        sizes = {"max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of, "sampling_rate": sampling_rate}
        for name, value in sizes.items():
            if value is not None:
                check_count(value, name)
        if truncation != "raise" and max_length is None:
            raise ValueError(f"truncation={truncation!r} needs max_length=, the longest row in tokens.")
        own = _OWN_ARGUMENTS | {*processor.config.encoders, *PLURALS.values()}
        given = mapped(processor_kwargs, "processor_kwargs")
        if taken := sorted(own & set(given)):
            raise ValueError(
                f"processor_kwargs has {taken}, which the collator gives the processor itself: by its own arguments, or from "
                "the rows' columns."
            )
        try:
            check_arguments(processor.config, processor.processors, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"processor_kwargs: {error}") from error
        self.processor_kwargs = dict(given)
        read = _COLUMNS | {*processor.config.encoders, *PLURALS, *PLURALS.values()}
        if not isinstance(length_column_name, str):
            raise TypeError(f"length_column_name must be the name of a column, got {length_column_name!r:.100}.")
        if length_column_name in read - {"length"}:  # a modality may have that name: its column is its own then
            raise ValueError(
                f"length_column_name={length_column_name!r} is a column that the collator reads: rename it."
            )
        self.length_column_name = length_column_name
        self.processor, self.padding_side, self.max_length = processor, padding_side, max_length
        self.sampling_rate, self.pad_to_multiple_of = sampling_rate, pad_to_multiple_of
        self.truncation, self._warned = truncation, False
        local_allowed(local_media)
        self.local_media = local_media

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels` ``(batch, length)``, -100 on what is not to be learnt, encoders' inputs.

        For a model whose prompts attend both ways also `token_type_ids` ``(batch, length)``, 0 before the first label.
        """
        if not rows:
            raise ValueError("The collator got no rows.")
        read = [self._named(i, self._read, row) for i, row in enumerate(rows)]
        encoded = self._together(read) or [self._named(i, self._encode, row) for i, row in enumerate(read)]
        self._warn([row["cut"] for row in encoded if row["cut"] is not None])
        batch = self._batch(encoded)
        check_labels(batch, self.processor.placeholder_ids)
        return batch

    def lengths(self, rows: Iterable[Mapping[str, Any]]) -> list[int]:
        """Tokens of each row as a batch would have it: features of media included, cut where the collator cuts.

        For Trainer's `train_sampling_strategy="group_by_length"`, as a column of a data set.  Of pictures in files nothing is
        read but their headers, where these tell the size; sounds and videos are processed.

        Raises:
            TypeError, ValueError: as when called; names the row.
        """
        if isinstance(rows, (Mapping, str)) or not isinstance(rows, Iterable):
            remedy = "give a list with a dict for each row, or a data set"
            raise TypeError(f"lengths() takes rows, got {type(rows).__name__}: {remedy}.")
        read, by_size = (
            (self._named(i, self._read, row) for i, row in enumerate(rows)),
            partial(self._encode, by_size=True),
        )
        return [len(self._named(i, by_size, row)["input_ids"]) for i, row in enumerate(read)]

    def _batch(self, encoded: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for row in encoded:
            if self.padding_side == "left":  # a row's first token would be predicted from padding, and alone it is not
                row["labels"][:1] = [IGNORED]
        length = max(len(row["input_ids"]) for row in encoded)
        length += -length % (self.pad_to_multiple_of or 1)  # up to the next multiple
        blanks = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": IGNORED, "attention_mask": 0}
        arrays = {key: np.full((len(encoded), length), blank) for key, blank in blanks.items()}  # (batch, length) each
        for i, row in enumerate(encoded):
            size = len(row["input_ids"])
            place = slice(length - size, length) if self.padding_side == "left" else slice(size)
            for key, array in arrays.items():
                array[i, place] = row.get(key, 1)  # the mask is 1 on all of a row
        batch = {key: torch.from_numpy(array) for key, array in arrays.items()}
        if _marks_prompts(self.processor.config):  # 0 in front of the first label, whose prompt attends both ways
            learnt = (batch["labels"] != IGNORED).long().cummax(-1).values
            batch["token_type_ids"] = learnt * batch["attention_mask"]
        return batch | join_rows([row["media"] for row in encoded], self.processor.config)  # of different modalities

    def _named(self, index: int, make: Callable[..., Any], *given: Any) -> Any:
        """What is made of the row of that number, which errors name."""
        try:
            return make(*given)
        except TypeError as error:
            raise TypeError(f"row {index}: {error}") from error
        except TimeoutError as error:
            raise TimeoutError(f"row {index}: {error}") from error
        except (ValueError, LookupError, jinja2.TemplateError) as error:  # a template may refuse a conversation
            raise ValueError(f"row {index}: {error}") from error

    def _read(self, columns: Any) -> ReadRow:
        """What a row's columns say."""
        if not isinstance(columns, Mapping):
            raise TypeError(f"expected a dict of columns, got {type(columns).__name__}.")
        row = {key: value for key, value in columns.items() if value is not None}  # None fills the gaps of a table
        audio = [self.processor.processors.get(name) for name in self.processor.config.modalities_of_kind("audio")]
        expected = next((p.sampling_rate for p in audio if hasattr(p, "sampling_rate")), None)
        rate = row.pop("sampling_rate", None)
        rate = self.sampling_rate or expected if rate is None else rate
        given = list(row)
        text, spans, media = self._text(row, self._media(row), given)
        self._drop_bookkeeping(row)
        if row:  # each reader has taken its columns out
            raise ValueError(
                f"unknown columns {sorted(row, key=str)} among {given}: {self._media_columns()}; {_REMEDY}"
            )
        options = self.processor.bos_options(text), {} if rate is None else {"sampling_rate": rate}
        return ReadRow(text, spans, media, *options)

    def _encode(self, row: ReadRow, by_size: bool = False) -> dict[str, Any]:
        """One row's ids, labels and encoder inputs; `by_size` leaves those out that are not needed to count features."""
        out = self._processed([row], by_size)
        (ids,), (wanted,), lengths = out.pop("input_ids"), out.pop("assistant_masks", [None]), out.pop("item_lengths")
        return self._labelled(row, ids, wanted, out, lengths)

    def _together(self, rows: Sequence[ReadRow]) -> list[dict[str, Any]] | None:
        """All rows, by one call of the processor where that gives what it gives of each; None where it does not.

        Which row is refused is told when each is encoded.
        """
        if not are_alike(rows, self.processor):
            return None
        try:
            out = self._processed(rows)
        except (TypeError, ValueError, LookupError, OSError):
            return None
        ids, masks, lengths = out.pop("input_ids"), out.pop("assistant_masks", None), out.pop("item_lengths")
        counts = [{name: len(row.media.get(name, ())) for name in lengths} for row in rows]
        if (parts := split_tensors(out, counts, self.processor.config)) is None:
            return None
        found, left = [], {name: iter(sizes) for name, sizes in lengths.items()}
        for i, row in enumerate(rows):
            own = {name: list(islice(left[name], count)) for name, count in counts[i].items()}
            found.append(self._named(i, self._labelled, row, ids[i], masks and masks[i], parts[i], own))
        if all(row["cut"] is None for row in found):  # then the tensors of all are the batch's as they are
            found = [row | {"media": {} if i else out} for i, row in enumerate(found)]
        return found

    def _processed(self, rows: Sequence[ReadRow], by_size: bool = False) -> dict[str, Any]:
        """What the processor makes of rows, ids by row, and of their items."""
        llm: dict[str, Any] = {"text": [row.text for row in rows], "item_lengths": True, "by_size": by_size}
        llm |= {} if rows[0].spans is None else {"assistant_spans": [row.spans for row in rows]}
        # Rows are cut and padded here, whatever the tokenizer was built with; what the caller says of the tokens in front wins.
        llm |= {
            "return_token_type_ids": False,
            "padding": False,
            "truncation": False,
            "default_options": rows[0].in_front,
        }
        names = dict.fromkeys(name for row in rows for name in row.media)
        media = {name: [row.media.get(name, []) for row in rows] for name in names}
        out = dict(self.processor(llm_inputs=llm, **self.processor_kwargs | rows[0].options, **media))
        del out["attention_mask"]  # made anew once rows are cut and padded
        return out

    def _labelled(self, row: ReadRow, ids: list, wanted: list | None, media: dict, lengths: Mapping) -> dict[str, Any]:
        """A row with labels, its own ids where the assistant wrote and never on placeholders; cut where it is too long."""
        silent = set(self.processor.placeholder_ids.values())
        kept = zip(ids, [1] * len(ids) if wanted is None else wanted, strict=True)
        labels = [i if keep and i not in silent else IGNORED for i, keep in kept]
        if not learnable(labels):
            raise ValueError(f"there is no token to learn: {why_not_learnable(labels, row.spans)}")
        return self._cut({"input_ids": ids, "labels": labels, "media": media, "cut": None}, lengths)

    def _drop_bookkeeping(self, row: dict[str, Any]) -> None:
        """Take out of a row its length, and what `datasets` adds for itself (``__key__``, ``__index_level_0__``)."""
        name = self.length_column_name
        if isinstance(row.get(name), Real) or getattr(row.get(name), "ndim", None) == 0:  # a number, or a tensor of one
            del row[name]
        for key in [key for key in row if isinstance(key, str) and key.startswith("__") and key.endswith("__")]:
            del row[key]

    def _media_columns(self) -> str:
        """Which columns of a row hold media."""
        config, told = self.processor.config, {}
        for name in config.encoders:
            kind, keys = config.modality(name)["kind"], [name]
            # Where several modalities have a kind, its own name means none of them.
            with contextlib.suppress(ValueError):
                keys += [PLURALS.get(kind, kind), kind] if name in config.modalities_for(kind) else []
            told[name] = list(dict.fromkeys(keys))
        return f"items in a column of one of the names {told}"

    def _text(
        self, row: dict[str, Any], media: dict[str, list], columns: list[str]
    ) -> tuple[str, Spans | None, dict[str, list]]:
        """A row's text, the spans to learn (None for all of it) and its media; takes their columns out of the row."""
        if "messages" in row:
            return self._conversation(row, media, row.pop("messages"))
        if "prompt" in row and "completion" in row:
            prompt, completion = row.pop("prompt"), row.pop("completion")
            if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
                return self._conversation(row, media, [*prompt, *completion], len(prompt))  # its turns are context
            what = "a string, or lists of messages for both"
            text = string_of("prompt", prompt, what) + string_of("completion", completion, what)
            return text, [(len(prompt), len(text))], media
        if "text" in row:
            return string_of("text", row.pop("text"), "a string"), None, media
        expected = f"expected 'messages', 'text', or 'prompt' and 'completion', and {self._media_columns()}"
        raise ValueError(f"{expected}; got the columns {columns}: {_REMEDY}")

    def _conversation(self, row, media, messages, first=0):
        if not isinstance(messages, (list, tuple)) or not messages:
            raise ValueError(f"expected a list of messages, got {messages!r:.100}.")
        tools = row.pop("tools", None)
        tools = json.loads(tools) if isinstance(tools, str) else tools
        if not isinstance(tools, (list, tuple, type(None))):
            raise TypeError(f"expected a list of tools, or JSON of one, got {tools!r:.100}.")
        variables = {"tools": without_gaps(tools) or None}
        variables |= without_gaps(mapped(row.pop("chat_template_kwargs", None), "chat_template_kwargs"))
        if taken := sorted({"conversation", "given", "first", "local_media"} & set(variables)):
            raise ValueError(
                f"chat_template_kwargs has {taken}: the template cannot read variables of these names here."
            )
        read = []
        for message in messages:  # a table fills keys in that tool calls of other rows have
            calls = message.get("tool_calls") if isinstance(message, Mapping) else None
            read.append({**message, "tool_calls": without_gaps(calls)} if calls else message)
        local = self.local_media
        return self.processor.read_labelled(read, given=media, first=first, local_media=local, **variables)

    def _media(self, row: dict[str, Any]) -> dict[str, list]:
        """Items by modality; takes their columns out of the row."""
        config, media, local = self.processor.config, {}, local_allowed(self.local_media)
        kinds = {plural: kind for kind, plural in PLURALS.items()}
        for key in dict.fromkeys([*config.encoders, *PLURALS.values(), *PLURALS]):
            value = row.pop(key, None)
            if value is None or (isinstance(value, (list, tuple)) and not value):
                continue
            for name in config.modalities_for(kinds.get(key, key)):
                if name in media:
                    raise ValueError(f"{name}: its items were given twice, by kind and by name.")
                kind = config.modality(name)["kind"]
                items = items_of(value, kind)
                media[name] = items if local or kind not in LIST_DEPTHS else foreign(items)
        return {name: items for name, items in media.items() if items}

    def _cut(self, encoded: dict[str, Any], lengths: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """A row as it is if it is short enough, else cut to whole items."""
        ids, labels, limit = encoded["input_ids"], encoded["labels"], self.max_length
        if limit is None or len(ids) <= limit:
            return encoded
        if self.truncation == "raise":
            raise ValueError(
                f"the row has {len(ids)} tokens, max_length is {limit}: shorten it, raise max_length, or choose "
                "truncation='right' or 'left'."
            )
        # The cut moves to the edge of an item that lies across it.
        items = place_items(ids, self.processor.placeholder_ids, lengths)
        start, stop = whole_items_within(items, len(ids), limit, self.truncation)
        if not learnable(labels[start:stop]):
            raise ValueError(
                f"the row has {len(ids)} tokens, and of the {stop - start} that are left by max_length={limit} and "
                f"truncation={self.truncation!r} none has a label that one before it could predict: raise max_length, or "
                "shorten what stands before the answer."
            )
        names, config = dict[str, list[list[str]]](), self.processor.config
        for name in config.encoders:  # those that are joined see the items of the first one
            names.setdefault(place_of(config, name)[0], []).append(list(own_names(config, name)))
        media, dropped = inputs_within(encoded["media"], names, items, start, stop)
        cut = {"tokens": len(ids) - (stop - start), **dropped}
        return {"input_ids": ids[start:stop], "labels": labels[start:stop], "media": media, "cut": cut}

    def _warn(self, cuts: list[dict[str, int]]) -> None:
        if not cuts or self._warned:
            return
        self._warned = True
        names = dict.fromkeys(name for cut in cuts for name in cut)
        counts = ", ".join(f"{sum(cut.get(name, 0) for cut in cuts)} of {name!r}" for name in names if name != "tokens")
        warnings.warn(
            f"{len(cuts)} rows of this batch were longer than max_length={self.max_length} and cut on the {self.truncation}, "
            f"by {sum(cut['tokens'] for cut in cuts)} tokens; items dropped: {counts or 'none'}. Later batches tell nothing.",
            stacklevel=3,
        )


def _marks_prompts(config: Any) -> bool:
    """Whether tokens of a prompt attend to each other both ways, so that a model must be told where it ends."""
    return config.mask is not None and getattr(MASK_RULES[config.mask["rule"]], "masks_text", False)
