"""The code files in a checkpoint's folder: which they are, what they say that they carry, which files name them.

Nothing is run here.  `code_bundle` chooses the files, `trusted_code` runs those that a checkpoint brought along.
"""

import ast
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..parts.classes import CODE_ENTRY
from ..parts.stored_values import read_json
from .finding import CONFIG, PROCESSOR

PACKAGE = "cornstarch_hf"
# A path, to a clone or a wheel: the package is on no index, where its bare name would be whoever registers it.
INSTALL = "pip install ./cornstarch_hf"
# The package, or the folder of a checkpoint whose code is running: there its modules lie beside each other.
ROOT = PACKAGE if __name__.startswith(f"{PACKAGE}.") else str(__package__)
HERE = Path(__file__).resolve().parents[__name__.removeprefix(f"{ROOT}.").count(".")]
# A checkpoint carries these under the names of the files that they stand for; the package itself never imports them.
THIN_FOLDER = HERE / "checkpoints" / "thin"
SHIM = "load_with_cornstarch_hf"  # stands for the code that is left out, and says what to install
_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
MODEL_MAP = {"AutoConfig": "MultimodalConfig", **dict.fromkeys(_MODELS, "MultimodalModel")}
# Side of a checkpoint -> the file that names its classes, and the Auto classes that load it.
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "model": (CONFIG, MODEL_MAP),
    "processor": (PROCESSOR, {"AutoProcessor": "MultimodalProcessor"}),
    "projector": (CONFIG, {"AutoConfig": "MultimodalProjectorConfig", "AutoModel": "MultimodalProjector"}),
}
CLASSES = sorted({name for _, classes in SIDES.values() for name in classes.values()})


@functools.cache
def own_modules() -> dict[str, str]:
    """Every module of the running code: the name under which a checkpoint carries it -> its name below `ROOT`."""
    paths = [path for path in HERE.glob("**/*.py" if ROOT == PACKAGE else "*.py") if path.parent != THIN_FOLDER]
    names = [path.relative_to(HERE).with_suffix("").parts for path in paths]
    return {"_".join(parts): ".".join(parts) for parts in sorted(names) if parts[-1] != "__init__"}


def needs_package(what: str) -> ImportError:
    """The error of a thin file whose whole one is asked for."""
    return ImportError(
        f"{what} is not among the code of this checkpoint: {INSTALL} (a clone or a wheel of it), and import it."
    )


def read_entry(folder: str | os.PathLike) -> dict:
    """What the code in a checkpoint's folder says that it carries; empty without code."""
    path = Path(folder) / f"{CODE_ENTRY}.py"
    if not path.is_file():
        return {}
    # Parsed and not run: nobody has said yet that it can be trusted.
    assigned = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    values = [ast.literal_eval(node.value) for node in assigned if getattr(node.targets[0], "id", "") == "CARRIES"]
    if not values or not isinstance(values[0], dict) or "sides" not in values[0]:
        return {}
    users = {stem for side in values[0]["sides"].values() for stem in side["files"]}
    return values[0] | {"files": sorted({CODE_ENTRY, *values[0]["package"], *users})}


def write_code(
    folder: Path, target: Path, side: str, texts: Mapping[str, str] | None, classes: Mapping[str, str]
) -> set[str]:
    """Write code files beside a saved configuration in `folder`, and name them in its ``auto_map``.

    Args:
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
        values = read_json(path, str(path))
        values["auto_map"] = {key: f"{entry}.{name}" for key, name in classes.items()}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # The other side of the checkpoint may still name what this one needs no more.
    others = [target / name for name, _ in SIDES.values() if name != file and (target / name).is_file()]
    maps = [read_json(path, str(path)).get("auto_map") or {} for path in others]
    others_need = {str(reference).partition(".")[0] for found in maps for reference in found.values()} - {entry}
    old = {CODE_ENTRY: read_entry(target).get("files", []), SHIM: [SHIM]}
    surplus = {stem for key, stems in old.items() if key not in others_need for stem in stems}
    for stem, text in texts.items():
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return {f"{stem}.py" for stem in surplus - set(texts)}


_SHIM_TEXT = f'''"""This checkpoint was saved without its code: it is loaded by the package {PACKAGE}.

    {INSTALL}

(a clone or a wheel of it) and `import {PACKAGE}` before loading; then `trust_remote_code` is not needed.
"""

try:  # else transformers would say to install what somebody may have registered under that name
    from {PACKAGE} import {", ".join(CLASSES)}  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "{PACKAGE}":
        raise
    raise ImportError(
        "This checkpoint carries no code: it is loaded by the package {PACKAGE}, which is not installed. {INSTALL} (a clone "
        "or a wheel of it), and `import {PACKAGE}` before loading."
    ) from error
'''
