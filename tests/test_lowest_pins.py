"""The lowest versions that `make test-lowest` installs are the bounds of pyproject.toml."""

import lowest_pins
import pytest


def test_every_requirement_has_one_pin():
    pins = lowest_pins.lowest_pins()
    names = [pin.partition("==")[0] for pin in pins]
    assert {"setuptools", "torch", "transformers", "peft", "bitsandbytes", "ruff", "pytest"} <= set(names)
    assert len(set(names)) == len(names), "a requirement has two bounds"
    assert "cornstarch-hf" not in names


@pytest.mark.parametrize("requirement", ["torch", "torch~=2.13", "torch>=2.13,<3", "torch[x]>=2.13"])
def test_a_requirement_without_a_plain_bound_is_refused(requirement, tmp_path, monkeypatch):
    text = f'[build-system]\nrequires = []\n[project]\nname = "x"\ndependencies = ["{requirement}"]\n[project.optional-dependencies]\n'
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(lowest_pins, "PROJECT", tmp_path / "pyproject.toml")
    with pytest.raises(ValueError, match=r"expected a requirement of the form name>=version, got 'torch"):
        lowest_pins.lowest_pins()
