"""Renders chat templates within bounds of time, memory and output.  A template is a program that a checkpoint brings.

The sandbox of jinja keeps it from the interpreter, not from `9 ** 9 ** 7` or endless loops.  Here each loop, call, filter
and test is a step of a `Budget`, and what could grow is measured before it is made.  What a template sees besides
(filters, globals, the tags `generation`, `break`, `continue`) is what transformers gives it.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.visitor import NodeTransformer

from .template_bounds import (
    FILTERS,
    METHODS,
    OF_LISTS,
    OPERATORS,
    Budget,
    TemplateLimit,
    bound,
    budget_of_thread,
    length,
    weight,
)
from .template_environment import Spans, TemplateEnvironment, printed

REFUSED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")


# ---- the parts of a template that are counted


class _CountedTokens(Extension):
    """Bounds what a template is parsed from."""

    def filter_stream(self, stream: Any) -> Iterator[Any]:
        """The tokens as they are asked for (TemplateLimit: too many)."""
        for number, token in enumerate(stream, 1):
            bound(number, "MAX_TEMPLATE_TOKENS", "the tokens of the chat template are at least")
            yield token


class _BoundedGenerator(CodeGenerator):
    """Bounds what a template is compiled to, which names and blocks within one another multiply."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.made, self.began = 0, time.thread_time()

    def write(self, x: str) -> None:
        self.made += len(x) + (4 * self._indentation if self._new_lines else 0)
        bound(self.made, "MAX_TEMPLATE_CODE", "the characters of code that the chat template becomes are at least")
        bound(
            time.thread_time() - self.began,
            "MAX_TEMPLATE_SECONDS",
            "the seconds that compiling the chat template takes are",
        )
        super().write(x)


class BoundedEnvironment(TemplateEnvironment):
    """The environment of chat templates with the bounds of this module."""

    intercepted_binops = frozenset(OPERATORS)
    code_generator_class = _BoundedGenerator

    def __init__(self) -> None:
        super().__init__([_CountedTokens])
        self.filters, self.tests, self.globals = _tables()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can grow: its result is measured before it is made."""
        (budget := budget_of_thread.get()).step()
        budget.spend(OPERATORS[operator](left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        (budget := budget_of_thread.get()).step()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple)) and method.__name__ in METHODS:
            args = tuple(_listed(argument) for argument in args)  # an iterator can be read only once
            named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}  # jinja's own
            budget.spend(METHODS[method.__name__](owner, *args, **named))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(weight(result) if isinstance(result, dict) else length(result))
        return result

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        parts = list(parts)
        budget_of_thread.get().spend(sum(map(len, parts)))
        return "".join(parts)


def _loop(items: Any) -> Iterator[Any]:
    """The items of a loop, each of them a step."""
    for item in items:
        budget_of_thread.get().step()
        yield item


def _listed(value: Any) -> Any:
    """What can be read only once as a list, that it may be measured; anything else as it is."""
    return list(_loop(value)) if isinstance(value, Iterator) else value


def _made(value: Any) -> Any:
    """A list, tuple or dictionary written in the template, or what is written out as text."""
    if not isinstance(value, str):  # text that exists already costs nothing
        budget_of_thread.get().spend(weight(value))
    return value


def _text(value: Any) -> Any:
    return printed(_made(value))


def _strings(parts: list[Any]) -> str:
    return "".join(str(_text(part)) for part in _made(parts))


def _compared(value: Any) -> Any:
    """A value that is compared; containers of containers that hold one another many times take long."""
    if isinstance(value, (list, tuple, Mapping)):
        bound(weight(value), "MAX_TEMPLATE_WORK", "the characters and entries that the chat template compares are")
    return value


def _part(items: Any, start: Any, stop: Any, step: Any) -> Any:
    part = items[slice(start, stop, step)]
    budget_of_thread.get().spend(length(part))
    return part


class _Counted(NodeTransformer):
    """What jinja compiles to plain Python becomes calls of the functions above, under their names as filters."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self.generic_visit(node)
        match node:
            case nodes.For():  # for x in a
                node.iter = _by(_loop, node.iter)
            case nodes.Concat():  # a ~ b
                return _by(_strings, nodes.List(node.nodes).set_lineno(node.lineno))
            case nodes.Output():  # {{ a }}; text of the template itself stays
                fixed = (nodes.TemplateData, nodes.Const)
                node.nodes = [child if isinstance(child, fixed) else _by(_text, child) for child in node.nodes]
            case nodes.Compare():  # a == b, a in b
                for owner in (node, *node.ops):
                    owner.expr = owner.expr if isinstance(owner.expr, nodes.Const) else _by(_compared, owner.expr)
            case nodes.List() | nodes.Dict() | nodes.Tuple(ctx="load"):  # [a, b]; no targets as in {% set a, b = ... %}
                return _by(_made, node)
            case nodes.Getitem(arg=nodes.Slice() as ends):  # a[b:c]
                none = nodes.Const(None).set_lineno(node.lineno)
                return _by(_part, node.node, *(end or none for end in (ends.start, ends.stop, ends.step)))
        return node


def _by(function: Callable, first: Any, *others: Any) -> Any:
    return nodes.Filter(first, function.__name__, list(others), [], None, None).set_lineno(first.lineno or 1)


def _bounded_filter(name: str, function: Callable) -> Callable:
    skipped = int(hasattr(function, "jinja_pass_arg"))  # jinja's own argument in front

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        (budget := budget_of_thread.get()).step()
        value, others = _listed(args[skipped]), args[skipped + 1 :]
        if name not in OF_LISTS:
            _made(value)
        if name in FILTERS:
            budget.spend(FILTERS[name](value, *others, **kwargs))
        result = function(*args[:skipped], value, *others, **kwargs)
        budget.spend(length(result))
        return result

    return bounded


def _bounded_test(function: Callable) -> Callable:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        budget_of_thread.get().step()
        return function(*map(_compared, args), **kwargs)

    return bounded


@functools.cache
def _tables() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The filters, tests and globals that transformers' chat templates find, bounded."""
    theirs = TemplateEnvironment()
    filters = {n: _bounded_filter(n, f) for n, f in theirs.filters.items() if n not in REFUSED_FILTERS}
    filters |= {function.__name__: function for function in (_loop, _strings, _made, _text, _compared, _part)}
    tests = {name: _bounded_test(test) for name, test in theirs.tests.items()}  # type: ignore[arg-type]
    return filters, tests, {name: value for name, value in theirs.globals.items() if name != "lipsum"}  # endless text


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> tuple[CodeType, frozenset[str], str]:
    """A template's code, of which nothing is computed yet, and its `template_contents`.

    TemplateLimit, or another TemplateError, if it cannot be compiled.
    """
    bound(len(template), "MAX_TEMPLATE_CHARACTERS", "the characters of the chat template are")
    made = BoundedEnvironment()
    try:
        tree = made.parse(template)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        names, blocks = {node.name for node in tree.find_all(nodes.Name)}, tree.find_all((nodes.Stmt, nodes.CondExpr))
        copies = len(names) * sum(not isinstance(block, (nodes.Output, nodes.Assign)) for block in blocks)
        bound(copies, "MAX_TEMPLATE_CODE", "the names of the chat template, times its blocks that each copy them, are")
        tree = _Counted().visit(tree)
        code = made.compile(tree)
        return code, frozenset(meta.find_undeclared_variables(tree)), "\0".join(pieces)
    except jinja2.TemplateError:
        raise
    except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"The chat template is nested too deeply ({type(error).__name__}).") from error
    except ValueError as error:  # of numbers with thousands of digits
        raise TemplateLimit(f"The chat template cannot be compiled ({error!s:.200}).") from error


def template_contents(template: str) -> tuple[frozenset[str], str]:
    """The variables that a template reads, and the text that it has by itself, pieces joined by null characters."""
    return _compiled(template)[1:]


def render_template(
    messages: list[dict[str, Any]], template: str, *, mark_assistant: bool = False, **variables: Any
) -> tuple[str, Spans]:
    """The text of one conversation, and with `mark_assistant` where the template's `generation` blocks lie in it.

    Raises:
        TemplateLimit: a bound of `limits` is met.
        jinja2.TemplateError, ValueError, TypeError: the template refuses the conversation, or fails.
    """
    # An environment's tracker of generation marks holds a state.
    made, code = BoundedEnvironment(), _compiled(template)[0]
    given = plain({"messages": messages, **variables})
    outer = budget_of_thread.set(Budget())  # of this rendering alone
    try:
        return made.write(code, given, mark_assistant, _check_output)
    except (RecursionError, OverflowError, MemoryError) as error:
        raise TemplateLimit(f"The chat template goes too deep or too far ({type(error).__name__}).") from error
    finally:
        budget_of_thread.reset(outer)


def _check_output(size: int) -> None:
    bound(size, "MAX_TEMPLATE_OUTPUT", "the characters that the chat template writes are")


def plain(value: Any) -> Any:
    """A value made of JSON types alone, others by the names of their types: a template gets no object's methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)  # a subclass could bring methods
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else [plain(item) for item in value]
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:  # a number of numpy
        return plain(value.item())
    return f"<{type(value).__name__}>"
