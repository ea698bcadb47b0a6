"""The code in a checkpoint's folder: what it says that it carries, which files name it, how the running package takes it over.

`code_bundle` chooses what is written.  Where the package is imported its own classes load every checkpoint; of a checkpoint's
code only the user's files are run, and only if the caller trusts it and something that they define is missing here.
"""

import ast
import functools
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_cached_module_file

from ..parts.classes import CODE_ENTRY, _source
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, PROJECTORS
from ..parts.threads import TravellingLock
from .file_names import CONFIG, HUB_OPTIONS, PLACES, PROCESSOR

PACKAGE = "cornstarch_hf"
# The package, or the folder of a checkpoint whose code is running: there its modules lie beside each other.
ROOT = PACKAGE if __name__.startswith(f"{PACKAGE}.") else str(__package__)
HERE = Path(__file__).resolve().parents[__name__.removeprefix(f"{ROOT}.").count(".")]
# A checkpoint carries these under the names of the files that they stand for; the package itself never imports them.
THIN_FOLDER = HERE / "checkpoints" / "thin"
SHIM = "load_with_cornstarch_hf"
MODEL_MAP = {
    "AutoConfig": "MultimodalConfig",
    "AutoModel": "MultimodalModel",
    "AutoModelForCausalLM": "MultimodalModel",
    "AutoModelForImageTextToText": "MultimodalModel",
    "AutoModelForMultimodalLM": "MultimodalModel",
}
# Side of a checkpoint -> the file that names its classes, and the Auto classes that load it.
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "model": (CONFIG, MODEL_MAP),
    "processor": (PROCESSOR, {"AutoProcessor": "MultimodalProcessor"}),
    "projector": (CONFIG, {"AutoConfig": "MultimodalProjectorConfig", "AutoModel": "MultimodalProjector"}),
}


@functools.cache
def own_modules() -> dict[str, str]:
    """Every module of the running code: the name under which a checkpoint carries it -> its name below `ROOT`."""
    paths = [path for path in HERE.glob("**/*.py" if ROOT == PACKAGE else "*.py") if path.parent != THIN_FOLDER]
    names = [path.relative_to(HERE).with_suffix("").parts for path in paths]
    return {"_".join(parts): ".".join(parts) for parts in sorted(names) if parts[-1] != "__init__"}


def needs_package(what: str) -> ImportError:
    """The error of a thin file whose whole one is asked for."""
    return ImportError(
        f"{what} is not among the code that this checkpoint carries: pip install cornstarch_hf, and import it."
    )


def read_entry(folder: str | os.PathLike) -> dict:
    """What the code in a checkpoint's folder says that it carries; empty without code."""
    path = Path(folder) / f"{CODE_ENTRY}.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CARRIES":
            found = ast.literal_eval(node.value)
            return found if isinstance(found, dict) else {}
    return {}


def write_code(
    folder: Path, target: Path, side: str, texts: Mapping[str, str] | None, classes: Mapping[str, str]
) -> set[str]:
    """Write code files beside a saved configuration, and name them in its ``auto_map``.

    Args:
        folder: where the configuration has been written already.
        target: where all this shall lie in the end; may hold the other side of the checkpoint with its code.
        side: a key of `SIDES`.
        texts: of the files by their names, the entry among them; None for the small file that asks for the package.
        classes: Auto class -> name of the class in the entry.

    Returns:
        names of code files in the target that nothing needs any more.
    """
    entry, texts = (CODE_ENTRY, texts) if texts is not None else (SHIM, {SHIM: _SHIM_TEXT})
    file = SIDES[side][0]
    if (path := folder / file).is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        values["auto_map"] = {key: f"{entry}.{name}" for key, name in classes.items()}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    others_need = {_entry_named_in(target / name) for name, _ in SIDES.values() if name != file}
    old = read_entry(target).get("files", ())
    surplus = set(old) - set(texts) if CODE_ENTRY in texts or CODE_ENTRY not in others_need else set()
    if CODE_ENTRY in texts and SHIM not in others_need:
        surplus.add(SHIM)
    for stem, text in texts.items():
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return {f"{stem}.py" for stem in surplus}


_SHIM_TEXT = f'''"""This checkpoint was saved without its code: it is loaded by the package cornstarch_hf.

    pip install cornstarch_hf

and `import cornstarch_hf` first; then `trust_remote_code` is not needed.
"""

from {PACKAGE} import {", ".join(sorted({name for _, found in SIDES.values() for name in found.values()}))}  # noqa: F401
'''


def _entry_named_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    return next((str(ref).partition(".")[0] for ref in found.values()), None)


# ---- what a checkpoint brought along

_REGISTRIES = {"callbacks": CALLBACKS, "projectors": PROJECTORS, "counts": FEATURE_COUNTS}


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
    repo = _source(auto_map)
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
            found += [name for name in side[kind] if _is_missing(registry.get(name), package)]
        found += [name for name in side["classes"] if name not in _imported_names()]
    return found


def _is_missing(entry: Any, package: str) -> bool:
    module = getattr(getattr(entry, "target", entry), "__module__", "") or ""
    return entry is None or (module.startswith(f"{ROOT}_shared_") and not module.startswith(f"{package}."))


def _imported_names() -> set[str]:
    def below(cls):
        for sub in cls.__subclasses__():
            yield sub.__name__
            yield from below(sub)

    return {name for base in (PreTrainedModel, PreTrainedConfig) for name in below(base)}


def _import(package: ModuleType, carries: dict, source: Any) -> None:
    name = package.__name__
    sys.modules[name] = package
    for stem in carries["package"]:
        if stem in own_modules():
            sys.modules[f"{name}.{stem}"] = importlib.import_module(f"{ROOT}.{own_modules()[stem]}")
    try:
        importlib.import_module(f"{name}.{CODE_ENTRY}")
    except BaseException as error:
        for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[key]
        if isinstance(error, ValueError):
            raise ValueError(
                f"The code of {source} cannot be taken over: {error} Where two checkpoints define the same name differently, "
                "load them in processes of their own."
            ) from error
        raise
