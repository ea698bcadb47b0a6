"""The code in a checkpoint's folder: what `trust_remote_code=True` runs where this package is not installed.

`users_code` collects and rewrites the files, `trusted_code` reads them where the package is imported.

All entries of ``auto_map`` name one file, the entry, which imports everything else: transformers copies each file of an
entry with what it imports into a folder of its own, so that several entries would give several copies of each class.
"""

import ast
import functools
import inspect
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..parts.classes import CODE_ENTRY, language_model_class, resolve_class
from ..parts.known_encoders import ENCODER_TYPES, EncoderType, registered_facts
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, PROJECTORS
from .users_code import PACKAGE, ROOT, CodeFiles, called_name, is_installed, own_stem, read_entry, top_calls

SHIM = "load_with_cornstarch_hf"
ROOTS = ("modeling_multimodal", "processing_multimodal", "projectors_projector", "checkpoints_trusted_code")
MODEL_MAP = {
    "AutoConfig": "MultimodalConfig",
    "AutoModel": "MultimodalModel",
    "AutoModelForCausalLM": "MultimodalModel",
    "AutoModelForImageTextToText": "MultimodalModel",
    "AutoModelForMultimodalLM": "MultimodalModel",
}
# Side of a checkpoint -> the file that names its classes, and the Auto classes that load it.
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "model": ("config.json", MODEL_MAP),
    "processor": ("processor_config.json", {"AutoProcessor": "MultimodalProcessor"}),
    "projector": ("config.json", {"AutoConfig": "MultimodalProjectorConfig", "AutoModel": "MultimodalProjector"}),
}
_HOMES = {
    "MultimodalConfig": "configuration_multimodal",
    "MultimodalProjectorConfig": "configuration_projector",
    "MultimodalModel": "modeling_multimodal",
    "MultimodalProcessor": "processing_multimodal",
    "MultimodalProjector": "projectors_projector",
}
_REGISTER = {
    "callbacks": "register_callback",
    "projectors": "register_projector",
    "counts": "register_feature_count",
    "encoder_types": "register_encoder_type",
}


class Part(NamedTuple):
    """Something that a checkpoint names and that somebody's file defines."""

    kind: str  # "classes", "callbacks", "projectors", "counts", or "encoder_types": a row, and each of its functions
    name: str
    target: Any
    count: Any = None


def export_code(
    folder: Any, side: str, owner: Any, target: Any, *, include_code: bool | None = None, others: Iterable[Any] = ()
) -> set[str]:
    """Write the code files of a saved model, processor or projector, and name them in its ``auto_map``.

    Args:
        folder: where its configuration has been written already.
        side: ``"model"``, ``"processor"`` or ``"projector"``.
        owner: what was saved; its `config` names the parts.
        target: where all this shall lie in the end; may hold the other side of the checkpoint with its code.
        include_code: True carries this package's modules and the files that define the user's parts.  False, and None
            for what was not loaded from a checkpoint with code, writes one small file that asks for this package:
            code that is frozen into a checkpoint gets no fixes and asks each reader to trust it.
        others: further objects whose classes the user may have defined (processors of single modalities).

    Returns:
        names of code files in the target that nothing needs any more.

    Raises:
        ValueError: a part is defined where it cannot be carried from: in a notebook, `__main__` or a function, or in a
            file that does more than define; names it and the remedy.
    """
    folder, target = Path(folder), Path(target)
    old, (file, mapping) = read_entry(target), SIDES[side]
    if include_code or (include_code is None and _has_code(owner)):
        parts = [*parts_of(owner.config, side), *(_class_part(type(other)) for other in (owner, *others))]
        carried = _collect(parts)
        texts, classes = _entry_texts(target, side, carried, parts, old), dict(mapping)
        if _is_users(_class_part(type(owner))):
            classes |= {key: type(owner).__name__ for key in mapping if key != "AutoConfig"}
        entry = CODE_ENTRY
    else:
        texts, classes, entry = {SHIM: _shim_text()}, mapping, SHIM
    _set_auto_map(folder / file, {key: f"{entry}.{name}" for key, name in classes.items()})
    others_need = {_entry_named_in(target / name) for name, _ in SIDES.values() if name != file}
    surplus = set(old.get("files", ())) - set(texts) if CODE_ENTRY in texts or CODE_ENTRY not in others_need else set()
    if CODE_ENTRY in texts and SHIM not in others_need:
        surplus.add(SHIM)
    for stem, text in texts.items():
        (folder / f"{stem}.py").write_text(text, encoding="utf-8")
    return {f"{stem}.py" for stem in surplus}


def _has_code(owner: Any) -> bool:
    """Whether this was loaded from a checkpoint with code: it runs from there, or its configuration says so."""
    maps = [getattr(owner, "auto_map", None), getattr(owner.config, "auto_map", None)]
    named = {str(ref).rpartition("--")[2].partition(".")[0] for m in maps if isinstance(m, dict) for ref in m.values()}
    return ROOT != PACKAGE or CODE_ENTRY in named


# ---- what a checkpoint names


def parts_of(config: Any, side: str) -> list[Part]:
    """Classes, callbacks, projections and counts that a configuration names, as they are known now.

    Raises:
        ValueError: a name that is not known.
    """
    if side == "projector":
        return _projection_part(config)
    found: list[Part] = []
    for name in config.encoders:
        encoder_config, entry = getattr(config, f"{name}_config"), config.modality(name)
        encoder_class = resolve_class(entry["encoder_class"], encoder_config, name)
        found += [_class_part(type(encoder_config)), _class_part(encoder_class)]
        found += _projection_part(getattr(config, f"{name}_projector_config"))
        for described in entry["callbacks"].values():
            callback = CALLBACKS[described["name"]]
            found.append(Part("callbacks", described["name"], callback.target, callback.feature_count))
        keys = [key for key in (name, encoder_config.model_type) if key in FEATURE_COUNTS]
        found += [Part("counts", key, FEATURE_COUNTS[key]) for key in keys]
        for model_type in registered_facts([encoder_config]) or ():
            row = ENCODER_TYPES[model_type]
            found += [Part("encoder_types", model_type, target) for target in (row, *row.functions)]
    if (text := config.text_config) is not None:
        cls: Any = language_model_class(text)
        if config.language_model_class is not None:
            cls = resolve_class(config.language_model_class, text, "language_model")
        found += [_class_part(type(text)), *([] if cls is None else [_class_part(cls)])]
    return found


def _class_part(cls: type) -> Part:
    return Part("classes", cls.__name__, cls)


def _projection_part(config: Any) -> list[Part]:
    name = config.projection_type
    return [Part("projectors", name, PROJECTORS[name])] if name in PROJECTORS else []


def _definition(target: Any) -> Any:
    return getattr(target, "func", target)  # of a functools.partial


def _file_of(target: Any) -> Path:
    """The file of the module that defines something; an empty path where there is none."""
    module = sys.modules.get(getattr(_definition(target), "__module__", ""), None)
    return Path(getattr(module, "__file__", None) or "")


def _is_users(part: Part) -> bool:
    """Whether somebody other than the libraries defined this."""
    module = getattr(_definition(part.target), "__module__", None) or ""
    if module.split(".")[0] in ("transformers", "torch", "builtins"):
        return False
    return own_stem(_file_of(part.target)) not in _package_stems()


@functools.cache
def _package_stems() -> frozenset[str]:
    return frozenset(CodeFiles(ROOTS).own)


# ---- collecting


class _Carried(NamedTuple):
    files: CodeFiles
    parts: list[Part]  # the user's
    homes: dict[int, str]  # position of a part -> stem of its file
    packages: list[str]  # installed modules that must be imported, for classes that they define
    rows: dict[str, EncoderType]  # of users' encoder types


def _collect(parts: list[Part]) -> _Carried:
    files, homes, packages = CodeFiles(ROOTS), {}, set()
    users = [part for part in dict.fromkeys(parts) if _is_users(part)]
    for i, part in enumerate(users):
        path = _checked_file(part)
        if not is_installed(path):
            homes[i] = files.add_file(path, f"it defines {part.name!r}")
        elif part.kind == "classes":
            packages.add(part.target.__module__)
        else:
            package = part.target.__module__.split(".")[0]
            raise ValueError(
                f"{part.name!r} ({part.kind}) is defined in the installed package {package!r}, whose files a checkpoint does "
                f"not carry: define it in a file of your own, which may import {package!r}."
            )
    rows = {part.name: part.target for part in parts if isinstance(part.target, EncoderType)}
    return _Carried(files, users, homes, sorted(packages), rows)


def _checked_file(part: Part) -> Path:
    target = _definition(part.target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", repr(target))
    path = _file_of(target)
    in_main = module in (None, "__main__") or not path.is_file()
    if in_main or ("<locals>" in name and part.kind == "classes"):
        where = f"inside a function ({name})" if not in_main else "in a notebook or in the script that is running"
        raise ValueError(
            f"{part.name!r} ({part.kind}) is defined {where}, from where a checkpoint cannot carry it: move it to the top of a "
            ".py file of its own and import it from there, or save with include_code=False."
        )
    return path


def _registered_in(text: str) -> set[tuple[str, str]]:
    """What a file registers by a name written out, as (function, name)."""
    calls = [call for call in top_calls(ast.parse(text)) if called_name(call) in _REGISTER.values() and call.args]
    return {(called_name(c), c.args[0].value) for c in calls if isinstance(c.args[0], ast.Constant)}


# ---- the entry


def _entry_texts(folder: Path, side: str, carried: _Carried, parts: list[Part], old: dict) -> dict[str, str]:
    """All files by stem, the entry among them; what the other side of the checkpoint brought along stays in it."""
    other = {key: value for key, value in old.get("sides", {}).items() if key != side}
    sides = other | {side: _side(carried)}
    texts = dict(carried.files.texts)
    for stem in old.get("files", ()):
        path = folder / f"{stem}.py"
        if any(stem in found["files"] for found in other.values()) and stem not in texts and path.is_file():
            texts[stem] = path.read_text(encoding="utf-8")
    files = sorted({*texts, CODE_ENTRY})
    carries = {"files": files, "package": sorted(carried.files.own), "sides": dict(sorted(sides.items()))}
    return texts | {CODE_ENTRY: _entry_text(carries)}


def _side(carried: _Carried) -> dict[str, Any]:
    """What one side of a checkpoint needs, as the entry lists it: plain data."""
    known = set().union(*(_registered_in(text) for text in carried.files.users.values()), set())
    side: dict[str, Any] = {"files": sorted(carried.files.users), "packages": carried.packages, "registrations": []}
    side |= {kind: [] for kind in ("classes", "callbacks", "projectors", "counts")}
    side["encoder_types"] = sorted(carried.rows)
    side["rows"] = {}  # facts as Python writes them, functions as [file, name]
    for name, row in carried.rows.items():
        if (_REGISTER["encoder_types"], name) not in known:
            facts, part = {fact: getattr(row, fact) for fact in row.facts}, Part("encoder_types", name, row)
            side["rows"][name] = {k: _place(part, v, carried) if callable(v) else repr(v) for k, v in facts.items()}
    for i, part in enumerate(carried.parts):
        if part.kind == "encoder_types":
            continue
        side[part.kind].append(part.name)
        if part.kind == "classes":
            if i in carried.homes:
                side.setdefault("homes", {})[part.name] = carried.homes[i]
        elif (_REGISTER[part.kind], part.name) not in known:
            side["registrations"].append(_registration(part, carried))
    return side


def _registration(part: Part, carried: _Carried) -> list:
    """``[function, name, file, target, file of the count, count]`` for what no carried file registers itself."""
    pairs = [[None, None] if t is None else _place(part, t, carried) for t in (part.target, part.count)]
    return [_REGISTER[part.kind], part.name, *pairs[0], *pairs[1]]


def _place(part: Part, target: Any, carried: _Carried) -> list:
    """``[file, name]`` from which a checkpoint imports something that is registered."""
    name, file = getattr(target, "__qualname__", "<"), _file_of(target).name
    found = getattr(sys.modules.get(getattr(target, "__module__", "")), name, None)
    if found is not target or inspect.ismodule(target):
        raise ValueError(
            f"{part.name!r} ({part.kind}) was registered in another file than {file}, and as {name!r} it cannot be found by a "
            f"name: call {_REGISTER[part.kind]}({part.name!r}, ...) at the top of the file that defines it."
        )
    return [carried.files.add_file(_checked_file(part._replace(target=target)), f"it defines {name!r}"), name]


def _entry_text(carries: dict[str, Any]) -> str:
    lines = [
        '"""The code of this checkpoint, for `trust_remote_code=True`; written when it was saved with include_code=True.',
        "",
        "`pip install cornstarch_hf` and `import cornstarch_hf` load it without running this.",
        '"""',
        "",
    ]
    for name, home in sorted(_HOMES.items()):
        lines.append(f"from .{home} import {name}  # noqa: F401")
    lines.append(
        "from .parts_registries import register_callback, register_feature_count, register_projector  # noqa: F401"
    )
    lines.append("from .parts_known_encoders import register_encoder_type  # noqa: F401")
    named = {*_HOMES.values(), "parts_registries", "parts_known_encoders"}
    registrations, packages = [], set()
    for side in carries["sides"].values():
        packages |= set(side["packages"])
        registrations += [entry for entry in side["registrations"] if entry not in registrations]
    for stem in [s for s in carries["package"] if s not in named | _package_stems()]:  # only a user's file needs it
        lines.append(f"from .{stem} import __name__ as _{stem}  # noqa: F401")
    homes = {name: home for side in carries["sides"].values() for name, home in side.get("homes", {}).items()}
    for stem in [s for s in carries["files"] if s not in carries["package"] and s != CODE_ENTRY]:
        names = sorted(name for name, home in homes.items() if home == stem) or [f"__name__ as _{stem}"]
        lines.append(f"from .{stem} import {', '.join(names)}  # noqa: F401")
    lines[5:5] = [f"import {package}  # noqa: F401" for package in sorted(packages)]
    for i, (_, _, home, target, count_home, count) in enumerate(registrations):
        lines.append(f"from .{home} import {target} as _target_{i}")
        if count is not None:
            lines.append(f"from .{count_home} import {count} as _count_{i}")
    rows = {name: row for side in carries["sides"].values() for name, row in side.get("rows", {}).items()}
    places = {tuple(value) for row in rows.values() for value in row.values() if isinstance(value, list)}
    lines += [f"from .{home} import {function} as _{home}_{function}" for home, function in sorted(places)]
    lines += ["", f"CARRIES = {json.dumps(carries, indent=4, sort_keys=True).replace('null', 'None')}", ""]
    for i, (function, name, _, _, _, count) in enumerate(registrations):
        lines.append(f"{function}({name!r}, _target_{i}{f', _count_{i}' if count is not None else ''})")
    for name, row in rows.items():
        facts = [f"{key}={value if isinstance(value, str) else '_'.join(['', *value])}" for key, value in row.items()]
        lines.append(f"register_encoder_type({name!r}, {', '.join(facts)})")
    return "\n".join(lines).rstrip("\n") + "\n"


def _shim_text() -> str:
    return (
        '"""This checkpoint was saved without its code: it is loaded by the package cornstarch_hf.\n\n'
        "    pip install cornstarch_hf\n\n"
        "and `import cornstarch_hf` first; then `trust_remote_code` is not needed.\n"
        '"""\n\n'
        f"from {PACKAGE} import {', '.join(sorted(_HOMES))}  # noqa: F401\n"
    )


# ---- the files that name the classes


def _set_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    values["auto_map"] = auto_map
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _entry_named_in(path: Path) -> str | None:
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
    return next((str(ref).partition(".")[0] for ref in found.values()), None)
