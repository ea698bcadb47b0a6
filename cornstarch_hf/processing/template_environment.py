"""What chat templates find in transformers, in an environment that keeps marks where a template prints lists and the like.

Python and JSON escape halves of surrogate pairs, by which nothing would find them again.
"""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, MappingView, Sequence
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import _compile_jinja_template

_ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*)\\u(d[89a-f][0-9a-f]{2})")  # behind an even number of backslashes
Spans = list[tuple[int, int]]


def printed(value: Any) -> Any:
    """What is written out: containers as Python prints them, but for marks, halves of surrogate pairs, which it escapes."""
    if not isinstance(value, (Mapping, list, tuple, MappingView)):
        return value
    return _ESCAPED.sub(lambda found: found[1] + chr(int(found[2], 16)), str(value))


def as_string(value: Any) -> str:
    """The filter `string`."""
    return str(printed(value))


def joined(parts: list[Any]) -> str:
    """What `a ~ b` makes."""
    return "".join(map(as_string, parts))


def as_json(value: Any, ensure_ascii: bool = False, *given: Any, **named: Any) -> str:
    """As transformers' `tojson`; marks are not escaped."""
    text = _compile_jinja_template("").environment.filters["tojson"](value, False, *given, **named)
    return (
        re.sub(r"[^\x00-\x7f\ud800-\udfff]", lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text
    )


class _Joins(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        listed = nodes.List(node.nodes).set_lineno(node.lineno)
        return nodes.Filter(listed, joined.__name__, [], [], None, None).set_lineno(node.lineno)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Filters, tests, globals and tags of transformers' chat templates."""

    def __init__(self, more: Sequence[type[Extension]] = ()) -> None:
        theirs = _compile_jinja_template("").environment
        extensions = [type(extension) for extension in theirs.extensions.values()]
        lines = {"trim_blocks": theirs.trim_blocks, "lstrip_blocks": theirs.lstrip_blocks}
        super().__init__(extensions=[*extensions, *more], finalize=printed, **lines)
        own = {"tojson": as_json, "string": as_string, joined.__name__: joined}
        self.filters, self.tests, self.globals = theirs.filters | own, theirs.tests, theirs.globals

    def compiled(self, template: str) -> CodeType:
        """A template's code."""
        return self.compile(_Joins().visit(self.parse(template)))

    def write(
        self, code: CodeType, given: dict[str, Any], mark_assistant: bool, check: Callable[[int], Any] | None = None
    ) -> tuple[str, Spans]:
        """The text that a template's code writes, and where its `generation` blocks lie; `check` gets its length so far."""
        program = jinja2.Template.from_code(self, code, self.make_globals(None))
        blocks: list[str] = []
        spans: Spans = []
        size = 0
        with self.activate_tracker(blocks, spans) if mark_assistant else contextlib.nullcontext():  # type: ignore[attr-defined]
            for block in program.generate(given):
                size += len(block)
                if check:
                    check(size)
                blocks.append(block)
        return "".join(blocks), [tuple(span) for span in spans]
