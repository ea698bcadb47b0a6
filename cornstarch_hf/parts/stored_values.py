"""Checks values from a checkpoint's JSON files before anything is made of them.  Knows no model.

Refuses what would replace a method, name code of others or a file outside of the folder, or keep the machine busy
without end; `build_bounds` watches what is then built.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..limits import cap, check

POINTER = "cornstarch_saved_in"
# Attributes of a configuration that are code or decide how attributes are found; a stored value would replace them.
_TAKEN = {name for name in dir(PreTrainedConfig) if callable(getattr(PreTrainedConfig, name))}
_TAKEN |= {"attribute_map", "sub_configs", "config_class", "extra_files"}
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$|^(n|num)_\w*(layer|depth|block|stage)")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_CODE_ENTRY = re.compile(r"(?:(?P<repo>[\w.-]+(?:/[\w.-]+)?)--)?[A-Za-z_]\w*\.[A-Za-z_]\w*")
_UNBOUNDED = re.compile(r"limit|clip|max|min")
SHARD = re.compile(r"[^/\\]+\.safetensors")


def check_values(values: Any, where: str) -> None:
    """Refuse, at any depth of what JSON gave, keys that would replace methods, kernels from a repository, data types that do
    not exist, layers, labels, nesting or size above the caps, NaN, and integers beyond 64 bits (ValueError)."""
    pending, seen = [(values, where, "", 0)], 0  # value, path to it, its key, depth
    deepest, most = cap("MAX_CONFIG_DEPTH"), cap("MAX_CONFIG_VALUES")
    while pending:
        value, path, key, depth = pending.pop()
        seen += 1
        if depth > deepest or seen > most:  # messages are made only then: there may be a million values
            check(depth, "MAX_CONFIG_DEPTH", f"{where}: its values are nested to a depth of")
            check(seen, "MAX_CONFIG_VALUES", f"{where}: its number of values is at least")
        if isinstance(value, Mapping):
            if set(value) != {"__float__"}:  # how transformers writes infinity
                _check_keys(value, path, is_config=depth == 0 or key.endswith("_config") or "model_type" in value)
            pending += [(v, f"{path}.{k}" if depth else f"{where}: {k}", str(k), depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(v, path, key, depth + 1) for v in value]
        else:
            _check_leaf(value, path, key)


def _check_keys(values: Mapping[Any, Any], path: str, is_config: bool) -> None:
    names = {name for name in values if isinstance(name, str)}
    if private := sorted(name for name in names if name.startswith("__")):
        raise ValueError(f"{path} has the key {private[0]!r}, which is no setting: remove it.")
    if not is_config:
        return
    if taken := sorted(_TAKEN & names):
        raise ValueError(f"{path} has the keys {taken}, which would replace methods of the configuration: remove them.")
    if not isinstance(values.get("model_type", ""), str):
        raise ValueError(f"{path} has the model_type {values['model_type']!r:.100}, expected a string.")
    check_auto_map(values.get("auto_map"), path)


def _check_leaf(value: Any, path: str, key: str) -> None:
    if isinstance(value, str):
        if _IMPLEMENTATION.fullmatch(key) and "/" in value:
            raise ValueError(
                f"{path} asks for the implementation {value!r}: kernels from a repository are code, pass "
                f"attn_implementation={value!r} yourself if you trust it."
            )
        if key in ("dtype", "torch_dtype") and value != "auto":
            check_dtype(value, path)
    elif isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not _UNBOUNDED.search(path))):
        raise ValueError(f"{path} is {value}, expected a finite number.")
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise ValueError(f"{path} is an integer of {value.bit_length()} bits, expected at most 63.")
        if key == "num_labels" or _LAYERS.search(key):
            check(value, "MAX_LABELS" if key == "num_labels" else "MAX_LAYERS", f"{path} is")


def check_dtype(name: Any, where: str) -> None:
    """Refuse what is not the name of a data type of torch (ValueError)."""
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{where} is {name!r:.100}, expected the name of a torch data type such as 'bfloat16'.")


def check_auto_map(entries: Any, where: str, repo_id: str | None = None, here_only: bool = False) -> None:
    """Refuse entries of an `auto_map` (or None) that are no ``module.Class`` beside the file (ValueError).

    Args:
        repo_id: the repository being loaded, whose name may stand in front (``user/repo--module.Class``).
        here_only: whether other repositories are refused.
    """
    if not isinstance(entries, (Mapping, type(None))):
        raise ValueError(f"{where}: auto_map must be a dictionary, got {entries!r:.100}.")
    for key, value in (entries or {}).items():
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            match = _CODE_ENTRY.fullmatch(entry) if isinstance(entry, str) else None
            here = match is not None and (not here_only or match["repo"] in (None, repo_id))
            if entry is not None and not here:
                raise ValueError(
                    f"{where}: auto_map[{key!r}] is {entry!r:.200}, expected 'module.Class' of a file beside it: code "
                    "elsewhere is not loaded with a checkpoint."
                )


def check_types(values: Mapping[str, Any], expected: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Refuse values of other types than expected; None always passes (ValueError)."""
    for key, types in expected.items():
        value = values.get(key)
        wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        if value is not None and wrong:
            names = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{where}: {key} must be a {names}, got {type(value).__name__} ({value!r:.100}).")


def check_switches(values: Mapping[str, Any] | None, where: str) -> None:
    """Refuse constructor arguments of a part that are not True or False (ValueError)."""
    for key, value in (values or {}).items():
        if not isinstance(value, bool):
            raise ValueError(f"{where}: the argument {key!r} must be True or False, got {value!r:.100}.")


def check_names(names: Any, where: str) -> None:
    """Refuse what is no list of names (ValueError)."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a list of names, got {names!r:.100}.")


def check_frozen_parts(stored: Any) -> None:
    """Refuse what does not say, by part, what of it trains when it trains again (ValueError)."""
    for part, found in (stored or {}).items():
        if not isinstance(found, Mapping) or set(found) - {"off", "held", "addition"}:
            raise ValueError(f"frozen_parts[{part!r:.100}] must hold 'off', 'held' and 'addition', got {found!r:.100}.")
        check_types(found, {"off": (bool,)}, f"frozen_parts[{part!r:.100}]")
        for key in ("held", "addition"):
            check_names(found.get(key) or [], f"frozen_parts[{part!r:.100}][{key!r}]")


def check_part_dtypes(stored: Any) -> None:
    """Refuse stored data types of parts that name what is no data type, or no names of parts (ValueError)."""
    for dtype, patterns in (stored or {}).items():
        if dtype == "buffers":
            check_types({"buffers": patterns}, {"buffers": (dict,)}, "part_dtypes")
            check_part_dtypes(patterns)
        elif dtype == "":
            check_dtype(patterns, "part_dtypes['']")
        else:
            check_dtype(dtype, f"part_dtypes[{dtype!r:.100}]")
            check_names(patterns, f"part_dtypes[{dtype!r}]")


def check_pattern(pattern: Any, where: str) -> None:
    """Refuse a regular expression that could take time without end on names of modules (ValueError).

    At most four open-ended repeats, none within another, eight alternatives, no back references and 1,000 characters.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"{where}: expected a pattern, got {pattern!r:.100}.")
    try:
        found = list(_operators(_parser.parse(pattern))) if len(pattern) <= 1000 else []
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{where}: {pattern!r:.100} is no regular expression ({error}).") from error
    # Nested repeats, and alternatives within one, can be tried in exponentially many ways.
    endless = any(inside and (most > 1 or name == "BRANCH") for name, most, inside in found)
    refers = any(name.startswith("GROUPREF") for name, _, _ in found)
    repeats = sum(most > 16 for _, most, _ in found)
    branches = sum(name == "BRANCH" for name, _, _ in found)
    if endless or refers or len(pattern) > 1000 or repeats > 4 or branches > 8:
        raise ValueError(
            f"{where}: the pattern {pattern!r:.100} could take time without end (repeats within repeats, "
            f"{repeats} open-ended repeats of at most 4, {branches} alternatives of at most 8, or more than 1,000 "
            "characters): list the names of the modules instead."
        )


def _operators(parsed: Any, inside: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Each operator of a parsed pattern: its name, how often it repeats at most, whether it stands within a repeat."""
    if isinstance(parsed, _parser.SubPattern):
        for operator, argument in parsed:
            name = str(operator)
            most = int(argument[1]) if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") else 1
            yield name, most, inside
            yield from _operators(argument, inside or most > 1)
    elif isinstance(parsed, (list, tuple)):  # arguments of an operator: patterns among other things
        for part in parsed:
            yield from _operators(part, inside)


def read_json(path: str | os.PathLike, what: str) -> Any:
    """A JSON file; ValueError where it is too large, no JSON, nested too deeply, or has a key twice in one object."""
    check(os.path.getsize(path), "MAX_CONFIG_BYTES", f"{what}: its size in bytes is")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{what} has the key {twice!r} twice in one object: readers would take different ones.")
        return found

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply to be read.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is no JSON file ({error}).") from error
