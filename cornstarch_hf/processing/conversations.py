"""Turns conversations, messages with media parts, into text with placeholders, by any chat template.

Templates written for text alone get each message as one string; templates that know parts get parts, and place the
media themselves where they can.  `assistant_turns` finds the assistant's turns in what is rendered here.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import get_json_schema

from .placeholder_text import mark_typed, occurrences, unmark
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
_PROBE = "cornstarchprobe"  # a word that no template writes by itself
_END = "\ue0c2"  # marks where the last message's content ends, which goes on
# What a template raises that does not know something, or refuses it.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError)
NO_ITEM = object()  # a part that tells where an item stands, but not which


@dataclass
class ConversationReader:
    """Takes the media out of conversations and makes messages for templates of the rest."""

    tokens: Mapping[str, str]  # placeholder token of each modality
    names_of: Callable[[str], list[str]]  # modalities that a part's type means, a name or a kind; ValueError if unclear
    kinds: Mapping[str, str]  # of the modalities

    def read(
        self, conversation: Sequence[Mapping[str, Any]], template: str, given: Mapping[str, Sequence[Any]] | None = None
    ) -> tuple[list[dict], dict[str, list]]:
        """Messages with typed placeholders marked, and each modality's media, `given` ones for parts without, in order."""
        media: dict[str, list] = {name: [] for name in self.tokens}
        messages = [self._message(message, template, media) for message in conversation]
        for name, items in (given or {}).items():
            bare = sum(item is NO_ITEM for item in media[name])
            if bare != len(items):
                remedy = f"put a part {{'type': {name!r}}} (or of its kind) for each item where it belongs in 'content'"
                told = f"{len(items)} items were given for {bare} parts without one"
                raise ValueError(f"{name}: {told}: {remedy}; {self.tokens[name]} typed in a string is text.")
            rest = iter(items)
            media[name] = [next(rest) if item is NO_ITEM else item for item in media[name]]
        found = {name: [item for item in items if item is not NO_ITEM] for name, items in media.items()}
        return messages, {name: items for name, items in found.items() if items}

    def _message(self, message: Mapping[str, Any], template: str, media: dict[str, list]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise TypeError(f"A message must be a dict with 'role' and 'content', got {type(message).__name__}.")
        marked = {k: self._marked(v) for k, v in message.items() if k != "content" and v is not None}
        content = message.get("content")
        if content is None:  # templates ask whether a turn of tool calls says something
            return marked | ({"content": None} if message.get("tool_calls") and "content" in message else {})
        if isinstance(content, str):
            text = self._marked(content)
            only_parts = handles_parts(template) and not handles_strings(template)
            return marked | {"content": [{"type": "text", "text": text}] if only_parts else text}
        parts = [self._part(part, template, media) for part in content]  # media are taken out on the way
        return marked | {"content": parts if handles_parts(template) else "".join(part["text"] for part in parts)}

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return mark_typed(value, list(self.tokens.values()))
        if isinstance(value, Mapping):
            return {key: self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _part(self, part: Any, template: str, media: dict[str, list]) -> dict[str, Any]:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping) or "type" not in part:
            raise TypeError(f"A content part must be a string or a dict with a 'type', got {part!r:.100}.")
        if part["type"] == "text":
            if not isinstance(text := part.get("text"), str):
                raise ValueError(f"A part of type 'text' must have a string as its 'text', got {text!r:.100}.")
            return {"type": "text", "text": self._marked(text)}
        kind = "image" if part["type"] == "image_url" else part["type"]  # OpenAI's word for it
        names = self.names_of(kind)
        item = _payload(part, [kind, *(self.kinds[name] for name in names)])
        for name in names:
            media[name].append(NO_ITEM if item is None else item)
        # A part stays where the template itself writes this modality's placeholder; else its tokens stand as text.
        alone = names[0] if len(names) == 1 and self.kinds[names[0]] == kind else None
        if alone and template_writes_placeholder(template, kind, self.tokens[alone]):
            return {"type": kind}
        # Encoders that share the item: a placeholder for each, one behind the other.
        return {"type": "text", "text": "".join(self.tokens[name] for name in names)}


def _payload(part: Mapping[str, Any], kinds: Sequence[str]) -> Any:
    """What a media part holds: under its type or kind, or as url, path or base64; None for a bare placeholder."""
    if part["type"] == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, Mapping) else value
    for key in (*kinds, "bytes", "url", "path", "base64", "data", "array"):
        value = part.get(key)
        if value is None or (isinstance(value, Mapping) and all(v is None for v in value.values())):
            continue  # a table's gap, or a struct of gaps
        rates = {key: part[key] for key in ("sampling_rate", "fps") if part.get(key) is not None}
        return value if not rates or isinstance(value, (str, bytes, Mapping)) else {"array": value, **rates}
    return None


def render(
    messages: list[dict],
    template: str,
    *,
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    mark_assistant: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and with `mark_assistant` where the template's `generation` blocks, if any, lie in it.

    Args:
        tools: JSON schemas, or functions, of which schemas are made.
        continue_final_message: end the text where the content of the last message ends.
        add_generation_prompt, documents, **variables: variables of the template; documents are dictionaries.

    Raises:
        TemplateLimit: a bound of `limits` is met.
        jinja2.TemplateError, ValueError, TypeError: the template refuses the conversation, or fails.
    """
    if any(not isinstance(document, Mapping) for document in documents or ()):
        raise TypeError("Each document must be a dict with its 'title' and 'text'.")
    given = [_with_reasoning(message) for message in messages]
    given = _with_mark(given) if continue_final_message else given
    for tool in tools or ():
        if not (isinstance(tool, Mapping) or inspect.isfunction(tool) or inspect.ismethod(tool)):
            raise ValueError(f"A tool must be a JSON schema or a documented function, got {tool!r:.100}.")
    schemas = [dict(tool) if isinstance(tool, Mapping) else get_json_schema(tool) for tool in tools or ()]
    variables |= {"tools": None if tools is None else schemas, "documents": documents}
    variables |= {"add_generation_prompt": add_generation_prompt}
    mark_assistant = mark_assistant and bool(GENERATION.search(template))
    text, spans = render_template(given, template, mark_assistant=mark_assistant, **variables)
    if not continue_final_message:
        return text, spans
    before, mark, _ = text.rpartition(_END)
    if not mark:
        raise ValueError("continue_final_message: the chat template does not write the last message's text.")
    return before, spans


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read; older versions of transformers know none."""
    fields = getattr(chat_template_utils, "_REASONING_FIELDS", ())
    found = next((message[key] for key in fields if message.get(key) is not None), None)
    # A message's own `thinking` wins.
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}


def _with_mark(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with a mark behind the content of the last one."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], messages[-1] | {"content": content + _END}]
    parts = list(content or [])
    for k in reversed(range(len(parts))):
        if isinstance(parts[k], Mapping) and "text" in parts[k]:
            parts[k] = {**parts[k], "text": parts[k]["text"] + _END}
            return [*messages[:-1], messages[-1] | {"content": parts}]
    raise ValueError("continue_final_message needs a last message with text to continue.")


@functools.lru_cache(maxsize=64)
def handles_parts(template: str) -> bool:
    """Whether a template renders a list of content parts, rather than one string."""
    rendered = _try([{"type": "text", "text": _PROBE}], template)
    # A template for strings prints the list of parts as Python does, with its keys.
    return _PROBE in rendered and "'text'" not in rendered and '"text"' not in rendered


@functools.lru_cache(maxsize=64)
def handles_strings(template: str) -> bool:
    """Whether a template renders a string as a message's content; some render parts alone and lose strings."""
    return _PROBE in _try(_PROBE, template)


@functools.lru_cache(maxsize=256)
def template_writes_placeholder(template: str, kind: str, token: str) -> bool:
    """Whether a template writes a modality's placeholder by itself where a part of that kind stands."""
    if not handles_parts(template):
        return False
    text = {"type": "text", "text": _PROBE}
    texts = [_try(content, template) for content in ([{"type": kind}, text], [text])]
    with_part, without = (occurrences(rendered, [token])[token] for rendered in texts)
    return with_part == without + 1


def _try(content: str | list, template: str) -> str:
    """The text of a conversation of one message, "" if the template refuses it."""
    try:
        return render([{"role": "user", "content": content}], template, bos_token="", eos_token="")[0]
    except TemplateLimit:  # also one of the errors below, but no answer about the template
        raise
    except TEMPLATE_ERRORS:
        return ""


def refuse_typed(text: str) -> str:
    """A rendered text, or ValueError if a user typed a placeholder in it: a plain string could not tell it from a real one."""
    if unmark(text) != text:
        remedy = "use apply_chat_template(..., tokenize=True), which keeps it as text."
        raise ValueError(
            f"A message has a placeholder token as text, which a string cannot tell from a real one: {remedy}"
        )
    return text


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations, not one (ValueError if it is empty)."""
    if not conversation:
        raise ValueError("The conversation is empty.")
    return isinstance(conversation[0], (list, tuple))


def chosen_template(own: str | Mapping[str, str] | None, chosen: str | None) -> str:
    """The template that is given, the one of that name, or the processor's only or "default" one (ValueError if none)."""
    named = dict(own) if isinstance(own, Mapping) else {"default": own}
    template = named.get(chosen or "default", chosen)
    if template is None:
        raise ValueError(f"There is no default chat template, name one by chat_template=, of {sorted(named)}.")
    return template


# A plane for private use: templates leave these characters as they are, and texts have none.
FIRST_BOOKEND, LAST_BOOKEND = 0xF0000, 0xFFFFD


def bookends(index: int) -> tuple[str, str]:
    """The two characters that stand around what a message says: they show where it is in the rendered text."""
    return chr(FIRST_BOOKEND + 2 * index), chr(FIRST_BOOKEND + 2 * index + 1)


def check_tool_calls(messages: list[dict], template: str, variables: dict[str, Any]) -> None:
    """Refuse a conversation with a turn of tool calls that the template does not write."""
    # Written behind a tool's name, a bookend shows whether the template writes that name at all.
    named = [call_with_bookend(message, bookends(i)[1]) for i, message in enumerate(messages)]
    calling = [index for index, message in enumerate(messages) if named[index] != message]
    text = render(named, template, **variables)[0] if calling else ""
    for index in calling:
        if bookends(index)[1] not in text:
            remedy = "use a template that knows 'tool_calls', or write the call into 'content'."
            raise ValueError(f"Message {index} calls a tool, but the chat template does not write that: {remedy}")


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
