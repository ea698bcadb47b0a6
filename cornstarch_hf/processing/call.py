"""Sorts the arguments of a processor's call, and turns texts with as many placeholders as features into ids.

Knows no encoder: `processing_multimodal` runs the sub-processors in between and counts the features.
"""

from collections.abc import Mapping
from typing import Any

from transformers import BatchFeature

from ..configuration_multimodal import MultimodalConfig
from .placeholder_text import MarkedText, Spans, check_text, encode, expand, occurrences, pad_rows

PLURALS = {"image": "images", "video": "videos", "audio": "audio"}  # keyword of `__call__` for items of each kind
# Names under which a modality's processor may take its items.
MEDIA_KEYS = ("images", "image", "videos", "video", "audio", "raw_speech", "speech", "text", "sequences", "items")
TEXT_OPTIONS = frozenset(
    [
        *("add_special_tokens", "max_length", "pad_to_multiple_of", "padding", "padding_side", "return_attention_mask"),
        *("return_offsets_mapping", "return_tensors", "return_token_type_ids", "split_special_tokens", "stride"),
        "truncation",
    ]
)
Media = dict[str, dict[str, Any]]


def call_arguments(config: MultimodalConfig) -> list[str]:
    """Names of all arguments that a processor takes for a model of that configuration."""
    names = {*config.encoders, *(f"{name}_kwargs" for name in config.encoders), *PLURALS.values(), *TEXT_OPTIONS}
    return sorted({*names, "text", "sampling_rate", "text_kwargs"})


def text_arguments(text: Any, llm_inputs: Mapping | None, kwargs: dict) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The text, the tokenizer's options, and what only this package hands over; takes options out of `kwargs`."""
    given = dict(llm_inputs or {})
    if text is not None and "text" in given:
        raise ValueError("text was given twice: as text= and in llm_inputs.")
    text = given.pop("text", text)
    # From this package's own callers; no tokenizer takes them.
    internal = {key: given.pop(key, None) for key in ("assistant_spans", "item_lengths")}
    options = {key: kwargs.pop(key) for key in list(kwargs) if key in TEXT_OPTIONS}
    options |= kwargs.pop("text_kwargs", None) or {}
    options |= given  # `llm_inputs` win
    if unknown := sorted(set(options) - TEXT_OPTIONS):
        raise TypeError(f"Unknown arguments for the tokenizer: {unknown}, expected some of {sorted(TEXT_OPTIONS)}.")
    return text, options, internal


def media_arguments(config: MultimodalConfig, by_kind: Mapping, encoder_inputs: Mapping | None, kwargs: dict) -> Media:
    """``{modality: {"items": ..., options}}`` from all the ways of handing items over; takes them out of `kwargs`.

    `by_kind` has items, or None, under the keywords of `PLURALS`; `encoder_inputs` items, options or tensors by modality;
    `kwargs` items by modality, options in ``{modality}_kwargs`` and ``images_kwargs``, and ``sampling_rate``.  ValueError if
    items are given twice, or for a modality that the model does not have; TypeError for what nothing takes.
    """
    media: Media = {}
    rate = kwargs.pop("sampling_rate", None)
    for kind, plural in PLURALS.items():
        for name in config.modalities_for(kind) if by_kind[plural] is not None else ():
            _add_items(media, name, by_kind[plural])
    for name in config.encoders:
        if (items := kwargs.pop(name, None)) is not None:
            _add_items(media, name, items)
    for name, given in (encoder_inputs or {}).items():
        config.modalities_for(name)  # raises for what the model does not have
        key = next((k for k in MEDIA_KEYS if k in given), None)
        if key is not None:
            _add_items(media, name, given[key])
        media.setdefault(name, {}).update({k: v for k, v in given.items() if k != key})
    owners = {f"{name}_kwargs": [name] for name in config.encoders}
    owners |= {f"{plural}_kwargs": config.modalities_of_kind(kind) for kind, plural in PLURALS.items()}
    for key in [key for key in kwargs if key in owners]:  # in the caller's order: later options win
        options = kwargs.pop(key) or {}
        for name in set(owners[key]) & set(media):
            media[name].update(options)
    for name in media:
        if rate is not None and config.modality(name)["kind"] == "audio":
            media[name].setdefault("sampling_rate", rate)  # the modality's own option wins
    if kwargs:
        raise TypeError(f"Unknown arguments {sorted(kwargs)}, this processor takes {call_arguments(config)}.")
    return media


def _add_items(media: Media, name: str, items: Any) -> None:
    if "items" in media.setdefault(name, {}):
        raise ValueError(f"{name}: its items were given twice, by kind and by name.")
    media[name]["items"] = items


def encode_texts(
    tokenizer: Any,
    texts: list[str],
    tokens: Mapping[str, str],
    ids: Mapping[str, int],
    lengths: Mapping[str, list[int]],
    options: Mapping[str, Any],
    spans: list[Spans] | None = None,
) -> dict[str, Any]:
    """What a tokenizer makes of texts, ``(batch, length)`` each, with every placeholder repeated for its item's features.

    Args:
        texts: with one placeholder for each item, see `check_items`.
        tokens, ids: placeholder token of each modality, and its id.
        lengths: features of each item, by modality.
        options: of `TEXT_OPTIONS`; ValueError if truncation would cut features.
        spans: of each text, in characters; adds `assistant_masks`.
    """
    by_token = {tokens[name]: counts for name, counts in lengths.items()}
    taken: dict[str, int] = {}  # how many items of each token are used up; advances from text to text
    expanded = [expand(text, by_token, taken) for text in texts]
    options = dict(options)
    as_tensors = options.pop("return_tensors", None)
    # Not for the tokenizer's call: rows are padded last, with masks and offsets, when nothing can be cut any more.
    padding = {k: options.pop(k) for k in ("padding", "pad_to_multiple_of", "padding_side") if k in options}
    with_mask = options.pop("return_attention_mask", None)
    if spans is not None:  # from characters of the text to those of the expanded one
        spans = [[(e.moved(a), e.moved(b)) for a, b in turns] for e, turns in zip(expanded, spans, strict=True)]
    rows = encode(tokenizer, [e.text for e in expanded], spans, **options)
    for sample, (text, row) in enumerate(zip(expanded, rows, strict=True)):
        for name, token in tokens.items():
            wanted, left = text.counts.get(token, 0), row["input_ids"].count(ids[name])
            if wanted != left:
                need = f"{wanted} features need as many placeholder tokens ({token}), but {left} are left after"
                raise ValueError(f"{name}, sample {sample}: {need} truncation: raise max_length, or shorten the text.")
    extra = {k: [row.pop(k) for row in rows] for k in ("assistant_masks", "offset_mapping") if k in rows[0]}
    data = pad_rows(tokenizer, rows, extra, padding, options.get("max_length"))
    if with_mask is False:
        data.pop("attention_mask")
    return dict(BatchFeature(data, tensor_type=as_tensors)) if as_tensors else data


def check_items(texts: list[str], tokens: Mapping[str, str], counts: Mapping[str, int], samples: Mapping) -> None:
    """Refuse texts that are none, or with other than one placeholder for each item (ValueError with both numbers).

    `counts` tells how many items each modality has, `samples` how many of them belong to each text where that was given.
    """
    for sample, text in enumerate(texts):
        if not isinstance(text, MarkedText):
            check_text(text, f"sample {sample}: ")
    found = [occurrences(text, list(tokens.values())) for text in texts]
    for name, token in tokens.items():
        written, given = [row[token] for row in found], samples.get(name)
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{name}: items were given for {len(given)} samples, but there are {len(texts)} texts.")
        # Without a list per sample only the sums can be compared.
        for sample, (count, items) in enumerate(zip(written, given or written, strict=True)):
            if count != items:
                told = f"the text has {count} placeholders {token}"
                raise ValueError(f"{name}, sample {sample}: {told}, but {items} items were given.")
        if sum(written) != counts[name]:
            told = f"the texts have {sum(written)} placeholders {token} {written}, but {counts[name]} items were given"
            raise ValueError(f"{name}: {told}: write one placeholder for each item.")
