"""Training: plain Trainer, accumulation, checkpointing, resuming."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from helpers import compose_tiny
from trainers import losses, rows, trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from cornstarch_hf import MultimodalCollator, MultimodalModel


@pytest.fixture
def pair():
    return compose_tiny(["clip", "whisper"])


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


def test_default_remove_unused_columns_loses_nothing(tmp_path, pair):
    model, processor = pair
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
    layers = [m for m in model.language_model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers and all(layer.training for layer in layers)
    checkpointed = gradients(model, batch)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], atol=1e-6, rtol=1e-4)


def test_bf16(tmp_path, pair):
    model, processor = pair
    made = trainer(model, processor, tmp_path, bf16=True)
    made.train()
    assert all(torch.tensor(losses(made)).isfinite())
    half = copy.deepcopy(model).bfloat16()
    assert torch.isfinite(half(**MultimodalCollator(processor)(rows(4))).loss)


def test_resumed_equals_uninterrupted(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    model, processor = compose_tiny(["clip", "whisper"])
    model.freeze("vision_encoder.module")
    whole = trainer(model, processor, tmp_path / "whole", **options)
    whole.train()
    model, processor = compose_tiny(["clip", "whisper"])
    model.freeze("vision_encoder.module")
    first = trainer(model, processor, tmp_path / "parts", **options)
    first.add_callback(Stop())
    first.train()
    assert (tmp_path / "parts" / "checkpoint-2" / "model.safetensors").exists()
    fresh, processor = compose_tiny(["clip", "whisper"])
    fresh.freeze("vision_encoder.module")
    second = trainer(fresh, processor, tmp_path / "parts", **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses(second)[-2:] == losses(whole)[-2:]
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_trainer_checkpoints_hold_everything_and_keep_foreign_files(tmp_path, pair):
    model, processor = pair
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


def test_loss_falls_on_rows_of_mixed_modalities(tmp_path, pair):
    model, processor = pair
    made = trainer(model, processor, tmp_path, max_steps=30, optim="adamw_torch")
    made.train()
    assert losses(made)[-1] < 0.5 * losses(made)[0]


def test_label_smoothing_shifts(tmp_path, pair):
    """Trainer's label smoother shifts labels itself for causal language models, which it knows by class name."""
    model, processor = pair
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
