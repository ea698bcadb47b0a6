"""What `from_pretrained` takes reaches the model, for whole and for reference checkpoints alike."""

import json

import pytest
import torch
from helpers import compose_tiny
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
