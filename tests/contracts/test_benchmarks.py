"""The benchmarks run by one command, leave a table, JSON and a plot, and refuse models that are not equal."""

import ast
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.fixture(autouse=True)
def repository_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def pair():
    from benchmarks.models import build_pair
    from benchmarks.sizes import QUICK

    return build_pair(QUICK, 400)


def run(*arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", "--quick", *map(str, arguments)], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=580)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def check_results(folder, out, groups):
    data = json.loads((folder / "results.json").read_text())
    about, results = data["about"], data["results"]
    assert (
        about["checked"] == (groups != {"ladder"})
        and about["quick"]
        and about["transformers"]
        and about["threads"] == 1
    )
    assert {result["group"] for result in results} == groups
    for result in results:
        assert len(result["native"]) == len(result["ours"]) > 0
        figures = [*result["native"], *result["ours"], *result["ours_by_native"].values()]
        assert all(math.isfinite(x) and x > 0 for x in figures), result["name"]
        assert result["target"] is None and result["met"] is None, "tiny sizes are held against no target"
    table = (folder / "results.md").read_text()
    assert table in out and all(f"| {result['name']} " in table for result in results)
    assert ("equal to the bit" in table) == about["checked"]
    assert Image.open(folder / "results.png").size[0] > 800
    return {result["name"]: result for result in results}


@pytest.mark.slow
def test_one_command(tmp_path):
    out = run("--only", "counting", "forward", "decode", "train", "processor", "storage", "--output", tmp_path)
    results = check_results(tmp_path, out, {"counting", "forward", "decode", "train", "processor", "save", "load"})
    full = results["training step, projector only, vocabulary 400, all logits"]["notes"]
    assert full["loss_relative_difference"] == full["gradient_relative_difference"] == 0
    at_labels = results["training step, all parameters, vocabulary 400"]["notes"]
    assert 0 <= at_labels["loss_relative_difference"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("group", ["overhead", "waits", "labels", "chat", "collator", "ladder"])
def test_a_group_alone(tmp_path, group):
    assert check_results(tmp_path, run("--only", group, "--output", tmp_path), {group})


@pytest.mark.slow
def test_everything_with_fresh_processes(tmp_path):
    out = run("--output", tmp_path)
    groups = {"import", "memory", "labels", "counting", "overhead", "waits", "graphs", "ladder"}
    groups |= {"forward", "decode", "train", "chat", "processor", "collator", "save", "load"}
    results = check_results(tmp_path, out, groups)
    runs = results["peak memory, training step, projector only, vocabulary 400"]["notes"]
    for side in ("native", "ours"):
        assert 0 < runs[side][0]["imported"] <= runs[side][0]["built"] <= runs[side][0]["peak"]


def test_unequal_weights_are_refused(pair):
    from benchmarks.models import check_logits, check_weights

    check_weights(pair.native, pair.ours)
    with torch.no_grad():
        pair.ours.vision_encoder.module.encoder.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    with pytest.raises(
        ValueError, match=r"weights differ in model\.vision_tower\.encoder\.layers\.0\.mlp\.fc1\.weight"
    ):
        check_weights(pair.native, pair.ours)
    with pytest.raises(ValueError, match=r"not equal to the bit, they differ by \d"):
        check_logits(pair.native, pair.ours, pair.inputs)


def test_shared_weights_are_refused(pair):
    from benchmarks.models import check_weights, compose_parts_of

    with pytest.raises(ValueError, match="share model.vision_tower"):
        check_weights(pair.native, compose_parts_of(pair.native))


def test_no_time_is_taken_of_models_that_do_other_things(pair):
    """Each measurement makes its own check, past the one on building: a model that changed in between is refused."""
    from benchmarks.sizes import QUICK
    from benchmarks.speed import decode, generate, train

    with torch.no_grad():
        pair.ours.language_model.lm_head.weight.mul_(-1)
    with pytest.raises(ValueError, match="logits differ after 0 decoded tokens"):
        decode(pair, QUICK)
    with pytest.raises(ValueError, match="generate other tokens"):
        generate(pair, QUICK)
    with pytest.raises(ValueError, match="With all logits the losses differ"):
        train(pair, QUICK)


def test_a_loss_that_is_not_at_labels_is_refused(pair):
    from benchmarks.models import set_trainable
    from benchmarks.speed import check_gradients

    for model in (pair.native, pair.ours):
        set_trainable(model, "projector")
    with pytest.raises(ValueError, match="loss_at_labels is True, but logits are there"):
        check_gradients(pair, at_labels=True)


def test_the_projector_alone_trains(pair):
    from benchmarks.models import native_name, set_trainable

    for mode, count in (("projector", 4), ("all", len(list(pair.native.parameters())))):
        for model in (pair.native, pair.ours):
            set_trainable(model, mode)
        ours = {native_name(name) for name, p in pair.ours.named_parameters() if p.requires_grad}
        native = {name for name, p in pair.native.named_parameters() if p.requires_grad}
        assert ours == native and len(ours) == count
    with pytest.raises(ValueError, match="'nothing'"):
        set_trainable(pair.native, "nothing")


def test_full_sizes_are_those_of_the_targets():
    from benchmarks import memory, models, sizes, speed

    assert sizes.FULL.image_tokens == 576 and sizes.FULL.judged and not sizes.QUICK.judged
    for targets in ({v for _, v in speed.TRAIN_TARGETS}, set(memory.TARGETS)):
        assert targets == set(sizes.FULL.vocabularies) == set(sizes.FULL.memory_vocabularies)
    inputs, labels = models.build_inputs(replace(sizes.FULL, vision={"image_size": 336, "patch_size": 14}), 32_000)
    assert inputs["input_ids"].shape == (2, 640) and (inputs["input_ids"] == 31_999).sum() == 2 * 576
    assert (labels != -100).sum() == 2 * 32 and (inputs["input_ids"][:, :16] != 31_999).all()


def test_ratios_and_targets():
    from benchmarks.results import Result, Target

    times = Result("train", "step", "s", [4.0, 6.0, 4.0], [2.0, 2.0, 2.0], Target(at_least=2.5))
    assert times.ratios == [0.5, 1 / 3, 0.5] and times.ratio == 0.5 and times.inverse == 2 and times.met is False
    rates = Result("processor", "rate", "pairs/s", [100.0], [200.0])
    assert rates.ratio == 0.5 and rates.met is None
    peaks = Result("memory", "peak", "MiB", [100.0], [80.0], Target(at_most=0.8))
    assert peaks.met is True and str(peaks.target) == "ours / native ≤ 0.8"
    waits = Result("waits", "step", "waits", [4.0], [6.0], Target(more=2))
    assert waits.met is True and waits.bound == 1.5 and str(waits.target) == "ours ≤ native + 2"
    assert Result("waits", "step", "waits", [4.0], [5.0], Target(more=0)).met is False
    assert str(Target(more=0)) == "ours ≤ native" and times.bound == 0.4 and peaks.bound == 0.8 and rates.bound is None
    with pytest.raises(ValueError, match="2 samples of the native model and 1"):
        Result("train", "step", "s", [1.0, 2.0], [1.0])


def test_measurements_are_taken_in_turn():
    from benchmarks.results import in_turn

    order = []
    samples = in_turn(lambda: order.append("a") or len(order), lambda: order.append("b") or len(order), 2)
    assert order == ["a", "b"] * 3 and samples == ([3, 5], [4, 6]), "the first of each warms up"


def test_fresh_processes():
    from benchmarks.children import run_python
    from benchmarks.imports import import_seconds

    assert import_seconds("import json") > 0
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1.*ZeroDivisionError"):
        run_python("-c", "1 / 0")


def test_the_program_of_a_memory_child():
    from benchmarks.memory import measure
    from benchmarks.sizes import QUICK

    native, ours = (measure(side, "projector", 400, QUICK) for side in ("native", "ours"))
    assert native["loss"] == pytest.approx(ours["loss"], rel=1e-5) and ours["peak"] >= ours["imported"] > 10


def test_the_program_of_a_child_with_labels_everywhere():
    from benchmarks.labels import all_labelled, measure
    from benchmarks.sizes import FULL, QUICK

    full = all_labelled(FULL)
    assert full.image_tokens + full.text_tokens == 640 and full.labelled == full.text_tokens and full.judged
    native, ours = (measure(side, "projector", 400, all_labelled(QUICK)) for side in ("native", "ours"))
    assert native["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert all(run["peak"] >= run["before"] > 10 and run["added"] >= 0 for run in (native, ours))


def test_a_chat_is_counted_turn_by_turn(pair):
    from benchmarks.chat import chat
    from benchmarks.sizes import QUICK

    calls, encoding, _ = chat(pair, QUICK)
    assert calls.notes == {"anew": [1, 1, 1, 1], "continued": [1, 0, 0, 0]} and calls.ratio == 0.25
    assert len(encoding.native) == len(encoding.ours) == QUICK.pairs["chat"]
    assert not pair.ours.vision_encoder.module._forward_hooks, "nothing is left that watches"


def test_waits_are_counted_and_said():
    from benchmarks.sizes import QUICK
    from benchmarks.waits import waits

    forward, token, *steps = waits(replace(QUICK, judged=True))
    assert forward.met and token.met and all(step.met for step in steps) and len(steps) == 2
    assert token.ours == [1.0] and all(len(result.notes["ours"]) == result.ours[0] for result in (forward, *steps))


def test_graphs_are_counted_with_their_breaks_where_a_call_is_not_one():
    from benchmarks.graphs import counted

    def one(x):
        return x + 1

    def broken(x):
        return x + 1 if x.sum().item() > 0 else x - 1

    def run(compiled):
        compiled(torch.ones(3))
        compiled(torch.ones(4))

    assert counted(run, one) == (2, "")
    graphs, reason = counted(run, broken)
    assert graphs > 2 and "data-dependent" in reason


def test_rungs_of_the_ladder_are_one_above_the_other():
    from benchmarks import ladder

    made = ladder.rungs()
    for below, above in itertools.pairwise(made):
        changed = [key for key in vars(above) if key != "name" and vars(above)[key] != vars(below)[key]]
        assert len(changed) == 1, above.name
    steps = {rung.name: ladder.Step(rung, judged=False) for rung in made}
    for step in steps.values():
        step.run()
        gradients = [n for n, p in step.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert gradients and all("projector" in name for name in gradients)
        assert all(p.dtype == torch.float32 for p in step.model.audio_encoder.projector.parameters())
    first, at_labels, trimmed, _, short, _, cached = steps.values()
    assert first.loss == pytest.approx(at_labels.loss, rel=1e-5)
    assert first.length == at_labels.length > trimmed.length > short.length == cached.length
    assert cached.loss == pytest.approx(short.loss, abs=0.02), "the same features, in bfloat16"


def test_the_collator_beside_the_processor_makes_the_same_ids():
    from benchmarks.collator import FEW, build, collator, talk
    from benchmarks.sizes import QUICK
    from cornstarch_hf import MultimodalCollator

    processor = build(QUICK)
    image = {"type": "image", "image": Image.new("RGB", (40, 30))}
    batch = MultimodalCollator(processor)([{"messages": talk(2, image)}])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert torch.equal(batch["input_ids"], processor.apply_chat_template([talk(2, image)], **options)["input_ids"])
    assert (batch["labels"] != -100).any() and len(talk(FEW)) == FEW
    assert [result.group for result in collator(QUICK)] == ["collator"] * 4


def test_clocks():
    from benchmarks.timing import cpu_seconds, one_thread, seconds

    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before and seconds(lambda: 1) >= 0
    assert cpu_seconds(lambda: sum(range(10**5))) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_are_small_and_stand_alone(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree) and text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.body[0].lineno < 40, node.name
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] not in ("tests", "tiny", "helpers")
