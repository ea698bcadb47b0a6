"""The code in a checkpoint's folder: what `trust_remote_code=True` runs where this package is not installed.

`users_code` collects and rewrites the files, `code_folder` writes them, `trusted_code` takes them over again.

All entries of ``auto_map`` name one file, the entry, which imports everything else: transformers copies each file of an
entry with what it imports into a folder of its own, so that several entries would give several copies of each class.
"""

import ast
import functools
import inspect
import pprint
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import BaseVideoProcessor, FeatureExtractionMixin, PreTrainedTokenizerBase

from ..parts.classes import CODE_ENTRY, carries_code, language_model_class, resolve_class
from ..parts.known_encoders import ENCODER_TYPES, EncoderType, registered_facts
from ..parts.registries import CALLBACKS, FEATURE_COUNTS, MASK_RULES, POSITION_RULES, PROJECTORS
from .code_folder import CLASSES, INSTALL, SIDES, own_modules, read_entry, write_code
from .users_code import OPTIONAL, THIN, CodeFiles, called_name, is_installed, own_module_of, own_stem, top_calls

# They import all that each checkpoint needs.
ROOTS = ("modeling_multimodal", "processing_multimodal", "projectors_projector")
NEEDS = frozenset().union(*THIN.values(), *OPTIONAL.values())  # all words by which a checkpoint asks for more than that
_REGISTER = {
    "callbacks": "register_callback",
    "projectors": "register_projector",
    "counts": "register_feature_count",
    "encoder_types": "register_encoder_type",
    "positions": "register_position_rule",
    "mask": "register_mask_rule",
}
_RULES = {"positions": POSITION_RULES, "mask": MASK_RULES}


class Part(NamedTuple):
    """Something that a checkpoint names and that somebody's file defines."""

    kind: str  # "classes", a key of `_REGISTER`; of "encoder_types" a row, and each of its functions
    name: str
    target: Any
    count: Any = None


def export_code(
    folder: Any, side: str, owner: Any, target: Any, include_code: bool | None, others: Iterable[Any], references: bool
) -> set[str]:
    """Write the code files of a saved model, processor or projector, and name them in its ``auto_map``.

    Args:
        folder, target: where its configuration is written, and where all this shall lie in the end; that may hold the other
            side of the checkpoint with its code.
        side: ``"model"``, ``"processor"`` or ``"projector"``.
        owner: what was saved; its `config` names the parts.
        include_code: True carries this package's modules and the files that define the user's parts.  False, and None
            for what was not loaded from a checkpoint with code, writes one small file that asks for this package.
        others: further objects whose classes the user may have defined (processors of single modalities).
        references: whether the checkpoint refers to other repositories for its weights.

    Returns:
        names of code files in the target that nothing needs any more.

    Raises:
        ValueError: a part is defined where it cannot be carried from: in a notebook, `__main__` or a function, or in a
            file that does more than define; names it and the remedy.
    """
    folder, target, others = Path(folder), Path(target), list(others)
    classes = dict(SIDES[side][1])
    if include_code is None:  # as this was loaded: it runs from a checkpoint's code, or its configuration says so
        include_code = any(carries_code(getattr(each, "auto_map", None)) for each in (owner, owner.config))
    if not include_code:
        return write_code(folder, target, side, None, classes)
    parts = [*_parts_of(owner.config, side), *(_class_part(type(other)) for other in (owner, *others))]
    needs = _needs_of(owner.config, side, others) | ({"references"} if references else set())
    needs |= {"native processor"} if getattr(owner, "native", None) is not None else set()
    items = getattr(owner, "processors", {}).values()
    needs |= {"text" for processor in items if isinstance(processor, PreTrainedTokenizerBase)}
    # Both sides share the code's folder: what the other one needs is kept.
    sides = {name: found for name, found in read_entry(target).get("sides", {}).items() if name != side}
    carried = _collect(parts, needs.union(*(found.get("needs", ()) for found in sides.values())))
    sides[side] = _side(carried, needs)
    texts = carried.files.own | carried.files.users
    for stem in {stem for found in sides.values() for stem in found["files"]} - set(texts):
        if (path := target / f"{stem}.py").is_file():
            texts[stem] = path.read_text(encoding="utf-8")
    texts[CODE_ENTRY] = _entry_text({"package": sorted(carried.files.own), "sides": dict(sorted(sides.items()))})
    if _is_users(_class_part(type(owner))):  # then Auto classes shall give the user's own subclass
        classes |= {key: type(owner).__name__ for key in classes if key != "AutoConfig"}
    return write_code(folder, target, side, texts, classes)


def _needs_of(config: Any, side: str, others: Iterable[Any]) -> set[str]:
    """What a checkpoint names and not each one does, by the words of `users_code.THIN`."""
    if side == "projector":
        return {config.projection_type, *_grids_for([config.projection_type])} & NEEDS
    needs = {getattr(config, f"{name}_projector_config").projection_type for name in config.encoders}
    needs |= _grids_for(needs)
    needs |= {config.modality(name)["kind"] for name in config.encoders} & {"audio", "text", "video"}
    needs |= {config.language_model_class, *config.steps}
    callbacks = {each["name"] for name in config.encoders for each in config.modality(name)["callbacks"].values()}
    needs |= {"native steps" for name in callbacks if name.startswith("native_")} | ({"tiles"} & callbacks)
    needs |= {"video" for other in others if isinstance(other, BaseVideoProcessor)}
    needs |= {"audio" for other in others if isinstance(other, FeatureExtractionMixin)}
    needs |= {"own processors" for each in others if own_stem(_file_of(type(each))) == "processing_own_processors"}
    return (needs | ({"adapters"} if config.adapters else set())) & NEEDS


def _grids_for(types: Iterable[str]) -> set[str]:
    """The word for finding grids, where projectors of some of these types may ask for them; any of a user's own may."""
    targets = [PROJECTORS[name] for name in types if name in PROJECTORS]
    asks = [own_stem(_file_of(target)) is None or bool(getattr(target, "needs_grid", False)) for target in targets]
    return {"grids"} if any(asks) else set()


# ---- what a checkpoint names


def _parts_of(config: Any, side: str) -> list[Part]:
    """Classes, callbacks, projections and counts that a configuration names (ValueError for a name that is not known)."""
    encoders = () if side == "projector" else config.encoders
    projectors = [config] if side == "projector" else [getattr(config, f"{n}_projector_config") for n in encoders]
    types = [projector.projection_type for projector in projectors if projector.projection_type in PROJECTORS]
    found = [Part("projectors", name, PROJECTORS[name]) for name in types]
    for name in encoders:
        encoder_config, entry = getattr(config, f"{name}_config"), config.modality(name)
        encoder_class = resolve_class(entry["encoder_class"], encoder_config, name)
        found += [_class_part(type(encoder_config)), _class_part(encoder_class)]
        found += [Part("callbacks", each["name"], *CALLBACKS[each["name"]]) for each in entry["callbacks"].values()]
        keys = [key for key in (name, encoder_config.model_type) if key in FEATURE_COUNTS]
        found += [Part("counts", key, FEATURE_COUNTS[key]) for key in keys]
        for model_type in registered_facts([encoder_config]) or ():
            row = ENCODER_TYPES[model_type]
            found += [Part("encoder_types", model_type, target) for target in (row, *row.functions)]
    for key, rules in _RULES.items():
        name = (getattr(config, key, None) or {}).get("rule")
        found += [Part(key, name, rules[name])] if name is not None and own_stem(_file_of(rules[name])) is None else []
    if (text := getattr(config, "text_config", None)) is not None:
        cls: Any = language_model_class(text)
        if config.language_model_class is not None:
            cls = resolve_class(config.language_model_class, text, "language_model")
        found += [_class_part(type(text)), *([] if cls is None else [_class_part(cls)])]
    return found


def _class_part(cls: type) -> Part:
    return Part("classes", cls.__name__, cls)


def _definition(target: Any) -> Any:
    return getattr(target, "func", target)  # of a functools.partial


def _file_of(target: Any) -> Path:
    """The file of the module that defines something; an empty path where there is none."""
    module = sys.modules.get(getattr(_definition(target), "__module__", ""), None)
    return Path(getattr(module, "__file__", None) or "")


def _is_users(part: Part) -> bool:
    """Whether somebody other than the libraries defined this."""
    module = getattr(_definition(part.target), "__module__", None) or ""
    library = module.split(".")[0] in ("transformers", "torch", "builtins")
    return not library and own_stem(_file_of(part.target)) not in _package_stems()


@functools.cache
def _package_stems() -> frozenset[str]:
    return frozenset(CodeFiles(ROOTS).own)


# ---- collecting


class _Carried(NamedTuple):
    files: CodeFiles
    parts: list[Part]  # the user's
    homes: dict[str, str]  # class -> stem of its file
    packages: list[str]  # installed modules that must be imported, for classes that they define
    rows: dict[str, EncoderType]  # of users' encoder types


def _collect(parts: list[Part], needs: Collection[str]) -> _Carried:
    modules = [name for name in sorted(needs) if name in own_modules()]  # that files of the other side import
    files, packages = CodeFiles((*ROOTS, *modules), needs), set()
    homes: dict[str, str] = {}
    users = [part for part in dict.fromkeys(parts) if _is_users(part)]
    for part in users:
        path = _checked_file(part)
        if not is_installed(path):
            stem = files.add_file(path, f"it defines {part.name!r}")
            homes |= {part.name: stem} if part.kind == "classes" else {}
        elif part.kind == "classes":
            # Its readers install the package too: the entry imports it, so that its classes are known.
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
    """The file that defines a part (ValueError where a checkpoint cannot carry it from there)."""
    target, path = _definition(part.target), _file_of(part.target)
    module, name = getattr(target, "__module__", None), getattr(target, "__qualname__", repr(target))
    in_main = module in (None, "__main__") or not path.is_file()
    if in_main or ("<locals>" in name and part.kind == "classes"):
        where = f"inside a function ({name})" if not in_main else "in a notebook or in the script that is running"
        raise ValueError(
            f"{part.name!r} ({part.kind}) is defined {where}, from where a checkpoint cannot carry it: move it to the top of a "
            ".py file of its own and import it from there, or save with include_code=False."
        )
    return path


# ---- the entry


def _side(carried: _Carried, needs: Collection[str]) -> dict[str, Any]:
    """What one side of a checkpoint needs, as the entry lists it: plain data."""
    calls = [call for text in carried.files.users.values() for call in top_calls(ast.parse(text)) if call.args]
    # What files register by a name written out, when they are imported, as (function, name).
    registered = {(called_name(c), c.args[0].value) for c in calls if isinstance(c.args[0], ast.Constant)}
    side: dict[str, Any] = {kind: [] for kind in ("classes", *_REGISTER, "registrations")}
    side |= {"encoder_types": sorted(carried.rows), "homes": carried.homes, "packages": carried.packages}
    side["rows"] = {}  # facts as Python writes them, functions as [file, name]
    for name, row in carried.rows.items():
        if (_REGISTER["encoder_types"], name) not in registered:
            facts, part = {fact: getattr(row, fact) for fact in row.facts}, Part("encoder_types", name, row)
            side["rows"][name] = {k: _place(part, v, carried) if callable(v) else repr(v) for k, v in facts.items()}
    for part in carried.parts:
        if part.kind != "encoder_types":
            side[part.kind].append(part.name)
        if (
            part.kind in ("callbacks", "projectors", "counts", *_RULES)
            and (_REGISTER[part.kind], part.name) not in registered
        ):
            # [function, name, file, target, file of the count, count]
            places = [[None, None] if t is None else _place(part, t, carried) for t in (part.target, part.count)]
            side["registrations"].append([_REGISTER[part.kind], part.name, *places[0], *places[1]])
    # Last, for places may have asked for further files.
    return side | {"files": sorted(carried.files.users), "needs": sorted({*needs, *carried.files.added})}


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


_ENTRY_TEXT = '''"""The code of this checkpoint, for `trust_remote_code=True`; written when it was saved with include_code=True.

`{install}` (a clone or a wheel) and `import cornstarch_hf` load it without running this.
"""
# ruff: noqa: F401

{imports}

{carries}

{registrations}'''


def _entry_text(carries: dict[str, Any]) -> str:
    """The text of the entry: imports of all that is not imported by something else, what it carries, registrations."""
    sides = carries["sides"].values()
    imports = [f"import {package}" for package in sorted({name for side in sides for name in side["packages"]})]
    defined = {name: own_module_of(name) for name in (*CLASSES, *_REGISTER.values())}
    imports += [f"from .{home} import {name}" for name, home in defined.items() if home in carries["package"]]
    for stem in sorted(set(carries["package"]) - _package_stems()):  # what not every checkpoint needs
        # transformers copies only files that it finds in lines of the form `from .x import y`.
        imports.append(f"from .{stem} import __name__ as _{stem}")
    homes = {name: home for side in sides for name, home in side.get("homes", {}).items()}
    for stem in sorted({stem for side in sides for stem in side["files"]}):
        names = sorted(name for name, home in homes.items() if home == stem) or [f"__name__ as _{stem}"]
        imports.append(f"from .{stem} import {', '.join(names)}")
    wanted = {tuple(entry): None for side in sides for entry in side["registrations"]}
    registrations = []
    for i, (function, name, home, target, count_home, count) in enumerate(wanted):
        imports.append(f"from .{home} import {target} as _target_{i}")
        if count is not None:
            imports.append(f"from .{count_home} import {count} as _count_{i}")
        registrations.append(f"{function}({name!r}, _target_{i}{f', _count_{i}' if count is not None else ''})")
    rows = {name: row for side in sides for name, row in side.get("rows", {}).items()}
    places = {tuple(value) for row in rows.values() for value in row.values() if isinstance(value, list)}
    imports += [f"from .{home} import {function} as _{home}_{function}" for home, function in sorted(places)]
    for name, row in rows.items():
        facts = [f"{key}={value if isinstance(value, str) else '_'.join(['', *value])}" for key, value in row.items()]
        registrations.append(f"register_encoder_type({name!r}, {', '.join(facts)})")
    carried = pprint.pformat(carries, width=240, compact=True)
    texts = {"imports": imports, "carries": [f"CARRIES = {carried}"], "registrations": registrations}
    return (
        _ENTRY_TEXT.format(install=INSTALL, **{key: "\n".join(lines) for key, lines in texts.items()}).rstrip("\n")
        + "\n"
    )
