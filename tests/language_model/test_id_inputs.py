"""What a language model makes of ids alone: Gemma's per-layer embeddings, Qwen4's n-grams, Falcon-H1's scaled embeddings."""

import inspect
import re

import catalog_llms
import pytest
import tiny
import torch
from helpers import compose_tiny, uneven_inputs

from cornstarch_hf.language_model.extra_inputs import COMPUTED, embed_ids, id_inputs
from cornstarch_hf.language_model.supported import LANGUAGE_MODEL_TYPES

IDS = torch.tensor([[5, 311, 311, 7]])
PLACEHOLDERS = IDS == 311


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_per_layer_embeddings_are_those_of_the_padding_token_where_features_stand(model_type):
    model = catalog_llms.build(model_type)
    found = id_inputs(model, IDS, PLACEHOLDERS, set())
    assert set(found) == {"per_layer_inputs"}
    expected = model.model.embed_tokens_per_layer(torch.tensor([[5, 0, 0, 7]])).view(1, 4, 4, 8)
    assert torch.equal(found["per_layer_inputs"], expected)


def test_ngrams_hash_the_placeholders_too():
    found = id_inputs(catalog_llms.build("qwen4_exp_text"), IDS, PLACEHOLDERS, set())
    assert set(found) == {"ple_input_ids"} and found["ple_input_ids"] is IDS


def test_most_language_models_need_none_and_what_is_given_is_not_computed():
    assert id_inputs(tiny.llama(), IDS, PLACEHOLDERS, set()) == {}
    assert id_inputs(tiny.llama(), None, PLACEHOLDERS, set()) == {}
    assert id_inputs(catalog_llms.build("gemma3n_text"), None, PLACEHOLDERS, set(COMPUTED)) == {}


def test_embeddings_without_ids_are_refused_where_features_replace_some():
    model, processor = compose_tiny(["clip"], catalog_llms.build("gemma3n_text"))
    inputs = uneven_inputs(processor)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(
        ValueError, match=r"Gemma3nForCausalLM computes per_layer_inputs from token ids.*pass input_ids"
    ):
        model(**inputs, inputs_embeds=embeds)
    with torch.no_grad():
        mask = ids == model.config.modality("vision")["token_id"]
        extra = id_inputs(model.language_model, ids, mask, set())
        given = model(**inputs, inputs_embeds=embeds, **extra).logits
        assert torch.equal(given, model(**inputs, input_ids=ids).logits)


def test_a_scale_of_embeddings_outside_their_module_reaches_text_beside_features():
    model, processor = compose_tiny(["clip"], tiny.falcon_h1(embedding_multiplier=3.0))
    inputs = uneven_inputs(processor)
    alone = inputs["input_ids"][2:, inputs["attention_mask"][2].argmax() :]
    with torch.no_grad():
        among, expected = model(**inputs).logits[2:, -alone.shape[1] :], model.language_model(alone).logits
        torch.testing.assert_close(among, expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        backbone, seen = model.language_model.model, []
        hook = backbone.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        backbone(alone)
        hook.remove()
    assert torch.equal(embed_ids(model.language_model, alone), seen[0])
    llama = tiny.llama()
    assert torch.equal(embed_ids(llama, alone), llama.get_input_embeddings()(alone))


def test_every_class_that_scales_embeddings_outside_their_module_is_known():
    scaled = re.compile(r"embed_tokens\(input_ids\)\s*\*")
    found = set()
    for model_type in catalog_llms.SUPPORTED:
        module = inspect.getmodule(catalog_llms.model_class(model_type))
        found |= {model_type} if scaled.search(inspect.getsource(module)) else set()
    assert found == {name for name, row in LANGUAGE_MODEL_TYPES.items() if row.embedding_scale}
