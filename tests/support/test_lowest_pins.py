"""The lowest versions that `make test-lowest` installs are the bounds of pyproject.toml."""

import lowest_pins
import pytest


def test_every_requirement_has_one_pin():
    pins = lowest_pins.lowest_pins()
    names = [pin.partition("==")[0] for pin in pins]
    assert {"setuptools", "torch", "transformers", "peft", "bitsandbytes", "ruff", "pytest"} <= set(names)
    assert len(set(names)) == len(names), "a requirement has two bounds"
    assert "cornstarch-hf" not in names


@pytest.fixture
def requiring(tmp_path, monkeypatch):
    """A project that requires one thing."""

    def written(requirement):
        text = f'[build-system]\nrequires = []\n[project]\nname = "x"\ndependencies = ["{requirement}"]\n[project.optional-dependencies]\n'
        (tmp_path / "pyproject.toml").write_text(text)
        monkeypatch.setattr(lowest_pins, "PROJECT", tmp_path / "pyproject.toml")

    return written


@pytest.mark.parametrize("requirement", ["torch>=2.13", "torch>=2.13,<3"])
def test_the_pin_is_the_lower_bound(requirement, requiring):
    requiring(requirement)
    assert lowest_pins.lowest_pins() == ["torch==2.13"]


@pytest.mark.parametrize(
    "requirement", ["torch", "torch~=2.13", "torch<3", "torch>2.13", "torch>=2.13,!=2.14", "torch[x]>=2.13"]
)
def test_a_requirement_without_a_lower_bound_is_refused(requirement, requiring):
    requiring(requirement)
    with pytest.raises(ValueError, match=r"expected a requirement of the form name>=version.*, got 'torch"):
        lowest_pins.lowest_pins()
