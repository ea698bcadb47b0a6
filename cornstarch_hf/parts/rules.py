"""Rules of positions and masks by name, which users can add to; only compositions that name one need this file."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .registries import OR_TRUST, Registry, check_function

POSITION_RULES = Registry("position rule", f"Add your own with register_position_rule(name, fn) {OR_TRUST}")
MASK_RULES = Registry("mask rule", f"Add your own with register_mask_rule(name, fn) {OR_TRUST}")


def register_position_rule(name: str, fn: Callable) -> None:
    """Make a rule of positions known under a name, for ``config.positions = {"rule": name, **options}``.

    Args:
        name: the name that a checkpoint holds.
        fn: ``fn(query, **options) -> positions``, of a `PositionQuery`: int64 ``(axes, batch, length)``, as the language model
            takes them, or ``(batch, length)``.  With the attribute ``text_row = False`` `generate` does not put the positions
            of plain text before the axes, which most models with several axes expect; with ``numbers_text = True`` it is
            asked for text without features too, which the language model else numbers itself; with ``needs_grids = False``
            nobody looks for grids.

    Raises:
        ValueError: another function has that name.
        TypeError: `fn` is not callable.
    """
    check_function("register_position_rule", name, fn)
    POSITION_RULES.add(name, fn)


def register_mask_rule(name: str, fn: Callable) -> None:
    """Make a rule of masks known under a name, for ``config.mask = {"rule": name, **options}``.

    Args:
        name: the name that a checkpoint holds.
        fn: ``fn(types, marks, **options) -> blocks``, of int64 ``(batch, length)`` that is 0 for text and i where the i-th
            modality is seen, and of `token_type_ids` or None: tokens of one block, ``(batch, length)``, attend to each other
            both ways, -1 for none.  With the attribute ``masks_text = True`` it is asked for prompts without features too.

    Raises:
        ValueError: another function has that name.
        TypeError: `fn` is not callable.
    """
    check_function("register_mask_rule", name, fn)
    MASK_RULES.add(name, fn)


def check_rule_options(key: str, rule: Callable, given: int, options: Mapping[str, Any], names: Sequence[str]) -> None:
    """ValueError for options that a rule of ``config.positions`` or ``config.mask`` does not take, lacks or finds wrong.

    Args:
        key: which of both.
        rule: its function; an attribute ``check(names, **options)`` of it says more of their values.
        given: how many arguments it gets besides.
        options: those of the configuration.
        names: the modalities.
    """
    signature = inspect.signature(rule)
    try:
        signature.bind(*[None] * given, **options)
    except TypeError as error:
        takes = list(signature.parameters)[given:]
        raise ValueError(f"{key}: its rule has the options {sorted(options)}, but takes {takes} ({error}).") from error
    if callable(check := getattr(rule, "check", None)):
        check(names, **options)
