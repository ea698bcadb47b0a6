"""Texts on their way through a native processor: what was typed put aside, what the assistant wrote found again."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import BatchEncoding

from .call import encode_expanded
from .placeholder_text import (
    MARK_END,
    MARK_START,
    Expanded,
    Spans,
    expand,
    occurrences,
    split_typed,
    token_pattern,
    unmark,
)

# Kind of items -> what transformers calls the texts that stand for their placeholders.
_REPLACEMENTS = {"image": "images_replacements", "video": "videos_replacements", "audio": "audio_replacements"}


class NativeTexts:
    """The texts of one call, on their way through a native processor, with typed text put aside."""

    def __init__(
        self,
        tokenizer: Any,
        texts: list[str] | None,
        spans: list[Spans] | None,
        tokens: Mapping[str, str],
        learns: bool = False,
    ):
        self.tokenizer, self.spans, self._given = tokenizer, spans, texts
        self._typed: list[str] = []
        self._tokens = tokens  # placeholder in a text by kind
        self.suffixes: list[str] | None = None
        self._starts: list[int] | None = None  # of what is learnt in each text, where it is given apart
        if learns and texts is not None and spans is not None and all(spans):
            self._starts = [min(a for a, _ in turns) for turns in spans]
            self._check_in_front(texts)
        self.texts = None if texts is None else [self._aside(text) for text in self._in_front(texts)]
        if self._starts is not None and texts is not None:
            end = tokenizer.eos_token or ""  # which the native class writes behind it
            behind = [text[start:].removesuffix(end) for text, start in zip(texts, self._starts, strict=True)]
            self.suffixes = [self._aside(text) for text in behind]
        self.expanded: list[Expanded] | None = None
        self.replacements: dict[str, list[str]] = {}

    def _in_front(self, texts: list[str]) -> list[str]:
        """The texts, or what of them stands in front of what is learnt where that is given apart."""
        starts = [None] * len(texts) if self._starts is None else self._starts
        return [text[:start] for text, start in zip(texts, starts, strict=True)]

    def _check_in_front(self, texts: list[str]) -> None:
        """Refuse items behind the first word to learn (ValueError)."""
        for sample, (text, start) in enumerate(zip(texts, self._starts or (), strict=True)):
            for token, count in occurrences(text[start:], list(self._tokens.values())).items():
                if count:
                    told = f"sample {sample}: {count} placeholders {token} stand behind the first text that is to be learnt"
                    raise ValueError(f"{told}, where this processor takes none: put the items into the first prompt.")

    def _aside(self, text: str) -> str:
        """The text with a number in place of what was typed between marks: a native processor would take it for its own."""
        pieces = split_typed(text)  # plain, typed, plain, ...
        for i in range(1, len(pieces), 2):
            self._typed.append(pieces[i])
            pieces[i] = f"{MARK_START}{len(self._typed) - 1}{MARK_END}"
        return "".join(pieces)

    def _back(self, text: str) -> str:
        pieces = split_typed(text)
        for i in range(1, len(pieces), 2):
            pieces[i] = f"{MARK_START}{self._typed[int(pieces[i])]}{MARK_END}"
        return "".join(pieces)

    def note(self, texts: Any, replacements: Mapping[str, Sequence[str]]) -> None:
        """Keep what stands for each placeholder, by kind, and where."""
        self.replacements = {kind: list(found) for kind, found in replacements.items() if found}
        if self._given is not None and list(texts) == self.texts:
            by_token = {self._tokens[kind]: found for kind, found in self.replacements.items()}
            taken: dict[str, int] = {}
            self.expanded = [expand(text, by_token, taken) for text in self._in_front(self._given)]

    def encode(self, text: Any, *rest: Any, text_pair: Any = None, **options: Any) -> Any:
        """What the tokenizer makes of texts; of those with typed text, or with spans to mark, ours does."""
        texts = [text] if isinstance(text, str) else list(text)
        whole = [self._back(one) for one in texts]
        if self.spans is None and all(unmark(one) == one for one in whole):
            return self.tokenizer(text, *rest, **options | ({} if text_pair is None else {"text_pair": text_pair}))
        expanded = self.expanded
        if expanded is None or [one.text for one in expanded] != whole:
            expanded = self._changed(whole)
        if self._starts is not None:
            pairs = [self._back(one) for one in text_pair]
            expanded = list(map(_with_suffix, expanded, pairs, self._starts, self._given or ()))
            texts = [one.text for one in expanded]
        options["return_offsets_mapping"], asked = True, options.get("return_offsets_mapping", False)
        kind = options.pop("return_tensors", None)
        data = encode_expanded(self.tokenizer, expanded, {}, {}, options, self.spans)
        offsets = data["offset_mapping"] if asked else data.pop("offset_mapping")
        starts = [lambda at, one=one: len(unmark(self._back(one[:at]))) for one in texts]
        return _Encoded(data, offsets, starts, kind)

    def _changed(self, whole: list[str]) -> list[Expanded]:
        """The texts as the native class changed them, without telling how (ValueError where the given ones are not in them)."""
        given = self._in_front(self._given or [])
        if self.spans is None:
            return [Expanded(one, [], {}) for one in whole]
        added = self.tokenizer.added_tokens_decoder.values()
        special = [*(token.content for token in added if token.special), *self._tokens.values()]
        placed = [
            in_changed_text(one, new, self._tokens.values(), special) for one, new in zip(given, whole, strict=True)
        ]
        if None in placed:
            reason = "what the assistant wrote in them is not known"
            raise ValueError(f"it changes texts, so that {reason}: give rows with 'text', of which all is learnt.")
        return [one for one in placed if one is not None]


def in_changed_text(text: str, changed: str, placeholders: Iterable[str], special: Iterable[str]) -> Expanded | None:
    """Where the parts of a text lie in what a native class made of it; None where they do not.

    It may write special tokens, and a space behind them, in place of each placeholder, and a line break at the end.

    >>> in_changed_text("a<i>b", "a<f><i><i><f> b\\n", ["<i>"], ["<i>", "<f>"]).spans
    [(1, 4, 1, 14)]
    """
    tokens = re.compile(f"(?:{'|'.join(map(re.escape, sorted(special, key=len, reverse=True)))})*")
    found = [match for match in token_pattern(tuple(placeholders)).finditer(text) if match[1] is not None]
    spans: list[tuple[int, int, int, int]] = []
    last, at = 0, 0
    for match in [*found, None]:
        piece = text[last : match.start() if match else None]
        if spans and piece:  # what the tokens in front took of this part is given back, or there is a space more
            at -= _run(tokens, piece, 0)
            at += not changed.startswith(piece, at) and changed[at : at + 1] == " "
            spans[-1] = (*spans[-1][:3], at)
        if not changed.startswith(piece, at) or (spans and at < spans[-1][2]):
            return None
        at += len(piece)
        if match:
            start, at = at, at + _run(tokens, changed, at)
            spans.append((match.start(), match.end(), start, at))
            last = match.end()
    return Expanded(changed, spans, {}) if changed[at:] in ("", "\n") else None


def _run(tokens: re.Pattern[str], text: str, at: int) -> int:
    """How long the run of tokens is that begins at a place of a text."""
    found = tokens.match(text, at)
    return 0 if found is None else found.end() - at


def _with_suffix(front: Expanded, suffix: str, start: int, given: str) -> Expanded:
    """A text with what is learnt behind it, which starts at `start` of the given one, to whose end all of it belongs."""
    whole, place = front.text + suffix, len(front.text)
    spans = [*front.spans, (start, start, place, place), (len(given), len(given), len(whole), len(whole))]
    return Expanded(whole, spans, front.counts)


class _Encoded(BatchEncoding):
    """Ids that were put together from pieces of texts."""

    def __init__(self, data: dict, offsets: list, starts: list, kind: Any):
        super().__init__(data, tensor_type=kind)
        self._offsets, self._starts = offsets, starts

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token at a character of a text that was given to the tokenizer, as in transformers."""
        row, at = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        place = self._starts[row](at)
        return next((i for i, (a, b) in enumerate(self._offsets[row]) if a <= place < b), None)


class TokenizerInCall:
    """Stands for the tokenizer while a native processor is called."""

    def __init__(self, call: NativeTexts):
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call.tokenizer, name)

    def __call__(self, text: Any = None, *rest: Any, **options: Any) -> Any:
        return self._call.encode(text, *rest, **options)


@functools.cache
def recording(cls: Any) -> Any:
    """A native class, by name and place the same, that tells its call what it puts in place of placeholders."""

    def get_text_with_replacements(self: Any, text: Any, *found: Any, **named: Any) -> Any:
        given = dict(zip(_REPLACEMENTS.values(), found, strict=False)) | named
        self._call.note(text, {kind: given.get(key) or () for kind, key in _REPLACEMENTS.items()})
        return super(made, self).get_text_with_replacements(text, *found, **named)

    own = {"get_text_with_replacements": get_text_with_replacements, "__module__": cls.__module__}
    made = type(cls)(cls.__name__, (cls,), own)
    return made
