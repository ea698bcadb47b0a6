"""Checks values from a checkpoint's JSON files before anything is made of them.  Knows no model.

Refuses what would replace a method, name code of others or a file outside of the folder, or keep the machine busy
without end; `build_bounds` watches what is then built.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
from transformers.utils import is_kernels_available

from ..limits import cap, check
from .classes import FAMILIES

POINTER = "cornstarch_saved_in"
# Attributes of a configuration that are code or decide how attributes are found; a stored value would replace them.
_TAKEN = {name for name in dir(PreTrainedConfig) if callable(getattr(PreTrainedConfig, name))}
_TAKEN |= {"attribute_map", "sub_configs", "config_class", "extra_files"}
_LAYERS = re.compile(r"(^|_)(layers?|depths?|blocks?|stages?)$|^(n|num)_\w*(layer|depth|block|stage)")
_RATE = re.compile(r"(dropout|layerdrop|pdrop|drop_path|drop_rate)(_(p|prob|rate))?$")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_OF_PARTS = "part_implementations"  # {part: {"attn": ..., "experts": ...}}
# What any configuration of transformers takes as true or false, and looks at first when a model is called.
_SWITCHES = (
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "tie_word_embeddings",
    "use_cache",
)
_KERNEL_SWITCHES = ("use_kernels", "allow_all_kernels", "kernel_config")
# What transformers does with kernels that it fetches from repositories of its choice.
_KERNEL_EXPERTS = frozenset(["deepgemm", "deepgemm_megamoe", "sonicmoe"])
_KERNEL_METHODS = frozenset(["eetq", "fbgemm_fp8", "fp8", "gguf", "metal", "mxfp4", "mxfp8", "nvfp4"])
_CODE_ENTRY = re.compile(r"(?:(?P<repo>[\w.-]+(?:/[\w.-]+)?)--)?[A-Za-z_]\w*\.[A-Za-z_]\w*")
_UNBOUNDED = re.compile(r"limit|clip|max|min")
SHARD = re.compile(r"[^/\\]+\.safetensors")
# In the text of JSON what stands for one more value is a comma, or the start of a container that holds one, outside of strings.
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_FILLED = re.compile(r"[{\[](?!\s*[}\]])")


def check_values(values: Any, where: str, asked: Collection[str] = ()) -> None:
    """Refuse, at any depth of what JSON gave, keys that would replace methods, kernels from a repository, data types that do
    not exist, layers, labels, nesting or size above the caps, NaN, and integers beyond 64 bits (ValueError).

    `asked` are the families of implementations (``"attn"``, ``"experts"``) of which the caller's word counts and no stored one.
    """
    # Each value with the path to it, its key, the implementations that it tells of, and its depth.
    pending, seen = [(values, where, "", "", 0)], 0
    deepest, most = cap("MAX_CONFIG_DEPTH"), cap("MAX_CONFIG_VALUES")
    while pending:
        value, path, key, family, depth = pending.pop()
        seen += 1
        if depth > deepest or seen > most:  # messages are made only then: there may be a million values
            check(depth, "MAX_CONFIG_DEPTH", f"{where}: its values are nested to a depth of")
            check(seen, "MAX_CONFIG_VALUES", f"{where}: its number of values is at least")
        if family in FAMILIES and family not in asked and not isinstance(value, Mapping):
            _check_implementation(value, path, family)
        if isinstance(value, Mapping):
            if set(value) != {"__float__"}:  # how transformers writes infinity
                _check_keys(value, path, is_config=depth == 0 or key.endswith("_config") or "model_type" in value)
            pending += [
                (v, f"{path}.{k}" if depth else f"{where}: {k}", str(k), _family(str(k), family), depth + 1)
                for k, v in value.items()
            ]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(v, path, key, family, depth + 1) for v in value]
        else:
            _check_leaf(value, path, key)
        if key in ("dtype", "torch_dtype") and not isinstance(value, (str, Mapping, type(None))):
            check_dtype(value, path)


def _family(key: str, above: str) -> str:
    """Of which implementations a value under a key tells, by the key or what it stands in; "" of none."""
    if found := _IMPLEMENTATION.fullmatch(key):
        return found[1]
    if above == _OF_PARTS and key in FAMILIES:
        return key
    return _OF_PARTS if key == _OF_PARTS else above


def _check_implementation(value: Any, path: str, family: str) -> None:
    """Refuse what is no name of an implementation that transformers or an installed package has (ValueError)."""
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{path} is {value!r:.100}, expected the name of an implementation, such as 'sdpa'.")
    if value and "/" in value:
        raise ValueError(
            f"{path} asks for the implementation {value!r:.200}: kernels from a repository are code. Remove that from the "
            f"file, or pass {family}_implementation={value!r:.200} yourself if you trust it."
        )


def without_implementations(values: Any, families: Collection[str], above: str = "") -> Any:
    """Checked values without what they say of some families of implementations; the values themselves where that is none."""
    if not families:
        return values
    if isinstance(values, Mapping):
        kept = {key: (value, _family(str(key), above)) for key, value in values.items()}
        return {k: without_implementations(v, families, own) for k, (v, own) in kept.items() if own not in families}
    return [without_implementations(v, families, above) for v in values] if isinstance(values, list) else values


def check_kernels(values: Mapping[str, Any], where: str) -> None:
    """Refuse names of implementations for which transformers would fetch and run kernels (ValueError).

    Those are repositories; and where the package `kernels` is installed flash attention, if its own package is missing or a
    type of model prefers a kernel, and some implementations of experts.
    """
    found = list(_implementations(values, f"{where}:"))
    for key, value, path, family in found:
        if key != "model_type":
            _check_implementation(value, path, family)
    if not is_kernels_available():
        return
    types = {value for key, value, _, _ in found if key == "model_type"}
    for _, value, path, family in found:
        if (family == "attn" and _fetches(value, types)) or (family == "experts" and value in _KERNEL_EXPERTS):
            raise ValueError(
                f"{path} asks for the implementation {value!r}, for which transformers would fetch a kernel from the Hub "
                "here, and kernels are code. Install its package (flash-attn), remove that from the file, or pass "
                f"{family}_implementation={value!r}, or another one, yourself."
            )


def _implementations(values: Any, path: str, key: str = "", family: str = "") -> Iterator[tuple]:
    """Each name of an implementation and each type of model: its key, the name, the path to it, of what it tells."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            below = f"{path} {name}" if path.endswith(":") else f"{path}.{name}"
            yield from _implementations(value, below, str(name), _family(str(name), family))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _implementations(value, path, key, family)
    elif isinstance(values, str) and (family in FAMILIES or key == "model_type"):
        yield key, values, path, family


def _fetches(name: str, model_types: Collection[str]) -> bool:
    """Whether transformers gets an attention by a kernel: its package is missing, or a model has it replaced by one."""
    if "flash" not in name:
        return False
    version = name.rpartition("_")[2]
    package = FLASH_ATTENTION_COMPATIBILITY_MATRIX.get(int(version)) if version.isdecimal() else None
    if package is None or not package["general_availability_check"]():
        return True
    configs = [CONFIG_MAPPING[kind] for kind in model_types if kind in CONFIG_MAPPING]
    models = [MODEL_MAPPING[config] for config in configs if config in MODEL_MAPPING]
    replaced = [getattr(model, "_compatible_flash_implementations", None) or () for model in models]
    return any("/" in other for others in replaced for other in others)


def check_quantization(values: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> None:
    """Refuse stored quantization that transformers runs by kernels from the Hub, where it can fetch them (ValueError).

    The caller allows it by a `quantization_config`, or `trust_remote_code`, among the `options` of loading.
    """
    stored = values.get("quantization_config")
    if not isinstance(stored, Mapping) or options.get("trust_remote_code") or options.get("quantization_config"):
        return
    method = str(stored.get("quant_method", "")).lower()
    if (method in _KERNEL_METHODS or stored.get("use_optimized_inference")) and is_kernels_available():
        raise ValueError(
            f"{where}: quantization_config has the quant_method {method!r}, which transformers runs by kernels that it "
            "fetches from the Hub, and kernels are code. Pass quantization_config= yourself, or trust_remote_code=True, "
            "if you trust them; or use weights that are not quantized so."
        )


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
    for key in _SWITCHES:
        value = values.get(key)
        layers = (
            key == "output_hidden_states" and isinstance(value, (list, tuple)) and all(type(n) is int for n in value)
        )
        if value is not None and not isinstance(value, bool) and not layers:
            raise ValueError(f"{path}: {key} is {value!r:.100}, expected true or false.")
    if asking := [key for key in _KERNEL_SWITCHES if values.get(key)]:
        told = f"{asking[0]}={values[asking[0]]!r:.100}: kernels from the Hub are code"
        raise ValueError(f"{path} asks for {told}. Remove that from the file, or pass it to from_pretrained yourself.")
    check_auto_map(values.get("auto_map"), path)


def _check_leaf(value: Any, path: str, key: str) -> None:
    if isinstance(value, str):
        if key in ("dtype", "torch_dtype") and value != "auto":
            check_dtype(value, path)
    elif isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not _UNBOUNDED.search(path))):
        raise ValueError(f"{path} is {value}, expected a finite number.")
    elif isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise ValueError(f"{path} is an integer of {value.bit_length()} bits, expected at most 63.")
        if key == "num_labels" or _LAYERS.search(key):
            check(value, "MAX_LABELS" if key == "num_labels" else "MAX_LAYERS", f"{path} is")
            if value < 0 and key.startswith(("n_", "num_")):  # else it may be the last layer but so many
                raise ValueError(f"{path} is {value}, expected a number that is not negative.")
    # Some layers ask of them only when they run.
    if isinstance(value, (int, float)) and _RATE.search(key) and not 0 <= value <= 1:
        raise ValueError(f"{path} is {value}, expected a rate from 0 to 1.")


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


def check_switches(
    values: Mapping[str, Any] | None, where: str, others: Mapping[str, tuple[type, ...]] | None = None
) -> None:
    """Refuse constructor arguments of a part that are not True or False (ValueError), nor of the types of `others`."""
    for key, value in (values or {}).items():
        if not isinstance(value, (bool, *(others or {}).get(key, ()))):
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


def read_text(path: str | os.PathLike, what: str) -> str:
    """The text of a JSON file (ValueError: it is too large, has too many values, or is no text)."""
    check(os.path.getsize(path), "MAX_CONFIG_BYTES", f"{what}: its size in bytes is")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is no JSON file ({error}).") from error
    check_number_of_values(text, what)
    return text


def check_number_of_values(text: str, what: str) -> None:
    """Refuse JSON of more than `MAX_CONFIG_VALUES` values (ValueError), before they take up to 40 times the text."""
    most = cap("MAX_CONFIG_VALUES")
    if sum(map(text.count, ",{[")) < most:  # also those within strings: mostly that is enough
        return
    bare = _STRING.sub('""', text)
    if (seen := 1 + bare.count(",")) <= most:
        seen += sum(1 for _ in _FILLED.finditer(bare))
    check(seen, "MAX_CONFIG_VALUES", f"{what}: its number of values is at least")


def read_json(path: str | os.PathLike, what: str) -> Any:
    """A JSON file; ValueError where it is too large, no JSON, nested too deeply, or has a key twice in one object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{what} has the key {twice!r} twice in one object: readers would take different ones.")
        return found

    text = read_text(path, what)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError(f"{what} is nested too deeply to be read.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} is no JSON file ({error}).") from error


def fingerprint(values: Mapping[str, Any]) -> str:
    """A hash of a file's values, or of those that a file would get; not of those about one reading or one save."""
    passing = ("name_or_path", POINTER)
    lasting = {key: value for key, value in values.items() if not key.startswith("_") and key not in passing}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()
