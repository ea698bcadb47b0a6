"""Gathering: ties, plans and sets of the parts under the names that the whole model has."""

import re

import pytest
import tiny
import torch
from helpers import compose_tiny
from peft import LoraConfig, get_peft_model
from torch import nn

from cornstarch_hf import MultimodalModel
from cornstarch_hf.parts.gathering import PLANS, gathered_plans, gathered_sets, gathered_ties, nearest_models


def names(module):
    found = [name for name, _ in module.named_modules()] + [name for name, _ in module.named_parameters()]
    return {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in found}


def flat(rule):
    return [r for part in rule for r in flat(part)] if isinstance(rule, tuple) else [rule]


def test_the_nearest_models_are_the_parts_themselves():
    model, _ = compose_tiny(["clip", "whisper"])
    assert dict(nearest_models(model)) == model._parts()
    lora = get_peft_model(tiny.llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped, _ = compose_tiny(["clip"], lora)
    assert dict(nearest_models(wrapped))["language_model.base_model.model"] is lora.get_base_model()
    assert list(nearest_models(nn.Linear(1, 1))) == []


def test_layers_of_every_part_are_not_split():
    model, _ = compose_tiny({"left": "clip", "right": "siglip"})
    found = gathered_sets(model)
    for part in (model.left_encoder.module, model.right_encoder.module, model.language_model):
        assert part._no_split_modules and set(part._no_split_modules) <= found["_no_split_modules"]
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"LlamaDecoderLayer", "CLIPEncoderLayer", "SiglipEncoderLayer"} <= found["_no_split_modules"] & kinds


def test_keys_that_are_not_saved_get_their_prefix():
    model, _ = compose_tiny(["clip"])
    model.language_model._keys_to_ignore_on_save = ["model.rotary.table"]
    model.vision_encoder.module._keys_to_ignore_on_save = ["positions"]
    expected = {"language_model.model.rotary.table", "vision_encoder.module.positions"}
    assert gathered_sets(model)["_keys_to_ignore_on_save"] == expected


def test_ties_have_full_names_and_are_really_tied():
    model, _ = compose_tiny(["clip"], tiny.llama(tie_word_embeddings=True))
    assert gathered_ties(model) == {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    for target, source in gathered_ties(model).items():
        assert model.get_parameter(target) is model.get_parameter(source)
    assert gathered_ties(compose_tiny(["clip"], tiny.llama(tie_word_embeddings=False))[0]) == {}


def test_ties_survive_a_wrapper_that_shifts_names():
    lora = get_peft_model(tiny.llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"]))
    model, _ = compose_tiny(["clip"], lora)
    inner = "language_model.base_model.model."
    assert gathered_ties(model) == {f"{inner}lm_head.weight": f"{inner}model.embed_tokens.weight"}


def test_every_rule_of_every_plan_names_something_that_exists():
    model, _ = compose_tiny(["clip", "whisper"], tiny.qwen3_moe())
    plans, existing = gathered_plans(model), names(model)
    assert set(plans) == set(PLANS)
    for key, plan in plans.items():
        assert {r for rule in plan for r in flat(rule)} <= existing, key
    assert plans["_tp_plan"]["language_model.model.layers.*.self_attn.q_proj"] == "colwise"
    assert {f"language_model.{rule}" for rule in model.language_model._tp_plan} & existing <= set(plans["_tp_plan"])


def test_each_kind_of_block_is_sharded_apart():
    model, _ = compose_tiny(["clip"])
    plan = gathered_plans(model)["_fsdp_plan"]
    blocks = {"language_model.model.layers.*", "vision_encoder.module.encoder.layers.*"}
    found = {re.sub(r"vision_model\.", "", rule) for rule in plan}
    assert blocks <= found and all(plan[rule] for rule in plan)


IDS = torch.arange(3, 12)[None]


def is_tied(language_model):
    return language_model.lm_head.weight is language_model.model.embed_tokens.weight


def heads(case):
    """A language model whose head is tied, or not, by its configuration, by hand, or against its configuration."""
    made = tiny.llama(tie_word_embeddings=case in ("tied", "untied by hand", "untied below adapters"))
    if case.startswith("untied"):
        made.lm_head.weight = nn.Parameter(torch.randn(320, 32, generator=torch.Generator().manual_seed(0)))
    elif case == "tied by hand":
        made.lm_head.weight = made.model.embed_tokens.weight
    return made


@pytest.mark.parametrize("case", ["tied", "apart", "untied by hand", "tied by hand", "untied below adapters"])
def test_composing_neither_ties_nor_unties(tmp_path, case):
    inner = heads(case)
    tied, before = is_tied(inner), inner(IDS).logits
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    part = get_peft_model(inner, lora) if case.endswith("adapters") else inner
    model, _ = compose_tiny(["clip"], part)
    assert is_tied(inner) is tied and torch.equal(model(IDS).logits, before)
    model.tie_weights()  # as resizing and trainers call it
    assert is_tied(inner) is tied and torch.equal(model(IDS).logits, before)
    for folder in (tmp_path / "first", tmp_path / "second"):  # saved, and what was loaded saved once more
        model.save_pretrained(folder)
        model = MultimodalModel.from_pretrained(folder).eval()
        model.tie_weights()
        loaded = model.language_model.get_base_model() if case.endswith("adapters") else model.language_model
        assert is_tied(loaded) is tied and torch.equal(model(IDS).logits, before)
