"""Where the assistant's turns are in the text of a conversation; `conversations` renders, this module finds.

A turn is what the template writes for an assistant's message behind the generation prompt: reasoning, text, tool calls,
and the marker that ends the turn, so that a model learns to stop.  A template with generation marks says so itself;
without marks the turn is found by rendering the conversation up to it, and what is found is checked.
"""

import re
from collections.abc import Sequence
from typing import Any

from .conversations import GENERATION, TEMPLATE_ERRORS, render

# Ends of what each message says are marked while rendering, by characters of a private plane that no text uses.
_FIRST, _LAST = 0xF0000, 0xFFFFD
_ENDS = re.compile(f"[{chr(_FIRST)}-{chr(_LAST)}]")
_STRATEGIES = ("all", "spoken", "none")  # which messages get marks: templates may treat an empty one differently
_REMEDY = "Put {% generation %} ... {% endgeneration %} around them in the template, or give rows of 'prompt' and 'completion'."
Spans = list[tuple[int, int]]


def assistant_spans(
    messages: list[dict], template: str, *, first: int = 0, specials: Sequence[str] = (), **variables: Any
) -> tuple[str, Spans]:
    """The text of a conversation and the character spans that the assistant wrote.

    Args:
        messages: as `conversations.ConversationReader` reads them.
        template: a Jinja template.
        first: the first message whose turn counts; earlier ones are context.
        specials: special tokens of the tokenizer, which tell where a turn ends in templates that end a conversation
            otherwise than a turn.
        **variables: of the template.

    Returns:
        text, and spans in order that do not overlap; each has the turn's end marker, none has its header.

    Raises:
        ValueError: turns cannot be told apart, or the template leaves out a tool call.
    """
    variables = variables | {"add_generation_prompt": False}
    marked = bool(GENERATION.search(template))
    text, spans = render(messages, template, mark_assistant=marked, **variables)
    _check_tool_calls(messages, template, variables)
    if marked and first == 0:
        return text, spans
    problem: Exception | None = None
    undisturbed = False
    for ends in _STRATEGIES:
        if undisturbed and ends == "none":
            break  # what marks could not tell apart is not to be guessed without them
        try:
            turns = _Turns(messages, template, variables, ends)
            undisturbed = undisturbed or (turns.with_ends and turns.plain(turns.whole) == text)
            if turns.plain(turns.whole) == text:
                found = turns.generated(first) if marked else turns.found(first, specials)
                return text, [(turns.moved(a), turns.moved(b)) for a, b in found]
        except TEMPLATE_ERRORS as error:
            problem = problem or error
    lack = "does not tell which turns are the completion's" if marked else "has no generation marks"
    raise ValueError(
        f"The assistant's turns cannot be found: the chat template {lack}, and changes earlier text as the conversation "
        f"grows, or cannot be rendered up to a turn{f' ({problem})' if problem else ''}. {_REMEDY}"
    ) from problem


def _check_tool_calls(messages: list[dict], template: str, variables: dict[str, Any]) -> None:
    """Refuse a conversation with a turn of tool calls that the template does not write."""
    calling = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if not calling:
        return
    marked = [_with_end_of_calls(m, _ends(i)[1]) if m.get("tool_calls") else m for i, m in enumerate(messages)]
    text, _ = render(marked, template, **variables)
    for index in calling:
        if marked[index] != messages[index] and _ends(index)[1] not in text:
            raise ValueError(
                f"Message {index} calls a tool, but the chat template does not write that: use a template that knows "
                "'tool_calls', or write the call into 'content'."
            )


class _Turns:
    """Assistant turns of one conversation, found with or without marked ends of messages."""

    def __init__(self, messages: list[dict], template: str, variables: dict[str, Any], ends: str):
        self.template, self.variables = template, variables
        self.messages = messages
        self.with_ends = ends != "none"
        if self.with_ends:
            silent = ends == "all"
            self.messages = [_with_ends(message, *_ends(index), silent) for index, message in enumerate(messages)]
        self.generation: Spans = []
        self.whole, self.generation = render(self.messages, template, mark_assistant=True, **variables)

    def plain(self, text: str) -> str:
        """A text without the marked ends."""
        return _ENDS.sub("", text) if self.with_ends else text

    def moved(self, position: int) -> int:
        """Where a position of the marked text is in the plain one."""
        return len(self.plain(self.whole[:position]))

    def found(self, first: int, specials: Sequence[str]) -> Spans:
        """Spans in the marked text; ValueError where a turn cannot be told from others."""
        spans: Spans = []
        for index, message in enumerate(self.messages):
            if index < first or message.get("role") != "assistant":
                continue
            start, end = self._start(index), self._end(index, specials)
            if start is None or end is None or start > end or (spans and start < spans[-1][1]):
                raise ValueError(f"message {index} is not where it should be")
            inside = set(_ENDS.findall(self.whole[start:end])) if self.with_ends else set()
            own = {mark for mark in _ends(index) if self.with_ends and mark in self.whole}
            if inside != own:
                raise ValueError(f"message {index} has text of another message in it, or lacks its own")
            spans.append((start, end))
        return spans

    def generated(self, first: int) -> Spans:
        """Spans that the template marks, of the messages from `first` on; ValueError where that is unclear."""
        known = [i for i in range(first) if self.whole.count(_ends(i)[1]) == 1]
        last = known[-1] if known else -1
        if any(message.get("role") == "assistant" for message in self.messages[last + 1 : first]):
            raise ValueError("the prompt's last turn says nothing")
        start = self.whole.index(_ends(last)[1]) if known else 0
        return [span for span in self.generation if span[0] >= start]

    def _rest(self, messages: list[dict], prompt: bool = False) -> tuple[str, str]:
        """The last marked end in the text of some messages, and what follows it."""
        text, _ = render(messages, self.template, **(self.variables | {"add_generation_prompt": prompt}))
        ends = list(_ENDS.finditer(text)) if self.with_ends else []
        return (ends[-1][0], text[ends[-1].end() :]) if ends else ("", text)

    def _after(self, end: str) -> int | None:
        """The position behind a marked end, the start of the text for none."""
        if not end:
            return 0
        return self.whole.index(end) + 1 if self.whole.count(end) == 1 else None

    def _start(self, index: int) -> int | None:
        """Behind what the generation prompt writes, where the template has one, else behind the turn's header."""
        if index == 0:
            return self._first_start()
        end, prompt = self._rest(self.messages[:index], prompt=True)
        _, bare = self._rest(self.messages[:index])
        at = self._after(end)
        if at is None:
            return None
        if prompt != bare and self.whole.startswith(prompt, at):
            return at + len(prompt)
        lead = self._lead(index, at)
        if lead is None:
            return None
        led = at + len(lead) if self.whole.startswith(lead, at) else None
        if prompt != bare:  # a prompt that also opens a reasoning block, which the turn does not have
            shared = _shared(prompt, lead)  # white space behind it is the message's own
            return at + len(shared) if led is not None and not lead[len(shared) :].strip() else None
        if not lead.startswith(bare) or not self.whole.startswith(bare, at):
            return None
        return led if lead[len(bare) :].strip() else at + len(bare)

    def _first_start(self) -> int | None:
        """The start of a conversation's first turn, by the generation prompt that would follow the whole of it."""
        lead = self._lead(0, 0)
        grown, _ = render(self.messages, self.template, **(self.variables | {"add_generation_prompt": True}))
        if (
            lead is None
            or not self.whole.startswith(lead)
            or not (grown.endswith(lead) or grown.startswith(self.whole))
        ):
            return None
        prompt = "" if grown.endswith(lead) else grown[len(self.whole) :]
        return lead.rfind(prompt) + len(prompt) if prompt and prompt in lead else len(lead)

    def _lead(self, index: int, at: int) -> str | None:
        """What the template writes from a position to the text of a message."""
        start = _ends(index)[0]
        text = self.whole
        if not self.with_ends or text.count(start) != 1:  # it says nothing: where would its text be?
            probe = {"role": self.messages[index]["role"], "content": start + "probe"}
            text, _ = render(
                [*self.messages[:index], probe, *self.messages[index + 1 :]], self.template, **self.variables
            )
        if text.count(start) != 1 or text.index(start) < at or not text.startswith(self.whole[:at]):
            return None
        return text[at : text.index(start)]

    def _end(self, index: int, specials: Sequence[str]) -> int | None:
        """Behind all that the template writes for a message, its end marker included."""
        if index == len(self.messages) - 1:
            return len(self.whole)
        end, tail = self._rest(self.messages[: index + 1])
        at = self._after(end)
        if at is None or self.whole.startswith(tail, at):
            return None if at is None else at + len(tail)
        if end != _ends(index)[1]:
            return None
        # The template ends a conversation otherwise than a turn; a special token that both have ends the turn.
        shared = _shared(tail, self.whole[at : at + len(tail)])
        closed = [m.end() for token in specials if token for m in re.finditer(re.escape(token), shared)]
        return at + max(closed) if closed else None


def _shared(a: str, b: str) -> str:
    """What two texts begin with alike."""
    return a[: next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _ends(index: int) -> tuple[str, str]:
    return chr(_FIRST + 2 * index), chr(_FIRST + 2 * index + 1)


def _with_ends(message: dict, start: str, end: str, silent: bool) -> dict:
    """A message with marks at both ends of what it says, inside of white space that templates strip.

    Where it says nothing and `silent` is given, the marks stand where it would.
    """
    content = message.get("content")
    if isinstance(content, str) and (content.strip() or (silent and not message.get("tool_calls"))):
        return message | {"content": _closed(_opened(content, start), end)}
    if not content or isinstance(content, str):
        return _with_end_of_calls(message, end)
    parts = list(content)
    spoken = [k for k, part in enumerate(parts) if part.get("type") == "text" and part["text"].strip()]
    if spoken:
        parts[spoken[0]] = parts[spoken[0]] | {"text": _opened(parts[spoken[0]]["text"], start)}
        parts[spoken[-1]] = parts[spoken[-1]] | {"text": _closed(parts[spoken[-1]]["text"], end)}
    elif silent:
        parts.append({"type": "text", "text": start + end})
    return message | {"content": parts}


def _with_end_of_calls(message: dict, end: str) -> dict:
    """A message that says nothing, with the mark behind the name of the last tool that it calls."""
    calls = list(message.get("tool_calls") or ())
    if not calls or not isinstance(calls[-1], dict):
        return message
    call = calls[-1].get("function") or calls[-1]
    if not isinstance(call.get("name"), str):
        return message
    named = call | {"name": call["name"] + end}
    calls[-1] = calls[-1] | {"function": named} if calls[-1].get("function") else named
    return message | {"tool_calls": calls}


def _opened(text: str, mark: str) -> str:
    spoken = text.lstrip()
    return text[: len(text) - len(spoken)] + mark + spoken


def _closed(text: str, mark: str) -> str:
    spoken = text.rstrip()
    return spoken + mark + text[len(spoken) :]
