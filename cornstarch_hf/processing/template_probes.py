"""Finds out what a chat template can write, by rendering short conversations: which roles, in which form, media, tool calls.

Templates written for text alone want each message as one string, others want parts, and many want one for some roles and
the other for others.  What the template refuses in one conversation is asked for in another one; what it refuses in all is
not known (None), and then tried with the caller's own variables.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .placeholder_text import occurrences
from .rendering import TEMPLATE_ERRORS, render
from .template_sandbox import TemplateLimit

_WORDS = ("cornstarchprobe", "cornstarchother")  # words that no template writes by itself
_PRINTED = re.compile(rf"""["']text["']\s*:\s*["']{_WORDS[0]}""")  # a list of parts as Python or JSON prints it
_TEXTS = [{"type": "text", "text": word} for word in _WORDS]
# What a message's content may be, and the words that must come out: one string, several parts, one part of text.
_FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "string": (_WORDS[0], _WORDS[:1]),
    "parts": (_TEXTS, _WORDS),
    "part": (_TEXTS[:1], _WORDS[:1]),
}
_CALL = {"type": "function", "id": "callprobe", "function": {"name": _WORDS[1], "arguments": {}}}
_SILENT: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
Variables = Mapping[str, Any]
_NO_TOKENS = {"bos_token": "", "eos_token": ""}


def _known(probe: Callable) -> Callable:
    """A probe that remembers its answers, and asks again with the caller's variables where it got none."""
    remembered = functools.lru_cache(maxsize=512)(probe)

    @functools.wraps(probe)
    def asked(template: str, *key: Any, variables: Variables | None = None) -> Any:
        found = remembered(template, *key)
        unsure = found is None or found == frozenset()  # some roles are written beside tools alone
        return probe(template, *key, variables=variables) if unsure and variables else found

    return asked


@_known
def forms(template: str, role: str, variables: Variables = _NO_TOKENS) -> frozenset[str] | None:
    """Forms in which a template writes what a role says, of "string", "parts" and "part" (the first part's text)."""
    found = {form: _writes(template, role, *_FORMS[form], variables) for form in _FORMS}
    return None if set(found.values()) == {None} else frozenset(form for form, written in found.items() if written)


def _writes(template: str, role: str, content: Any, words: tuple[str, ...], variables: Variables) -> bool | None:
    """Whether a role's content comes out; None if no conversation with it is taken."""
    answer = None
    for messages in _conversations(template, role, content, variables):
        text = _try(messages, template, variables)
        if text is not None:
            answer = all(word in text for word in words) and not _PRINTED.search(text)
        if answer:
            break
    return answer


def _conversations(template: str, role: str, content: Any, variables: Variables) -> Iterator[list[dict]]:
    """Short conversations in which a message of that role may stand; behind a system's message where they need one."""
    message = {"role": role, "content": content}
    short = [[message]]
    if role != "user":
        user = {"role": "user", "content": said(template, "user", "q", variables)}
        short = [[message, user], [user, message], [user, message, user], [message]]
    if role == "tool":
        answer = {**message, "tool_call_id": _CALL["id"], "name": _WORDS[1]}
        calls = [{"role": "assistant", "tool_calls": [_CALL], **silent} for silent in _SILENT]
        short = [*([user, call, answer] for call in calls), *short]
    yield from short[1:2] if role == "assistant" else ()  # where one stands most of the time
    yield from short
    for system in ("s", [{"type": "text", "text": "s"}]) if role != "system" else ():
        yield from ([{"role": "system", "content": system}, *messages] for messages in short)


def said(template: str, role: str, text: str, variables: Variables | None = None) -> Any:
    """A text as the content of a message of that role: a string, or the only part where the template loses strings."""
    known = forms(template, role, variables=variables) or {"string"}
    return text if "string" in known else [{"type": "text", "text": text}]


@_known
def writes_placeholder(
    template: str, role: str, kind: str, token: str, variables: Variables = _NO_TOKENS
) -> bool | None:
    """Whether a template writes a modality's placeholder by itself where a part of that kind stands in a role's message."""
    known = forms(template, role, variables=variables)
    if known is None or "parts" not in known:
        return None if known is None else False
    asked = (
        _conversations(template, role, content, variables) for content in ([{"type": kind}, *_TEXTS], list(_TEXTS))
    )
    for with_part, without in zip(*asked, strict=True):
        texts = [_try(messages, template, variables) for messages in (with_part, without)]
        if texts[0] is not None and texts[1] is not None:
            counts = [occurrences(text, [token])[token] for text in texts if text is not None]
            return counts[0] == counts[1] + 1
    return False  # a part of that kind is refused


@_known
def silent_content(template: str, variables: Variables = _NO_TOKENS) -> dict[str, Any] | None:
    """What stands for the content of a turn that only calls tools, so that the call is written and no word "None"."""
    user = {"role": "user", "content": said(template, "user", "q", variables)}
    for silent in _SILENT:
        for as_json in (False, True):  # of the arguments, as some templates want them
            arguments: Any = "{}" if as_json else {}
            call = _CALL | {"function": {"name": _WORDS[1], "arguments": arguments}}
            text = _try([user, {"role": "assistant", "tool_calls": [call], **silent}], template, variables) or ""
            if _WORDS[1] in text and ("None" not in text or "None" in template):
                return silent
    return None


def _try(messages: list[dict], template: str, variables: Variables) -> str | None:
    """The text of a conversation, None if the template refuses it."""
    try:
        return render(messages, template, **variables)[0]
    except TemplateLimit:  # also one of the errors below, but no answer about the template
        raise
    except TEMPLATE_ERRORS:
        return None


# ---- what is written of a conversation at hand


def bookends(index: int) -> tuple[str, str]:
    """What stands around what a message says, to show where it is in the rendered text: halves of surrogate pairs, two each.

    Templates leave them as they are, and no text has them.
    """
    lead, trail = chr(0xD800 + index // 256), 0xDC00 + 2 * (index % 256)
    return lead + chr(trail), lead + chr(trail + 1)


def check_written(messages: list[dict], template: str, variables: Mapping[str, Any]) -> None:
    """Refuse a conversation with a turn of tool calls, or a role, that the template does not write."""
    # Written behind a tool's name, a bookend shows whether the template writes that name at all.
    ended, wanted = list(messages), {}
    for index, message in enumerate(messages):
        end = bookends(index)[1]
        calling = call_with_bookend(message, end)
        if calling != message:
            ended[index] = calling
            wanted[index] = ("calls a tool", "use a template that knows 'tool_calls', or write the call into 'content'")
        elif message.get("content") and not forms(template, message["role"], variables=variables):
            ended[index] = message | {"content": said(template, message["role"], f"x{end}", variables)}
            wanted[index] = (f"is of the role {message['role']!r}", "use a template that knows it, or another role")
    text = render(ended, template, **variables)[0] if wanted else ""
    for index, (what, remedy) in wanted.items():
        if bookends(index)[1] not in text:
            raise ValueError(f"Message {index} {what}, but the chat template does not write that: {remedy}.")


def call_with_bookend(message: dict, end: str) -> dict:
    """A message with a bookend behind the name of the last tool that it calls; without calls as it is."""
    calls = list(message.get("tool_calls") or ())
    if not calls or not isinstance(calls[-1], dict):
        return message
    call = calls[-1].get("function") or calls[-1]
    if not isinstance(call.get("name"), str):
        return message
    named = call | {"name": call["name"] + end}
    calls[-1] = calls[-1] | {"function": named} if calls[-1].get("function") else named
    return message | {"tool_calls": calls}
