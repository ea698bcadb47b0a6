"""Conversations: messages with media parts to text with placeholders, by any chat template.

Templates written for text alone get each message as one string; templates that know parts get parts, and place the
media themselves where they can.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from .placeholder_text import mark_typed, occurrences, unmark

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
_PROBE = "cornstarchprobe"


class ConversationReader:
    """Takes the media out of conversations and renders the rest.

    Args:
        tokens: placeholder token of each modality.
        names_of: the modalities that a part's type means (a name, or a kind; ValueError where that is unclear).
        kinds: the modalities' kinds.
    """

    def __init__(self, tokens: Mapping[str, str], names_of: Callable[[str], list[str]], kinds: Mapping[str, str]):
        self.tokens, self.names_of, self.kinds = dict(tokens), names_of, dict(kinds)

    def read(self, conversation: Sequence[Mapping[str, Any]], template: str) -> tuple[list[dict], dict[str, list]]:
        """Messages for the template, typed placeholders marked, and the media of each modality in order.

        Raises:
            ValueError: a part of unknown type.
            TypeError: a message or part that is no dict.
        """
        media: dict[str, list] = {name: [] for name in self.tokens}
        messages = [self._message(message, template, media) for message in conversation]
        return messages, {name: items for name, items in media.items() if items}

    def _message(self, message: Mapping[str, Any], template: str, media: dict[str, list]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise TypeError(f"A message must be a dict with 'role' and 'content', got {type(message).__name__}.")
        marked = {k: self._marked(v) for k, v in message.items() if k != "content" and v is not None}
        content = message.get("content")
        if content is None:
            return marked
        if isinstance(content, str):
            return marked | {"content": self._marked(content)}
        parts = [self._part(part, template, media) for part in content]
        if handles_parts(template):
            return marked | {"content": parts}
        return marked | {"content": "".join(part["text"] for part in parts)}

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return mark_typed(value, list(self.tokens.values()))
        if isinstance(value, Mapping):
            return {key: self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _part(self, part: Any, template: str, media: dict[str, list]) -> dict[str, Any]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping) or "type" not in part:
            raise TypeError(f"A content part must be a string or a dict with a 'type', got {part!r:.100}.")
        if part["type"] == "text":
            return {"type": "text", "text": self._marked(part["text"])}
        kind = "image" if part["type"] == "image_url" else part["type"]
        names = self.names_of(kind)
        item = _payload(part, [kind, *(self.kinds[name] for name in names)])
        for name in names:
            if item is not None:
                media[name].append(item)
        if len(names) == 1 and self.kinds[names[0]] == kind and places(template, kind, self.tokens[names[0]]):
            return {"type": kind}
        return {"type": "text", "text": "".join(self.tokens[name] for name in names)}


def _payload(part: Mapping[str, Any], kinds: Sequence[str]) -> Any:
    """What a media part holds: under its type or kind, or as url, path or base64; None for a bare placeholder."""
    if part["type"] == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, Mapping) else value
    for key in (*kinds, "url", "path", "base64", "data", "array"):
        if part.get(key) is not None:
            value = part[key]
            rate = part.get("sampling_rate")
            return {"array": value, "sampling_rate": rate} if rate is not None and not isinstance(value, str) else value
    return None


def render(messages: list[dict], template: str, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and where its assistant turns are, if the template marks them."""
    marks = "generation" in template and variables.pop("mark_assistant", False)
    variables.pop("mark_assistant", None)
    rendered: Any = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=bool(marks), **variables
    )
    texts, spans = rendered
    return texts[0], [tuple(span) for span in spans[0]] if marks and spans else []


def assistant_spans(messages: list[dict], template: str, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation and the character spans that the assistant wrote.

    Where a template has no generation marks, an assistant turn is what follows the text of the conversation so far
    with a generation prompt.

    Raises:
        ValueError: the template rewrites earlier text as a conversation grows, so turns cannot be told apart.
    """
    variables = variables | {"add_generation_prompt": False}
    text, spans = render(messages, template, mark_assistant=True, **variables)
    if "generation" in template and "endgeneration" in template:
        return text, spans
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before, _ = render(messages[:index], template, **(variables | {"add_generation_prompt": True}))
        after, _ = render(messages[: index + 1], template, **variables)
        if not after.startswith(before) or not text.startswith(after):
            raise ValueError(
                "The assistant's turns cannot be found: the chat template has no generation marks and changes earlier "
                "text as the conversation grows. Put {% generation %} ... {% endgeneration %} around them."
            )
        spans.append((len(before), len(after)))
    return text, spans


@functools.lru_cache(maxsize=64)
def handles_parts(template: str) -> bool:
    """Whether a template renders a list of content parts, rather than one string."""
    rendered = _try([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}], template)
    return rendered is not None and _PROBE in rendered and "'text'" not in rendered and '"text"' not in rendered


@functools.lru_cache(maxsize=256)
def places(template: str, kind: str, token: str) -> bool:
    """Whether a template writes a modality's placeholder by itself where a part of that kind stands."""
    if not handles_parts(template):
        return False
    text = {"type": "text", "text": _PROBE}
    with_part, without = (
        _try([{"role": "user", "content": content}], template) for content in ([{"type": kind}, text], [text])
    )
    if with_part is None or without is None:
        return False
    return occurrences(with_part, [token])[token] == occurrences(without, [token])[token] + 1


def _try(messages: list[dict], template: str) -> str | None:
    try:
        return render(messages, template, bos_token="", eos_token="")[0]
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # a template may refuse what it does not know
        return None


def refuse_typed(text: str) -> str:
    """A rendered text without marks; ValueError if a user typed a placeholder in it.

    As a plain string it could not be told from a real one.
    """
    if unmark(text) != text:
        raise ValueError(
            "A message contains a placeholder token as text, which a string cannot tell from a real placeholder: use "
            "apply_chat_template(..., tokenize=True), which keeps it as text."
        )
    return text


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations, not one (ValueError if it is empty)."""
    if not conversation:
        raise ValueError("The conversation is empty.")
    return isinstance(conversation[0], (list, tuple))


def chosen_template(own: str | Mapping[str, str] | None, asked: str | None) -> str:
    """The template to render: one that is given, one of several by its name, or the processor's only or default one.

    Raises:
        ValueError: there is none, or several of which none is called "default".
    """
    named = dict(own) if isinstance(own, Mapping) else {"default": own}
    template = named.get(asked or "default", asked)
    if template is None:
        raise ValueError(f"There is no default chat template, name one by chat_template=, of {sorted(named)}.")
    return template
