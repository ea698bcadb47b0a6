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

from ..parts.classes import CODE_ENTRY, code_source
from ..parts.known_encoders import ENCODER_TYPES
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, PROJECTORS
from ..parts.threads import TravellingLock
from .code_folder import HERE, ROOT, own_modules, read_entry
from .finding import HUB_OPTIONS, PLACES

_REGISTRIES = {
    "callbacks": CALLBACKS,
    "projectors": PROJECTORS,
    "counts": FEATURE_COUNTS,
    "encoder_types": ENCODER_TYPES,
}


def with_shared_code(source: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained` after the checkpoint's code was taken over, where it is trusted and needed.

    Raises:
        ValueError, ImportError: as `load_shared_code`.
    """
    config = options.get("config")
    if not isinstance(config, PreTrainedConfig):
        if options.get("trust_remote_code"):
            places = {key: options[key] for key in PLACES if options.get(key) is not None}
            values, _ = PreTrainedConfig.get_config_dict(source, **places)
            load_shared_code(source, values.get("auto_map"), options)
        return options
    load_shared_code(source, getattr(config, "auto_map", None), options)
    resolved = getattr(config, "with_shared_parts", None)
    return options if resolved is None else options | {"config": resolved()}


_IMPORTING = TravellingLock()


def load_shared_code(source: Any, auto_map: Any, options: dict[str, Any]) -> None:
    """Run the user's files of a checkpoint if it is trusted and they define what is missing here.

    Args:
        source: folder or repo id.
        auto_map: of its configuration.
        options: of `from_pretrained`: ``trust_remote_code``, and where files come from.

    Raises:
        ValueError: a name is taken by another definition.
        ImportError: a package that the files import is not installed; names it.
    """
    repo = code_source(auto_map)
    if repo is None or not options.get("trust_remote_code"):
        return
    hub = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    file = Path(HF_MODULES_CACHE) / get_cached_module_file(repo or str(source), f"{CODE_ENTRY}.py", **hub)
    if file.resolve().parent == HERE:
        return  # this very code is running
    carries = read_entry(file.parent)
    package = _package_of(file.parent, carries)
    with _IMPORTING:  # a thread that comes second waits until the names are there
        if f"{package.__name__}.{CODE_ENTRY}" not in sys.modules and _missing(carries, package.__name__):
            _import(package, carries, source)


def _package_of(folder: Path, carries: dict) -> ModuleType:
    """A package for the user's files, in which this package's modules go by the names that the files import them under."""
    users = sorted({stem for side in carries.get("sides", {}).values() for stem in side["files"]} | {CODE_ENTRY})
    # Named by content: the same files, found in another place, are the same package and run once.
    digest = hashlib.sha256(
        b"".join(stem.encode() + (folder / f"{stem}.py").read_bytes() for stem in users)
    ).hexdigest()
    package = ModuleType(f"{ROOT}_shared_{digest[:16]}")
    package.__path__ = [str(folder)]
    return package


def _missing(carries: dict, package: str) -> list[str]:
    """Names that the files define and nothing here does, or another checkpoint's files do."""
    found = []
    for side in carries.get("sides", {}).values():
        for kind, registry in _REGISTRIES.items():
            found += [name for name in side.get(kind, ()) if _is_missing(registry.get(name), package)]
        found += [name for name in side["classes"] if name not in _imported_names()]
    return found


def _is_missing(entry: Any, package: str) -> bool:
    targets = getattr(entry, "functions", [getattr(entry, "target", entry)])  # of an encoder type several
    modules = [getattr(target, "__module__", "") or "" for target in targets]
    others = [m for m in modules if m.startswith(f"{ROOT}_shared_") and not m.startswith(f"{package}.")]
    return entry is None or bool(others)


def _imported_names() -> set[str]:
    def below(cls):
        for sub in cls.__subclasses__():
            yield sub.__name__
            yield from below(sub)

    return {name for base in (PreTrainedModel, PreTrainedConfig) for name in below(base)}


def _import(package: ModuleType, carries: dict, source: Any) -> None:
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
