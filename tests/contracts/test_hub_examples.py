"""Every example runs offline, outside of the tests' process, on models that it makes; those about sharing at a small Hub too."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_python
from hub_cache import commit_of, put_into_cache
from hub_client import Client
from hub_server import HubServer
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "hub_examples"
TOKEN = "hf_" + "e" * 34


def test_no_example_is_forgotten():
    covered = {"compose_vlm", "llava_next_callbacks", "finetune_with_trainer", "quickstart", "train_in_stages",
               "share_with_code", "push_and_load", "reference_checkpoint", "compose_video", "compose_protein",
               "compose_time_series", "compose_features", "convert_llava"}  # fmt: skip
    shared = {"tiny_models", "digits_and_tones"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == covered | shared


def test_compose_vlm(tmp_path):
    out = run_python(EXAMPLES / "compose_vlm.py", "--output", str(tmp_path / "made"))
    assert "answer:" in out and (tmp_path / "made" / "model.safetensors").exists()


NEW_MODALITIES = """
import os, runpy, sys
_, examples, folder = sys.argv
sys.path.insert(0, examples)
for name in ("compose_video", "compose_protein", "compose_time_series", "compose_features"):
    sys.argv = [name, "--output", os.path.join(folder, name)]
    runpy.run_path(os.path.join(examples, name + ".py"), run_name="__main__")
"""


@pytest.mark.slow
def test_examples_of_further_modalities(tmp_path):
    out = run_python(NEW_MODALITIES, str(EXAMPLES), str(tmp_path))
    found = re.findall(r"features of each item: (\d+)", out)
    assert found == ["68", "24", "8", "5"], (
        "4 frames of 17; letters with <cls> and <eos>; patches of 8 values; as given"
    )
    assert out.count("answer:") == 4 and (tmp_path / "compose_protein" / "protein_tokenizer").is_dir()


def test_llava_next_callbacks():
    out = run_python(EXAMPLES / "llava_next_callbacks.py")
    features, placeholders = re.search(r"features per image: (\[.*?\]) placeholders: (\[.*?\])", out).groups()
    assert features == placeholders == "[34, 56]"


@pytest.mark.slow
def test_convert_llava(tmp_path):
    out = run_python(EXAMPLES / "convert_llava.py", "--output", str(tmp_path / "made"))
    before, after = map(float, re.search(r"loss before ([\d.]+), after ([\d.]+)", out).groups())
    assert after < before and "LlavaForConditionalGeneration, equal logits: True" in out
    assert json.loads((tmp_path / "made" / "config.json").read_text())["model_type"] == "llava"


@pytest.mark.slow
def test_share_with_code():
    out = run_python(EXAMPLES / "share_with_code.py")
    assert "carries: multimodal_code.py my_parts.py" in out and "features: 9" in out
    assert "package imported: False" in out


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of the small models of the examples."""
    root = tmp_path_factory.mktemp("parts")
    made = runpy.run_path(str(EXAMPLES / "tiny_models.py"))
    made["make_language_model"](root / "language")
    made["make_vision_encoder"](root / "vision")
    return root


@pytest.fixture(scope="module")
def hub(parts, tmp_path_factory):
    """A Hub that holds them."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.users[TOKEN] = ("user", True)
        server.put_folder("base/language", parts / "language")
        server.put_folder("base/vision", parts / "vision")
        yield server


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    """Runs an example as a user does who is logged in at this Hub."""
    yield from runner(hub, tmp_path_factory.mktemp("online"), TOKEN)


@pytest.fixture(scope="module")
def offline(hub, parts, tmp_path_factory):
    """Runs an example where the Hub may not be asked; the bases are in the cache."""
    cache = tmp_path_factory.mktemp("offline")
    for name in ("language", "vision"):
        put_into_cache(cache / "hub", f"base/{name}", parts / name, commit_of(name))
    yield from runner(hub, cache, HF_HUB_OFFLINE="1")


def runner(hub, cache, token=None, **environment):
    client = Client(hub, cache, token, **environment)
    client("import sys, runpy; sys.path.insert(0, examples)", examples=str(EXAMPLES))

    def run(name, *arguments, ids=True):
        ids = ("--language-model", "base/language", "--vision", "base/vision") if ids else ()
        code = "sys.argv = argv; runpy.run_path(argv[0], run_name='__main__')"
        return client(code, argv=[str(EXAMPLES / name), *ids, *map(str, arguments)])

    yield run
    client.close()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--reference", "--include-code", "--private")], ids=["whole", "reference"])
def test_push_and_load_by_repository(hub, online, options):
    name = f"user/pushed-{len(options)}"
    out = online("push_and_load.py", "--repo-id", name, *options)
    commit = hub.repos[name].branches["main"]
    assert f"loaded from: {name} {commit}" in out and "answer:" in out
    files = hub.content(name)
    assert {"README.md", "config.json", "composition.json", "processor_config.json", "tokenizer.json"} <= set(files)
    assert ("composition.safetensors" in files, "model.safetensors" in files) == (bool(options), not options)
    assert ("multimodal_code.py" in files) == hub.repos[name].private == bool(options)


def test_push_and_load_without_a_repository(hub, offline, tmp_path):
    hub.calls.clear()
    out = offline("push_and_load.py", "--output", tmp_path / "made", ids=False)
    assert f"not pushed, since no --repo-id was given: saved into {tmp_path / 'made'}" in out and "answer:" in out
    out = offline("push_and_load.py", "--repo-id", "user/name", "--output", tmp_path / "other")
    assert "not pushed, since the Hub may not be asked (HF_HUB_OFFLINE)" in out and "answer:" in out
    assert not hub.calls


def test_reference_checkpoint_of_the_hub(online):
    out = online("reference_checkpoint.py", "--repo-id", "user/reference")
    assert "loaded equal to the bit: True" in out and "whole again: True" in out and " equal: True" in out
    found = re.search(r"sizes: (.*?) bytes whole, (.*?) by reference, (.*?) whole again", out).groups()
    whole, small, again = (int(size.replace(",", "")) for size in found)
    assert small < whole / 3 and abs(whole - again) < 1_000


def test_reference_checkpoint_of_the_cache_and_of_models_from_nowhere(hub, offline, tmp_path):
    hub.calls.clear()
    assert "whole again: True" in offline("reference_checkpoint.py")
    out = offline("reference_checkpoint.py", "--output", tmp_path, ids=False)
    assert "not by reference: vision_encoder did not come from the Hub" in out
    assert "the whole one loaded equal to the bit: True" in out and not (tmp_path / "reference").exists()
    assert not hub.calls


@pytest.mark.slow
def test_finetune_with_trainer():
    assert "right answers: 24 of 24" in run_python(EXAMPLES / "finetune_with_trainer.py")


@pytest.mark.parametrize("steps", [12])
def test_quickstart(tmp_path, steps):
    out = run_python(EXAMPLES / "quickstart.py", "--steps", str(steps), "--rows", "128", "--batch-size", "8",
                     "--questions", "16", "--output", str(tmp_path))  # fmt: skip
    assert "accuracy on 16 held-out digits" in out and "WhisperEncoder" in out
    for name in ("loss.png", "answers.png", "model/model.safetensors", "model/processor_config.json"):
        assert (tmp_path / name).stat().st_size > 1000, name


@pytest.mark.slow
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


STAGES = (
    "--steps",
    "2",
    "4",
    "2",
    "--part-steps",
    "2",
    "--save-steps",
    "2",
    "--batch-size",
    "4",
    "--rows",
    "24",
    "--questions",
    "4",
)
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import train_in_stages as example

class Killed(example.Trainer):
    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3 and "adapt" in self.args.output_dir:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

example.Trainer = Killed
example.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_stages_killed_inside_the_second_resume_to_the_same_weights(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = run_python(EXAMPLES / "train_in_stages.py", *STAGES, "--output-dir", str(whole))
    assert len(re.findall(r"(composed|stage \d, \w+): \d+\.\d % of the held-out questions", out)) == 4
    for name in ("parts", "0-composed", "1-align"):  # finished stages are skipped
        shutil.copytree(whole / name, parts / name)
    (parts / "1-align" / "accuracy.json").write_text(json.dumps({"accuracy": 0.123}))
    command = [sys.executable, "-c", KILLED, str(EXAMPLES), *STAGES, "--output-dir", str(parts)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, capture_output=True, env=environment, timeout=300).returncode == -signal.SIGKILL
    assert (parts / "2-adapt" / "checkpoint-2").exists() and not (parts / "2-adapt" / "model").exists()
    out = run_python(EXAMPLES / "train_in_stages.py", *STAGES, "--output-dir", str(parts))
    assert "stage 1, align: 12.3 %" in out and "stage 3, full" in out
    history = json.loads((parts / "2-adapt" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    for stage in ("2-adapt", "3-full"):
        found, expected = (load_file(f / stage / "model" / "model.safetensors") for f in (parts, whole))
        assert found.keys() == expected.keys() and any("lora_" in name for name in found) == (stage == "2-adapt")
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    before = load_file(whole / "2-adapt" / "model" / "model.safetensors")
    moved = {name.split(".")[1] for name in found if "encoder." in name and not torch.equal(found[name], before[name])}
    assert moved == {"module", "projector"}
