"""Finds placeholders in text, repeats them for their items' features, and turns text into ids.

What an end user typed is wrapped in marks while a template is rendered, and encoded as plain text.  Marks are halves of
surrogate pairs: no encoding of text has them alone, so no text that a tokenizer takes does.
"""

import functools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AddedToken, BatchFeature, PreTrainedTokenizerBase

from ..configuration_multimodal import MEDIA_KINDS, MultimodalConfig
from ..limits import check, check_count

MARK_START, MARK_END = "\udffd", "\udffe"
BREAK = MARK_START + MARK_END  # between two texts that would make a token together
_TYPED = f"{MARK_START}([^{BREAK}]*){MARK_END}"  # templates may cut texts: a mark alone only breaks the text
_MARKS = re.compile(f"{_TYPED}|[{BREAK}]")
_SURROGATE = re.compile("[\ud800-\udfff]")
Spans = list[tuple[int, int]]
# Of a tokenizer's call: what each may be, None for a positive integer.  Its others change which tokens belong to which text
# or feature, or nothing.
_CHOICES: dict[str, tuple[Any, ...] | None] = {
    "padding": (True, False, None, "longest", "max_length", "do_not_pad"),
    "truncation": (True, False, None, "longest_first", "only_first", "only_second", "do_not_truncate"),
    "padding_side": ("left", "right", None),
    "return_tensors": ("pt", "np", None),
    "max_length": None,
    "pad_to_multiple_of": None,
    "add_special_tokens": (True, False),
    **dict.fromkeys(("split_special_tokens", "return_attention_mask", "return_token_type_ids"), (True, False, None)),
    **dict.fromkeys(("return_mm_token_type_ids", "return_offsets_mapping"), (True, False, None)),
}
TEXT_OPTIONS = frozenset(_CHOICES)


@functools.lru_cache(maxsize=256)
def token_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds any of the tokens, longer ones first, unless it is marked as typed text."""
    ordered = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    # Marked text is tried first and leaves the group empty; `(?!)` matches nothing, where there are no tokens.
    return re.compile(f"{MARK_START}[^{BREAK}]*{MARK_END}|({ordered or '(?!)'})")


class MarkedText(str):
    """A text that this package made, in which marks are its own."""


def check_texts(text: Any) -> Any:
    """None, one text, or a sequence of texts, as given (TypeError: anything else; ValueError: none in it)."""
    if isinstance(text, (bytes, bytearray, memoryview)) or not isinstance(text, (str, Sequence, type(None))):
        raise TypeError(f"text must be a string or a list of strings, got {type(text).__name__}.")
    if text is not None and not isinstance(text, str) and not len(text):
        raise ValueError("text is an empty list: give one text or more, or leave it out.")
    return text


def check_text(text: Any, who: str = "") -> str:
    """The text, or ValueError if half of a surrogate pair stands in it: no tokenizer takes such, and marks are of the kind."""
    if not isinstance(text, str):
        raise TypeError(f"{who}the text must be a string, got {type(text).__name__}.")
    if found := _SURROGATE.search(text):
        where = f"{who}U+{ord(found[0]):04X} at character {found.start()}"
        raise ValueError(f"{where} is half of a surrogate pair, which is no text: decode bytes with errors='replace'.")
    return text


def mark_typed(text: str, tokens: Sequence[str]) -> str:
    """Wrap each placeholder token that occurs in a user's text.

    >>> mark_typed("see <image>", ["<image>"]) == "see " + MARK_START + "<image>" + MARK_END
    True
    """
    clean = unmark(text)  # a mark in the user's text would end ours too early
    return token_pattern(tuple(tokens)).sub(rf"{MARK_START}\g<0>{MARK_END}", clean)


def unmark(text: str) -> str:
    """Text without the marks."""
    return text.replace(MARK_START, "").replace(MARK_END, "")


@dataclass
class Expanded:
    """A text in which each placeholder stands as often as its item has features."""

    text: str
    spans: list[tuple[int, int, int, int]]  # of each placeholder: start and end in the original text, then in this one
    counts: dict[str, int]  # features by token

    def moved(self, position: int) -> int:
        """Where a position of the original text is in the expanded one, marks not counted."""
        shift = 0
        for _, end, _, new_end in self.spans:
            if end <= position:
                shift = new_end - end
        return len(unmark(self.text[: position + shift]))


def split_typed(text: str) -> list[str]:
    """A text cut into what is plain, what was typed, what is plain, and so on, without the marks around what was typed."""
    return re.split(_TYPED, text)


def expand(text: str, replacements: Mapping[str, list[str]], taken: dict[str, int]) -> Expanded:
    """Put in place of each placeholder the text of the next item of its token, by `replacements` of the whole batch.

    `taken`, how many items of each token earlier samples used, is advanced in place.

    >>> expand("a<image>b", {"<image>": ["<image>" * 3]}, {}).text
    'a<image><image><image>b'
    """
    # `last` is where the rest of the text begins, `size` how long the expanded text is up to there.
    pieces, spans, counts, last, size = [], [], dict.fromkeys(replacements, 0), 0, 0
    for match in token_pattern(tuple(replacements)).finditer(text):
        token = match[1]
        if token is None:  # typed by a user
            continue
        index = taken.get(token, 0)
        taken[token] = index + 1
        new = replacements[token][index] if index < len(replacements[token]) else ""  # `check_items` refuses more
        pieces.append(text[last : match.start()] + new)
        size += len(pieces[-1])
        spans.append((match.start(), match.end(), size - len(new), size))
        counts[token] += new.count(token)
        last = match.end()
    return Expanded("".join([*pieces, text[last:]]), spans, counts)


def occurrences(text: str, tokens: Sequence[str]) -> dict[str, int]:
    """How often each token stands in a text as a placeholder."""
    found = [match[1] for match in token_pattern(tuple(tokens)).finditer(text) if match[1] is not None]
    return {token: found.count(token) for token in tokens}


def encode(tokenizer, texts: list[str], spans: Sequence[Spans] | None = None, **options: Any) -> list[dict[str, list]]:
    """`input_ids`, and `offset_mapping` where asked for, of each expanded text; marked parts become plain text.

    With spans of each text, in characters, marks not counted, `assistant_masks` has 1 on the tokens of a span.  Where a token
    would reach over the end of a span, the text is split there, as in generation, where the prompt is tokenized alone; so a
    span's tokens are exactly its text.  Options are of the tokenizer's call, without padding and tensors.
    """
    turns: Sequence[Spans] = [[] for _ in texts] if spans is None else spans
    # Offsets tell what tokens lie in a span.
    asked = options | ({} if spans is None else {"return_offsets_mapping": True})
    rows: dict[int, dict[str, list]] = {}
    # Texts as a whole, all in one call, where nothing was typed and no token reaches over the end of a span; else pieces.
    # Slow tokenizers give no offsets.
    whole = [i for i, text in enumerate(texts) if unmark(text) == text and (spans is None or tokenizer.is_fast)]
    batch = tokenizer([texts[i] for i in whole], padding=False, return_attention_mask=False, **asked) if whole else {}
    for k, i in enumerate(whole):
        row = {key: values[k] for key, values in batch.items()}
        mask = [] if spans is None else token_mask(row["offset_mapping"], turns[i])
        if mask is not None:
            rows[i] = row | {"assistant_masks": mask}
    for i in set(range(len(texts))) - set(rows):
        rows[i] = _encode_pieces(tokenizer, texts[i], turns[i], options)
    unasked = set() if options.get("return_offsets_mapping") else {"offset_mapping"}
    unasked |= {"assistant_masks"} if spans is None else set()
    return [{key: v for key, v in rows[i].items() if key not in unasked} for i in range(len(texts))]


def _encode_pieces(tokenizer, text: str, spans: Spans, options: dict[str, Any]) -> dict[str, list]:
    """As `encode`, of a text that is cut at marks and at the ends of spans."""
    parts = [part or "" for part in _MARKS.split(text)]  # plain, typed, plain, typed, ..., plain
    with_offsets, split = options.get("return_offsets_mapping", False), bool(options.get("split_special_tokens"))
    # Pieces are tokenized without special tokens, which go around the whole.
    prefix, suffix = _special_frame(tokenizer) if options.get("add_special_tokens", True) else ([], [])
    ids, offsets, mask, position = list(prefix), [(0, 0)] * len(prefix), [0] * len(prefix), 0
    for index, part in enumerate(parts):
        end = position + len(part)
        cuts = sorted({cut for span in spans for cut in span if position < cut < end})  # starts of spans too
        for start, stop in zip([position, *cuts], [*cuts, end], strict=True) if part else ():
            piece = part[start - position : stop - position]
            piece_ids, piece_offsets = _encode_piece(
                tokenizer, piece, split or index % 2 == 1, start == 0, with_offsets
            )
            ids += piece_ids
            offsets += [(a + start, b + start) for a, b in piece_offsets]
            mask += [int(any(a <= start and stop <= b for a, b in spans))] * len(piece_ids)
        position = end
    row: dict[str, list] = {"input_ids": ids + suffix, "offset_mapping": offsets + [(0, 0)] * len(suffix)}
    row["assistant_masks"] = mask + [0] * len(suffix)
    if options.get("return_token_type_ids", "token_type_ids" in tokenizer.model_input_names):
        row["token_type_ids"] = _token_types(tokenizer, prefix, len(ids) - len(prefix), suffix)
    limit = options.get("max_length")
    if options.get("truncation") and limit is not None and len(row["input_ids"]) > limit:
        left = tokenizer.truncation_side == "left"  # which side goes
        row = {key: values[-limit:] if left else values[:limit] for key, values in row.items()}
    return row


def _encode_piece(tokenizer, piece: str, typed: bool, first: bool, offsets: bool):
    options = {"add_special_tokens": False, "split_special_tokens": typed, "return_offsets_mapping": offsets}
    size = 0
    # A character in front keeps sentencepiece from putting a space before a piece in the middle of a text; it must not
    # grow together with the piece.
    for lead in ("",) if first else ("\n", ".", "x", ""):
        encoded = tokenizer(lead + piece, **options)
        cut = tokenizer(lead, **options)["input_ids"] if lead else []
        ids, size = encoded["input_ids"], len(lead)
        if ids[: len(cut)] == cut:  # the lead kept its own tokens
            break
    spans = encoded.get("offset_mapping", [(0, 0)] * len(ids))
    own = tokenizer.convert_tokens_to_ids(piece)
    if typed and own in ids[len(cut) :] and piece in tokenizer.get_added_vocab():  # one that is not called special
        text = tokenizer._encode_without_added_tokens(lead + piece)
        ids = text if text[: len(cut)] == cut else [*cut, *tokenizer._encode_without_added_tokens(piece)]
        spans = [(0, size)] * len(cut) + [(size, size + len(piece))] * (len(ids) - len(cut))
        if own in ids[len(cut) :]:
            raise ValueError(f"The tokenizer makes the token {piece!r} of the same characters typed in a message.")
    return ids[len(cut) :], [(max(a - size, 0), max(b - size, 0)) for a, b in spans[len(cut) :]]


def _special_frame(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text by itself."""
    # The tokens of "a" are looked for in what the tokenizer makes of it with special tokens.
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def _token_types(tokenizer, prefix: list[int], size: int, suffix: list[int]) -> list[int]:
    """The types that a tokenizer gives the ids of one text: before it, of `size` ids in it, and behind it."""
    framed = bool(prefix or suffix)
    types = tokenizer("a", add_special_tokens=framed, return_token_type_ids=True)["token_type_ids"]
    inside = types[len(prefix)]
    return types[: len(prefix)] + [inside] * size + types[len(types) - len(suffix) :]


def token_mask(offsets: Sequence[tuple[int, int]], spans: Spans) -> list[int] | None:
    """1 for each token that lies in one of the character spans, else 0; None if a token lies on the end of one.

    White space that a tokenizer takes into a token but not into its offsets counts to the token behind it.

    >>> token_mask([(0, 2), (2, 4), (4, 4)], [(2, 4)])
    [0, 1, 0]
    >>> token_mask([(0, 3), (3, 4)], [(2, 4)]) is None
    True
    """
    ends = np.array([*sorted({end for span in spans for end in span if end > 0}), np.iinfo(np.int64).max])
    lows, highs = zip((0, 0), *sorted(spans), strict=True)
    farthest = np.maximum.accumulate(highs)
    a, b = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # (tokens,) each
    reached = np.maximum.accumulate(np.concatenate(([0], b)))[:-1]  # where the tokens before each one end
    start = np.minimum(reached, a)  # white space in front that the offsets leave out
    gap_ends = (a > reached) & (ends[np.searchsorted(ends, reached)] <= a)
    if bool((gap_ends | (ends[np.searchsorted(ends, start, "right")] < b)).any()):
        return None
    inside = (start < b) & (b <= farthest[np.searchsorted(lows, start, "right") - 1])
    return inside.astype(int).tolist()


def pad_rows(tokenizer, rows: list[dict], extra: Mapping, padding: Mapping, max_length: int | None) -> dict[str, Any]:
    """Rows of `input_ids` and more as columns, padded by the tokenizer if asked for.

    `extra` has further per-token values, padded alike with 0 or (0, 0); `padding` is given as in a tokenizer's call.
    """
    strategy, side = padding.get("padding", False), padding.get("padding_side") or tokenizer.padding_side
    if strategy:
        options = {"padding": strategy, "padding_side": side, "pad_to_multiple_of": padding.get("pad_to_multiple_of")}
        limit = max_length if strategy == "max_length" else None
        batch = tokenizer.pad(rows, max_length=limit, return_attention_mask=True, **options)
    else:
        batch = {key: [row[key] for row in rows] for key in rows[0]}
        batch["attention_mask"] = [[1] * len(ids) for ids in batch["input_ids"]]
    data = dict(batch)
    for key, values in extra.items():
        blank = (0, 0) if key == "offset_mapping" else 0
        data[key] = [pad_list(v, len(ids), blank, side) for v, ids in zip(values, data["input_ids"], strict=True)]
    return data


def check_filled(tokenizer: Any, options: Mapping[str, Any], texts: int, name: str) -> None:
    """Refuse a length to which so many texts would be filled up without end (ValueError)."""
    most = options.get("max_length") if options.get("padding") == "max_length" else None
    if (
        most is None and options.get("padding") == "max_length" and tokenizer.model_max_length <= 1e20
    ):  # else it has none
        most = tokenizer.model_max_length
    for key, length in {"max_length": most, "pad_to_multiple_of": options.get("pad_to_multiple_of")}.items():
        if length is not None:
            told = f"{name}: ask for less: filled up by {key}={int(length):,}, {texts} texts have tokens:"
            check(int(length) * texts, "MAX_PADDED_TOKENS", told)


def check_lengths(options: Mapping[str, Any], given: Mapping[str, Any], name: str) -> None:
    """Refuse, of a tokenizer's options, a length that was given and that it would leave aside (ValueError).

    Of `max_length` beside padding to the longest text a warning tells, as in transformers.
    """
    padding, cuts = options.get("padding", False), options.get("truncation")
    padded = padding not in (False, None, "do_not_pad")
    if given.get("pad_to_multiple_of") is not None and not padded:
        raise ValueError(f"{name}: pad_to_multiple_of= does nothing without padding: pass padding=True too.")
    whole = cuts in (False, "do_not_truncate") or (cuts is None and padding is not False)  # as transformers reads them
    if given.get("max_length") is not None and whole and padding != "max_length":
        told = (
            f"{name}: max_length= does nothing here: pass truncation=True to cut, or padding='max_length' to fill up."
        )
        if cuts is not None or not padded:
            raise ValueError(told)
        warnings.warn(told, stacklevel=4)


def check_values(options: Mapping[str, Any], name: str) -> None:
    """Refuse values that no tokenizer's option has (ValueError that names those that it has)."""
    for key in sorted(TEXT_OPTIONS & set(options)):
        value, choices = options[key], _CHOICES[key]
        if choices is None:
            whole = int(value) if isinstance(value, np.integer) else value
            _ = value is None or check_count(whole, f"{name}: {key}")
        elif not (isinstance(value, (str, bool, type(None))) and value in choices):
            told = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
            raise ValueError(f"{name}: {key} must be {told}, got {value!r:.100}.")


def check_even(rows: Sequence[Sequence[int]], max_length: int | None, padding: Any) -> None:
    """Refuse rows of several lengths, which no tensor holds (ValueError with both numbers)."""
    sizes = [len(row) for row in rows]
    if len(set(sizes)) > 1:
        sample = next(i for i, size in enumerate(sizes) if size != sizes[0])
        told = f"sample {sample}: the text has {sizes[sample]} tokens and that of sample 0 {sizes[0]}, tensors want one length"
        filled = f": padding={padding!r} fills up to {max_length} and cuts nothing" if padding == "max_length" else ""
        raise ValueError(f"{told}{filled}: pass padding=True, or return_tensors=None for lists.")


def pad_list(values: list, length: int, blank: Any, side: str) -> list:
    """Values filled up with `blank` on one side."""
    fill = [blank] * (length - len(values))
    return fill + list(values) if side == "left" else list(values) + fill


def placeholder_tokens(config: MultimodalConfig, chosen: Mapping[str, str]) -> dict[str, str]:
    """The placeholder token of each modality: chosen, else configured, else by default (ValueError: unknown, empty, twice)."""
    names = [name for name in config.encoders if name not in config.joined]
    if unknown := sorted(set(chosen) - set(names)):
        raise ValueError(f"tokens names {unknown}, the model has placeholders of the encoders {names}.")
    tokens: dict[str, str] = {}
    for name in names:
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
    """Make each token one special token of the tokenizer (in place; one that exists keeps its id); return ids by modality."""
    kinds = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
    named = {getattr(tokenizer, f"{kind}_token", None): kind for kind in kinds}
    ids: dict[str, Any] = {}
    for name, token in tokens.items():
        remedy = "choose another placeholder token."
        if token in named:
            raise ValueError(f"{name}: {token!r} is the tokenizer's {named[token]} token, {remedy}")
        if token not in tokenizer.all_special_tokens or len(tokenizer.encode(token, add_special_tokens=False)) != 1:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        ids[name] = tokenizer.convert_tokens_to_ids(token)
        if tokenizer.encode(token, add_special_tokens=False) != [ids[name]]:  # a normalizer may still split it
            raise ValueError(f"{name}: the tokenizer does not keep {token!r} as one token, {remedy}")
    return ids


class MultimodalBatch(BatchFeature):
    """A `BatchFeature` that masks labels on placeholders, of which it gets the ids, as they are put into it."""

    placeholder_ids: tuple[int, ...] = ()

    def __init__(self, data: dict | None = None, tensor_type=None, skip_tensor_conversion=None, placeholder_ids=()):
        self.placeholder_ids = tuple(placeholder_ids)
        super().__init__(data, tensor_type, skip_tensor_conversion)

    def __setitem__(self, key: str, value: Any) -> None:
        """As in a dict; of `labels` that fit the `input_ids` ``(batch, length)`` in it, a masked copy is kept."""
        ids = self.data.get("input_ids")
        if key == "labels" and isinstance(ids, torch.Tensor) and isinstance(value, torch.Tensor):
            # (batch, length), True on placeholders, which are not predicted
            placeholders = torch.isin(ids, torch.tensor(self.placeholder_ids, device=ids.device)).to(value.device)
            value = value.masked_fill(placeholders, -100) if value.shape == ids.shape else value
        super().__setitem__(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {"data": self.data, "placeholder_ids": self.placeholder_ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.placeholder_ids = state.get("placeholder_ids", ())
