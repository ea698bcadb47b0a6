"""Thin files: what a checkpoint's own code has in place of whole ones has the same names and signatures."""

import ast
import importlib
import inspect
import re

import pytest

from cornstarch_hf.checkpoints.code_bundle import ROOTS
from cornstarch_hf.checkpoints.code_folder import THIN_FOLDER, own_modules
from cornstarch_hf.checkpoints.users_code import JOINT, OPTIONAL, THIN, CodeFiles

CARRIED = CodeFiles(ROOTS)
EVERYTHING = frozenset().union(*THIN.values(), *OPTIONAL.values())


def modules(stem):
    thin = importlib.import_module(f"cornstarch_hf.checkpoints.thin.{stem}")
    return thin, importlib.import_module(f"cornstarch_hf.{own_modules()[stem]}")


def signature(function):
    """As written, without the modules of annotations."""
    return re.sub(r"[\w.]+\.(\w+)", r"\1", str(inspect.signature(function)))


def imported(texts):
    """Names that files import of each other, by the file that has them."""
    found = {}
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def test_the_table_names_the_thin_files():
    assert {path.stem for path in THIN_FOLDER.glob("*.py")} - {"__init__"} == set(THIN)
    assert not set(THIN) & set(OPTIONAL) and set(THIN) | set(OPTIONAL) <= set(own_modules())


@pytest.mark.parametrize("stem", THIN)
def test_thin_files_have_the_signatures_of_whole_ones(stem):
    thin, whole = modules(stem)
    assert inspect.getdoc(thin)
    for name, made in vars(thin).items():
        if getattr(made, "__module__", None) != thin.__name__ or name.startswith("_"):
            continue
        original = getattr(whole, name)
        assert inspect.isclass(made) == inspect.isclass(original), name
        pairs = [(made, original)]
        if inspect.isclass(made):
            pairs = [(value, getattr(original, key)) for key, value in vars(made).items() if inspect.isfunction(value)]
        for short, full in pairs:
            assert signature(short) == signature(full), name


@pytest.mark.parametrize(
    "needs",
    [frozenset(), *({name} for name in sorted(EVERYTHING)), EVERYTHING],
    ids=lambda needs: "+".join(sorted(needs)) or "nothing",
)
def test_names_that_carried_files_import_are_there(needs):
    files = CodeFiles(ROOTS, needs)
    for stem, names in imported(files.own).items():
        tree = ast.parse(files.own[stem])
        defined = {node.name for node in tree.body if hasattr(node, "name")}
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {inner.id for target in targets if target for inner in ast.walk(target) if hasattr(inner, "id")}
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {alias.asname or alias.name for alias in node.names}
        assert names <= defined, stem


def test_a_file_that_nothing_carried_imports_is_not_carried():
    assert set(CARRIED.own) == set(imported(CARRIED.own)) | set(ROOTS)
    assert not set(OPTIONAL) & set(CARRIED.own)
    assert {"checkpoints_users_code", "checkpoints_files", "checkpoints_bases", "assembly"} & set(CARRIED.own) == set()


def test_thin_files_that_are_carried_as_one_share_no_name():
    """They import each name once, and none of them defines what another one does."""
    tree = ast.parse(CARRIED.own[JOINT])
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.asname or alias.name for node in imports for alias in node.names]
    defined = [node.name for node in tree.body if hasattr(node, "name")]
    defined += [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    assert len(CARRIED.joint) > 9 and len(defined) > 20 and len(names) > 9
    assert sorted({*names, *defined}) == sorted([*names, *defined])
    assert tree.body[: len(imports)] == imports


def test_constants_of_thin_files_are_those_of_whole_ones():
    for stem in THIN:
        thin, whole = modules(stem)
        for name, value in vars(thin).items():
            if name.isupper() and name in vars(whole):
                assert getattr(whole, name) == value, (stem, name)


def test_the_thin_search_for_turns_refuses_calls_that_the_template_does_not_write():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "w"}]
    called = [*messages[:1], messages[1] | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]
    for part in modules("processing_assistant_turns"):
        assert part.assistant_spans(messages, template)[0] == "qw"
        with pytest.raises(ValueError, match="Message 1 calls a tool, but the chat template does not write that"):
            part.assistant_spans(called, template)
