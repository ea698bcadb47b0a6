"""What is handed on: the wheel, from which a model is composed, saved with its code and loaded; the sdist with its tests."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cornstarch_hf

ROOT = Path(cornstarch_hf.__file__).parents[1]
HERE = Path(__file__).parents[1] / "support"
FOLDERS = ("cornstarch_hf", "tests", "docs", "hub_examples", "benchmarks", ".ci", ".github")
FILES = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "constraints.txt"),
    *("pyproject.toml", ".gitignore", ".pre-commit-config.yaml"),
)
WORK = """
import importlib, pkgutil, sys
from pathlib import Path
import cornstarch_hf

site, folder = Path(sys.argv[1]), sys.argv[2]
assert Path(cornstarch_hf.__file__).is_relative_to(site), cornstarch_hf.__file__
names = [m.name for m in pkgutil.walk_packages(cornstarch_hf.__path__, "cornstarch_hf.")]
for name in names:
    importlib.import_module(name)
for room in [m for m in names if hasattr(sys.modules[m], "__path__")]:
    for public in getattr(sys.modules[room], "__all__", ()):
        assert getattr(sys.modules[room], public) is getattr(cornstarch_hf, public), (room, public)

import torch
from helpers import compose_tiny, uneven_inputs
from transformers import AutoModel, AutoProcessor

model, processor = compose_tiny(["clip"])
model.save_pretrained(folder, include_code=True)
processor.save_pretrained(folder, include_code=True)
again = AutoModel.from_pretrained(folder)
loaded = AutoProcessor.from_pretrained(folder)
assert type(again) is cornstarch_hf.MultimodalModel and loaded.tokens == processor.tokens
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
model(**uneven_inputs(processor))
print(len(names))
"""


def run(*command, cwd, **environment):
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | environment, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_the_wheel_holds_all_of_the_package_and_works_outside_the_clone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    shutil.copytree(ROOT / "cornstarch_hf", source / "cornstarch_hf", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    held = {path.relative_to(site) for path in (site / "cornstarch_hf").rglob("*") if path.is_file()}
    files = {path.relative_to(source) for path in (source / "cornstarch_hf").rglob("*") if path.is_file()}
    assert files <= held and Path("cornstarch_hf/py.typed") in held
    (tmp_path / "work.py").write_text(WORK)
    paths = os.pathsep.join([str(site), str(HERE)])
    printed = run(sys.executable, "work.py", site, str(tmp_path / "saved"), cwd=tmp_path, PYTHONPATH=paths)
    assert int(printed.splitlines()[-1]) > 60


def test_the_sdist_holds_what_its_tests_need(tmp_path):
    source = tmp_path / "source"
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "outputs"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, str(tmp_path), cwd=source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        held = {Path(*Path(member.name).parts[1:]) for member in opened if member.isfile()}
    assert files - held == set()
    made = {"PKG-INFO", "setup.cfg"}
    assert {str(path) for path in held - files if "cornstarch_hf.egg-info" not in path.parts} == made
