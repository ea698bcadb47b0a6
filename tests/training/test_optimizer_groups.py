"""Training: plain Trainer, accumulation, checkpointing, resuming."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from dropping import LayerRuns
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model
from trainers import losses, rows, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from cornstarch_hf import MultimodalCollator, MultimodalModel, parameter_groups


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def test_batch_of_8_equals_2_by_4_accumulated(tmp_path):
    found = []
    for batch, steps in ((8, 1), (4, 2)):
        model, processor = compose_tiny(["clip", "whisper"])
        made = trainer(model, processor, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        made.train()
        found.append((losses(made), [p.detach().clone() for p in model.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_default_remove_unused_columns_loses_nothing(tmp_path, fresh_pair):
    model, processor = fresh_pair
    batch = MultimodalCollator(processor)([dict(r) for r in rows() if "images" in r and "audio" in r] * 2)
    table = Dataset.from_dict({key: value.tolist() for key, value in batch.items()}).with_format("torch")
    seen = []
    for name, encoder in model.encoders.items():
        encoder.register_forward_hook(lambda *_, n=name: seen.append(n))
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True)  # fmt: skip
    assert arguments.remove_unused_columns
    made = Trainer(model=model, args=arguments, train_dataset=table)
    assert set(made._remove_unused_columns(table).column_names) == set(batch)
    made.train()
    assert sorted(seen) == ["audio", "vision"]


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [(), ("vision_encoder.module",), ("language_model",)])
@pytest.mark.parametrize("language_model", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(frozen, language_model):
    model, processor = compose_tiny(["clip", "whisper"], tiny.LANGUAGE_MODELS[language_model]())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if frozen:
        model.freeze(*frozen)
    batch = MultimodalCollator(processor)(rows(4))
    model.train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    model.train()
    with LayerRuns(model.language_model) as runs:
        checkpointed = gradients(model, batch)
    twice = {name for (name, _), count in runs.calls.items() if count == 2}
    assert len(twice) == 2 and twice == {name for name, _ in runs.calls}, "each layer computes again for the gradients"
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-4)


def test_bf16(tmp_path, fresh_pair):
    model, processor = fresh_pair
    made = trainer(model, processor, tmp_path, bf16=True)
    made.train()
    assert all(torch.tensor(losses(made)).isfinite())
    half = copy.deepcopy(model).bfloat16()
    assert torch.isfinite(half(**MultimodalCollator(processor)(rows(4))).loss)


def test_resumed_equals_uninterrupted(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    model, processor = compose_tiny(["clip", "whisper"])
    model.freeze("vision_encoder.module")
    whole = trainer(model, processor, tmp_path / "whole", **options)
    whole.train()
    model, processor = compose_tiny(["clip", "whisper"])
    model.freeze("vision_encoder.module")
    first = trainer(model, processor, tmp_path / "parts", **options)
    first.add_callback(StopAfter(2))
    first.train()
    assert (tmp_path / "parts" / "checkpoint-2" / "model.safetensors").exists()
    fresh, processor = compose_tiny(["clip", "whisper"])
    fresh.freeze("vision_encoder.module")
    second = trainer(fresh, processor, tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(second)[-2:] == losses(whole)[-2:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trainer_checkpoints_hold_everything_and_keep_foreign_files(tmp_path, fresh_pair):
    model, processor = fresh_pair
    made = trainer(model, processor, tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    made.processing_class = processor
    made.train()
    folder = tmp_path / "checkpoint-1"
    assert {"model.safetensors", "config.json", "processor_config.json", "trainer_state.json", "optimizer.pt"} <= {
        p.name for p in folder.iterdir()
    }
    again = MultimodalModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    again.save_pretrained(folder)
    assert (folder / "trainer_state.json").exists() and (folder / "optimizer.pt").exists()


def test_loss_falls_on_rows_of_mixed_modalities(tmp_path, fresh_pair):
    model, processor = fresh_pair
    made = trainer(model, processor, tmp_path, max_steps=30, optim="adamw_torch")
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0]


def test_label_smoothing_shifts(tmp_path, fresh_pair):
    """Trainer's label smoother shifts labels itself for causal language models, which it knows by class name."""
    model, processor = fresh_pair
    made = trainer(model, processor, tmp_path, label_smoothing_factor=0.1)
    batch = MultimodalCollator(processor)(rows(4))
    smoothed = made.compute_loss(model, dict(batch))
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    target = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), target.flatten(), ignore_index=-100, label_smoothing=0.1
    )
    torch.testing.assert_close(smoothed.detach(), expected, atol=1e-4, rtol=1e-3)


# ---- groups of parameters


def grouped(model, rates, **options):
    """``{name of a parameter: (learning rate, weight decay, part)}``"""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"], group["name"])
        for group in parameter_groups(model, rates, **options)
        for p in group["params"]
    }


@pytest.mark.parametrize("wrap", [None, "inside", "outside"])
def test_each_part_has_its_learning_rate(wrap):
    outside = {"target_modules": r"language_model\..*q_proj", "modules_to_save": ["projector"]}
    lora = LoraConfig(r=2, **(outside if wrap == "outside" else {"target_modules": ["q_proj"]}))
    language_model = get_peft_model(tiny.llama(), lora) if wrap == "inside" else tiny.llama()
    model, _ = compose_tiny(["clip", "whisper"], language_model)
    model.freeze("vision_encoder.module", "audio_encoder.module")
    whole = get_peft_model(model, lora) if wrap == "outside" else model
    found = grouped(whole, {"projector": 1e-3, "language_model": 2e-5}, weight_decay=0.1)
    assert set(found) == {name for name, p in whole.named_parameters() if p.requires_grad}
    assert all(rate == (1e-3 if "projector" in name else 2e-5) for name, (rate, _, _) in found.items())
    assert any("projector" in name for name in found) and any("language_model" in name for name in found)


def test_weight_decay_is_that_of_trainer(tmp_path):
    model, processor = compose_tiny(["clip", "whisper"])
    found = grouped(model, {"*": 1.0}, weight_decay=0.1)
    made = trainer(model, processor, tmp_path, weight_decay=0.1)
    assert {name for name, (_, decay, _) in found.items() if decay} == set(made.get_decay_parameter_names(model)) & set(
        found
    )


def test_the_smaller_part_counts_where_two_cover_a_parameter():
    model, _ = compose_tiny(["clip"])
    found = grouped(model, {"language_model": 1.0, "*": 2.0, "language_model.model.layers.1": 3.0, "embed_tokens": 4.0})
    assert {rate for rate, _, _ in found.values()} == {1.0, 2.0, 3.0, 4.0}
    assert found["language_model.model.layers.1.mlp.up_proj.weight"][0] == 3.0
    assert found["language_model.model.embed_tokens.weight"][0] == 4.0
    assert found["vision_encoder.projector.projection.weight"][0] == 2.0


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"projector": 1.0}, r"\d+ trainable parameters have no learning rate, vision_encoder.module\S+ first"),
        ({"*": 1.0, "nothing": 2.0}, "'nothing' names no part with parameters"),
        ({"*": 1.0, "audio_encoder.module": 2.0}, "'audio_encoder.module': nothing in it trains"),
        (
            {"*": 1.0, "lm_head": 2.0, "language_model.lm_head": 3.0},
            "'lm_head' and 'language_model.lm_head' name the same",
        ),
    ],
)
def test_groups_that_would_not_train_what_is_meant(rates, message):
    model, _ = compose_tiny(["clip", "whisper"])
    model.freeze("audio_encoder.module")
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, rates)


def test_trainer_takes_the_groups_and_resumes(tmp_path):
    found = []
    for stop in (None, 1):
        model, processor = compose_tiny(["clip", "whisper"])
        for steps in (stop, 3):
            if steps is None:
                continue
            model, processor = compose_tiny(["clip", "whisper"])
            optimizer = torch.optim.AdamW(parameter_groups(model, {"projector": 1e-2, "*": 1e-4}))
            options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "linear"}
            made = trainer(model, processor, tmp_path / str(stop), optimizers=(optimizer, None), **options)
            if steps == 1:
                made.add_callback(StopAfter(1))
            made.train(resume_from_checkpoint=steps == 3 and stop == 1)
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
