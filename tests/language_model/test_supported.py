"""Models that cannot be a language model: each is refused at composition, by what it is, with a reason."""

import catalog_llms
import pytest
import tiny
import torch
from transformers import LlamaForCausalLM

from cornstarch_hf import ModalEncoderModule, MultimodalModel
from cornstarch_hf.language_model.refusals import REFUSED as REASONS
from cornstarch_hf.language_model.refusals import check_language_model, refusal


class Draft(LlamaForCausalLM):
    """Takes what an assistant takes from the model that it helps."""

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, shared_kv_states=None):
        return None


REFUSED = {name: reason for name, (reason, setting) in REASONS.items() if setting is None}


@pytest.mark.parametrize("model_type", [*REFUSED, "cpmant", "xlstm", "musicgen", "bart", "whisper", "trocr"])
def test_a_refused_type_says_why_at_composition(model_type):
    model = catalog_llms.build(model_type)
    with pytest.raises(ValueError) as caught:
        MultimodalModel(encoders={"vision": ModalEncoderModule(tiny.clip())}, language_model=model)
    message = str(caught.value)
    assert catalog_llms.REFUSED[model_type] in message and REFUSED.get(model_type, "") in message
    assert message.startswith(type(model).__name__) and message.endswith("Choose another language model.")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "roformer"])
def test_a_model_that_attends_both_ways_is_refused_until_it_is_told_not_to(model_type):
    assert refusal(catalog_llms.build(model_type)) is None
    config = catalog_llms.configuration(model_type)
    config.is_decoder = False
    both_ways = catalog_llms.built(catalog_llms.model_class(model_type), config)
    with pytest.raises(ValueError, match=r"is not causal.*Load it with is_decoder=True"):
        MultimodalModel(encoders={}, language_model=both_ways)


def test_bidirectional_gemma_is_refused_and_bidirectional_images_are_not():
    images_only = catalog_llms.build("gemma4_unified_text")
    assert images_only.config.use_bidirectional_attention == "vision" and refusal(images_only) is None
    model = tiny.gemma3()
    model.config.use_bidirectional_attention = True
    assert "is not causal" in refusal(model)


def test_doge_is_refused_with_experts_alone():
    assert refusal(catalog_llms.build("doge")) is None
    config = catalog_llms.configuration("doge")
    config.is_moe = True
    doge = catalog_llms.built(catalog_llms.model_class("doge"), config)
    assert "chooses the experts of a token by other tokens" in refusal(doge)
    ids, other = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]), torch.tensor([[5, 6, 7, 8], [20, 21, 22, 23]])
    assert not torch.equal(doge(ids).logits[0], doge(other).logits[0])  # or else it need not be refused


def test_roformer_is_refused_where_it_turns_values_by_positions():
    config = catalog_llms.configuration("roformer")
    config.rotary_value = True
    assert "its configuration has rotary_value=True" in refusal(
        catalog_llms.built(catalog_llms.model_class("roformer"), config)
    )


def test_outputs_without_names_are_refused():
    model = tiny.llama()
    model.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict=False, by which its own layers' outputs are tuples"):
        check_language_model(model)


def test_an_assistant_is_refused_with_its_use():
    assert "generate as assistant_model=" in refusal(Draft(tiny.llama().config))


@pytest.mark.parametrize("build", [*tiny.LANGUAGE_MODELS.values()])
def test_usual_language_models_are_not_refused(build):
    assert refusal(build()) is None
