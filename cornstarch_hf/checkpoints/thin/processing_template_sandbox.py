"""Chat templates rendered as transformers renders them: the checkpoint that brings one brought this code too."""

from typing import Any

import jinja2
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template


class TemplateLimit(jinja2.TemplateError, ValueError):
    """A chat template went beyond its bounds, of which there are none here."""


def template_contents(template: str) -> tuple[frozenset[str], str]:
    """The variables that a template reads, and the text that it has by itself."""
    return (
        chat_template_utils._get_template_variables(template),
        chat_template_utils._get_template_literal_text(template),
    )


def render_template(
    messages: list[dict[str, Any]], template: str, *, mark_assistant: bool = False, **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of one conversation, and where the template's `generation` blocks lie in it."""
    found: Any = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=mark_assistant, **variables
    )
    texts, spans = found
    return texts[0], [tuple(span) for span in spans[0]] if spans else []
