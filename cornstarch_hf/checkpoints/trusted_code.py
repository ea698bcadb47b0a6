"""What a checkpoint's own code brings along, taken over by the running package.  `code_bundle` writes that code.

Where the package is imported its own classes load every checkpoint; of a checkpoint's code only the user's files are run,
and only if the caller trusts it and something that they define is missing here.
"""

import hashlib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_cached_module_file

from ..parts.classes import CODE_ENTRY, code_source, subclasses_of
from ..parts.known_encoders import ENCODER_TYPES
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, MASK_RULES, POSITION_RULES, PROJECTORS
from ..parts.threads import TravellingLock
from .code_folder import HERE, ROOT, own_modules, read_entry
from .finding import HUB_OPTIONS, PLACES, picked

_KINDS = {"callbacks": CALLBACKS, "projectors": PROJECTORS, "counts": FEATURE_COUNTS, "encoder_types": ENCODER_TYPES}
_KINDS |= {"positions": POSITION_RULES, "mask": MASK_RULES}
_IMPORTING = TravellingLock()


def with_shared_code(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained` after the checkpoint's code was taken over; raises as `load_shared_code` does."""
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        if options.get("trust_remote_code"):
            values, _ = PreTrainedConfig.get_config_dict(source, **picked(options, PLACES))
            load_shared_code(source, values.get("auto_map"), options)
        return options
    load_shared_code(source, getattr(config, "auto_map", None), options)
    resolved = getattr(config, "with_shared_parts", None)
    return options if resolved is None else options | {"config": resolved()}


def load_shared_code(source: Any, auto_map: Any, options: dict[str, Any]) -> None:
    """Run the user's files of a checkpoint, by the `auto_map` of its configuration, if it is trusted and they define what is
    missing here.

    Raises:
        ValueError: a name is taken by another definition.
        ImportError: a package that the files import is not installed; names it.
    """
    repo = code_source(auto_map)
    if repo is None or not options.get("trust_remote_code"):
        return
    hub = picked(options, HUB_OPTIONS)
    file = Path(HF_MODULES_CACHE) / get_cached_module_file(repo or str(source), f"{CODE_ENTRY}.py", **hub)
    if file.resolve().parent == HERE:
        return  # this very code is running
    folder, carries = file.parent, read_entry(file.parent)
    users = sorted({stem for side in carries.get("sides", {}).values() for stem in side["files"]} | {CODE_ENTRY})
    # Named by content: the same files, found in another place, are the same package and run once.
    content = b"".join(stem.encode() + (folder / f"{stem}.py").read_bytes() for stem in users)
    package = ModuleType(f"{ROOT}_shared_{hashlib.sha256(content).hexdigest()[:16]}")
    package.__path__ = [str(folder)]
    with _IMPORTING:  # a thread that comes second waits until the names are there
        if f"{package.__name__}.{CODE_ENTRY}" not in sys.modules and _lacks(carries, package.__name__):
            _import(package, carries, source)


def _lacks(carries: dict, package: str) -> bool:
    """Whether the files define a name that nothing here does, or that another checkpoint's files do."""
    sides = carries.get("sides", {}).values()
    entries = [r.get(name) for side in sides for kind, r in _KINDS.items() for name in side.get(kind, ())]
    if any(entry is None or _is_of_another(entry, package) for entry in entries):
        return True
    imported = {cls.__name__ for base in (PreTrainedModel, PreTrainedConfig) for cls in subclasses_of(base)}
    return any(name not in imported for side in sides for name in side["classes"])


def _is_of_another(entry: Any, package: str) -> bool:
    targets = getattr(entry, "functions", [getattr(entry, "target", entry)])  # of an encoder type several
    modules = [getattr(target, "__module__", "") or "" for target in targets]
    return any(m.startswith(f"{ROOT}_shared_") and not m.startswith(f"{package}.") for m in modules)


def _import(package: ModuleType, carries: dict, source: Any) -> None:
    """Import a package of the user's files, in which this package's modules go by the names that the files import."""
    name = package.__name__
    sys.modules[name] = package
    # First of all: the files' imports of this package's modules are to find the running ones, not copies.
    for stem in carries["package"]:
        if stem in own_modules():
            sys.modules[f"{name}.{stem}"] = importlib.import_module(f"{ROOT}.{own_modules()[stem]}")
    try:
        importlib.import_module(f"{name}.{CODE_ENTRY}")
    except BaseException as error:
        # What was half imported would count as imported the next time.
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
        if isinstance(error, ValueError):
            raise ValueError(
                f"The code of {source} cannot be taken over: {error} Where two checkpoints define the same name differently, "
                "load them in processes of their own."
            ) from error
        raise
