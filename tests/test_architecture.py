"""The shape of the package: rooms in layers, imports to the left only, small files and functions, nothing that sharing would lose."""

import ast
import io
import re
import tokenize
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import cornstarch_hf

PACKAGE = Path(cornstarch_hf.__file__).parent
TESTS = Path(__file__).parent
# Rooms and files on top.  Each layer may import those before it; files on top, and `limits` and `parts`, also their own.
LAYERS = [
    ["limits", "parts"],
    ["configuration_multimodal", "configuration_projector"],
    ["processing", "checkpoints", "language_model"],
    ["projectors"],
    ["encoders"],
    ["composition", "processing_multimodal", "modeling_multimodal"],
    ["assembly", "swap_checks", "swapping", "training", "hub", "conversion"],
    ["__init__"],
]
# name -> why it may be longer than 40 lines of body
LONG_FUNCTIONS: dict[str, str] = {}
OPTIONAL = {"bitsandbytes", "peft", "trl", "datasets", "sklearn", "matplotlib", "soundfile", "librosa"}
# The package itself imports no thin file; `test_thin` holds them to the files that they stand for in a checkpoint.
PATHS = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "thin")
ROOMS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
# Files that are tested together with another one.
COVERED = {
    "conversion.configs": "conversion/test_native",
    "conversion.entries": "conversion/test_table",
    "conversion.keys": "conversion/test_table",
    "conversion.refusals": "conversion/test_table",
    "encoders.building": "test_composition",
    "checkpoints.described": "checkpoints/test_config_sync",
    "encoders.said_of_items": "language_model/test_positions",
    "language_model.position_rules": "language_model/test_positions",
    "language_model.refusals": "language_model/test_supported",
    "encoders.rebuilding": "test_composition",
    "projectors.native": "conversion/test_native",
    "checkpoints.code_folder": "checkpoints/test_code_bundle",
    "checkpoints.finding": "checkpoints/test_checkpoint_files",
    "swap_checks": "test_swapping",
    "parts.stored_adapters": "parts/test_adapters",
    "processing.sounds": "processing/test_media",
    "processing.texts": "processing/test_text_items",
    "processing.opening": "processing/test_media",
    "checkpoints.plain_storage": "checkpoints/test_config_sync",
    "checkpoints.storage": "checkpoints/test_config_sync",
}


def module(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = {module(path): path for path in PATHS if path.name != "__init__.py"} | {"__init__": PACKAGE / "__init__.py"}
FACES = {room: PACKAGE / room / "__init__.py" for room in ROOMS}


def room(name):
    return name.split(".")[0]


def layer(name):
    return next(i for i, names in enumerate(LAYERS) if room(name) in names)


def imports(name):
    """Modules of this package that a file imports anywhere: in functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module, f"{name}:{node.lineno} imports without a file"
            folder = name.split(".")[: -node.level]
            found.add(".".join([*folder, node.module]))
    return found


def test_the_layers_are_those_that_the_contributing_guide_tells():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    told = next(block for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S) if "modeling_multimodal" in block)
    assert [line.split(", ") for line in told.splitlines()] == LAYERS and len(LAYERS) == 8


def test_every_room_and_file_on_top_has_its_layer():
    named = [name for names in LAYERS for name in names]
    assert sorted(named) == sorted({room(name) for name in FILES}) and len(named) == len(set(named))
    assert 8 <= len(ROOMS) <= 11
    assert {room(name) for name in FILES if "." in name} == set(ROOMS)
    assert {module(path) for path in PATHS} == set(FILES) | {f"{name}.__init__" for name in ROOMS}


def test_the_house_stays_small_enough_to_be_drawn():
    assert len([name for name in FILES if "." not in name]) <= 10
    assert len([name for name in FILES if name != "__init__"]) <= 120


def test_a_twentieth_of_the_lines_have_comments():
    lines = comments = 0
    for path in FILES.values():
        text = path.read_text()
        lines += text.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})
    assert comments >= 0.05 * lines


@pytest.mark.parametrize("name", FILES)
def test_imports_go_to_the_left(name):
    for other in imports(name):
        assert other in FILES, f"{name} imports {other}, which is no file: a face is for users"
        if "." in name and room(name) == room(other):
            continue
        files_on_top = "." not in name and "." not in other
        beside = layer(other) == layer(name) and (files_on_top or layer(name) == 0)
        assert layer(other) < layer(name) or beside, f"{name} imports {other}"


def test_nothing_is_imported_in_a_circle():
    order = list(TopologicalSorter({name: imports(name) for name in FILES}).static_order())
    assert sorted(order) == sorted(FILES)


@pytest.mark.parametrize("room", ROOMS)
def test_a_face_says_its_duty_and_imports_nothing_before_it_is_asked(room):
    tree = ast.parse(FACES[room].read_text())
    assert ast.get_docstring(tree)
    assert not [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.level or n.module.startswith("cornstarch"))
    ]


def test_every_file_has_a_docstring_and_a_test():
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
        *folder, stem = name.split(".")
        default = "test_auto" if stem == "__init__" else "/".join([*folder, f"test_{stem}"])
        assert (TESTS / f"{COVERED.get(name, default)}.py").is_file(), name


@pytest.mark.parametrize("name", FILES)
def test_imports_have_the_form_that_a_shared_checkpoint_can_carry(name):
    tree = ast.parse(FILES[name].read_text())
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.Try)) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cornstarch_hf") for alias in node.names), name
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & OPTIONAL or id(node) in guarded, f"{name}: optional {names}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            root = node.module.split(".")[0]
            assert root != "cornstarch_hf", name
            assert root not in OPTIONAL or id(node) in guarded, f"{name}: optional {root}"
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert not any(re.search(r"^\s*from \.", text, re.M) for text in texts), "a relative import in a docstring"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_small(name):
    text = FILES[name].read_text()
    assert text.count("\n") <= 400, name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40 or f"{name}.{node.name}" in LONG_FUNCTIONS, f"{name}: {node.name} has {lines} lines"


def test_public_names_are_documented_with_what_they_raise():
    assert cornstarch_hf.__all__ == sorted(cornstarch_hf.__all__)
    for name in cornstarch_hf.__all__:
        documented = getattr(cornstarch_hf, name).__doc__
        assert documented and "Args:" in documented and "Raises:" in documented, name


def test_no_leftovers():
    for path in [*PATHS, *TESTS.rglob("*.py")]:
        if path.name != Path(__file__).name:
            assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|mark\.(skip|xfail)\b", path.read_text()), (
                path.name
            )
