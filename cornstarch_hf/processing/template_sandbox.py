"""Renders chat templates within bounds of time, memory and output.  A template is a program that a checkpoint brings.

The sandbox of jinja keeps it from the interpreter, not from `9 ** 9 ** 7` or endless loops.  Here each loop, call, filter
and test is a step of a `Budget`, and what could grow is measured before it is made.  What a template sees besides
(filters, globals, the tags `generation`, `break`, `continue`) is what transformers gives it.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView
from contextvars import ContextVar
from types import CodeType
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.visitor import NodeTransformer

from ..limits import cap, check
from .template_environment import Spans, TemplateEnvironment, printed

REFUSED_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_BITS = 4096  # of an integer that a template computes
_WIDTH = 10_000  # of a padded or indented string


class TemplateLimit(jinja2.TemplateError, ValueError):
    """A chat template went beyond its bounds; the message names the cap."""


class Budget:
    """What one rendering has used: passes through loops, calls, filters and tests; characters and entries made; time."""

    def __init__(self) -> None:
        self.steps, self.work = 0, 0
        self.began = time.thread_time()  # of computing: on a busy machine a harmless template may wait for long

    def step(self) -> None:
        self.steps += 1
        _check(self.steps, "MAX_TEMPLATE_STEPS", "the chat template's steps are")
        _check(time.thread_time() - self.began, "MAX_TEMPLATE_SECONDS", "the seconds that the chat template takes are")

    def spend(self, size: int) -> None:
        self.work += size
        _check(self.work, "MAX_TEMPLATE_WORK", "the characters and entries that the chat template makes are")


# Each thread has its own, and none has one while it compiles: jinja tries to compute constants then, and leaves what raises.
_budget: ContextVar[Budget] = ContextVar("_budget")


def _check(value: float, name: str, what: str) -> None:
    try:
        check(value, name, what)
    except ValueError as error:
        raise TemplateLimit(str(error)) from error


# ---- how much an operation will make, at most


def weight(value: Any) -> int:
    """Characters that a value has as text, or entries of 8 characters each; stops above `MAX_TEMPLATE_WORK`."""
    total, pending, limit = 0, [value], cap("MAX_TEMPLATE_WORK")
    while pending and total <= limit:  # containers that hold one another many times would never end
        item = pending.pop()
        if isinstance(item, (Mapping, set, frozenset, MappingView, range, list, tuple)):
            total += 8 * len(item)  # a pointer each
            pending += [*item, *(item.values() if isinstance(item, Mapping) else ())]  # type: ignore[misc]
        else:
            total += _length(item)
    return total


def _length(value: Any) -> int:
    """What a value takes by itself; what a list holds was counted when that was made."""
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple)) else 8


def _at_most(most: int, size: int, what: str) -> None:
    if size > most:
        raise TemplateLimit(f"The chat template asks for {what} of {size:,}, more than {most:,}.")


def _widest(*given: Any, **named: Any) -> int:
    """The largest number, or length of text, among arguments that say how wide something becomes."""
    values = [v for v in (*given, *named.values()) if isinstance(v, (int, str))]
    _at_most(_WIDTH, max((abs(v) for v in values if isinstance(v, int)), default=0), "a width or a number of digits")
    return max((v if isinstance(v, int) else len(v) for v in values), default=0)


def _widened(text: Any, *given: Any, **named: Any) -> int:
    """Of padding, or of an indent in front of each line; without a width jinja and Python take 80 at most."""
    lines = text.count("\n") + text.count("\t") + 1 if isinstance(text, str) else 1
    return weight(text) + lines * max(80, _widest(*given, **named))


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any, **named: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def _strung(separator: Any, items: Any = ()) -> int:
    return weight(items) + len(str(separator)) * (len(items) if hasattr(items, "__len__") else 0)


def _formatted(text: Any, *values: Any, **named: Any) -> int:
    """Of a format of either kind, with `%` or with `{}`."""
    plain = str(text, "latin-1") if isinstance(text, bytes) else str(text)
    if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", plain):
        raise TemplateLimit("The chat template formats by widths of five digits, or by widths that are computed.")
    return len(plain) + (max(plain.count("{"), plain.count("%")) + 1) * (_WIDTH + weight(values) + weight(named))


def _summed(items: Any, attribute: Any = None, start: Any = 0) -> int:
    return weight(items) * (len(items) if isinstance(start, (list, tuple)) and hasattr(items, "__len__") else 1)


def _power(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _at_most(_BITS, left.bit_length() * abs(right), "an integer with a number of bits")
    return 8


def _product(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        _at_most(_BITS, left.bit_length() + right.bit_length(), "an integer with a number of bits")
    items, times = (left, right) if isinstance(right, int) else (right, left)
    repeats = isinstance(times, int) and isinstance(items, (str, bytes, list, tuple))
    return weight(items) * max(times, 0) if repeats else 8


OPERATORS: dict[str, Callable[[Any, Any], int]] = {
    "**": _power,
    "*": _product,
    "+": lambda left, right: _length(left) + _length(right),
    "%": lambda left, right: _formatted(left, right) if isinstance(left, (str, bytes)) else 8,
}
# What a string method or a filter of that name makes; methods of other names make no more than they are given.
GROWING: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "indent", "expandtabs"), _widened),
    **dict.fromkeys(("batch", "slice", "round", "to_bytes"), _widened),
    **dict.fromkeys(("format", "format_map"), _formatted),
    **dict.fromkeys(("escape", "e", "forceescape"), lambda text: 6 * weight(text)),
    "replace": _replaced,
    "translate": lambda text, table: len(text) * max([1, *map(_length, getattr(table, "values", lambda: table)())]),
    "tojson": lambda value, *given, **named: weight(value) * (6 + _widest(*given, **named)),
    "sum": _summed,
}
_METHODS = GROWING | {"join": _strung, **dict.fromkeys(("index", "count"), lambda items, *_: weight(items))}
_FILTERS = GROWING | {"join": lambda items, d="", *_, **named: _strung(d, items)}
# Filters that hand on the items of a list; the others turn what is no text into text, or compare all of it.
_OF_LISTS = frozenset(
    [
        *("attr", "count", "d", "default", "first", "items", "join", "last", "length", "list", "map", "random"),
        *("reject", "rejectattr", "reverse", "select", "selectattr"),
    ]
)


# ---- the parts of a template that are counted


class BoundedEnvironment(TemplateEnvironment):
    """The environment of chat templates with the bounds of this module."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self) -> None:
        super().__init__()
        self.filters, self.tests, self.globals = _tables()

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator that can grow: its result is measured before it is made."""
        (budget := _budget.get()).step()
        budget.spend(OPERATORS[operator](left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        (budget := _budget.get()).step()
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, list, tuple)) and method.__name__ in _METHODS:
            args = tuple(_listed(argument) for argument in args)  # an iterator can be read only once
            named = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}  # jinja's own
            budget.spend(_METHODS[method.__name__](owner, *args, **named))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.spend(weight(result) if isinstance(result, dict) else _length(result))
        return result

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        parts = list(parts)
        _budget.get().spend(sum(map(len, parts)))
        return "".join(parts)


def _loop(items: Any) -> Iterator[Any]:
    """The items of a loop, each of them a step."""
    for item in items:
        _budget.get().step()
        yield item


def _listed(value: Any) -> Any:
    """What can be read only once as a list, that it may be measured; anything else as it is."""
    return list(_loop(value)) if isinstance(value, Iterator) else value


def _made(value: Any) -> Any:
    """A list, tuple or dictionary written in the template, or what is written out as text."""
    if not isinstance(value, str):  # text that exists already costs nothing
        _budget.get().spend(weight(value))
    return value


def _text(value: Any) -> Any:
    return printed(_made(value))


def _strings(parts: list[Any]) -> str:
    return "".join(str(_text(part)) for part in _made(parts))


def _compared(value: Any) -> Any:
    """A value that is compared; containers of containers that hold one another many times take long."""
    if isinstance(value, (list, tuple, Mapping)):
        _check(weight(value), "MAX_TEMPLATE_WORK", "the characters and entries that the chat template compares are")
    return value


def _part(items: Any, start: Any, stop: Any, step: Any) -> Any:
    part = items[slice(start, stop, step)]
    _budget.get().spend(_length(part))
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
        (budget := _budget.get()).step()
        value, others = _listed(args[skipped]), args[skipped + 1 :]
        if name not in _OF_LISTS:
            _made(value)
        if name in _FILTERS:
            budget.spend(_FILTERS[name](value, *others, **kwargs))
        result = function(*args[:skipped], value, *others, **kwargs)
        budget.spend(_length(result))
        return result

    return bounded


def _bounded_test(function: Callable) -> Callable:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
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
def _compiled(template: str) -> CodeType:
    """A template's code, of which nothing is computed yet; TemplateLimit or another TemplateError if it cannot be compiled."""
    _check(len(template), "MAX_TEMPLATE_CHARACTERS", "the characters of the chat template are")
    made = BoundedEnvironment()
    try:
        return made.compile(_Counted().visit(made.parse(template)))
    except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"The chat template is nested too deeply ({type(error).__name__}).") from error


@functools.lru_cache(maxsize=64)
def template_contents(template: str) -> tuple[frozenset[str], str]:
    """The variables that a template reads, and the text that it has by itself, pieces joined by null characters."""
    _check(len(template), "MAX_TEMPLATE_CHARACTERS", "the characters of the chat template are")
    try:
        tree = BoundedEnvironment().parse(template)
        pieces = [node.data for node in tree.find_all(nodes.TemplateData)]
        pieces += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return frozenset(meta.find_undeclared_variables(_Counted().visit(tree))), "\0".join(pieces)
    except (RecursionError, SyntaxError, MemoryError, OverflowError) as error:
        raise TemplateLimit(f"The chat template is nested too deeply ({type(error).__name__}).") from error


def render_template(
    messages: list[dict[str, Any]], template: str, *, mark_assistant: bool = False, **variables: Any
) -> tuple[str, Spans]:
    """The text of one conversation, and with `mark_assistant` where the template's `generation` blocks lie in it.

    Raises:
        TemplateLimit: a bound of `limits` is met.
        jinja2.TemplateError, ValueError, TypeError: the template refuses the conversation, or fails.
    """
    made, code = BoundedEnvironment(), _compiled(template)  # an environment's tracker of generation marks holds a state
    given = plain({"messages": messages, **variables})
    outer = _budget.set(Budget())  # of this rendering alone
    try:
        return made.write(code, given, mark_assistant, _check_output)
    except (RecursionError, OverflowError, MemoryError) as error:
        raise TemplateLimit(f"The chat template goes too deep or too far ({type(error).__name__}).") from error
    finally:
        _budget.reset(outer)


def _check_output(size: int) -> None:
    _check(size, "MAX_TEMPLATE_OUTPUT", "the characters that the chat template writes are")


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
