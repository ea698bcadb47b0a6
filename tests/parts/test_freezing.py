"""Freezing: names, modes, what a reload restores."""

import logging

import pytest
import torch
from helpers import compose_tiny
from torch import nn

from cornstarch_hf import MultimodalModel


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.fixture
def model():
    return compose_tiny(["clip", "whisper"])[0]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (("vision_encoder.module", "language_model"), ("vision_encoder.projector", "audio_encoder")),
        (("*.projector",), ("vision_encoder.module", "audio_encoder.module", "language_model")),
        (("language_model.model.layers.0",), None),
        (("*.k_proj",), None),
    ],
)
def test_freeze_by_names_and_globs_survives_save_and_load(tmp_path, caplog, model, patterns, left):
    assert model.freeze(*patterns) is model
    names = trainable(model)
    assert 0 < len(names) < len(list(model.parameters()))
    if left is not None:
        fixed = {"audio_encoder.module.embed_positions.weight"}  # Whisper's own: sinusoids
        expected = {n for n, _ in model.named_parameters() if n.startswith(left)} - fixed
        assert set(names) == expected
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "cornstarch_hf.checkpoints.storage"):
        again = MultimodalModel.from_pretrained(tmp_path)
    assert trainable(again) == names
    assert sum("frozen" in record.message for record in caplog.records) == 1
    assert len(MultimodalModel.from_pretrained(tmp_path).unfreeze().config.frozen or []) == 0


def test_requires_grad_set_by_hand_survives_too(tmp_path, model):
    model.language_model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    names = trainable(model)
    model.save_pretrained(tmp_path)
    assert trainable(MultimodalModel.from_pretrained(tmp_path)) == names


def test_names_that_are_not_there(model):
    with pytest.raises(ValueError, match=r"'visoin_encoder' names no part.*vision_encoder"):
        model.freeze("visoin_encoder")
    with pytest.raises(ValueError, match="needs names"):
        model.freeze()


def test_plain_train_and_eval_never_touch_requires_grad(model):
    model.freeze("audio_encoder.module")
    names = trainable(model)
    for mode in (True, False, True):
        model.train(mode)
    assert trainable(model.eval()) == names


def test_cornstarchs_form(model):
    assert model.train(encoders_mode={"vision": (False, True), "audio": (True, True)}, llm_mode=False) is model
    assert not any(p.requires_grad for p in model.vision_encoder.module.parameters())
    assert all(p.requires_grad for p in model.vision_encoder.projector.parameters())
    assert not any(p.requires_grad for p in model.language_model.parameters())
    assert not any(m.training for m in model.language_model.modules() if isinstance(m, nn.Dropout))
    model.train(llm_mode=True)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"\['non_existing'\].*\['vision', 'audio'\]"):
        model.train(encoders_mode={"non_existing": (True, True)})
    with pytest.raises(ValueError, match="encoder trains, projector trains"):
        model.train(encoders_mode={"vision": True})
    with pytest.raises(TypeError):
        model.train({"vision": (True, True)}, True)


def test_no_gradient_is_computed_for_frozen_parts(model):
    model.set_modality_token_ids({"vision": 9})
    model.freeze("vision_encoder.module", "language_model").train()
    ids = torch.tensor([[1, *[9] * 5, 30]])
    model(input_ids=ids, pixel_values=torch.randn(1, 3, 8, 8), labels=ids).loss.backward()
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == [f"vision_encoder.projector.projection.{k}" for k in ("weight", "bias")]
