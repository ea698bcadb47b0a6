"""Sets of parameter names as short lists of patterns, and back.  Pure functions.

A pattern is a dotted name in which ``*`` stands for one layer number; it means everything at or below that name.
"""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def compress(selected: Iterable[str], every: Iterable[str]) -> list[str]:
    """The patterns that match exactly the `selected` ones among `every` name.

    >>> names = ["a.0.w", "a.1.w", "a.0.b", "a.1.b", "c.w"]
    >>> compress(["a.0.w", "a.1.w", "a.0.b", "a.1.b"], names)
    ['a']
    >>> compress(["a.0.w", "a.1.w", "c.w"], names)
    ['a.*.w', 'c']
    >>> compress(["a.1.w"], names)
    ['a.1.w']
    """
    chosen = set(selected)
    groups: dict[str, list[str]] = {}
    for name in every:
        groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    whole, single = set(), []
    for pattern, names in groups.items():
        inside = [name for name in names if name in chosen]
        if len(inside) == len(names):
            whole.add(pattern)
        else:
            single += inside
    return sorted(_raise_to_parents(whole, set(groups)) + single)


def _raise_to_parents(whole: set[str], every: set[str]) -> list[str]:
    """Replace patterns by their highest ancestor all of whose descendants are in the set."""
    partial = {parent for pattern in every - whole for parent in _ancestors(pattern)}
    raised = set()
    for pattern in whole:
        free = [parent for parent in _ancestors(pattern) if parent not in partial]
        raised.add(min(free, key=len).removesuffix(".*") if free else pattern)
    return sorted(raised)


def _ancestors(pattern: str) -> list[str]:
    parts = pattern.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def matches(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that are at or below one of the patterns.

    >>> sorted(matches(["a.*.w"], ["a.0.w", "a.10.w", "a.0.b"]))
    ['a.0.w', 'a.10.w']
    """
    patterns = list(patterns)
    if not patterns:
        return set()
    regex = re.compile("|".join(f"(?:{as_regex(pattern)})" for pattern in patterns))
    return {name for name in names if regex.match(name)}


def as_regex(pattern: str) -> str:
    """A pattern as a regular expression, anchored at the start and at the end of a dotted component."""
    return "^" + r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in pattern.split(".")) + r"(?:\.|$)"
