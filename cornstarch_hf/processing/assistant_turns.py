"""Finds where the assistant's turns are in the text of a conversation, which `rendering` renders.

A turn is what the template writes for an assistant's message behind the generation prompt: reasoning, text, tool calls,
and the marker that ends the turn, so that a model learns to stop.  A template with generation marks says so itself.
Without them the conversation is rendered with bookends around what each message says, characters that no text has, of
which « and » stand for one pair here, and ↵ for a line break:

    <|im_start|>user↵«5+2?»<|im_end|>↵<|im_start|>assistant↵«seven»<|im_end|>↵<|im_start|>user↵«and?»<|im_end|>↵
                           |----------- prompt ------------|       |- tail --|
                                                            |----- turn -----|

The prompt is what the conversation up to ``5+2?``, rendered alone with a generation prompt, has behind its last bookend;
the tail is what the one up to ``seven`` has behind its last.  Both are looked for behind the same bookend in the whole
text, never by counting characters, since templates may change earlier text as a conversation grows.
"""

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import nodes

from .rendering import GENERATION, TEMPLATE_ERRORS, bookends, check_written, render, said, with_bookends
from .template_sandbox import BoundedEnvironment

_BOOKEND = re.compile("[\ud800-\udbff][\udc00-\uddff]")
_REMEDY = "Put {% generation %} ... {% endgeneration %} around them in the template, or give rows of 'prompt' and 'completion'."
Spans = list[tuple[int, int]]
_SHORT, _AGAIN = (
    16,
    32,
)  # messages of conversations that are compared with each other, and how often one is looked at again
_SURE = 8  # places that are found, of the first and again all over the talk, before others are taken for known


def assistant_spans(
    messages: list[dict],
    template: str,
    *,
    first: int = 0,
    specials: Sequence[str] = (),
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[str, Spans]:
    """The text of a conversation and the character spans that the assistant wrote.

    The spans are in order and do not overlap; each has the turn's end marker, none has its header.  ValueError if turns
    cannot be told apart, or the template leaves out a tool call.

    Args:
        messages: as `conversations.ConversationReader` reads them.
        first: the first message whose turn counts; earlier ones are context.
        specials: special tokens, which tell where a turn ends in templates that end a conversation otherwise than a turn.
        add_generation_prompt: begin one more turn behind the conversation.
    """
    marked = bool(GENERATION.search(template))
    grown, spans = render(
        messages, template, mark_assistant=marked, add_generation_prompt=add_generation_prompt, **variables
    )
    check_written(messages, template, variables, grown)
    if marked and first == 0:
        return grown, spans  # the template's own word, for the whole conversation
    text = render(messages, template, **variables)[0] if add_generation_prompt else grown
    spans = _found_spans(messages, template, text, first, specials, variables)
    end = spans[-1][1] if spans else 0
    if not grown.startswith(text[:end]):
        raise ValueError(
            "The chat template ends the last turn otherwise where add_generation_prompt begins another one."
        )
    return grown, spans


def _found_spans(
    messages: list[dict], template: str, text: str, first: int, specials: Sequence[str], variables: dict[str, Any]
) -> Spans:
    marked = bool(GENERATION.search(template))
    problem: Exception | None = None
    undisturbed = False
    for around in ("all", "spoken", "none"):  # templates may treat an empty message otherwise than one with bookends
        if undisturbed and around == "none":
            break  # what bookends could not tell apart is not to be guessed without them
        try:
            turns = _Turns(messages, template, variables, around)
            # Where the template writes something else because of the bookends, they tell nothing.
            if turns.plain() != text:
                continue
            undisturbed = True
            found = turns.by_generation_marks(first) if marked else turns.by_bookends(first, specials)
            return [(turns.in_plain(a), turns.in_plain(b)) for a, b in found]
        except TEMPLATE_ERRORS as error:
            problem = problem or error
    lack = "does not tell which turns are the completion's" if marked else "has no generation marks"
    raise ValueError(
        f"The assistant's turns cannot be found: the chat template {lack}, and changes earlier text as the conversation "
        f"grows, or cannot be rendered up to a turn{f' ({problem})' if problem else ''}. {_REMEDY}"
    ) from problem


class _Turns:
    """One conversation, rendered with bookends around what "all" messages say, the "spoken" ones (not silent), or "none"."""

    def __init__(self, messages: list[dict], template: str, variables: dict[str, Any], around: str):
        self.template, self.variables, self.messages = template, variables, messages
        self.has_bookends = around != "none"
        if self.has_bookends:
            self.messages = [with_bookends(m, *bookends(i), around == "all") for i, m in enumerate(messages)]
        self.whole, self.generated = render(self.messages, template, mark_assistant=True, **variables)

        # Where each bookend stands, and where all of them do, in order.
        self.places: dict[str, list[int]] = {}
        self.ordered = [found.start() for found in _BOOKEND.finditer(self.whole)] if self.has_bookends else []
        for at in self.ordered:
            self.places.setdefault(self.whole[at : at + 2], []).append(at)
        self._known: dict[tuple, list[int]] = {}
        self._shared: dict[tuple, list[int]] = {}
        if len(messages) <= _SHORT and (form := form_by(template)) is not None:  # rows of tables often have one form
            told = [m.get("role") for m in messages], messages[0] if form else None
            self._shared = _places_of(template, repr((around, variables, told)))
        self._in_doubt = False
        self._prompt_is_constant = writes_constant_prompt(template)
        each = max(len(messages) // _SURE, 1)
        self._looked_up = {*range(0, len(messages), each), *range(max(len(messages) - 4, 0), len(messages) + 1)}

    def plain(self) -> str:
        """The whole text without bookends."""
        return _BOOKEND.sub("", self.whole) if self.has_bookends else self.whole

    def in_plain(self, position: int) -> int:
        """A position of the whole text in that without bookends, of two characters each."""
        return position - 2 * bisect_left(self.ordered, position)

    def by_bookends(self, first: int, specials: Sequence[str]) -> Spans:
        """Spans of turns in the whole text; ValueError where one cannot be told from others."""
        spans = self._by_bookends(first, specials)
        if self._in_doubt or any(
            len(set(known)) > 1 for known in self._known.values()
        ):  # so that the others have to be looked for too
            self._looked_up, self._in_doubt = set(range(len(self.messages) + 1)), True
            spans = self._by_bookends(first, specials)
        return spans

    def _by_bookends(self, first: int, specials: Sequence[str]) -> Spans:
        spans: Spans = []
        for index, message in enumerate(self.messages):
            if index < first or message.get("role") != "assistant":
                continue
            start = self._at(index, "start", self._start)
            end = self._at(index + 1, "end", lambda after: self._end(after - 1, specials))
            if start > end or (spans and start < spans[-1][1]):
                raise self._lost(index)  # the template has moved text, so turns would overlap
            inside = set(_BOOKEND.findall(self.whole[start:end]))
            if self.has_bookends and inside != {bookend for bookend in bookends(index) if bookend in self.places}:
                raise ValueError(f"message {index} has text of another message in it, or lacks its own")
            spans.append((start, end))
        return spans

    def _at(self, index: int, what: str, find: Callable[[int], int]) -> int:
        """Where a turn starts or ends between two messages, of which `index` is the second.

        `find` renders the conversation up to there.  Between messages of the same roles and fields, and in the same text, it
        is at the same place: this is looked up `_SURE` times, and again all over the conversation, for a template whose
        generation prompt hangs on no message.  For others each is looked up.
        """
        known_prompt = what == "end" or self._prompt_is_constant
        if not 0 < index < len(self.messages) or not self.has_bookends or not known_prompt:
            return find(index)
        before, after = (self.places.get(mark, ()) for mark in (bookends(index - 1)[1], bookends(index)[0]))
        if len(before) != 1 or len(after) != 1 or not before[0] < after[0]:
            return find(index)
        at = before[0]
        pair = self.messages[index - 1 : index + 1]
        kinds = [(key, message["role"] if key == "role" else None) for message in pair for key in message]
        key = (what, self.whole[at + 2 : after[0]], *kinds)
        known, shared = (
            self._known.setdefault(key, []),
            self._shared.setdefault((index, len(self.messages), *key), [0, 0]),
        )
        if not self._in_doubt and shared[1] >= _SURE and shared[1] % _AGAIN:
            shared[1] += 1
            return at + shared[0]
        if len(known) < _SURE or index in self._looked_up:
            known.append(find(index) - at)
            if shared[1] and shared[0] != known[-1]:  # it hangs on what messages say: nothing is known of it
                self._in_doubt, shared[1] = True, -(2**62)
            shared[:] = known[-1], shared[1] + 1
        return at + known[-1]

    def by_generation_marks(self, first: int) -> Spans:
        """Spans that the template marks, of the messages from `first` on; ValueError where that is unclear."""
        written = [i for i in range(first) if self.whole.count(bookends(i)[1]) == 1]
        last = written[-1] if written else -1  # behind it begins what may be the completion's
        if any(message.get("role") == "assistant" for message in self.messages[last + 1 : first]):
            raise ValueError("the prompt's last turn says nothing")
        start = self.whole.index(bookends(last)[1]) if written else 0
        return [span for span in self.generated if span[0] >= start]

    def _start(self, index: int) -> int:
        """Behind what the generation prompt writes, where the template has one, else behind the turn's header."""
        if index == 0:
            return self._first_start()
        # Rendered up to this message, with a generation prompt and without: where they differ, the template has one.
        at, _, prompt = self._continued(index, self.messages[:index], add_generation_prompt=True)
        _, _, bare = self._continued(index, self.messages[:index])
        if prompt != bare and self.whole.startswith(prompt, at):
            return at + len(prompt)
        lead = self._lead(index, at)
        if prompt != bare:  # a prompt that also opens a reasoning block, which the turn does not have
            shared = _shared(prompt, lead)  # white space behind it is the message's own
            if self.whole.startswith(lead, at) and not lead[len(shared) :].strip():
                return at + len(shared)
        elif lead.startswith(bare) and self.whole.startswith(bare, at):  # the template has no generation prompt
            if not lead[len(bare) :].strip():
                return at + len(bare)
            if self.whole.startswith(lead, at):
                return at + len(lead)
        raise self._lost(index)

    def _first_start(self) -> int:
        """The start of a conversation's first turn, by the generation prompt that would follow the whole of it."""
        lead = self._lead(0, 0)
        # Nothing stands before it to be rendered alone: its header is looked for at the end instead.
        grown, _ = render(self.messages, self.template, **self.variables | {"add_generation_prompt": True})
        if self.whole.startswith(lead) and grown.endswith(lead):
            return len(lead)
        if self.whole.startswith(lead) and grown.startswith(self.whole):
            prompt = grown[len(self.whole) :]
            return lead.rfind(prompt) + len(prompt) if prompt and prompt in lead else len(lead)
        raise self._lost(0)

    def _end(self, index: int, specials: Sequence[str]) -> int:
        """Behind all that the template writes for a message, its end marker included."""
        if index == len(self.messages) - 1:
            return len(self.whole)
        at, bookend, tail = self._continued(index, self.messages[: index + 1])
        if self.whole.startswith(tail, at):
            return at + len(tail)
        # The template ends a conversation otherwise than a turn; a special token that both have ends the turn.
        shared = _shared(tail, self.whole[at:])
        closed = [m.end() for token in specials if token for m in re.finditer(re.escape(token), shared)]
        if closed and bookend == bookends(index)[1]:
            return at + max(closed)
        raise self._lost(index)

    def _continued(self, index: int, messages: list[dict], **variables: Any) -> tuple[int, str, str]:
        """The last bookend in the text of some messages, where the whole text goes on behind it, and what follows it here."""
        text, _ = render(messages, self.template, **self.variables | variables)
        found = list(_BOOKEND.finditer(text)) if self.has_bookends else []
        if not found:
            return 0, "", text
        if self.whole.count(bookend := found[-1][0]) != 1:
            raise self._lost(index)
        return self.whole.index(bookend) + len(bookend), bookend, text[found[-1].end() :]

    def _lead(self, index: int, at: int) -> str:
        """What the template writes from a position to the text of a message."""
        bookend, text = bookends(index)[0], self.whole
        if not self.has_bookends or text.count(bookend) != 1:  # it says nothing: where would its text be?
            role = self.messages[index]["role"]
            probe = {"role": role, "content": said(self.template, role, bookend + "probe", self.variables)}
            others = [*self.messages[:index], probe, *self.messages[index + 1 :]]
            text, _ = render(others, self.template, **self.variables)
        if text.count(bookend) != 1 or text.index(bookend) < at or not text.startswith(self.whole[:at]):
            raise self._lost(index)
        return text[at : text.index(bookend)]

    def _lost(self, index: int) -> ValueError:
        return ValueError(f"message {index} is not where it should be")


@functools.lru_cache(maxsize=64)
def writes_constant_prompt(template: str) -> bool:
    """Whether what a template writes for `add_generation_prompt` is the same behind every conversation.

    So it is where this is asked for at the top of the template alone, and nothing there is of a message, or was set on the way.
    """
    tree = BoundedEnvironment().parse(template)
    made = {"messages", "loop"} | {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    made |= {macro.name for macro in tree.find_all(nodes.Macro)}
    parts = [x for part in tree.body for x in (part.nodes if isinstance(part, nodes.Output) else [part])]
    for part in parts:
        names = {name.name for name in part.find_all(nodes.Name)}
        if "add_generation_prompt" in names and (made & names or any(part.find_all((nodes.For, nodes.Assign)))):
            return False
    return True


@functools.lru_cache(maxsize=64)
def form_by(template: str) -> bool | None:
    """By what conversations have one form for a template: False by roles, True by the first message too, None by all of them.

    A template that does nothing with `messages` but to go through them writes each by itself; it may ask for roles of others.
    """
    tree, allowed, first = BoundedEnvironment().parse(template), set(), False
    loops = [loop for loop in tree.find_all(nodes.For) if loop.test is None]
    allowed |= {id(loop.iter) for loop in loops}
    for outer in tree.find_all((nodes.Getattr, nodes.Getitem)):
        inner: Any = outer.node
        if not isinstance(inner, nodes.Getitem):
            continue
        number = inner.arg.node if isinstance(inner.arg, nodes.Neg) else inner.arg  # of -1
        name = outer.attr if isinstance(outer, nodes.Getattr) else getattr(outer.arg, "value", None)
        if isinstance(number, nodes.Const) and (name == "role" or getattr(inner.arg, "value", None) == 0):
            allowed.add(id(inner.node))
            first = first or name != "role"
    names = [name for name in tree.find_all(nodes.Name) if name.name in ("messages", "namespace")]
    beside = {"previtem", "nextitem", "changed"} & {node.attr for node in tree.find_all(nodes.Getattr)}
    return None if beside or any(id(name) not in allowed for name in names) else first


@functools.lru_cache(maxsize=256)
def _places_of(template: str, form: str) -> dict[tuple, list[int]]:
    """Of conversations of one form and a template: where turns start and end between messages, and how often that was asked."""
    return {}


def _shared(a: str, b: str) -> str:
    """What two texts begin with alike."""
    return a[: next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]
