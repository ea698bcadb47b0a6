"""Renders a conversation's messages by a chat template, whole or up to where the last message goes on.

`template_sandbox` runs the template; `conversations` makes the messages, `template_probes` finds out what a template can write.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import get_json_schema

from .template_sandbox import render_template

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
