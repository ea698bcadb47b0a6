"""Files of a user made flat: what is carried, how imports read afterwards, and what is refused."""

import ast

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files, get_relative_imports

from cornstarch_hf.checkpoints.code_bundle import ROOTS
from cornstarch_hf.checkpoints.code_folder import HERE, THIN_FOLDER, own_modules, read_entry
from cornstarch_hf.checkpoints.users_code import JOINT, CodeFiles, bundled, is_installed, own_file


@pytest.fixture
def project(tmp_path):
    """A user's folder: a file beside another, and a package with relative imports."""
    (tmp_path / "beside.py").write_text("import math\nFACTOR = math.pi\n")
    package = tmp_path / "lib" / "deep"
    package.mkdir(parents=True)
    (tmp_path / "lib" / "__init__.py").write_text("from .deep.layers import Layer\n")
    (package / "__init__.py").write_text("")
    (package / "layers.py").write_text(
        "from .. import tools\nfrom ..tools import (\n    helper,\n)\nclass Layer: pass\n"
    )
    (tmp_path / "lib" / "tools.py").write_text("import numpy\ndef helper(): return 1\n")
    return tmp_path


def carried(folder, text, name="parts.py"):
    path = folder / name
    path.write_text(text)
    files = CodeFiles(())
    files.add_file(path, "a test")
    return files


def _taken_imports(tree):
    """What a file imports at its top; the statements are taken out."""
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    tree.body = [node for node in tree.body if node not in imports]
    return {(getattr(node, "module", None), alias.name, alias.asname) for node in imports for alias in node.names}


def test_package_files_are_seen_by_transformers_as_python_sees_them(tmp_path):
    files = CodeFiles(ROOTS)
    for stem, text in files.own.items():
        (tmp_path / f"{stem}.py").write_text(text)
    for stem, text in files.own.items():
        path = tmp_path / f"{stem}.py"
        assert set(get_relative_imports(path)) <= set(files.own), stem
        check_imports(path)
        sources = [files.source(one).read_text() for one in (files.joint if stem == JOINT else [stem])]
        whole, carried = ast.parse("\n".join(sources)), ast.parse(text)
        for node in (*ast.walk(whole), *ast.walk(carried)):
            if isinstance(node, ast.ImportFrom) and node.level:
                node.module, node.level = "", 1
        for node in ast.walk(whole):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                text := ast.get_docstring(node, clean=False)
            ):
                node.body[0].value.value = text.partition("\n\n")[0]
                del node.body[: len(node.body) > 1 and not isinstance(node, ast.Module)]
        if stem == JOINT:  # whose imports are each one of the sources', once
            moved = [_taken_imports(tree) for tree in (whole, carried)]
            assert moved[0] == moved[1]
        # All of it, but for the places of modules, comments, and docstrings of functions and classes, and further paragraphs.
        assert ast.dump(carried) == ast.dump(whole), stem
    found = {
        path.rpartition("/")[2][:-3] for root in ROOTS for path in get_relative_import_files(tmp_path / f"{root}.py")
    }
    assert found | set(ROOTS) == set(files.own)
    assert not [
        stem for stem in files.own if stem.startswith(("training_", "hub_")) or stem in ("assembly", "__init__")
    ]


@pytest.mark.parametrize(
    "module, line, carried, found",
    [
        ("modeling", "from .limits import cap", "from .limits import cap", {"limits"}),
        ("modeling", "from .encoders.grids import GRIDS", "from .encoders_grids import GRIDS", {"encoders_grids"}),
        ("encoders.grids", "from .items import (\n    a,\n)", "from .encoders_items import a", {"encoders_items"}),
        ("encoders.grids", "if 1:\n    from ..limits import cap", "if 1:\n    from .limits import cap", {"limits"}),
        (
            "encoders.grids",
            "from torch import (  # why\n    nn,\n    Tensor as T,\n)",
            "from torch import nn, Tensor as T",
            set(),
        ),
        ("encoders.grids", "from ..parts.names import x", "from .parts_names import x", {"parts_names"}),
        ("limits", "x = '# no comment'  # why\n    # left out\ny = 2", "x = '# no comment'\ny = 2", set()),
        ("encoders.grids", "from torch import nn\nimport re", "from torch import nn\nimport re", set()),
    ],
)
def test_imports_of_the_package_become_flat(module, line, carried, found):
    assert bundled(f"{line}\nx = 1\n", module) == (f"{carried}\nx = 1\n", found)


def test_of_blank_lines_one_is_carried_but_in_texts():
    text = 'a = """1\n\n\n2"""\n\n\n\n\nb = 3  # why\n\n# alone\n\n\nc = (\n    1,\n\n\n    2,\n)\n'
    assert bundled(text, "a")[0] == 'a = """1\n\n\n2"""\n\nb = 3\n\nc = (\n    1,\n\n    2,\n)\n'
    text = 'class A:\n    """Of it.\n\n    More.\n    """\n\n    x: int\n\n    def f(self):\n        return "a:\\n"\n'
    assert bundled(text, "a")[0] == 'class A:\n    x: int\n\n    def f(self):\n        return "a:\\n"\n'


def test_no_two_modules_are_carried_under_one_name():
    paths = [path for path in HERE.rglob("*.py") if path.stem != "__init__" and path.parent != THIN_FOLDER]
    assert len(own_modules()) == len(paths) and {own_file(stem) for stem in own_modules()} == set(paths)


def test_imports_between_a_users_files_become_relative(project):
    files = carried(project, "import beside\nimport beside as b, math\nfrom beside import FACTOR as F\nimport torch\n"
                             "from lib import Layer\ndef f():\n    from beside import FACTOR  # here\n")  # fmt: skip
    lines = files.users["parts"].splitlines()
    assert lines == [
        "from . import beside as beside",
        "from . import beside as b",
        "import math",
        "from .beside import FACTOR as F",
        "import torch",
        "from .lib import Layer",
        "def f():",
        "    from .beside import FACTOR",
    ]
    assert files.users["lib"] == "from .layers import Layer\n"
    assert files.users["layers"].splitlines()[:2] == ["from . import tools as tools", "from .tools import helper"]
    assert set(files.users) == {"parts", "beside", "lib", "layers", "tools"}
    assert files.users["tools"] == (project / "lib" / "tools.py").read_text()


def test_imports_of_this_package_become_the_copy_of_the_checkpoint(tmp_path):
    files = carried(tmp_path, "from cornstarch_hf import register_callback, MultimodalProjector as P, limits\n"
                              "from cornstarch_hf.processing.media import ready_image\nfrom cornstarch_hf.encoders import ModalEncoderModule\n"
                              "from cornstarch_hf.parts import registries as r\n")  # fmt: skip
    assert files.users["parts"].splitlines() == [
        "from .parts_registries import register_callback",
        "from .projectors_projector import MultimodalProjector as P",
        "from . import limits as limits",
        "from .processing_media import ready_image",
        "from .encoders_module import ModalEncoderModule",
        "from . import parts_registries as r",
    ]
    assert {"parts_registries", "projectors_projector", "processing_media", "configuration_projector"} <= set(files.own)


def test_names_that_are_taken_are_changed_everywhere(tmp_path):
    (tmp_path / "parts_names.py").write_text("X = 1\n")
    files = carried(tmp_path, "from parts_names import X\n", "composition.py")
    (stem,) = [s for s in files.users if s.endswith("_parts_names")]
    (main,) = [s for s in files.users if s.endswith("_composition")]
    assert files.users[main] == f"from .{stem} import X\n" and main != "composition"


@pytest.mark.parametrize(
    "text, message",
    [
        ("import cornstarch_hf\n", r"parts.py:1 uses `import cornstarch_hf`.*`from cornstarch_hf import name`"),
        ("import lib.tools\n", r"`import lib.tools`.*`from lib.tools import name`"),
        ("from cornstarch_hf import nothing_such\n", r"'nothing_such'"),
        ("import os; import beside\n", r"parts.py:1: put this import on a line of its own"),
        ('"""Use it so:\n\nfrom .mine import x\n"""\n', r"reads like an import of \['mine'\]"),
        ("KEY = 'hf_" + "a" * 34 + "'\n", r"holds an access token"),
        ("x = 1\nprint('trains')\n", r"parts.py:2 .*`print\('trains'\)` would run wherever"),
        ("from transformers import AutoModel\nm = AutoModel.from_pretrained('x')\n", r"parts.py:2 .*from_pretrained"),
        ("with open('x') as f:\n    pass\n", r"parts.py:1 .*does more than define"),
        ("import torch\nif torch:\n    torch.manual_seed(0)\n", r"parts.py:3"),
    ],
)
def test_files_that_cannot_be_carried_are_refused(project, text, message):
    with pytest.raises(ValueError, match=message):
        carried(project, text)


def test_definitions_registrations_and_guarded_programs_are_carried(tmp_path):
    text = (
        '"""Parts."""\n\nimport logging\nfrom cornstarch_hf import register_callback\n\nlogger = logging.getLogger(__name__)\n'
        "try:\n    import nowhere_at_all\nexcept ImportError:\n    nowhere_at_all = None\nSIZE: int = int('3')\n"
        "def f(inputs, output): return output\nregister_callback('a_test_f', f)\nfor n in 'ab':\n"
        "    register_callback('a_test_' + n, f)\nif __name__ == '__main__':\n    print('training')\n"
    )
    files = carried(tmp_path, text)
    assert files.users["parts"] == text.replace("from cornstarch_hf import", "from .parts_registries import")


def test_installed_files_and_other_texts_are_known(tmp_path):
    assert is_installed(__import__("torch").__file__ and HERE.__class__(__import__("torch").__file__))
    assert not is_installed(tmp_path / "x.py")
    (tmp_path / "target" / "some-1.0.dist-info").mkdir(parents=True)
    assert is_installed(tmp_path / "target" / "some" / "x.py") and not is_installed(tmp_path / "x.py")
    (tmp_path / "multimodal_code.py").write_text("raise SystemExit\nCARRIES = {'package': ['a'], 'sides': {}}\n")
    found = {"package": ["a"], "sides": {}, "files": ["a", "multimodal_code"]}
    assert read_entry(tmp_path) == found and read_entry(tmp_path / "no") == {}
