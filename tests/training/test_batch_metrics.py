"""What a run reports about its batches: counted by hand, in the log, in TensorBoard's files, over several processes."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from helpers import compose_tiny, run_python
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainers import rows, trainer

import cornstarch_hf
from cornstarch_hf import BatchMetrics, MultimodalCollator

NAMES = ["tokens/vision", "tokens/audio", "tokens/text", "padding_ratio", "tokens_per_second"]


def by_hand(processor, batches):
    """Tokens by kind and padding of batches of rows."""
    counts = dict.fromkeys(["vision", "audio", "text", "padding"], 0)
    for items in batches:
        batch = MultimodalCollator(processor)(items)
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        for name in ("vision", "audio"):
            counts[name] += int((ids == processor.config.modality(name)["token_id"]).sum())
        counts["padding"] += int((~mask).sum())
        counts["text"] += ids.numel()
    counts["text"] -= counts["vision"] + counts["audio"] + counts["padding"]
    return counts


def entries(made):
    return [entry for entry in made.state.log_history if "loss" in entry]


def counted(entry):
    return {name: entry[f"tokens/{name}"] for name in ("vision", "audio", "text")}


def ordered(model, processor, folder, **options):
    return trainer(model, processor, folder, train_sampling_strategy="sequential", **options)


def test_counts_are_those_of_the_batches(tmp_path):
    model, processor = compose_tiny(["clip", "whisper"])
    made = ordered(model, processor, tmp_path, max_steps=2, logging_steps=1)
    made.add_callback(BatchMetrics())
    made.train()
    for entry, items in zip(entries(made), (rows()[:4], rows()[4:]), strict=True):
        expected = by_hand(processor, [items])
        padding = expected.pop("padding")
        assert counted(entry) == expected
        assert entry["padding_ratio"] == padding / (padding + sum(expected.values())) > 0
        assert entry["tokens_per_second"] > 0
    assert not model._forward_pre_hooks, "nothing stays on the model"


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "peft"])
def test_an_entry_covers_all_steps_since_the_last_and_no_evaluation(tmp_path, wrap):
    model, processor = compose_tiny(["clip", "whisper"])
    whole = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if wrap else model
    made = ordered(
        whole, processor, tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )  # fmt: skip
    made.add_callback(BatchMetrics("data/"))
    made.train()
    (entry,) = entries(made)
    expected = by_hand(processor, [rows()[i : i + 2] for i in range(0, 8, 2)])
    assert {k.removeprefix("data/tokens/"): v for k, v in entry.items() if k.startswith("data/tokens/")} == {
        name: expected[name] for name in ("vision", "audio", "text")
    }
    assert not any("tokens" in key for e in made.state.log_history if "eval_loss" in e for key in e)


def test_tensorboard_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model, processor = compose_tiny(["clip", "whisper"])
    made = ordered(model, processor, tmp_path, report_to="tensorboard")
    BatchMetrics.add_to(made)
    made.train()
    folder = next((tmp_path / "runs").rglob("events.out*")).parent
    events = EventAccumulator(str(folder)).Reload()
    for name in NAMES:
        written = [event.value for event in events.Scalars(f"train/{name}")]
        assert written == pytest.approx([entry[name] for entry in entries(made)]) and len(written) == 2, name


PROCESSES = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_batch_metrics as t
from accelerate import PartialState

folder = Path(sys.argv[1])
model, processor = t.compose_tiny(["clip", "whisper"])
made = t.ordered(model, processor, folder, per_device_train_batch_size=2, ddp_find_unused_parameters=True, max_steps=1)
made.add_callback(t.BatchMetrics())
made.train()
assert PartialState().num_processes == 2
if PartialState().is_main_process:
    (folder / "entries.json").write_text(json.dumps(t.entries(made)))
"""


@pytest.mark.slow
def test_sums_over_processes(tmp_path):
    (tmp_path / "work.py").write_text(PROCESSES)
    launch = "\nimport sys; from torch.distributed.run import main; main(sys.argv[1:])\n"
    run_python(
        launch,
        "--standalone",
        "--nproc-per-node=2",
        str(tmp_path / "work.py"),
        str(tmp_path),
        str(Path(__file__).parent),
    )
    (entry,) = json.loads((tmp_path / "entries.json").read_text())
    _, processor = compose_tiny(["clip", "whisper"])
    expected = by_hand(processor, [rows()[:2], rows()[2:4]])
    assert counted(entry) == {name: expected[name] for name in ("vision", "audio", "text")}


def test_embeddings_instead_of_ids_count_as_text():
    model, _ = compose_tiny(["clip"])
    metrics = BatchMetrics()
    metrics._count(model.train(), (), {"inputs_embeds": torch.zeros(2, 3, 32), "attention_mask": torch.tensor([[1, 1, 0]] * 2)})  # fmt: skip
    assert {name: int(n) for name, n in metrics._counts.items()} == {"padding": 2, "vision": 0, "text": 4}


def test_other_models_are_refused_and_the_name_is_found_late(tmp_path):
    with pytest.raises(ValueError, match="BatchMetrics counts for composed models, got LlamaForCausalLM"):
        BatchMetrics().on_train_begin(None, None, None, model=tiny.llama())
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        cornstarch_hf.Nothing  # noqa: B018
