"""The page about what is supported tells what the catalogue and the rules say now."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import supported
import transformers

from cornstarch_hf.parts.known_encoders import ENCODER_TYPES, EncoderType

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def text():
    return (ROOT / supported.PAGE).read_text(encoding="utf-8")


def parts(text):
    """The tables of the page."""
    names = (
        "Encoders",
        "No encoders",
        "Language models",
        "No language models",
        "Processors",
        "No processors",
        "Native models",
        "No native models",
    )
    return dict(zip(names, re.split(r"^(?:## |These are|These cannot)", text, flags=re.M)[1:], strict=True))


def test_the_page_is_of_the_version_that_is_tested(text):
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={supported.version_of(text)}" in pins, "run `make supported`"


def test_the_page_is_of_this_catalogue_and_these_rules(text):
    if transformers.__version__ != supported.version_of(text):
        pytest.skip("another transformers has other classes")
    rows = supported.encoder_rows(text)
    assert set(rows) == supported.expected_encoders()
    assert {name: count for name, (_, _, count) in rows.items()} == {
        name: supported.rule_text(
            model_type, "rule" if ENCODER_TYPES.get(model_type, EncoderType()).count else "dry run"
        )
        for name, (model_type, _, _) in rows.items()
    }
    assert text.endswith(supported.fixed_parts()), "run `make supported`"


def test_the_readme_gives_the_pages_numbers(text):
    found = {
        "encoders": re.search(r"\| (\d+) of (\d+) measured classes", README).groups(),
        "language models": re.search(r"\| (\d+) of (\d+) causal types", README).groups(),
        "processors": re.search(r"\| (\d+) image processors and feature", README).groups(),
        "native models": re.search(r"^\[(\d+) native types\]", README, re.M).groups(),
    }
    tables = {name: len(re.findall(r"^\| [^-]", part, re.M)) - 1 for name, part in parts(text).items()}
    assert found == {
        "encoders": (str(tables["Encoders"]), str(tables["Encoders"] + tables["No encoders"])),
        "language models": (
            str(tables["Language models"]),
            str(tables["Language models"] + tables["No language models"]),
        ),
        "processors": (str(tables["Processors"]),),
        "native models": (str(tables["Native models"]),),
    }


def test_a_page_of_a_run_that_failed_or_is_not_whole_is_refused():
    passed = SimpleNamespace(
        nodeid="tests/test_encoder_catalog.py::test_a_class_composes[CLIPVisionModel]",
        outcome="passed",
        user_properties=[("type", "x"), ("kind", "image"), ("count", "rule")],
    )
    with pytest.raises(ValueError, match=r"Of the encoders of the catalogue, .* were not run"):
        supported.page([passed], "5")
    failed = SimpleNamespace(**vars(passed) | {"outcome": "failed"})
    with pytest.raises(ValueError, match=r"would tell what is not so: .*CLIPVisionModel.* did not pass"):
        supported.page([failed], "5")
