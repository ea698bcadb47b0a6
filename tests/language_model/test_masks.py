"""Masks by items: equal to native models in calls, steps, beams and chunks, and refusals that yield to a rule."""

import copy

import native_models
import pytest
import tiny
import torch
from native_models import IMAGE
from own_memory import own_memory
from transformers import GemmaConfig, GemmaForCausalLM

from cornstarch_hf import ModalEncoderModule, MultimodalConfig, MultimodalModel, register_mask_rule
from cornstarch_hf.language_model.masks import item_blocks, one_block, prefix
from cornstarch_hf.parts.registries import MASK_RULES
from cornstarch_hf.parts.versions import CACHE

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
TYPES = ["gemma3", "gemma4", "paligemma"]
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture(scope="module")
def sides():
    """A function that gives a native model, the composition of its parts, and a batch for both."""
    made = {}

    def of(model_type):
        if model_type not in made:
            native = native_models.native(model_type)
            made[model_type] = native, native_models.compose(native), native_models.picture_inputs(native)
        return made[model_type]

    return of


def attended(logits, inputs):
    return logits[inputs["attention_mask"].bool()]


def without_types(inputs):
    return {key: value for key, value in inputs.items() if not key.endswith("token_type_ids")}


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_and_tokens_are_those_of_the_native_model(sides, model_type):
    native, model, inputs = sides(model_type)
    with torch.no_grad():
        expected, found = native(**inputs).logits, model(**inputs).logits
        assert torch.equal(attended(found, inputs), attended(expected, inputs))
        again = model(**without_types(inputs)).logits  # told by the placeholders
        assert torch.equal(attended(again, inputs), attended(found, inputs))
        model.config.mask, rule = None, model.config.mask
        plain = model(**without_types(inputs)).logits
        model.config.mask = rule
    assert not torch.equal(attended(plain, inputs), attended(found, inputs))  # or else nothing was shown
    assert torch.equal(model.generate(**inputs, **GREEDY), native.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prefill_chunk_size": 7}, {"use_cache": False}, STATIC])
@pytest.mark.parametrize("model_type", TYPES)
def test_strategies_give_the_tokens_of_the_native_model(sides, model_type, options):
    native, model, inputs = sides(model_type)
    # PaliGemma over Gemma 2 fails natively with a static cache.
    expected = {} if model_type == "paligemma" and options is STATIC else options
    found = model.generate(**inputs, **GREEDY | options)
    assert torch.equal(found, native.generate(**inputs, **GREEDY | expected))


@pytest.mark.parametrize("model_type", TYPES)
def test_an_assistant_gives_the_tokens_of_the_native_model(sides, model_type):
    native, model, inputs = sides(model_type)
    first = {key: value[:1] for key, value in inputs.items()}
    expected = native.generate(**first, **GREEDY)
    assert torch.equal(model.generate(**first, **GREEDY, assistant_model=copy.deepcopy(model)), expected)
    assert torch.equal(model.generate(**first, **GREEDY, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_are_those_of_the_native_model(sides, model_type):
    native, model, inputs = (copy.deepcopy(each) for each in sides(model_type))
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == IMAGE), -100)
    for each in (native.train(), model.train()):
        each(**inputs, labels=labels).loss.backward()
    expected = {name: p.grad for name, p in native.model.language_model.named_parameters()}
    found = {name: p.grad for name, p in model.language_model.model.named_parameters()}
    assert all(torch.equal(found[name], grad) for name, grad in expected.items() if grad is not None)


def test_a_chat_goes_on_with_the_cache(sides):
    native, model, inputs = sides("gemma3")
    pixels = inputs["pixel_values"]
    first = {key: value[:1] for key, value in inputs.items()}
    answer = native.generate(**first, **GREEDY)
    ids = torch.cat([answer, torch.tensor([[9, *[IMAGE] * 16, 10]])], 1)
    mask = torch.cat(
        [first["attention_mask"], torch.ones(1, ids.shape[1] - first["attention_mask"].shape[1]).long()], 1
    )
    second = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[:2]}
    expected = native.generate(**second, token_type_ids=native_models.types(ids), **GREEDY)
    cache = model.generate(**first, **GREEDY, return_dict_in_generate=True)[CACHE]
    assert torch.equal(model.generate(**second, **GREEDY, **{CACHE: cache}), expected)


def test_marks_of_a_caller_reach_the_mask_and_must_hold_the_placeholders(sides):
    _, model, inputs = sides("gemma3")
    more = dict(inputs)
    more["token_type_ids"] = inputs["token_type_ids"].clone()
    place = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1, 0])
    more["token_type_ids"][0, place + 1] = 1  # a token behind the image, in its block
    with torch.no_grad():
        assert not torch.equal(model(**more).logits[0, place], model(**inputs).logits[0, place])
    more["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])
    with pytest.raises(ValueError, match="sample 0: 16 of 16 placeholder tokens are not marked"):
        model(**more)
    with pytest.raises(ValueError, match="sample 0: 16 of 16 placeholder tokens are not marked"):
        model.generate(**more, **GREEDY)


def test_answers_of_a_prefix_are_causal(sides):
    _, model, inputs = sides("paligemma")
    answer = inputs["token_type_ids"].clone()
    answer[:, -2:] = 1
    ids = inputs["input_ids"].clone()
    ids[:, -1] = 77
    given = inputs | {"token_type_ids": answer}
    with torch.no_grad():
        assert torch.equal(model(**given).logits[:, -2], model(**given | {"input_ids": ids}).logits[:, -2])
        assert not torch.equal(model(**inputs).logits[:, -2], model(**inputs | {"input_ids": ids}).logits[:, -2])


def test_flash_attention_is_refused(sides):
    _, model, inputs = sides("gemma3")
    model = copy.deepcopy(model)
    model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"mask: flash_attention_2 cannot let tokens.*attn_implementation='sdpa'"):
        model(**inputs)


def test_a_model_that_attends_both_ways_is_refused_without_a_rule(tmp_path):
    gemma = GemmaForCausalLM(GemmaConfig(**native_models.TEXT, head_dim=16, use_bidirectional_attention=True)).eval()
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    with pytest.raises(ValueError, match=r"is not causal.*mask=\{'rule': 'prefix'\}"):
        MultimodalModel(encoders=encoders, language_model=gemma)
    model = MultimodalModel(encoders=encoders, language_model=gemma, mask={"rule": "prefix"}).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 7, 9]])
    assert not torch.equal(model(input_ids=ids).logits[:, 0], model(input_ids=changed).logits[:, 0])
    model.save_pretrained(tmp_path)
    again = own_memory(MultimodalModel.from_pretrained(tmp_path)).eval()
    assert again.config.mask == {"rule": "prefix"}
    assert torch.equal(again(input_ids=ids).logits, own_memory(model)(input_ids=ids).logits)


def test_rules_that_are_none_are_refused():
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    with pytest.raises(ValueError, match="Unknown mask rule 'none', expected one of .*item_blocks"):
        MultimodalModel(encoders=encoders, language_model=tiny.llama(), mask={"rule": "none"})
    with pytest.raises(ValueError, match=r"layers names \['sliding'\].*types \['full_attention'\]"):
        MultimodalModel(
            encoders=encoders, language_model=tiny.llama(), mask={"rule": "item_blocks", "layers": ["sliding"]}
        )
    with pytest.raises(ValueError, match='mask must be {"rule": name'):
        MultimodalConfig(mask={"layers": []})
    with pytest.raises(TypeError, match=r"register_mask_rule\('x', fn\) expects a function"):
        register_mask_rule("x", None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"rule": "item_blocks", "size": 3}, r"options \['size'\], but takes \[\]"),
        ({"rule": "item_blocks", "layers": "full_attention"}, "layers must be a list of types of layers, got 'full"),
        ({"rule": "item_blocks", "layers": [3]}, r"layers must be a list of types of layers, got \[3\]"),
        ({"rule": "prefix", "windowed": "no"}, "windowed must be True or False, got 'no'"),
    ],
)
def test_options_of_rules_are_checked_when_a_model_is_composed(rule, message):
    encoders = {"vision": ModalEncoderModule(tiny.clip())}
    with pytest.raises(ValueError, match=message):
        MultimodalModel(encoders=encoders, language_model=tiny.llama(), mask=rule)


def test_what_a_users_rule_gives_is_checked():
    register_mask_rule("test_wrong", lambda types, marks: types[0])
    MASK_RULES["test_wrong"].masks_text = True
    try:
        encoders = {"vision": ModalEncoderModule(tiny.clip())}
        model = MultimodalModel(encoders=encoders, language_model=tiny.llama(), mask={"rule": "test_wrong"})
        with pytest.raises(
            ValueError, match=r"'test_wrong' must give \(batch, length\) = \(1, 2\), got the shape \(2,\)"
        ):
            model(input_ids=torch.tensor([[5, 6]]))
    finally:
        del MASK_RULES._entries["test_wrong"]


# ---- the rules themselves

KINDS = torch.tensor([[0, 1, 1, 0, 2, 2, 1]])


def test_blocks_are_runs_of_features_or_all_of_a_row_or_a_prompt():
    assert item_blocks(KINDS).tolist() == [[-1, 0, 0, -1, 1, 1, 1]]
    assert one_block(KINDS).tolist() == [[-1, 0, 0, -1, 0, 0, 0]]
    assert prefix(KINDS).tolist() == [[0] * 7]
    assert prefix(KINDS, torch.tensor([[0, 0, 0, 0, 0, 1, 1]])).tolist() == [[0, 0, 0, 0, 0, -1, -1]]


def pairs(types, marks, *, size=2):
    """Features of a row are blocks of some size."""
    place = (types != 0).long().cumsum(-1) - 1
    return torch.where(types != 0, place // size, -1)


def test_a_users_rule_is_followed():
    register_mask_rule("test_pairs", pairs)
    try:
        encoders = {"vision": ModalEncoderModule(tiny.clip(), drop_prefix=1)}
        rule = {"rule": "test_pairs", "size": 3}
        model = MultimodalModel(encoders=encoders, language_model=tiny.llama(), mask=rule).eval()
        model.set_modality_token_ids({"vision": 9})
        size = tiny.clip().config.image_size
        pixels = torch.randn(1, 3, size, size)
        count = len(model.get_image_features(pixels).pooler_output[0])
        inputs = {"input_ids": torch.tensor([[5, *[9] * count, 6]]), "pixel_values": pixels}
        found = model(**inputs).logits
        model.config.mask = rule | {"size": 1}
        assert not torch.allclose(found[:, 1], model(**inputs).logits[:, 1])
        assert torch.equal(found[:, 0], model(**inputs).logits[:, 0])
    finally:
        del MASK_RULES._entries["test_pairs"]
