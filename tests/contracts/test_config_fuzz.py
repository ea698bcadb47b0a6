"""Changed values in a checkpoint's files: it loads and answers the same, says what is other, or is refused by file and key.

`CONFIG_FUZZ` changes (`CONFIG_FUZZ_SLOW` under the marker `slow`), each from its own seed, of four checkpoints: CLIP with
Llama, Whisper with Qwen2, two encoders with adapters, and one that refers to its parts' repositories.  What must come of each:

- It loads, and logits, tokens (of a processor: its tensors) are equal to the bit to those of the honest checkpoint.
- Or they differ, and what was loaded says so: its configuration, settings of generation or description are other ones.  A value
  that defines a model may be any that its class takes; the manifest's hashes tell that it was changed, when they are asked.
- Or a ValueError, TypeError or OSError names the file, and the key or the part; where a class takes a value, and only its call finds
  that it makes no sense, the part or the modality.

`verify=True` refuses each change of a model's files.  No kernel is fetched, no address asked, no code of the folder run, and
no load takes 2 GB or does not end.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import tiny
from fuzz_files import HEADER, MODEL_FILES, changes
from helpers import HERE
from hub_cache import commit_of, put_into_cache
from kernels_stand_in import put_kernels
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from cornstarch_hf import compose

FEW, MANY = (int(os.environ.get(key, number)) for key, number in (("CONFIG_FUZZ", "60"), ("CONFIG_FUZZ_SLOW", "1700")))
SEED = int(os.environ.get("CONFIG_FUZZ_SEED", "29"))
SHARES = {
    "config.json": 0.13, "processor_config.json": 0.04, "composition.json": 0.03, "tokenizer_config.json": 0.02,
    "generation_config.json": 0.02, HEADER: 0.025,
}  # fmt: skip
MEGABYTES = 2000
EVIL = "import pathlib\npathlib.Path({!r}).write_text('ran')\nclass Model: pass\n"


def qwen2():
    return tiny.seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**tiny.TEXT)))()


def with_lora(module, names):
    return get_peft_model(module, LoraConfig(r=2, target_modules=names, init_lora_weights=False))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four saved checkpoints, what they are loaded with, and a folder with a stand-in for the package `kernels`."""
    root = tmp_path_factory.mktemp("fuzz")
    for name, build, processor in (("u/llama", tiny.llama, tiny.tokenizer), ("u/clip", tiny.clip, tiny.clip_processor)):
        build().save_pretrained(root / name)
        processor().save_pretrained(root / name)
        put_into_cache(root / "cache", name, root / name, commit_of(name))
    clip = {"model": tiny.clip(), "processor": tiny.clip_processor()}
    whisper = {"model": tiny.whisper(), "processor": tiny.whisper_processor()}
    adapted = {"vision": {**clip, "model": with_lora(tiny.clip(), ["q_proj"])}, "audio": whisper}
    made = {
        "plain": compose(tiny.llama(), {"vision": clip}, "linear", tokenizer=tiny.tokenizer()),
        "audio": compose(qwen2(), {"audio": whisper}, "mlp", tokenizer=tiny.tokenizer()),
        "adapters": compose(with_lora(tiny.llama(), ["v_proj"]), adapted, "linear", tokenizer=tiny.tokenizer()),
        "reference": compose("u/llama", {"vision": "u/clip"}, "linear", cache_dir=root / "cache"),
    }
    folders = {name: root / "checkpoints" / name for name in made}
    for name, (model, processor) in made.items():
        stored = {"embed": False, "cache_dir": root / "cache"} if name == "reference" else {}
        model.eval().save_pretrained(folders[name], **stored)
        processor.save_pretrained(folders[name])
        (folders[name] / "evil.py").write_text(EVIL.format(str(root / "evidence")))
    put_kernels(root / "packages")
    options = {name: {} for name in made} | {"reference": {"cache_dir": str(root / "cache"), "local_files_only": True}}
    return root, folders, options


def outcomes(world, count, scratch):
    """What became of so many changes: pairs of a change and its result."""
    root, folders, options = world
    made = changes(SEED, folders, {file: max(1, round(count * share)) for file, share in SHARES.items()})
    jobs = {"changes": list(map(asdict, made)), "folders": {k: str(v) for k, v in folders.items()}, "options": options}
    (scratch / "jobs.json").write_text(json.dumps(jobs | {"scratch": str(scratch)}))
    paths = os.pathsep.join([str(root / "packages"), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "0", "FUZZ_EVIDENCE": str(root / "evidence")}
    environment |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "fuzz_files.py"), str(scratch / "jobs.json"), str(scratch / "results.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, timeout=3000
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return list(zip(made, json.loads((scratch / "results.json").read_text()), strict=True))


PARTS = (
    "text_config",
    "language_model",
    "vision",
    "audio",
    "adapters",
    "tokenizer",
    "config.json",
    "safetensors",
    "the encoders",
)


def names_place(change, result):
    """Whether an error says in which file, and at which key or part, something is wrong; one of a call says the part."""
    told = result["told"]
    keys = [key for key in change.path if isinstance(key, str)]
    named = not change.path or any(key in told for key in (*keys, *PARTS))
    if result["stage"] == "called":
        return named
    return named and ((change.file if change.file != HEADER else "safetensors") in told or result["folder"] in told)


def problem(change, result):
    """What is wrong with an outcome, None if nothing."""
    if result["asked"] or result["ran"]:
        return f"asked for {result['asked']}, ran code: {result['ran']}"
    if result["outcome"] == "raised" and not result["clear"]:
        return "raised something else"
    if result["outcome"] == "raised" and not names_place(change, result):
        return "does not name the place"
    if result["outcome"] == "other values" and not (change.alone or result["verified"]):
        return "other values, which nothing tells"
    untold = (
        change.file in MODEL_FILES and not change.alone and change.file != "composition.json" and not result["verified"]
    )
    return "not verified" if untold else None


def check(found):
    large = next(
        (f"{change}: {r['done']}: {r['megabytes']} MB" for change, r in found if r["megabytes"] >= MEGABYTES), None
    )
    assert large is None, large
    wrong = [
        f"{change} [{result['done']}]: {why} ({result.get('stage')}): {result['error']}: {result['told']:.400} {result.get('frames')}"
        for change, result in found
        if (why := problem(change, result)) is not None
    ]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong[:40])


def test_some_changes(world, tmp_path):
    found = outcomes(world, FEW, tmp_path)
    check(found)
    kinds = {result["outcome"] for _, result in found}
    assert {"raised", "equal"} <= kinds


@pytest.mark.slow
@pytest.mark.timeout(2400)  # a guard against hanging: 1,700 loads on a busy machine take long
def test_many_changes(world, tmp_path):
    found = outcomes(world, MANY, tmp_path)
    assert len(found) >= 1500
    check(found)
