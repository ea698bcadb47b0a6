"""Tensors that adapters bring along: ties behind them, shared projections, buffers that no checkpoint holds."""

import pytest
import tiny
import torch
from helpers import compose_tiny
from own_memory import check_comes_back
from peft import FourierFTConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model

from cornstarch_hf import MultimodalModel
from cornstarch_hf.parts.adapters import adapter_buffers, current_name, shared_by_adapters

TARGETS = ["q_proj", "v_proj"]


def composed(config, **changes):
    return compose_tiny(["clip"], get_peft_model(tiny.llama(**changes), config))[0]


def test_names_behind_adapters():
    model = composed(LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"]))
    inner = "language_model.base_model.model"
    found = current_name(model, f"{inner}.model.embed_tokens.weight")
    assert found == f"{inner}.model.embed_tokens.base_layer.weight"
    assert current_name(model, f"{inner}.lm_head.weight") == f"{inner}.lm_head.original_module.weight"
    assert current_name(model, f"{inner}.model.norm.weight") == f"{inner}.model.norm.weight"
    assert current_name(model, "no.such.weight") == "no.such.weight"


@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"]])
def test_tied_weights_stay_tied_behind_adapters(tmp_path, targets):
    model = composed(LoraConfig(r=2, target_modules=targets), tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    again, info = MultimodalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    head, table = again.get_output_embeddings(), again.get_input_embeddings()
    assert head.weight is getattr(table, "base_layer", table).weight
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=4, target_modules=["q_proj"]),
        OFTConfig(oft_block_size=4, r=0, target_modules=TARGETS),
        FourierFTConfig(n_frequency=10, target_modules=TARGETS),
    ],
    ids=["shared", "tables", "computed"],
)
def test_shared_projections_and_computed_tables_come_back(tmp_path, config):
    model = composed(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01) if p.requires_grad else None
    if not isinstance(config, FourierFTConfig):  # which keeps its table as a plain attribute
        assert shared_by_adapters(model) or adapter_buffers(model)
    model.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path).eval()
    check_comes_back(model, again, {"input_ids": torch.tensor([[1, 5, 9]])})


def test_buffers_that_nothing_can_make_again_are_refused(tmp_path):
    model = composed(VeraConfig(r=4, target_modules=["q_proj"], save_projection=False))
    with pytest.raises(ValueError, match=r"would not hold the buffers .*save_projection=True"):
        model.save_pretrained(tmp_path)
