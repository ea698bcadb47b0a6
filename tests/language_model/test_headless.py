"""A composed model without its head: the model in all but the call, and the backbone that it runs."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs
from tiny import Bare
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss

from cornstarch_hf.language_model.calling import Headless, run_backbone

IDS = torch.tensor([[1, 5, 9, 4], [2, 8, 3, 7]])


@pytest.fixture
def bare():
    return SimpleNamespace(language_model=Bare(), config=PreTrainedConfig(), loss_function=ForCausalLMLoss)


def test_the_headless_model_is_the_model_in_all_but_the_call():
    model, processor = compose_tiny(["clip"])
    headless, inputs = Headless(model), uneven_inputs(processor)
    assert headless.config is model.config and headless.dtype is model.dtype
    assert headless == model.base_model and hash(headless) == hash(model.base_model)
    assert headless != model and headless != Headless(compose_tiny(["clip"])[0])
    with torch.no_grad():
        hidden = headless(**inputs, labels=inputs["input_ids"]).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), model(**inputs).logits)


def test_the_backbone_takes_what_it_knows_and_must_exist(bare):
    bare.language_model = tiny.llama()
    expected = bare.language_model.model(IDS, use_cache=False).last_hidden_state
    assert torch.equal(
        run_backbone(bare, {"input_ids": IDS, "use_cache": False, "labels": None}).last_hidden_state, expected
    )
    bare.language_model = bare.language_model.model
    with pytest.raises(ValueError, match="LlamaModel has no backbone apart from its head"):
        run_backbone(bare, {"input_ids": IDS})
