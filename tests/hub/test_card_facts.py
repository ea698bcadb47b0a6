"""Facts of training runs: those that ran, and nothing of the machine or the user."""

import json
from importlib.metadata import version

import pytest
import tiny
import torch
from helpers import compose_tiny
from trainers import rows, trainer

from cornstarch_hf import parameter_groups
from cornstarch_hf.hub.card_facts import training_facts

SECRETS = {
    "output_dir": "alices-folder",
    "run_name": "alices-host-run",
    "hub_token": "hf_secretsecret",
    "hub_model_id": "alice/secret",
    "logging_dir": "alices-logs",
    "project": "alices-project",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, processor = compose_tiny(["clip", "whisper"])
    options = {key: value for key, value in SECRETS.items() if key not in ("output_dir", "logging_dir")}
    options |= {"lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.1, "per_device_train_batch_size": 2}
    options |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2, "data_seed": 7}
    made = trainer(model, processor, folder / SECRETS["output_dir"], **options)
    made.train()
    made.evaluate()
    made.state.log_history.append(
        {
            "eval_/home/alice/rows.json_loss": 1.0,
            "eval_accuracy": 0.5,
            "eval_a/alice.json_loss": 1.0,
            "eval_a/b/c": 2.0,
            "eval_rewards/chosen": 3,
            "eval_text": "a row",
        }
    )
    made.state.log_history.append({"note": "a row of the data", "loss": "nan?", "step": 2})
    return made


def test_facts_are_those_of_the_run(trained):
    facts = dict(training_facts(trained))
    history = trained.state.log_history
    last = [entry["loss"] for entry in history if isinstance(entry.get("loss"), float)][-1]
    evaluated = next(entry["eval_loss"] for entry in history if "eval_loss" in entry)
    assert facts["optimizer steps"] == "2" and facts["epochs"] == f"{trained.state.epoch:.4g}"
    assert facts["batch size"] == "4 (2 per device x 2 accumulated x 1 processes)"
    assert facts["optimizer"] == "SGD" and facts["learning rate"] == "0.01"
    assert facts["learning rate schedule"] == "cosine" and facts["warmup steps"] == "1"
    assert facts["weight decay"] == "0.1" and facts["mixed precision"] == "none"
    assert facts["seed"] == "1" and facts["data seed"] == "7" and facts["gradient clipping"] == "1"
    assert facts["last training loss"] == f"{last:.4g}" and facts["eval_loss"] == f"{evaluated:.4g}"
    assert facts["eval_accuracy"] == "0.5" and facts["eval_rewards/chosen"] == "3" and "mean training loss" in facts
    assert f"torch {version('torch')}" in facts["versions"] and "transformers " in facts["versions"]
    assert not [name for name in facts if "runtime" in name or "per_second" in name]


def test_facts_hold_nothing_of_the_machine_or_the_data(trained):
    text = json.dumps(training_facts(trained))
    for secret in (*SECRETS.values(), "alice", "home", "row", "/"):
        assert secret not in text.replace("eval_rewards/chosen", ""), secret


def test_a_checkpoint_folder_tells_what_its_state_holds(trained):
    folder = f"{trained.args.output_dir}/checkpoint-2"
    facts = dict(training_facts(folder))
    assert facts == dict(training_facts(f"{folder}/trainer_state.json"))
    known = dict(training_facts(trained))
    assert {key: known[key] for key in ("epochs", "optimizer steps")}.items() <= facts.items()
    assert facts["batch size per device"] == "2" and float(facts["last training loss"]) > 0
    assert set(facts) == {"epochs", "optimizer steps", "batch size per device", "last training loss"}


def test_a_run_without_a_step_has_no_facts(tmp_path):
    model, processor = compose_tiny(["clip", "whisper"])
    assert training_facts(trainer(model, processor, tmp_path)) == []
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 0, "log_history": []}))
    assert training_facts(tmp_path) == []


def test_learning_rates_of_parts_and_an_own_schedule(tmp_path):
    model, processor = compose_tiny(["clip"])
    model.freeze("vision_encoder.module")
    groups = parameter_groups(model, {"projector": 1e-2, "language_model": 1e-3})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    items = [{"prompt": "<image> a", "completion": " b", "images": [tiny.image()]}] * 2
    made = trainer(model, processor, tmp_path, items, (optimizer, schedule), max_steps=1)
    made.train()
    facts = dict(training_facts(made))
    assert facts["optimizer"] == "Adam" and facts["learning rate"] == "0.01 (projector), 0.001 (language_model)"
    assert "learning rate schedule" not in facts


@pytest.mark.parametrize("content", ["", "[]", None])
def test_a_state_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer: .*trainer_state.json (cannot be read|must hold a JSON object)"):
        training_facts(tmp_path)


def test_what_is_no_trainer_is_refused():
    with pytest.raises(TypeError, match=r"must be a transformers.Trainer or the path .*, got list"):
        training_facts(rows(1))
