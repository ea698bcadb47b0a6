"""Every example runs offline, in a fresh process, on models that it makes."""

import re
from pathlib import Path

import pytest
from helpers import run_python

EXAMPLES = Path(__file__).parent.parent / "hub_examples"


def test_no_example_is_forgotten():
    covered = {"compose_vlm", "llava_next_callbacks", "finetune_with_trainer", "quickstart", "tiny_models"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == covered


def test_compose_vlm(tmp_path):
    out = run_python(EXAMPLES / "compose_vlm.py", "--output", str(tmp_path / "made"))
    assert "answer:" in out and (tmp_path / "made" / "model.safetensors").exists()


def test_llava_next_callbacks():
    out = run_python(EXAMPLES / "llava_next_callbacks.py")
    features, placeholders = re.search(r"features per image: (\[.*?\]) placeholders: (\[.*?\])", out).groups()
    assert features == placeholders == "[34, 56]"


def test_finetune_with_trainer():
    assert "right answers: 24 of 24" in run_python(EXAMPLES / "finetune_with_trainer.py")


@pytest.mark.parametrize("steps", [12])
def test_quickstart(tmp_path, steps):
    out = run_python(EXAMPLES / "quickstart.py", "--steps", str(steps), "--rows", "128", "--batch-size", "8",
                     "--questions", "16", "--output", str(tmp_path))  # fmt: skip
    assert "accuracy on 16 held-out digits" in out and "WhisperEncoder" in out
    for name in ("loss.png", "answers.png", "model/model.safetensors", "model/processor_config.json"):
        assert (tmp_path / name).stat().st_size > 1000, name


def test_quickstart_takes_ids(tmp_path):
    """The options take Hub ids; here folders that the example itself makes."""
    code = (
        "import sys, runpy\nsys.path.insert(0, sys.argv[1])\nimport quickstart\n"
        "parts = quickstart.small_parts()\nfolder = sys.argv[2]\n"
        "parts['language_model'].save_pretrained(folder + '/language')\n"
        "parts['tokenizer'].save_pretrained(folder + '/language')\n"
        "for name, spec in parts['encoders'].items():\n"
        "    spec['model'].save_pretrained(folder + '/' + name)\n"
        "    spec['processor'].save_pretrained(folder + '/' + name)\n"
        "sys.argv = ['quickstart.py', '--language-model', folder + '/language', '--vision', folder + '/vision',\n"
        "            '--audio', folder + '/audio', '--steps', '2', '--batch-size', '4', '--questions', '4',\n"
        "            '--output', folder + '/out']\n"
        "runpy.run_path(quickstart.__file__, run_name='__main__')\n"
    )
    assert "accuracy on 4 held-out digits" in run_python(code, str(EXAMPLES), str(tmp_path))
