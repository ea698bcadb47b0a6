"""Placeholders in text: find, expand, protect what users typed, and turn text into ids.

A placeholder that an end user typed inside a message is wrapped in private-use characters while a template is
rendered, and encoded as plain text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MARK_START, MARK_END = "\ue0c0", "\ue0c1"
MARKED = re.compile(f"{MARK_START}(.*?){MARK_END}", re.DOTALL)


def token_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, longer ones first, unless it is marked as typed text."""
    ordered = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(f"{MARK_START}.*?{MARK_END}|({ordered or '(?!)'})", re.DOTALL)


def mark_typed(text: str, tokens: Sequence[str]) -> str:
    """Wrap each placeholder token that occurs in a user's text.

    >>> mark_typed("see <image>", ["<image>"]) == "see " + MARK_START + "<image>" + MARK_END
    True
    """
    clean = text.replace(MARK_START, "").replace(MARK_END, "")
    pattern = token_pattern(tokens)
    return pattern.sub(lambda m: f"{MARK_START}{m[0]}{MARK_END}", clean)


def unmark(text: str) -> str:
    """Text without the marks."""
    return text.replace(MARK_START, "").replace(MARK_END, "")


@dataclass
class Expanded:
    """A text whose placeholders have been repeated.

    Attributes:
        text: with each placeholder as often as its item has features.
        spans: of each placeholder: start and end in the original text and in the expanded one.
        counts: features by token.
    """

    text: str
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def moved(self, position: int) -> int:
        """Where a position of the original text is in the expanded one, marks not counted."""
        shift = 0
        for _, end, _, new_end in self.spans:
            if end <= position:
                shift = new_end - end
        before = self.text[: position + shift]
        return len(before) - before.count(MARK_START) - before.count(MARK_END)


def expand(text: str, lengths: Mapping[str, list[int]], taken: dict[str, int]) -> Expanded:
    """Repeat each placeholder by the number of features of the next item of its modality.

    Args:
        text: with one placeholder per item.
        lengths: features of every item of the batch, by token.
        taken: how many items of each token earlier samples used; advanced in place.

    >>> expand("a<image>b", {"<image>": [3]}, {}).text
    'a<image><image><image>b'
    """
    pieces, spans, counts, last, size = [], [], dict.fromkeys(lengths, 0), 0, 0
    for match in token_pattern(list(lengths)).finditer(text):
        token = match[1]
        if token is None:
            continue
        index = taken.get(token, 0)
        taken[token] = index + 1
        count = lengths[token][index] if index < len(lengths[token]) else 0
        before, repeated = text[last : match.start()], token * count
        spans.append((match.start(), match.end(), size + len(before), size + len(before) + len(repeated)))
        pieces += [before, repeated]
        size += len(before) + len(repeated)
        counts[token] += count
        last = match.end()
    return Expanded("".join([*pieces, text[last:]]), spans, counts)


def occurrences(text: str, tokens: Sequence[str]) -> dict[str, int]:
    """How often each token stands in a text as a placeholder."""
    found = [match[1] for match in token_pattern(tokens).finditer(text) if match[1] is not None]
    return {token: found.count(token) for token in tokens}


def encode(tokenizer, texts: list[str], **options: Any) -> list[dict[str, list]]:
    """Ids, and offsets where asked for, of each text; marked parts become plain text.

    Args:
        tokenizer: of the language model.
        texts: expanded texts.
        **options: of the tokenizer's call, without padding and tensors.

    Returns:
        one dict per text with ``input_ids``, perhaps ``token_type_ids``, ``offset_mapping``.
    """
    plain = [i for i, text in enumerate(texts) if MARK_START not in text]
    encoded: dict[int, dict[str, list]] = {}
    if plain:
        batch = tokenizer([texts[i] for i in plain], padding=False, return_attention_mask=False, **options)
        for row, i in enumerate(plain):
            encoded[i] = {key: value[row] for key, value in batch.items()}
    for i in set(range(len(texts))) - set(plain):
        encoded[i] = _encode_marked(tokenizer, texts[i], **options)
    return [encoded[i] for i in range(len(texts))]


def _encode_marked(tokenizer, text: str, **options: Any) -> dict[str, list]:
    offsets = options.get("return_offsets_mapping", False)
    prefix, suffix = _special_frame(tokenizer) if options.get("add_special_tokens", True) else ([], [])
    ids, spans, position = list(prefix), [(0, 0)] * len(prefix), 0
    for index, piece in enumerate(MARKED.split(text)):  # plain, typed, plain, typed, ..., plain
        if not piece:
            continue
        typed = index % 2 == 1
        piece_ids, piece_spans = _encode_piece(tokenizer, piece, typed, first=position == 0, offsets=offsets)
        ids += piece_ids
        spans += [(start + position, end + position) for start, end in piece_spans]
        position += len(piece)
    ids, spans = ids + suffix, spans + [(0, 0)] * len(suffix)
    limit = options.get("max_length")
    if options.get("truncation") and limit is not None and len(ids) > limit:
        kept = slice(len(ids) - limit, None) if tokenizer.truncation_side == "left" else slice(limit)
        ids, spans = ids[kept], spans[kept]
    return {"input_ids": ids} | ({"offset_mapping": spans} if offsets else {})


def _encode_piece(tokenizer, piece: str, typed: bool, first: bool, offsets: bool):
    options = {"add_special_tokens": False, "return_offsets_mapping": offsets, "split_special_tokens": typed}
    # A line break in front keeps sentencepiece from putting a space before a piece in the middle of a text.
    lead = "" if first else "\n"
    encoded = tokenizer(lead + piece, **options)
    ids, spans = encoded["input_ids"], encoded.get("offset_mapping", [(0, 0)] * len(encoded["input_ids"]))
    if lead:
        cut = tokenizer(lead, **options)["input_ids"]
        if ids[: len(cut)] != cut:
            encoded = tokenizer(piece, **options)
            return encoded["input_ids"], encoded.get("offset_mapping", [(0, 0)] * len(encoded["input_ids"]))
        ids, spans = ids[len(cut) :], [(max(a - 1, 0), max(b - 1, 0)) for a, b in spans[len(cut) :]]
    return ids, spans


def _special_frame(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text by itself."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def token_mask(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that overlaps one of the character spans, else 0.

    >>> token_mask([(0, 2), (2, 4), (4, 4)], [(2, 4)])
    [0, 1, 0]
    """
    return [int(any(a < end and b > start and a < b for start, end in spans)) for a, b in offsets]


def pad_rows(
    tokenizer, rows: list[dict], extra: Mapping[Any, list[list]], padding: Mapping[Any, Any], max_length: int | None
) -> dict[str, Any]:
    """Rows as columns, padded by the tokenizer if asked for.

    Args:
        tokenizer: of the language model.
        rows: ``input_ids`` and what else the tokenizer gave, per text.
        extra: further per-token values, padded alike with 0 or (0, 0).
        padding: `padding`, `pad_to_multiple_of`, `padding_side` as in a tokenizer's call.
        max_length: for ``padding="max_length"``.
    """
    strategy, side = padding.get("padding", False), padding.get("padding_side") or tokenizer.padding_side
    if strategy:
        limit = max_length if strategy == "max_length" else None
        multiple = padding.get("pad_to_multiple_of")
        batch = tokenizer.pad(
            rows,
            padding=strategy,
            max_length=limit,
            padding_side=side,
            pad_to_multiple_of=multiple,
            return_attention_mask=True,
        )
    else:
        batch = {key: [row[key] for row in rows] for key in rows[0]}
        batch["attention_mask"] = [[1] * len(ids) for ids in batch["input_ids"]]
    data = dict(batch)
    for key, values in extra.items():
        blank = (0, 0) if key == "offset_mapping" else 0
        data[key] = [_filled(v, len(ids), blank, side) for v, ids in zip(values, data["input_ids"], strict=True)]
    return data


def _filled(values: list, length: int, blank: Any, side: str) -> list:
    fill = [blank] * (length - len(values))
    return fill + list(values) if side == "left" else list(values) + fill
