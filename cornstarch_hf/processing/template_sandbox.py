"""Chat templates rendered within bounds of time, memory and output.  A template is a program that a checkpoint brings.

The sandbox of jinja keeps a template from the interpreter, not from `9 ** 9 ** 7` or endless loops.  Here operators that
can grow are intercepted, loops, joins and slices are counted, and filters are wrapped.  What a template sees besides
(filters, globals, the tags `generation`, `break`, `continue`) is what transformers gives it.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import _compile_jinja_template, get_json_schema

from .template_bounds import (
    GROWING,
    OPERATORS,
    Budget,
    TemplateLimit,
    _running,
    checked,
    length,
    running,
    weight,
)

REFUSED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
REFUSED_GLOBALS = ("lipsum",)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the bounds of this module."""

    intercepted_binops = frozenset(OPERATORS)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can grow: its result is measured before it is made."""
        budget = running()
        budget.step()
        budget.spend(OPERATORS[operator](left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, method or macro."""
        budget = running()
        budget.step()
        method = getattr(__obj, "__wrapped__", __obj)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            name = method.__name__ if method.__name__ != "join" else "join_method"
            if name == "join_method" and args and not isinstance(args[0], (str, list, tuple, Mapping)):
                args = (_listed(args[0], budget), *args[1:])
            if name in GROWING:
                budget.spend(GROWING[name](owner, *args, **kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(weight(result) if isinstance(result, dict) else length(result))
        return result

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the pieces of a block, macro or template."""
        parts = list(parts)
        running().spend(sum(map(len, parts)))
        return "".join(parts)


def _listed(items: Any, budget: Budget) -> list[Any]:
    found = []
    for item in items:
        budget.step()
        found.append(item)
    return found


class _Steps:
    """The items of a loop, each of them counted."""

    def __init__(self, items: Any, budget: Budget):
        self.items = items if hasattr(items, "__len__") else _listed(items, budget)
        self.budget = budget

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.budget.step()
            yield item


def _loop(items: Any) -> _Steps:
    return _Steps(items, running())


def _concatenated(parts: list[Any]) -> str:
    running().spend(weight(parts))
    return "".join(str(part) for part in parts)


def _text(value: Any) -> Any:
    """A value that is written out."""
    if not isinstance(value, str):
        running().spend(weight(value))
    return value


def _weighed(value: Any) -> Any:
    """A value that is compared; containers of containers that hold one another many times take long."""
    if isinstance(value, (list, tuple, Mapping)):
        checked(weight(value), "MAX_TEMPLATE_WORK", "the characters and entries that the chat template compares are")
    return value


def _made(value: Any) -> Any:
    """A list, tuple or dictionary written in the template."""
    running().spend(weight(value))
    return value


def _sliced(items: Any, start: Any, stop: Any, step: Any) -> Any:
    made = items[slice(start, stop, step)]
    running().spend(length(made))
    return made


class _Counted(NodeTransformer):
    """Loops, joins and slices of a template, which jinja compiles to plain Python, become calls that are counted."""

    def _by(self, name: str, first: Any, *others: Any) -> Any:
        return nodes.Filter(first, name, list(others), [], None, None).set_lineno(first.lineno or 1)

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop over what is counted."""
        self.generic_visit(node)
        node.iter = self._by("_loop", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """``a ~ b``."""
        self.generic_visit(node)
        return self._by("_concatenated", nodes.List(node.nodes).set_lineno(node.lineno))

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        """What is written out; text of the template itself stays."""
        self.generic_visit(node)
        plain = (nodes.TemplateData, nodes.Const)
        node.nodes = [child if isinstance(child, plain) else self._by("_text", child) for child in node.nodes]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        """``a == b``, ``a in b``."""
        self.generic_visit(node)
        for owner in (node, *node.ops):
            if not isinstance(owner.expr, nodes.Const):
                owner.expr = self._by("_weighed", owner.expr)
        return node

    def visit_List(self, node: Any) -> nodes.Expr:
        """``[a, b]``, and likewise tuples that are no targets, and dictionaries."""
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else self._by("_made", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        """``a[b:c]``; other subscripts stay."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        ends = [e or nodes.Const(None).set_lineno(node.lineno) for e in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._by("_sliced", node.node, *ends)


_TEST = "a test"


def _bounded(name: str, function: Callable) -> Callable:
    """A filter or test that is counted, and measured where it can grow."""
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget = running()
        budget.step()
        given = list(args)
        if len(given) > skipped and isinstance(given[skipped], Iterator):
            given[skipped] = _listed(given[skipped], budget)
        if name in GROWING:
            budget.spend(GROWING[name](*given[skipped:], **kwargs))
        for value in given[skipped:] if name == _TEST else ():
            _weighed(value)
        result = function(*given, **kwargs)
        budget.spend(length(result))
        return result

    return bounded


def _of_each_thread(kind: Any) -> Any:
    """The extension that tracks what the assistant wrote, with a state for each thread: they share the environment."""
    if not hasattr(kind, "activate_tracker"):
        return kind
    state = threading.local()

    def kept(key: str) -> property:
        return property(lambda self: getattr(state, key, None), lambda self, value: setattr(state, key, value))

    return type(kind.__name__, (kind,), {key: kept(key) for key in ("_rendered_blocks", "_generation_indices")})


@functools.lru_cache(maxsize=1)
def environment() -> BoundedEnvironment:
    """The environment of transformers' chat templates, bounded."""
    theirs = _compile_jinja_template("").environment
    kinds = [_of_each_thread(type(extension)) for extension in theirs.extensions.values()]
    mine = BoundedEnvironment(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=kinds)
    mine.filters = {n: _bounded(n, f) for n, f in theirs.filters.items() if n not in REFUSED_FILTERS}
    counted = (_loop, _concatenated, _sliced, _text, _weighed, _made)
    mine.filters |= {function.__name__: function for function in counted}
    mine.tests = {name: _bounded(_TEST, test) for name, test in theirs.tests.items()}
    mine.globals = {name: value for name, value in theirs.globals.items() if name not in REFUSED_GLOBALS}
    return mine


@functools.lru_cache(maxsize=64)
def compiled(template: str) -> jinja2.Template:
    """A template, compiled; nothing in it is computed yet.

    Raises:
        TemplateLimit: it is longer than `MAX_TEMPLATE_CHARACTERS`, or nested too deeply to be compiled.
        jinja2.TemplateError: it is no template.
    """
    checked(len(template), "MAX_TEMPLATE_CHARACTERS", "the characters of the chat template are")
    outer, _running.budget = getattr(_running, "budget", None), None
    try:
        tree = _Counted().visit(environment().parse(template))
        code = environment().compile(tree)
    except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"The chat template is nested too deeply ({type(error).__name__}).") from error
    finally:
        _running.budget = outer
    return jinja2.Template.from_code(environment(), code, environment().make_globals(None))


def plain(value: Any) -> Any:
    """A value made of JSON types alone, others by the names of their types: a template gets no object's methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    return (
        plain(value.item())
        if type(value).__module__ == "numpy" and hasattr(value, "item") and value.ndim == 0
        else (f"<{type(value).__name__}>")
    )


def render_template(
    messages: list[dict[str, Any]],
    template: str,
    *,
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    mark_assistant: bool = False,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of one conversation, and where the template's `generation` blocks lie in it.

    Args:
        messages: dictionaries.
        template: a Jinja template.
        tools: JSON schemas, or functions, of which schemas are made.
        documents: dictionaries.
        add_generation_prompt: a variable of the template.
        continue_final_message: end the text where the content of the last message ends.
        mark_assistant: return the spans.
        **variables: further variables.

    Raises:
        TemplateLimit: a bound of `limits` is met.
        jinja2.TemplateError, ValueError, TypeError: the template refuses the conversation, or fails.
    """
    schemas = None if tools is None else [_schema(tool) for tool in tools]
    if any(not isinstance(document, Mapping) for document in documents or ()):
        raise TypeError("Each document must be a dict with its 'title' and 'text'.")
    chat = [_reasoning(plain(message)) for message in messages]
    if continue_final_message:
        _mark_end(chat)
    given = {"messages": chat, "tools": plain(schemas), "documents": plain(documents), **plain(variables)}
    text, spans = _rendered(
        compiled(template), given | {"add_generation_prompt": add_generation_prompt}, mark_assistant
    )
    return (_cut_at_mark(text) if continue_final_message else text), spans


def _rendered(template: jinja2.Template, variables: dict[str, Any], tracked: bool) -> tuple[str, list[tuple[int, int]]]:
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    tracker = environment().activate_tracker if tracked else None
    outer, _running.budget = getattr(_running, "budget", None), Budget()
    size = 0
    try:
        with tracker(blocks, spans) if tracker else contextlib.nullcontext():
            for block in template.generate(**variables):
                size += len(block)
                checked(size, "MAX_TEMPLATE_OUTPUT", "the characters that the chat template writes are")
                blocks.append(block)
    except (RecursionError, OverflowError, MemoryError) as error:
        raise TemplateLimit(f"The chat template goes too deep or too far ({type(error).__name__}).") from error
    finally:
        _running.budget = outer
    return "".join(blocks), [tuple(span) for span in spans]


def _schema(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if inspect.isfunction(tool) or inspect.ismethod(tool):
        return get_json_schema(tool)
    raise ValueError(f"A tool must be a JSON schema or a documented function, got {tool!r:.100}.")


# A message's reasoning goes by several names; templates read the first or the second.  Older versions of transformers
# leave messages as they are.
_REASONING = getattr(chat_template_utils, "_REASONING_FIELDS", ())


def _reasoning(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise TypeError(f"A message must be a dict, got {type(message).__name__}.")
    found = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


_END = "\ue0c2"


def _mark_end(chat: list[dict[str, Any]]) -> None:
    """Put a mark behind the last message's content."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _END
        return
    last = next((part for part in reversed(content or []) if isinstance(part, dict) and "text" in part), None)
    if last is None:
        raise ValueError("continue_final_message needs a last message with text to continue.")
    last["text"] += _END


def _cut_at_mark(text: str) -> str:
    before, mark, _ = text.rpartition(_END)
    if not mark:
        raise ValueError("continue_final_message: the chat template does not write the last message's text.")
    return before
