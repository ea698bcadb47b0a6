"""What a chat template may use up: steps, time, characters, and how much each operation will make before it is done.

`template_sandbox` asks these functions wherever a template loops, calls, joins or computes.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from ..limits import cap, check

_BITS = 4096  # of an integer that a template computes
_WIDTH = 10_000  # of a padded or indented string
_running = threading.local()


class TemplateLimit(jinja2.TemplateError, ValueError):
    """A chat template went beyond its bounds; the message names the cap."""


class Budget:
    """What one rendering has used: steps, characters and entries made, time."""

    def __init__(self) -> None:
        self.steps, self.work = 0, 0
        self.until = time.monotonic() + cap("MAX_TEMPLATE_SECONDS")

    def step(self) -> None:
        """Count one pass through a loop, call, filter or test."""
        self.steps += 1
        checked(self.steps, "MAX_TEMPLATE_STEPS", "the chat template's steps are")
        if time.monotonic() > self.until:
            raise TemplateLimit(
                f"The chat template takes over cornstarch_hf.limits.MAX_TEMPLATE_SECONDS = {cap('MAX_TEMPLATE_SECONDS')}."
            )

    def spend(self, size: int) -> None:
        """Count characters or entries before they are made."""
        self.work += size
        checked(self.work, "MAX_TEMPLATE_WORK", "the characters and entries that the chat template makes are")


def checked(value: float, name: str, what: str) -> None:
    try:
        check(value, name, what)
    except ValueError as error:
        raise TemplateLimit(str(error)) from error


def running() -> Budget:
    budget = getattr(_running, "budget", None)
    if budget is None:  # while a template is compiled nothing is computed in advance
        raise TemplateLimit("nothing is computed before a chat template is rendered")
    return budget


# ---- sizes


def weight(value: Any) -> int:
    """Characters that a value has as text, or entries of 8 characters each; stops above `MAX_TEMPLATE_WORK`."""
    total, pending, limit = 0, [value], cap("MAX_TEMPLATE_WORK")
    while pending and total <= limit:
        item = pending.pop()
        if isinstance(item, (str, bytes)):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 8 * len(item)
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            total += 8 * len(item)
            pending += list(item)
        else:
            total += 8
    return total


def length(value: Any) -> int:
    if isinstance(value, (str, bytes)):
        return len(value)
    return 8 * len(value) if isinstance(value, (list, tuple)) else 8


def _check_width(value: Any) -> None:
    if isinstance(value, int) and abs(value) > _WIDTH:
        raise TemplateLimit(
            f"The chat template asks for a width or a number of digits of {value:,}, more than {_WIDTH:,}."
        )


def _check_format(text: Any) -> None:
    """Widths within a format string, of either kind."""
    if isinstance(text, (str, bytes)):
        plain = text if isinstance(text, str) else text.decode("latin-1")
        if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", plain):
            raise TemplateLimit("The chat template formats by widths of five digits, or by widths that are computed.")


def _multiply(left: Any, right: Any) -> int:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
            return weight(many) * max(times, 0)
    return _integer(left, right, lambda a, b: a + b)


def _integer(left: Any, right: Any, bits: Callable[[int, int], int]) -> int:
    if isinstance(left, int) and isinstance(right, int):
        size = bits(abs(left).bit_length(), abs(right).bit_length())
        if size > _BITS:
            raise TemplateLimit(f"The chat template computes an integer of {size:,} bits, more than {_BITS:,}.")
    return 8


def _power(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        size = abs(left).bit_length() * abs(right)
        if size > _BITS:
            raise TemplateLimit(f"The chat template computes an integer of {size:,} bits, more than {_BITS:,}.")
    return 8


def _remainder(left: Any, right: Any) -> int:
    if not isinstance(left, (str, bytes)):
        return 8
    _check_format(left)
    return len(left) + (str(left).count("%") + 1) * (_WIDTH + weight(right))


OPERATORS: dict[str, Callable[[Any, Any], int]] = {
    "**": _power,
    "*": _multiply,
    "+": lambda left, right: length(left) + length(right),
    "%": _remainder,
}


def _replaced(text: Any, old: Any = "", new: Any = "", *_: Any) -> int:
    text, old, new = str(text), str(old), str(new)
    return len(text) + text.count(old) * len(new)


def _joined(separator: Any, items: Any = ()) -> int:
    items = items if isinstance(items, (str, list, tuple, Mapping)) else ()
    return weight(items) + len(str(separator)) * len(items)


def _padded(text: Any, width: Any = 80, *_: Any) -> int:
    _check_width(width)
    return weight(text) + _WIDTH


def _indented(text: Any, width: Any = 4, *_: Any) -> int:
    _check_width(width)
    return weight(text) + (str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width))


def _formatted(text: Any, *values: Any, **named: Any) -> int:
    _check_format(text)
    fields = str(text).count("{") + str(text).count("%") + 1
    return weight(text) + fields * (_WIDTH + weight(values) + weight(named))


def _as_json(value: Any, *options: Any, **named: Any) -> int:
    for option in (*options, *named.values()):
        _check_width(option)
    indent = next((o for o in (*options, *named.values()) if isinstance(o, int) and not isinstance(o, bool)), 0)
    return weight(value) * (6 + indent)


# What a string method or a filter of that name makes, at most; of all others no more than they are given.
GROWING: dict[str, Callable[..., int]] = {
    "replace": _replaced,
    "center": _padded,
    "ljust": _padded,
    "rjust": _padded,
    "zfill": _padded,
    "expandtabs": lambda text, width=8: _padded(text, width) + str(text).count("\t") * int(width),
    "format": _formatted,
    "format_map": _formatted,
    "translate": lambda text, table: len(text) * max([1, *map(length, getattr(table, "values", lambda: table)())]),
    "indent": _indented,
    "tojson": _as_json,
    "join_method": _joined,
    "join": lambda items, separator="", *_: _joined(separator, items),
    "string": weight,
    "escape": lambda text: 6 * weight(text),
    "e": lambda text: 6 * weight(text),
    "forceescape": lambda text: 6 * weight(text),
    "batch": lambda items, count, *_: _padded("", count),
    "slice": lambda items, count, *_: _padded("", count),
    "round": lambda value, precision=0, *_: _padded("", precision),
    "to_bytes": lambda value, length=1, *_, **__: _padded("", length),
    "filesizeformat": lambda *_: 100,
}
