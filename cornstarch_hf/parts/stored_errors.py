"""Errors about what a checkpoint's files say: the file or part, its class, the values that could be meant, the remedy.

`stored_values` and `build_bounds` refuse what they know to be wrong; here stands what classes of others raise of the rest.
The error of theirs is always the cause of the one that is raised here.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .build_bounds import BoundedTensors
from .weightless import build_without_weights, without_dtypes

REMEDY = "Restore the file that was saved with the weights."
# What says by itself what is missing (a file, a package, memory), and is nobody's wrong value.
_OTHERS = (OSError, ImportError, MemoryError, torch.OutOfMemoryError)
_MOST = 48  # values that are tried
_CHOICES: tuple[Mapping[str, Any], ...] = (ACT2CLS, {"default": None, **ROPE_INIT_FUNCTIONS})


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """What is raised within about stored values becomes a ValueError that begins with where these lie.

    Errors about files, packages and memory that are missing stay as they are.
    """
    try:
        yield
    except _OTHERS:
        raise
    except Exception as error:
        if _is_told(error, where):
            raise
        raise _explained(error, where) from error


def make_config(
    make: Callable[[dict[str, Any]], Any], values: Mapping[str, Any], where: str, whole: bool = False
) -> Any:
    """What `make` makes of the stored values of a configuration; raises as `explained`, and names values that it may be.

    Of a `whole` one, ValueErrors tell that already.
    """

    def without(key: str) -> None:
        make({k: v for k, v in values.items() if k != key})

    try:
        return make(dict(values))
    except _OTHERS:
        raise
    except Exception as error:
        if _is_told(error, where):
            raise
        tried = () if whole and _is_told(error) else _taken(without, values)
        named = [f"{key}={values[key]!r:.100}" for key in tried]
        hint = f" Without {' or '.join(named)} it does." if named else ""
        raise _explained(error, where, hint) from error


def build_part(cls: Any, config: PreTrainedConfig, options: Mapping[str, Any], part: str, key: str) -> Any:
    """A part of a model, ``cls(config, **options)``.

    Args:
        part: its name (``"vision_encoder"``), with which errors begin.
        key: of the whole configuration, under which `config` lies there.

    Raises:
        ValueError: of whatever the class raises; names the values of `config` of which one alone, if it were the default of
            its class, would let it be built.
    """
    try:
        return cls(config, **options)
    except _OTHERS:
        raise
    except Exception as error:
        given = f", {dict(options)}" if options else ""
        told = f"{part}: {cls.__name__} cannot be built of {key} ({type(config).__name__}{given}): {_short(error)}."
        raise ValueError(f"{told}{_hint(cls, config, options, key)} {REMEDY}") from error


def _is_told(error: Exception, where: str = "") -> bool:
    return isinstance(error, ValueError) and where in str(error)


def _explained(error: Exception, where: str, hint: str = "") -> ValueError:
    if isinstance(error, (TypeError, ValueError)):
        text = f"{where}: {_line(error)}{hint}"
    else:
        text = f"{where} does not take its stored values ({_short(error)}).{hint}"
    return ValueError(text if REMEDY in text else f"{text} {REMEDY}")


def _line(error: Exception) -> str:
    return " ".join(f"{error!s:.2000}".split())


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {_line(error):.600}".removesuffix(".")


def _hint(cls: Any, config: PreTrainedConfig, options: Mapping[str, Any], key: str) -> str:
    """Which stored value it may be that a part cannot be built of."""
    own = getattr(cls, "config_class", None)
    if isinstance(own, type) and not isinstance(config, own):
        return f" Its class takes a {own.__name__}: one of the two is wrong."
    try:
        usual = vars(type(config)())
    except Exception:  # a class of somebody, whose arguments have no defaults: nothing can be tried
        return ""
    stored = {k: v for k, v in vars(config).items() if k in usual and not k.startswith("_") and usual[k] != v}

    def with_default(name: str) -> None:
        changed = copy.deepcopy(config)
        setattr(changed, name, usual[name])
        with BoundedTensors():
            build_without_weights(functools.partial(cls, without_dtypes(changed), **options))

    named = [f"{key}.{name}={stored[name]!r:.100}{_choices(usual[name])}" for name in _taken(with_default, stored)]
    return f" It may be {' or '.join(named)}: with the default it is built." if named else ""


def _choices(usual: Any) -> str:
    """What could be said instead, where the default is a name in a table of transformers."""
    usual = usual.get("rope_type") if isinstance(usual, Mapping) else usual
    table = next((table for table in _CHOICES if isinstance(usual, str) and usual in table), None)
    return "" if table is None else f" (one of {sorted(table)})"


def _taken(attempt: Callable[[str], Any], keys: Iterable[str]) -> list[str]:
    """Those of some keys with which an attempt does not fail."""
    found = []
    for key in list(keys)[:_MOST]:
        with contextlib.suppress(Exception):
            attempt(key)
            found.append(key)
    return found
