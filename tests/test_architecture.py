"""The shape of the package: imports go upward only, files and functions stay small, nothing that sharing would lose."""

import ast
import re
from pathlib import Path

import pytest

import cornstarch_hf

PACKAGE = Path(cornstarch_hf.__file__).parent
# Each line may import the lines above it, never its own line or one below.
ORDER = [
    {"batches", "card_licenses", "card_training", "checkpoint_files", "count_cache", "fixed_inputs", "grids", "heads", "implementations", "item_processors", "limits", "manifests", "merging", "module_specs", "module_tree", "name_patterns", "placeholder_text", "precomputed_features", "reentrant", "registries", "selection", "text_items", "threads", "typical_inputs", "uploading", "versions"},
    {"callbacks", "input_names", "items", "media", "reductions", "size_guard", "template_bounds", "untrusted", "weightless"},
    {"adapters", "classes", "rendering", "resampler", "shape_probe", "snapshots", "truncation", "video", "window_reductions"},
    {"adapter_tensors", "chat", "code_files", "configuration_projector", "forward_signature", "frames", "freezing", "frozen_modes", "origins", "saving", "video_processors"},
    {"card_markup", "checkpoint_checks", "code_export", "configuration_multimodal", "gathering", "id_inputs", "labelling", "layouts", "positions", "shared_code", "subprocessors", "training"},
    {"bases", "card_usage", "checkpointing", "language_model", "refusals", "tokens", "towers"},
    {"generation_multimodal", "item_lengths", "references"},
    {"loading"},
    {"modeling_storage"},
    {"projectors"},
    {"encoders"},
    {"building", "own_parts"},
    {"composition", "feature_counts"},
    {"describing", "processing_base"},
    {"card_sections", "modeling_base", "processing_multimodal"},
    {"batch_metrics", "collator", "model_card", "modeling_multimodal"},
    {"assembly", "auto", "pushing"},
    {"hub"},
    {"__init__"},
]  # fmt: skip
# name -> why it may be longer than 40 lines of body
LONG_FUNCTIONS: dict[str, str] = {}
OPTIONAL = {"bitsandbytes", "peft", "trl", "datasets", "sklearn", "matplotlib", "soundfile", "librosa"}
FILES = sorted(PACKAGE.glob("*.py"))


def level(module):
    return next(i for i, names in enumerate(ORDER) if module in names)


def test_the_order_is_the_one_that_the_contributing_guide_tells():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    told = next(block for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S) if "modeling_base" in block)
    assert [set(line.split(" | ")) for line in told.splitlines()] == ORDER


def test_every_module_has_its_place_and_a_docstring_and_a_test():
    assert {path.stem for path in FILES} == set().union(*ORDER)
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    covered = {
        "modeling_base": "modeling_multimodal",
        "modeling_storage": "checkpointing",
        "processing_base": "processing_multimodal",
        "building": "composition",
        "__init__": "architecture",
    }
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
        assert covered.get(path.stem, path.stem) in tests, f"tests/test_{path.stem}.py"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_go_upward_in_the_form_that_a_shared_checkpoint_can_carry(path):
    tree = ast.parse(path.read_text())
    guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.Try)) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("cornstarch_hf") for alias in node.names), path.name
            names = {alias.name.split(".")[0] for alias in node.names}
            assert not names & OPTIONAL or id(node) in guarded, f"{path.name}: optional {names}"
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                root = node.module.split(".")[0]
                assert root != "cornstarch_hf", path.name
                assert root not in OPTIONAL or id(node) in guarded, f"{path.name}: optional {root}"
                continue
            assert node.level == 1 and node.module and "." not in node.module, f"{path.name}:{node.lineno}"
            assert level(node.module) < level(path.stem), f"{path.name} imports {node.module}"
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    assert not any(re.search(r"^\s*from \.", text, re.M) for text in texts), "a relative import in a docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400, path.name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 40 or f"{path.stem}.{node.name}" in LONG_FUNCTIONS, (
                f"{path.name}: {node.name} has {lines} lines"
            )


def test_public_names_are_documented_with_what_they_raise():
    assert cornstarch_hf.__all__ == sorted(cornstarch_hf.__all__)
    for name in cornstarch_hf.__all__:
        documented = getattr(cornstarch_hf, name).__doc__
        assert documented and "Args:" in documented and "Raises:" in documented, name


def test_no_leftovers():
    for path in [*FILES, *Path(__file__).parent.glob("*.py")]:
        if path.name != Path(__file__).name:
            assert not re.search(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|mark\.(skip|xfail)\b", path.read_text()), (
                path.name
            )
