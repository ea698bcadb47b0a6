"""What a chat template may use while it is compiled and rendered: how much an operation makes is found before it is done.

Knows no template; `template_sandbox` asks, with the caps of `limits`.
"""

import re
import time
from collections.abc import Callable, Mapping, MappingView
from contextvars import ContextVar
from typing import Any

import jinja2

from ..limits import cap, check

_BITS = 4096  # of an integer that a template computes
_CONTAINERS = (Mapping, set, frozenset, MappingView, range, list, tuple)
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
        bound(self.steps, "MAX_TEMPLATE_STEPS", "the chat template's steps are")
        self.clock()

    def clock(self) -> None:
        bound(time.thread_time() - self.began, "MAX_TEMPLATE_SECONDS", "the seconds that the chat template takes are")

    def spend(self, size: int) -> None:
        self.work += size
        bound(self.work, "MAX_TEMPLATE_WORK", "the characters and entries that the chat template makes are")


# Each thread has its own, and none has one while it compiles: jinja tries to compute constants then, and leaves what raises.
budget_of_thread: ContextVar[Budget] = ContextVar("budget_of_thread")


def bound(value: float, name: str, what: str) -> None:
    """Refuse a value above the cap of that name (TemplateLimit that begins with `what`)."""
    try:
        check(value, name, what)
    except ValueError as error:
        raise TemplateLimit(str(error)) from error


# ---- how much an operation will make, at most


def weight(value: Any) -> int:
    """Characters that a value has as text, or entries of 8 characters each; stops above `MAX_TEMPLATE_WORK`."""
    total, pending, limit = 0, [value], cap("MAX_TEMPLATE_WORK")
    budget = budget_of_thread.get(None)
    while pending and total <= limit:  # containers that hold one another many times would never end
        if budget is not None:
            budget.clock()
        item = pending.pop()
        if not isinstance(item, _CONTAINERS):
            total += length(item)
            continue
        # What its containers take by themselves comes first: of many large ones none has to be looked into.
        total += 8 * len(item)  # type: ignore[arg-type]
        if total > limit:
            return total
        items = [*item, *(item.values() if isinstance(item, Mapping) else ())]  # type: ignore[misc]
        inside = [each for each in items if isinstance(each, _CONTAINERS)]
        if (below := total + sum(8 * len(each) for each in inside)) > limit:
            return below
        total += sum(length(each) for each in items if not isinstance(each, _CONTAINERS))
        pending += inside
    return total


def length(value: Any) -> int:
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
    "+": lambda left, right: length(left) + length(right),
    "%": lambda left, right: _formatted(left, right) if isinstance(left, (str, bytes)) else 8,
}
# What a string method or a filter of that name makes; methods of other names make no more than they are given.
GROWING: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "indent", "expandtabs"), _widened),
    **dict.fromkeys(("batch", "slice", "round", "to_bytes"), _widened),
    **dict.fromkeys(("format", "format_map"), _formatted),
    **dict.fromkeys(("escape", "e", "forceescape"), lambda text: 6 * weight(text)),
    "replace": _replaced,
    "translate": lambda text, table: len(text) * max([1, *map(length, getattr(table, "values", lambda: table)())]),
    "tojson": lambda value, *given, **named: weight(value) * (6 + _widest(*given, **named)),
    "sum": _summed,
}
METHODS = GROWING | {"join": _strung, **dict.fromkeys(("index", "count"), lambda items, *_: weight(items))}
FILTERS = GROWING | {"join": lambda items, d="", *_, **named: _strung(d, items)}
# Filters that hand on the items of a list; the others turn what is no text into text, or compare all of it.
OF_LISTS = frozenset(
    [
        *("attr", "count", "d", "default", "first", "items", "join", "last", "length", "list", "map", "random"),
        *("reject", "rejectattr", "reverse", "select", "selectattr"),
    ]
)
