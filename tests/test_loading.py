"""What `from_pretrained` takes reaches the model, for whole and for reference checkpoints alike."""

import json
import logging

import pytest
import torch
from helpers import compose_tiny
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, GenerationConfig

from cornstarch_hf import MultimodalConfig, MultimodalModel
from cornstarch_hf.snapshots import POINTER


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
