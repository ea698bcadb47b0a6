"""Outside the tested versions importing warns; beyond them nothing is done with caches, whose names change."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import compose_tiny, run_python, uneven_inputs
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from cornstarch_hf import versions

ROOT = Path(__file__).parents[1]


def test_the_range_is_the_one_that_installers_are_told():
    import tomllib

    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    told = next(text.removeprefix("transformers") for text in required if text.startswith("transformers"))
    assert SpecifierSet(told) == SpecifierSet(f">={versions.OLDEST},<{versions.BELOW}")
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        assert versions.OLDEST in text and versions.BELOW in text, page


@pytest.mark.parametrize("version", ["5.20.1", versions.BELOW + ".0", "6.0.0.dev0"])
def test_importing_warns_outside_the_range(version):
    # The first import of processors makes transformers' module anew, with its own version.
    code = f"import transformers.processing_utils, sys\nsys.modules['transformers'].__version__ = {version!r}\nimport cornstarch_hf\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"transformers {version} is installed" in done.stderr and versions.OLDEST in done.stderr
    assert f"< {versions.BELOW}" in done.stderr


def test_importing_within_the_range_says_nothing():
    run_python("import warnings\nwarnings.simplefilter('error', UserWarning)\nimport cornstarch_hf\n")


@pytest.fixture(scope="module")
def composed():
    model, processor = compose_tiny(["clip"])
    return model, uneven_inputs(processor)


@pytest.fixture()
def later(monkeypatch):
    monkeypatch.setattr(versions, "_FOUND", Version(versions.BELOW))


def test_generation_beyond_the_range_raises(composed, later):
    model, inputs = composed
    with pytest.raises(
        ValueError, match=rf"tested with transformers >= {versions.OLDEST}, < {versions.BELOW}.*pip install"
    ):
        model.generate(**inputs, max_new_tokens=1)


def test_a_cache_that_is_handed_in_beyond_the_range_raises(composed, later):
    from transformers import DynamicCache

    model, inputs = composed
    for call in (model, model.base_model):
        assert call(**inputs) is not None  # without a cache nothing depends on its name
        with pytest.raises(ValueError, match="name caches differently"):
            call(**inputs, past_key_values=DynamicCache())
