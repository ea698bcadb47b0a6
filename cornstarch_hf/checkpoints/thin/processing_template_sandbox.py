"""Chat templates rendered as transformers renders them: the checkpoint that brings one brought this code too."""

import functools
from types import CodeType
from typing import Any

import jinja2
from transformers.utils import chat_template_utils

from ...processing.template_environment import Spans, TemplateEnvironment


class TemplateLimit(jinja2.TemplateError, ValueError):
    """A chat template went beyond its bounds, of which there are none here."""


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> CodeType:
    return TemplateEnvironment().compiled(template)


def template_contents(template: str) -> tuple[frozenset[str], str]:
    """The variables that a template reads, and the text that it has by itself."""
    return (
        chat_template_utils._get_template_variables(template),
        chat_template_utils._get_template_literal_text(template),
    )


def render_template(
    messages: list[dict[str, Any]], template: str, *, mark_assistant: bool = False, **variables: Any
) -> tuple[str, Spans]:
    """The text of one conversation, and where the template's `generation` blocks lie in it."""
    code = _compiled(template)
    return TemplateEnvironment().write(code, {"messages": messages, **variables}, mark_assistant)
