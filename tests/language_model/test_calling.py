"""Calling the language model: its loss or ours, logits to keep, and keywords it lacks."""

from types import SimpleNamespace

import catalog_llms
import pytest
import tiny
import torch
from tiny import Bare
from torch import nn
from transformers import PreTrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutput

from cornstarch_hf.language_model.calling import cache_keyword, cached_length, run_language_model, text_keywords
from cornstarch_hf.parts.versions import CACHE

IDS = torch.tensor([[1, 5, 9, 4], [2, 8, 3, 7]])


class Unlabelled(nn.Module):
    """Takes ids and whatever a loss may need, but no labels."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 10)

    def forward(self, input_ids, num_items_in_batch=None, return_dict=True):
        return CausalLMOutput(logits=self.table(input_ids))


@pytest.fixture
def bare():
    return SimpleNamespace(language_model=Bare(), config=PreTrainedConfig(), loss_function=ForCausalLMLoss)


def run(model, **changes):
    return run_language_model(model, **{"labels": None, "logits_to_keep": 0, "input_ids": IDS} | changes)


def test_the_language_models_own_loss_is_used_where_it_can_be(bare):
    found = run(bare, labels=IDS)
    assert found.loss == found.logits.sum() and bare.language_model.seen == [True]


def test_the_loss_that_a_language_model_cannot_compute(bare):
    found = run(bare, labels=IDS, num_items_in_batch=3)
    expected = (
        nn.functional.cross_entropy(found.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum") / 3
    )
    assert bare.language_model.seen == [False]
    torch.testing.assert_close(found.loss, expected)
    shifted = nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(run(bare, shift_labels=shifted, num_items_in_batch=3).loss, expected)


def test_a_language_model_without_labels_gets_our_loss(bare):
    bare.language_model = Unlabelled()
    found = run(bare, labels=IDS, num_items_in_batch=3)
    torch.testing.assert_close(found.loss, ForCausalLMLoss(found.logits, IDS, 10, num_items_in_batch=3))


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])])
@pytest.mark.parametrize("slices", [True, False])
def test_logits_to_keep_whether_the_language_model_knows_it_or_not(bare, keep, slices):
    if slices:
        bare.language_model = tiny.llama()
    whole, kept = run(bare).logits, run(bare, logits_to_keep=keep).logits
    torch.testing.assert_close(kept, whole[:, slice(-keep, None) if isinstance(keep, int) else keep])


def test_keywords_that_a_language_model_lacks(bare):
    with pytest.raises(
        TypeError, match=r"The language model Bare does not take \['attention_mask', 'output_attentions'\]"
    ):
        run(bare, attention_mask=IDS, output_attentions=True)
    for harmless in ({"use_cache": False}, {"output_attentions": False}, {"position_ids": None}):
        assert torch.equal(run(bare, **harmless).logits, run(bare).logits)


def test_settings_of_the_configuration_are_defaults(bare):
    bare.language_model, bare.config.output_hidden_states = tiny.llama(), True
    assert len(run(bare).hidden_states) == 3 and run(bare, output_hidden_states=False).hidden_states is None
    for wanted in (True, False):
        bare.config.use_cache = wanted
        assert (run(bare).past_key_values is not None) is wanted
        assert (run(bare, use_cache=not wanted).past_key_values is not None) is not wanted


def test_keywords_are_those_of_forward(bare):
    assert text_keywords(bare.language_model) == ["input_ids", "labels", "return_dict"]


def test_a_cache_is_known_by_its_name_and_its_length():
    assert cache_keyword(tiny.llama()) == CACHE and cache_keyword(Bare()) is None
    cache = tiny.llama()(IDS, use_cache=True)[CACHE]
    assert cached_length(None) == 0 and cached_length(cache) == 4
    mamba = catalog_llms.build("mamba")
    name = "cache" if CACHE == "cache" else "cache_params"
    state = mamba(IDS, use_cache=True)[name]
    assert cache_keyword(mamba) == name and cached_length(state) == 1
    assert cached_length(type(state)(config=mamba.config)) == 0
