"""Names of modules and parameters: sets of them as short lists of patterns and back, and walks over a model by name.

A pattern is a dotted name in which ``*`` stands for one layer number; it means everything at or below that name.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import nn

_NUMBER = re.compile(r"(?<=\.)\d+(?![^.])")  # a whole component of a dotted name, not its first


def place_of(config: Any, name: str) -> tuple[str, str]:
    """Whose items an encoder sees, and what stands before its inputs there: ``{name}.`` where it is joined to another one."""
    owner = config.joined.get(name)
    return (name, "") if owner is None else (owner, f"{name}.")


def own_names(config: Any, name: str) -> dict[str, str]:
    """Keywords of the composed model, and an encoder's inputs by its own names."""
    owner, start = place_of(config, name)
    names = config.modality(owner)["input_names"]
    return {key: x[len(start) :] for key, x in names.items() if x.startswith(start) and "." not in x[len(start) :]}


def starred(name: str) -> str:
    """A dotted name with ``*`` for each number behind a dot: the same for all layers of a kind."""
    return _NUMBER.sub("*", name)


def compress(selected: Iterable[str], every: Iterable[str]) -> list[str]:
    """The patterns that match exactly the `selected` ones among `every` name.

    >>> names = ["a.0.w", "a.1.w", "a.0.b", "a.1.b", "c.w"]
    >>> compress(["a.0.w", "a.1.w", "a.0.b", "a.1.b"], names)
    ['a']
    >>> compress(["a.0.w", "a.1.w", "c.w"], names)
    ['a.*.w', 'c']
    >>> compress(["a.1.w"], names)
    ['a.1.w']
    >>> compress(["l.0.w", "l.1.w"], ["l.0.w", "l.1.w", "l.extra"])
    ['l.*']
    """
    chosen = set(selected)
    groups: dict[str, list[str]] = {}  # "layers.*.norm.weight" -> that weight of each layer
    for name in every:
        groups.setdefault(starred(name), []).append(name)
    mixed = {pattern for pattern, names in groups.items() if not chosen.issuperset(names)}
    short = {name for pattern in mixed for name in groups[pattern] if name in chosen}
    # Names above something that is not selected: no pattern may stand so high.
    partial = {parent for pattern in mixed for parent in at_or_above(pattern)}
    for pattern in groups.keys() - mixed:
        # The highest name at or above the pattern below which everything is selected.
        free = [parent for parent in at_or_above(pattern) if parent not in partial]
        short |= {free[0]} if free else set(groups[pattern])
    return sorted(short)


def at_or_above(name: str) -> list[str]:
    """A dotted name and the names of all that hold it, the outermost first.

    >>> at_or_above("a.0.w")
    ['a', 'a.0', 'a.0.w']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts) + 1)]


def matches(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that are at or below one of the patterns.

    >>> sorted(matches(["a.*.w"], ["a.0.w", "a.10.w", "a.0.b"]))
    ['a.0.w', 'a.10.w']
    """
    regex = "|".join(f"(?:{as_regex(pattern)})" for pattern in patterns)
    # An expression without alternatives would match everything.
    return set(filter(re.compile(regex).match, names)) if regex else set()


def as_regex(pattern: str) -> str:
    """A pattern as a regular expression, anchored at the start and at the end of a dotted component."""
    return "^" + r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in pattern.split(".")) + r"(?:\.|$)"


def modules_by_name(root: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[tuple[str, nn.Module]]:
    """Every module by its dotted names, parents first, as `root.named_modules(remove_duplicate=False)` gives them; none of
    `without`, and none below those."""
    pending = [("", root)]
    while pending:  # a stack of what is still to visit: recursive generators cost a frame per level for each name
        name, module = pending.pop()
        yield name, module
        prefix, children = f"{name}." if name else "", reversed(module._modules.items())
        pending += [(prefix + key, child) for key, child in children if child is not None and child not in without]


def parameters_by_name(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter by its dotted names, as `root.named_parameters(remove_duplicate=False)` gives them."""
    for name, module in modules_by_name(root):
        prefix = f"{name}." if name else ""
        yield from ((prefix + key, value) for key, value in module._parameters.items() if value is not None)


def shallow(module: nn.Module, **changes: Any) -> Any:
    """A module that shares everything with another one but its table of modules, and what is changed."""
    copied = object.__new__(type(module))  # classes of their own (FSDP) may build another one in theirs
    copied.__dict__.update({**module.__dict__, "_modules": dict(module._modules), **changes})
    return copied
