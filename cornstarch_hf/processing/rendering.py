"""Renders a conversation's messages by a chat template, and finds out what a template can write.

`template_sandbox` runs the template; `conversations` makes the messages.
"""

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import get_json_schema

from .placeholder_text import occurrences
from .template_sandbox import TemplateLimit, render_template

DEFAULT_TEMPLATE = """\
{%- for message in messages %}
{{- message['role'] + ':\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] }}{{ eos_token or '' }}{% endgeneration %}
{%- else %}
{{- message['content'] }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PLAIN = (str, int, float, bool, type(None))
_END = "\udfff"  # marks where the last message's text ends, which goes on; half a surrogate pair, which no text has
# What a template raises that does not know something, or refuses it.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ConversationError(jinja2.TemplateError, ValueError):
    """A conversation that does not become text: it is refused, by the chat template or by its reader."""


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """What goes wrong with a conversation as TypeError or ConversationError that says where."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{where}{error}") from error
    except TEMPLATE_ERRORS as error:
        raise ConversationError(f"{where}{error}") from error


def tool_schemas(tools: Sequence[Any] | None) -> list[dict] | None:
    """JSON schemas of tools, which are schemas already or documented functions (ValueError: something else)."""
    for tool in tools or ():
        if not (isinstance(tool, Mapping) or inspect.isfunction(tool) or inspect.ismethod(tool)):
            raise ValueError(f"A tool must be a JSON schema or a documented function, got {tool!r:.100}.")
    schemas = [dict(tool) if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools or ()]
    return None if tools is None else schemas


def render(
    messages: list[dict],
    template: str,
    *,
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    mark_assistant: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and with `mark_assistant` where the template's `generation` blocks, if any, lie in it.

    Args:
        tools: JSON schemas, or functions, of which schemas are made.
        continue_final_message: end the text where the content of the last message ends, or the field of that name.
        add_generation_prompt, documents, **variables: variables of the template; documents are dictionaries.

    Raises:
        TemplateLimit: a bound of `limits` is met.
        jinja2.TemplateError, ValueError, TypeError: the template refuses the conversation, or fails.
    """
    if any(not isinstance(document, Mapping) for document in documents or ()):
        raise TypeError("Each document must be a dict with its 'title' and 'text'.")
    given = [_with_reasoning(message) for message in messages]
    field = "content" if continue_final_message is True else continue_final_message
    said = ""
    if field:
        given, said = _with_end(given, field)
    variables |= {"tools": tool_schemas(tools), "documents": documents, "add_generation_prompt": add_generation_prompt}
    mark_assistant = mark_assistant and bool(GENERATION.search(template))
    text, spans = render_template(given, template, mark_assistant=mark_assistant, **variables)
    return (_up_to_end(text, said, str(field)), spans) if field else (text, spans)


def _reasoning_fields() -> Sequence[str]:
    return getattr(chat_template_utils, "_REASONING_FIELDS", ())  # older versions of transformers know none


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read."""
    found = next((message[key] for key in _reasoning_fields() if message.get(key) is not None), None)
    # A message's own `thinking` wins.
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


def _with_end(messages: list[dict[str, Any]], field: str) -> tuple[list[dict[str, Any]], str]:
    """Messages with a mark, and a space, behind the text that a field of the last one has, and that text."""
    last = messages[-1] if messages else {}
    value = last.get(field)
    if isinstance(value, str):  # reasoning has several names, of which a template reads one
        fields = {
            field,
            *(key for key in _reasoning_fields() if field in _reasoning_fields() and last.get(key) == value),
        }
        return [*messages[:-1], last | dict.fromkeys(fields, f"{value}{_END} ")], value
    parts = list(value) if isinstance(value, (list, tuple)) else []
    for k in reversed(range(len(parts))):
        if isinstance(parts[k], Mapping) and "text" in parts[k]:
            text = parts[k]["text"]
            parts[k] = {**parts[k], "text": f"{text}{_END} "}
            return [*messages[:-1], last | {field: parts}], text
    raise ValueError(
        f"continue_final_message needs a last message with text to continue: expected a string, or parts with text, as "
        f"its {field!r}, got {value!r:.100}."
    )


def _up_to_end(text: str, said: str, field: str) -> str:
    """The text before the mark; without white space at its end where the template strips what it writes."""
    before, mark, behind = text.rpartition(_END)
    if not mark or said.strip() not in before:
        raise ValueError(
            f"continue_final_message: the chat template does not write the last message's {field!r} as it is."
        )
    return before if behind.startswith(" ") else before.rstrip()


# ---- what a template can write, found by rendering short conversations: which roles, in which form, media, tool calls

# Templates written for text alone want each message as one string, others want parts, and many want one for some roles and
# the other for others.  What the template refuses in one conversation is asked for in another one; what it refuses in all is
# not known (None), and then tried with the caller's own variables.
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
    def answer(template: str, *key: Any, variables: Variables | None = None) -> Any:
        found = remembered(template, *key)
        unsure = found is None or found == frozenset()  # some roles are written beside tools alone
        return probe(template, *key, variables=variables) if unsure and variables else found

    return answer


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


def check_written(messages: list[dict], template: str, variables: Mapping[str, Any], text: str | None = None) -> None:
    """Refuse a conversation of which the template leaves out what a message says, or a tool that it calls (ValueError).

    Where its `text` is there already and shows that, nothing is rendered for it.
    """
    if text is not None and _shows_all(text, messages, template, variables):
        return
    ended: list[dict] = []
    wanted: list[tuple[tuple[str, ...], int, str, str]] = []  # marks, how many must come out, and what is missing else
    for index, message in enumerate(messages):
        named, name_end = message, bookends(len(messages) + index)[1]
        if calls := message.get("tool_calls") or ():
            named = call_with_bookend(message, name_end, every=True)
            remedy = "use a template that knows 'tool_calls', or write the call into 'content'"
            wanted.append(((name_end,), len(calls), f"Message {index} calls a tool", remedy))
        told = with_bookends(message, *bookends(index), False)["content"] if message.get("content") else None
        if told is not None and told != message["content"]:
            named = named | {"content": told}
            what = "has text beside the tools that it calls" if calls else f"is of the role {message['role']!r}"
            remedy = "use a template that does, or another role"
            wanted.append((bookends(index), 1, f"Message {index} {what}", remedy))  # one end is enough: some cut texts
        ended.append(named)
    text = _try(ended, template, variables) if wanted else None
    for marks, count, what, remedy in wanted if text is not None else []:
        escaped = [mark.encode("ascii", "backslashreplace").decode() for mark in marks]  # as a list is printed
        if sum(text.count(mark) for mark in (*marks, *escaped)) < count:
            raise ValueError(f"{what}, but the chat template does not write that: {remedy}.")


def _shows_all(text: str, messages: list[dict], template: str, variables: Mapping[str, Any]) -> bool:
    """Whether a rendered text has what each message says, in order, and nobody else can have written it."""
    if any(not isinstance(x, _PLAIN) for x in variables.values()) or any(
        m.keys() - {"role", "content"} for m in messages
    ):
        return False
    said = [
        part if isinstance(part, str) else part.get("text", "") for m in messages for part in _parts(m.get("content"))
    ]
    said = [words for part in said if (words := part.strip())]
    sources = "\n".join(
        [template, *(x for x in variables.values() if isinstance(x, str)), *(m["role"] for m in messages), *said]
    )
    end = 0
    for words in said:
        at = text.find(words, end)
        if at < 0 or text.count(words) != 1 or sources.count(words) != 1:
            return False  # it is not there as it is, or may be somebody else's
        end = at + len(words)
    return True


def _parts(content: Any) -> Sequence[Any]:
    return [content] if isinstance(content, str) else content or ()


def call_with_bookend(message: dict, end: str, every: bool = False) -> dict:
    """A message with a bookend behind the name of the last tool that it calls, or of `every` one; without calls as it is."""
    calls = list(message.get("tool_calls") or ())
    for place in range(0 if every else max(len(calls) - 1, 0), len(calls)):
        function = calls[place].get("function") or calls[place] if isinstance(calls[place], dict) else {}
        if isinstance(function.get("name"), str):
            named = function | {"name": function["name"] + end}
            calls[place] = calls[place] | {"function": named} if calls[place].get("function") else named
    return message | {"tool_calls": calls} if calls else message


def with_bookends(message: dict, start: str, end: str, silent: bool) -> dict:
    """A message with bookends around what it says; where it says nothing and `silent` is given, where it would stand."""
    content = message.get("content")
    if isinstance(content, str) and (content.strip() or (silent and not message.get("tool_calls"))):
        return message | {"content": _enclosed(content, start, end)}
    if not content or isinstance(content, str):
        return call_with_bookend(message, end)
    parts = list(content)
    spoken = [k for k, part in enumerate(parts) if part.get("type") == "text" and part["text"].strip()]
    if spoken:
        parts[spoken[0]] = parts[spoken[0]] | {"text": _enclosed(parts[spoken[0]]["text"], start, "")}
        parts[spoken[-1]] = parts[spoken[-1]] | {"text": _enclosed(parts[spoken[-1]]["text"], "", end)}
    elif silent:
        parts.append({"type": "text", "text": start + end})
    return message | {"content": parts}


def _enclosed(text: str, start: str, end: str) -> str:
    """A text with bookends inside of the white space around it, which templates strip."""
    before = len(text) - len(text.lstrip())
    behind = max(before, len(text.rstrip()))  # white space alone: both bookends go to its end
    return text[:before] + start + text[before:behind] + end + text[behind:]
