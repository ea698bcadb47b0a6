"""A head over a bare text stack: equal to the native model's text, and a language model like any other."""

import copy

import native_models
import pytest
import tiny
import torch
from own_memory import check_comes_back
from torch import nn
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM

from cornstarch_hf import MultimodalConfig, MultimodalModel, TextModelWithHead
from cornstarch_hf.encoders.rebuilding import build_language_model
from cornstarch_hf.parts.versions import CACHE

IDS = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
LABELS = torch.tensor([[-100, -100, 5, 6, -100, 8], [9, 10, -100, 12, 13, 14]])
# model_type -> options of the head
PLAIN = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "qwen3_5", "paddleocr_vl", "hunyuan_vl", "molmo2",
    "cohere2_vision", "gemma3", "ovis2",
)  # fmt: skip
HEADS: dict[str, dict] = {name: {} for name in PLAIN}
HEADS["muse_glimmer"] = {"scale": 0.19611613513818404, "softcap": 20.0}


@pytest.fixture(scope="module")
def heads():
    """A function that gives the native model of a type and a head over its own text stack."""
    made = {}

    def of(model_type):
        if model_type not in made:
            native = native_models.native(model_type)
            stack = copy.deepcopy(native.get_decoder())
            stack.config.tie_word_embeddings = False
            made[model_type] = (
                native,
                TextModelWithHead(stack, copy.deepcopy(native.lm_head), **HEADS[model_type]).eval(),
            )
        return made[model_type]

    return of


def real(logits):
    return logits[MASK.bool()]


@pytest.mark.parametrize("model_type", HEADS)
def test_logits_losses_and_tokens_are_those_of_the_native_models_text(heads, model_type):
    native, model = heads(model_type)
    with torch.no_grad():
        expected, found = native(**TEXT, labels=LABELS), model(**TEXT, labels=LABELS)
    assert torch.equal(real(found.logits), real(expected.logits)) and torch.equal(found.loss, expected.loss)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**TEXT, **options), native.generate(**TEXT, **options))


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl_moe", "muse_glimmer"])
def test_gradients_are_those_of_the_native_models_text(heads, model_type):
    native, model = (copy.deepcopy(each).train() for each in heads(model_type))
    native(**TEXT, labels=LABELS).loss.backward()
    model(**TEXT, labels=LABELS).loss.backward()
    expected = {name: p.grad for name, p in native.get_decoder().named_parameters()}
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.model.named_parameters() if p.grad is not None)
    assert torch.equal(model.lm_head.weight.grad, native.lm_head.weight.grad)


@pytest.mark.parametrize("model_type", HEADS)
def test_a_composition_stores_it_by_name_and_loads_equal(heads, model_type, tmp_path):
    _, head = heads(model_type)
    model = MultimodalModel(encoders={}, language_model=head).eval()
    assert model.config.language_model_class == "TextModelWithHead"
    assert {key.split(".")[1] for key in model.state_dict()} == {"model", "lm_head"}
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert (again.config.language_model_kwargs or {}) == model.config.language_model_kwargs
    assert type(again.language_model.model) is type(head.model)
    with torch.no_grad():
        assert torch.equal(real(copy.deepcopy(again)(**TEXT).logits), real(head(**TEXT).logits))


def test_experts_are_balanced_by_the_stacks_own_loss(heads):
    native, model = heads("qwen3_vl_moe")
    with torch.no_grad():
        expected = native(**TEXT, labels=LABELS, output_router_logits=True)
        found = model(**TEXT, labels=LABELS, output_router_logits=True)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.aux_loss, expected.aux_loss)
    assert not torch.equal(found.loss, model(**TEXT, labels=LABELS).loss)


def test_the_head_runs_where_it_is_asked_to(heads):
    _, model = heads("qwen2_vl")
    whole = model(**TEXT).logits
    wanted = torch.tensor([[False, False, True, False, True, False], [True] * 6])
    cases = [(2, whole[:, -2:]), (torch.tensor([1, 3]), whole[:, [1, 3]]), (wanted, whole[wanted])]
    cases.append((torch.tensor([[2, 3], [0, 5]]), torch.stack([whole[0, [2, 3]], whole[1, [0, 5]]])))
    for keep, expected in cases:
        torch.testing.assert_close(model(**TEXT, logits_to_keep=keep).logits, expected)


def test_a_loss_at_labels_is_the_whole_loss(heads):
    _, head = heads("qwen2_vl")
    model = MultimodalModel(encoders={}, language_model=copy.deepcopy(head)).train()
    expected = model(**TEXT, labels=LABELS)
    model.config.loss_at_labels = True
    found = model(**TEXT, labels=LABELS)
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected.loss)


def test_shifted_and_counted_labels_give_the_loss_of_transformers(heads):
    native, model = heads("qwen2_vl")
    shifted = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-100)
    given = {"shift_labels": shifted, "num_items_in_batch": torch.tensor(20)}
    expected = native(**TEXT, labels=LABELS, **given).loss
    assert torch.equal(model(**TEXT, **given).loss, expected)
    assert torch.equal(model(**TEXT, labels=LABELS, **given).loss, expected)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"])
def test_it_can_what_its_stack_can(heads, model_type):
    _, model = heads(model_type)
    stack = model.model
    for name in (
        "_supports_sdpa",
        "_supports_flash_attn",
        "_supports_flex_attn",
        "_is_stateful",
        "_can_compile_fullgraph",
    ):
        assert getattr(model, name) == getattr(stack, name), name
    assert model.supports_gradient_checkpointing and model._no_split_modules == set(stack._no_split_modules)
    assert model._can_set_experts_implementation() == type(stack)._can_set_experts_implementation()
    assert (
        model.base_model is stack and model.get_decoder() is stack and CACHE in model.forward.__signature__.parameters
    )


def test_experts_and_attention_are_chosen_as_in_any_model(heads):
    _, head = heads("qwen3_vl_moe")
    model = copy.deepcopy(head)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    assert model.model.config._experts_implementation == "eager" and model.model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**TEXT).logits[MASK.bool()], head(**TEXT).logits[MASK.bool()])


@pytest.mark.parametrize("tied", [True, False])
def test_a_tie_is_what_the_configuration_says(tied, tmp_path):
    config = native_models.configuration("qwen2_vl", text={"tie_word_embeddings": tied}).text_config
    head = native_models.randomized(TextModelWithHead(config)).eval()
    assert (head.lm_head.weight is head.get_input_embeddings().weight) is tied
    model = MultimodalModel(encoders={}, language_model=head).eval()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    own = again.language_model
    assert (own.lm_head.weight is own.get_input_embeddings().weight) is tied
    check_comes_back(model, again, TEXT, max_new_tokens=3)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_contradicts_its_configuration_is_refused_and_stays_as_it_is(tied):
    native = native_models.native("qwen2_vl", tie_word_embeddings=tied)
    native.get_decoder().config.tie_word_embeddings = not tied  # as stored text configurations do
    before = native.lm_head.weight
    with pytest.raises(ValueError, match=rf"says tie_word_embeddings={not tied}.*of its own with .*={tied}"):
        TextModelWithHead(native.get_decoder(), native.lm_head)
    assert native.lm_head.weight is before


def test_embeddings_are_resized_with_the_head(heads):
    _, head = heads("qwen2_vl")
    model = MultimodalModel(encoders={}, language_model=copy.deepcopy(head)).eval()
    model.resize_token_embeddings(260)
    assert model.language_model.lm_head.weight.shape[0] == 260 and model.config.text_config.vocab_size == 260
    assert model(input_ids=torch.tensor([[259]])).logits.shape[-1] == 260


def test_parts_that_do_not_fit_are_refused(heads):
    _, model = heads("qwen2_vl")
    stack = model.model
    with pytest.raises(TypeError, match="takes a text stack or its configuration, got Linear"):
        TextModelWithHead(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"lm_head must be a torch.nn.Linear, got Embedding"):
        TextModelWithHead(stack, nn.Embedding(2, 2))
    with pytest.raises(ValueError, match=r"weight \(100, 64\).*hidden_size\) = \(256, 64\)"):
        TextModelWithHead(stack, nn.Linear(64, 100))
    for option, value in [("scale", 0), ("softcap", -1.0), ("softcap", float("inf")), ("scale", True)]:
        with pytest.raises(ValueError, match=f"{option} must be None or a number above 0, got {value}"):
            TextModelWithHead(stack, **{option: value})
    with pytest.raises(ValueError, match="no AutoModel for PaddleOCRTextConfig: name the class"):
        TextModelWithHead(native_models.configuration("paddleocr_vl").text_config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny.llama, "takes a text stack, and LlamaForCausalLM has a head already.*get_decoder"),
        (tiny.clip, r"takes a text stack, but CLIPVisionConfig has no \['vocab_size'\]"),
        (lambda: tiny.clip().config, r"takes a text stack, but CLIPVisionConfig has no \['vocab_size'\]"),
    ],
)
def test_what_is_no_text_stack_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        TextModelWithHead(make())


def test_stored_options_are_numbers_and_names():
    text = LlamaConfig(**native_models.TEXT)
    for options in ({"scale": "2"}, {"softcap": [1]}, {"backbone": 3}, {"other": 2}):
        with pytest.raises(ValueError, match=f"language_model_kwargs: the argument {next(iter(options))!r} must be"):
            MultimodalConfig(text_config=text, language_model_class="TextModelWithHead", language_model_kwargs=options)
    config = MultimodalConfig(
        text_config=text, language_model_class="TextModelWithHead", language_model_kwargs={"scale": 2}
    )
    assert build_language_model(config).scale == 2
    with pytest.raises(ValueError, match="must be True or False"):
        MultimodalConfig(text_config=text, language_model_kwargs={"scale": 2})


def test_a_plain_stack_with_a_head_is_its_own_class():
    with torch.random.fork_rng():
        llama = native_models.randomized(LlamaForCausalLM(LlamaConfig(**native_models.TEXT))).eval()
    model = TextModelWithHead(copy.deepcopy(llama.model), copy.deepcopy(llama.lm_head)).eval()
    assert torch.equal(model(**TEXT).logits, llama(**TEXT).logits)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(trained.values()) and set(trained) == {name for name, _ in llama.named_parameters()}
