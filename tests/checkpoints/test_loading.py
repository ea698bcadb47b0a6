"""What `from_pretrained` takes reaches the model, for whole and for reference checkpoints alike."""

import json
import logging

import pytest
import torch
from helpers import compose_tiny
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, GenerationConfig, PreTrainedModel

from cornstarch_hf import MultimodalConfig, MultimodalModel
from cornstarch_hf.parts.stored_values import POINTER


@pytest.fixture
def folder(tmp_path):
    model = compose_tiny(["clip"])[0]
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, MultimodalModel.from_pretrained])
def test_options_of_configuration_and_of_loading(folder, load):
    model, info = load(
        folder, loss_at_labels=True, dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager"
    )
    assert model.config.loss_at_labels is True and model.dtype == torch.bfloat16 and not any(info.values())
    assert model.language_model.config._attn_implementation == "eager" and model.generation_config.max_new_tokens == 3
    with pytest.raises(TypeError, match="no_such_option"):
        load(folder, no_such_option=1)


def test_a_given_configuration_is_used_and_left_alone(folder):
    config = AutoConfig.from_pretrained(folder)
    config.loss_at_labels = True
    before = config.to_dict()
    assert MultimodalModel.from_pretrained(folder, config=config).config.loss_at_labels is True
    assert config.to_dict() == before and not hasattr(config, "transformers_weights")
    assert AutoModel.from_pretrained(folder, config=config).config.loss_at_labels is True
    again = MultimodalModel.from_pretrained(folder, generation_config=GenerationConfig(max_new_tokens=9))
    assert again.generation_config.max_new_tokens == 9


def test_a_state_instead_of_a_folder(folder):
    model = AutoModel.from_pretrained(folder)
    again = MultimodalModel.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_after_an_interrupted_save_the_new_checkpoint_is_read(folder):
    """As after a kill between the moment at which it became valid and the last file's coming to its place."""
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.language_model.lm_head.weight.add_(1)
    model.config.loss_at_labels = True
    inside = folder / ".saved-abcdefgh"
    model.save_pretrained(inside)
    values = json.loads((inside / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {POINTER: inside.name}))
    for load in (AutoModel.from_pretrained, MultimodalModel.from_pretrained):
        again = load(folder)
        assert torch.equal(again.language_model.lm_head.weight, model.language_model.lm_head.weight)
        assert again.config.loss_at_labels is True and POINTER not in again.config.to_dict()
    assert POINTER not in MultimodalConfig.from_pretrained(folder).to_dict()
    model.save_pretrained(folder)
    assert not inside.exists() and POINTER not in (folder / "config.json").read_text()


def test_who_asks_what_is_missing_is_told_instead_of_refused(folder, caplog):
    save_file({"other": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (AutoModel.from_pretrained, MultimodalModel.from_pretrained):
        with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, expected \d+ as it was saved"):
            load(folder)
        with caplog.at_level(logging.WARNING):
            _, info = load(folder, output_loading_info=True)
        assert "vision_encoder.projector.projection.weight" in info["missing_keys"] and info["unexpected_keys"] == {
            "other"
        }
        assert "model.safetensors has" in caplog.text
        with pytest.raises(ValueError, match="model.safetensors has"):
            load(folder, output_loading_info=True, verify=True)
    (folder / "composition.json").unlink()
    with pytest.raises(ValueError, match=r"does not hold \d+ tensors of the model.*they would be random"):
        AutoModel.from_pretrained(folder)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_every_variant_is_verified(folder):
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(folder, variant="x")
    for variant in (None, "x"):
        MultimodalModel.from_pretrained(folder, variant=variant, verify=True)
    for variant, name in ((None, "model.safetensors"), ("x", "model.x.safetensors")):
        flip_a_bit(folder / name)
        if variant is None:
            MultimodalModel.from_pretrained(folder, variant="x", verify=True)
        with pytest.raises(ValueError, match=f"{name} has the SHA-256"):
            MultimodalModel.from_pretrained(folder, variant=variant, verify=True)
    (folder / "model.y.safetensors").write_bytes((folder / "model.x.safetensors").read_bytes())
    model.save_pretrained(folder, variant="x")
    with pytest.raises(ValueError, match="lists no weights of the variant 'y' to verify"):
        MultimodalModel.from_pretrained(folder, variant="y", verify=True)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ("language_model", "composition.safetensors with all else is missing"),
        ("foo_encoder", r"refers to \['foo_encoder'\]"),
    ],
)
def test_a_whole_checkpoint_that_says_it_is_a_reference(folder, component, message):
    values = json.loads((folder / "composition.json").read_text())
    values["components"][component] = {"source": "reference"}
    (folder / "composition.json").write_text(json.dumps(values))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        MultimodalModel.from_pretrained(folder)


def test_replaced_while_it_is_read(folder, monkeypatch):
    other = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        other.language_model.lm_head.weight.add_(1)
    load = PreTrainedModel._load_pretrained_model
    saves = []

    def meanwhile(*args, **kwargs):
        if not saves:
            saves.append(other.save_pretrained(folder))
        return load(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(meanwhile))
    with pytest.raises(ValueError, match=r"was saved again while it was read.*load again"):
        MultimodalModel.from_pretrained(folder)
    again = MultimodalModel.from_pretrained(folder)
    assert torch.equal(again.language_model.lm_head.weight, other.language_model.lm_head.weight)


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        OSError, match="is no folder of this machine, and cannot be the id of a repository: check the path"
    ):
        MultimodalModel.from_pretrained(tmp_path / "typo")
