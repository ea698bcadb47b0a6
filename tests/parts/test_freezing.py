"""Freezing: names, modes, what a reload restores."""

import logging

import native_types
import pytest
import tiny
import torch
from helpers import compose_tiny
from torch import nn

from cornstarch_hf import ModalEncoderModule, MultimodalModel, from_native


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


def by_hand(model):
    """Parts of which the user trains some weights alone."""
    for part in (model.vision_encoder.module, model.vision_encoder.projector, model.language_model):
        for parameter in list(part.parameters())[::2]:
            parameter.requires_grad_(False)
    return model


MODES = {
    "all follow": ({"llm_mode": False}, {"llm_mode": True}),
    "named": (
        {"encoders_mode": {"vision": (False, False)}, "llm_mode": False},
        {"encoders_mode": {"vision": (True, True)}, "llm_mode": True},
    ),
}


@pytest.mark.parametrize("change", [by_hand, lambda model: model], ids=["by hand", "Whisper's own"])
@pytest.mark.parametrize("modes", MODES)
def test_what_trained_before_trains_again(tmp_path, model, modes, change):
    names = trainable(change(model))
    off, on = MODES[modes]
    for _ in range(2):
        frozen = trainable(model.train(**off).train(**off))  # twice: what is frozen already has nothing new to say
        assert all(name.startswith("audio") for name in frozen) and bool(frozen) == (modes == "named")
        model.save_pretrained(tmp_path)
        again = MultimodalModel.from_pretrained(tmp_path)
        assert trainable(again) == frozen and trainable(again.train(**on)) == names
        assert trainable(again.train(**on)) == names, "and nothing more the second time"
        assert trainable(model.train(**on)) == names
    assert not any("off" in found for found in (model.config.frozen_parts or {}).values())


def test_a_part_frozen_as_a_whole_trains_when_it_is_named_and_else_stays_frozen(model):
    names = trainable(model.freeze("vision_encoder.module", "language_model"))
    model.train(llm_mode=False).train(llm_mode=True)
    text = [name for name in trainable(model) if name.startswith("language_model")]
    assert len(text) == len(list(model.language_model.parameters()))
    assert trainable(model)[: -len(text)] == names
    model.train(encoders_mode={"vision": (True, True)})
    assert all(p.requires_grad for p in model.vision_encoder.parameters())


def test_what_is_unfrozen_meanwhile_is_not_held_back(model):
    names = trainable(by_hand(model))
    model.train(llm_mode=False)
    model.unfreeze("language_model.model.layers.0")
    model.train(llm_mode=True)
    layer = {n for n, _ in model.named_parameters() if n.startswith("language_model.model.layers.0.")}
    assert set(trainable(model)) == {*names, *layer}
    model.train(llm_mode=False).unfreeze()
    assert all(p.requires_grad for p in model.train(llm_mode=True).parameters()) and model.config.frozen_parts is None


class Shift(nn.Module):
    """A callback of any place that learns one number."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, inputs, output=None):
        return inputs if output is None else output


# Place of a callback, and which of a pair of modes speaks of it.
PLACES = {"preprocess_callback": 0, "postprocess_module_callback": 0, "postprocess_projector_callback": 1}


@pytest.mark.parametrize("place", PLACES)
def test_callbacks_that_learn_go_with_the_encoder_or_the_projector(place):
    encoder = ModalEncoderModule(tiny.clip(), **{place: Shift()})
    model = MultimodalModel(encoders={"vision": encoder}, language_model=tiny.llama())
    shift, whole = getattr(encoder, place).shift, trainable(model)
    assert f"vision_encoder.{place}.shift" in whole
    for pair in ((False, True), (True, False), (False, False), (True, True)):
        model.train(encoders_mode={"vision": pair})
        assert shift.requires_grad is pair[PLACES[place]] is getattr(encoder, place).training
    assert trainable(model) == whole and not model.config.frozen_parts
    assert not trainable(model.train(llm_mode=False))
    assert trainable(model.train(llm_mode=True)) == whole
    model.freeze(f"vision_encoder.{place}")
    assert trainable(model.train(llm_mode=False).train(llm_mode=True)) == [n for n in whole if place not in n]
    assert trainable(model.freeze("vision_encoder").unfreeze()) == whole


def test_the_newline_of_tiles_is_frozen_with_the_projector_and_stays_so(tmp_path):
    model = MultimodalModel(
        encoders={"vision": ModalEncoderModule(tiny.clip(), tiles="newline", drop_prefix=1)},
        language_model=tiny.llama(),
    )
    newline = "vision_encoder.postprocess_projector_callback.image_newline"
    whole = trainable(model)
    model.train(encoders_mode={"vision": (False, True)}, llm_mode=False)
    assert trainable(model) == [name for name in whole if "projector" in name] and newline in trainable(model)
    model.train(encoders_mode={"vision": (True, False)}, llm_mode=False)
    assert newline not in trainable(model)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path)
    assert trainable(again) == trainable(model)
    assert trainable(again.train(encoders_mode={"vision": (True, True)}, llm_mode=True)) == whole


@pytest.mark.parametrize("model_type", ["deepseek_vl_hybrid", "llava_next", "llava_next_video", "llava_onevision"])
def test_what_native_models_learn_beside_their_parts_is_frozen_with_them(model_type):
    model, _ = from_native(native_types.build(model_type))
    whole = trainable(model)
    assert whole and not trainable(model.train(llm_mode=False))
    assert trainable(model.train(llm_mode=True)) == whole
    modes = dict.fromkeys(model.config.encoders, (False, True))
    left = trainable(model.train(encoders_mode=modes, llm_mode=False))
    place = "module" if model_type == "deepseek_vl_hybrid" else "projector"
    assert any(f"postprocess_{place}_callback" in name for name in left) == (place == "projector")


@pytest.mark.parametrize(
    "stored", [{"language_model": ["a"]}, {"language_model": {"held": "a"}}, {"language_model": {"on": True}}, ["a"]]
)
def test_a_stored_state_of_parts_that_is_none_is_refused(model, stored):
    values = model.config.to_dict() | {"frozen_parts": stored}
    with pytest.raises(ValueError, match="frozen_parts"):
        type(model.config).from_dict(values)
