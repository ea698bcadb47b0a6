"""Stored values by which transformers would fetch a kernel from the Hub and run it: refused, and the caller's word counts.

A stand-in for the package `kernels`, in a process of its own, writes down what it is asked for.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import HERE, compose_tiny
from kernels_stand_in import put_kernels
from tiny import clip, llama

DRIVER = """
import json, sys
import kernels
from transformers import AutoConfig, AutoModel, AutoProcessor
from cornstarch_hf import MultimodalModel, MultimodalProjector, compose
from transformers.utils import is_kernels_available
assert is_kernels_available()
LOADERS = {
    "AutoConfig": AutoConfig.from_pretrained, "AutoModel": AutoModel.from_pretrained, "MultimodalModel": MultimodalModel.from_pretrained,
    "processor": AutoProcessor.from_pretrained, "projector": MultimodalProjector.from_pretrained,
    "from_config": lambda folder, **options: AutoModel.from_config(AutoConfig.from_pretrained(folder), **options),
    "encoder": lambda folder, **options: compose(llm, {"vision": {"model": folder, "processor": image_processor, **options}}, "linear", tokenizer=tokenizer),
    "language model": lambda folder, **options: compose(folder, {"vision": {"model": vision, "processor": image_processor}}, "linear", tokenizer=tokenizer, **options),
}
import tiny
from helpers import compose_tiny
llm, vision, tokenizer = tiny.llama(), tiny.clip(), tiny.tokenizer()
image_processor = compose_tiny(["clip"])[1].processors["vision"]
found = []
for loader, folder, options in json.load(open(sys.argv[1])):
    kernels.ASKED.clear()
    try:
        LOADERS[loader](folder, **options)
        told = "loaded"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    found.append([told, list(kernels.ASKED)])
print("RESULT" + json.dumps(found))
"""
REPO, OF_CHOICE = "kernels-community/flash-attn3", ("flash_attention_2", "flash_attention_3", "flash_attention_4")


def edits():
    """Every way to say it: name -> change of a configuration."""
    ways = {}
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        ways[key] = lambda v, key=key: v.update({key: REPO})
        ways[f"{key} of text"] = lambda v, key=key: v["text_config"].update({key: REPO})
        ways[f"{key} of vision"] = lambda v, key=key: v["vision_config"].update({key: REPO})
        ways[f"{key} by part"] = lambda v, key=key: v.update({key: {"": "eager", "text_config": REPO}})
        ways[f"{key} by part of vision"] = lambda v, key=key: v["vision_config"].update({key: {"": {"": [REPO]}}})
        ways[f"{key} of the projector"] = lambda v, key=key: v["vision_projector_config"].update({key: REPO})
    for key in ("experts_implementation", "_experts_implementation"):
        ways[key] = lambda v, key=key: v["text_config"].update({key: {"": REPO}})
    ways["part_implementations"] = lambda v: v.update(part_implementations={"vision_config": {"attn": {"": REPO}}})
    ways["a revision"] = lambda v: v.update(attn_implementation=f"{REPO}@main:forward")
    ways["paged"] = lambda v: v.update(attn_implementation=f"paged|{REPO}")
    ways["use_kernels"] = lambda v: v.update(use_kernels=True)
    ways["kernel_config"] = lambda v: v["text_config"].update(kernel_config={"RMSNorm": f"{REPO}:RMSNorm"})
    for name in OF_CHOICE:
        ways[name] = lambda v, name=name: v.update(attn_implementation=name)
        ways[f"{name} of a part"] = lambda v, name=name: v.update(part_implementations={"text_config": {"attn": name}})
    for name in ("sonicmoe", "deepgemm"):
        ways[name] = lambda v, name=name: v.update(experts_implementation=name)
    return ways


WAYS = edits()
METHODS = ("mxfp4", "fp8", "eetq", "nvfp4", "metal", "fbgemm_fp8")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each attempt came to, and which repositories were asked for: name -> (text, names)."""
    root = tmp_path_factory.mktemp("kernels")
    put_kernels(root / "packages")
    model, processor = compose_tiny(["clip"])
    honest = root / "honest"
    model.save_pretrained(honest)
    processor.save_pretrained(honest)
    model.vision_encoder.projector.save_pretrained(root / "projector")
    clip().save_pretrained(root / "clip")
    llama().save_pretrained(root / "llama")
    jobs, names = [], []

    def add(name, loader, source, edit=None, options=None, file="config.json"):
        folder = root / f"c{len(jobs)}"
        shutil.copytree(source, folder)
        (folder / "composition.json").unlink(missing_ok=True)
        if edit is not None:
            values = json.loads((folder / file).read_text())
            edit(values)
            (folder / file).write_text(json.dumps(values))
        jobs.append([loader, str(folder), options or {}])
        names.append(name)

    add("honest", "AutoModel", honest)
    for way, edit in WAYS.items():
        for loader in ("AutoConfig", "AutoModel", "MultimodalModel", "from_config"):
            add((way, loader), loader, honest, edit)
        add(
            (way, "caller"),
            "MultimodalModel",
            honest,
            edit,
            {"attn_implementation": "sdpa", "experts_implementation": "eager"},
        )
        add(
            (way, "processor"),
            "processor",
            honest,
            lambda v, edit=edit: edit(v["model_config"]),
            file="processor_config.json",
        )
    add("caller's kernel", "AutoModel", honest, WAYS["attn_implementation"], {"attn_implementation": REPO})
    add("caller's flash", "AutoModel", honest, WAYS["flash_attention_2"], {"attn_implementation": "flash_attention_2"})
    for key in ("attn_implementation", "_attn_implementation"):
        for name in (REPO, "flash_attention_2"):
            edit = lambda v, key=key, name=name: v.update({key: name})  # noqa: E731
            for loader, source in (("projector", "projector"), ("encoder", "clip"), ("language model", "llama")):
                add((loader, key, name), loader, root / source, edit)
                if loader != "projector":
                    add((loader, key, name, "caller"), loader, root / source, edit, {"attn_implementation": "eager"})
    for method in METHODS:
        edit = lambda v, method=method: v.update(quantization_config={"quant_method": method})  # noqa: E731
        add(("quantization", method), "AutoModel", honest, edit)
        add(("quantization", method, "language model"), "language model", root / "llama", edit)
        add(("quantization", method, "trusted"), "AutoModel", honest, edit, {"trust_remote_code": True})
    (root / "jobs.json").write_text(json.dumps(jobs))
    paths = [str(root / "packages"), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-", root / "jobs.json"], input=DRIVER, capture_output=True, text=True, env=environment, timeout=600)  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-3000:]
    return dict(zip(names, json.loads(lines[0].removeprefix("RESULT")), strict=True))


def test_an_honest_checkpoint_loads(told):
    assert told["honest"] == ["loaded", []]


@pytest.mark.parametrize("loader", ["AutoConfig", "AutoModel", "MultimodalModel", "from_config"])
def test_no_stored_value_fetches_a_kernel(told, loader):
    for way in WAYS:
        text, asked = told[way, loader]
        assert asked == [] and text.startswith("ValueError: "), (way, text, asked)
        assert "are code" in text or "expected the name of an implementation" in text, (way, text)


def test_a_processor_fetches_none_and_counts_without(told):
    for way in WAYS:
        text, asked = told[way, "processor"]
        plain = any(name in way for name in (*OF_CHOICE, "sonicmoe", "deepgemm"))
        assert asked == [] and (text == "loaded" if plain else text.startswith("ValueError: ")), (way, text, asked)


def test_what_the_caller_asks_for_counts(told):
    for way in WAYS.keys() - {"use_kernels", "kernel_config"}:
        assert told[way, "caller"] == ["loaded", []], way
    assert told["caller's kernel"][1] == [REPO]
    assert told["caller's flash"][1], "the kernel that stands in for it"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", [REPO, "flash_attention_2"])
def test_projectors_and_native_checkpoints(told, key, name):
    for loader in ("projector", "encoder", "language model"):
        text, asked = told[loader, key, name]
        assert asked == [] and "are code" in text and text.startswith("ValueError: "), (loader, text)
        if loader != "projector":  # transformers lets a key with an underscore win over the caller's argument
            text, asked = told[loader, key, name, "caller"]
            assert asked == [] and (text == "loaded" if key == "attn_implementation" else "are code" in text), (
                loader,
                text,
            )


@pytest.mark.parametrize("method", METHODS)
def test_quantization_by_kernels(told, method):
    for name in (("quantization", method), ("quantization", method, "language model")):
        text, asked = told[name]
        assert asked == [] and text.startswith("ValueError: ") and "kernels are code" in text, (name, text)
    assert "kernels are code" not in told["quantization", method, "trusted"][0], "what is left to say is transformers'"
