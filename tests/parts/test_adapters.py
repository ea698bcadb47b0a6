"""Adapters of PEFT-wrapped parts: seen through, described in JSON, wrapped again."""

import json
import sys
import types

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model

from cornstarch_hf.parts.adapters import adapter_parameter_names, is_wrapped, tuner_layers, unwrapped
from cornstarch_hf.parts.stored_adapters import check_not_injected, describe_adapters, wrap_again

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def wrapped(config=None):
    return get_peft_model(tiny.llama(), config or LoraConfig(**LORA, task_type="CAUSAL_LM"))


def again(model):
    return wrap_again(tiny.llama(), json.loads(json.dumps(describe_adapters(model, "part"))), "part")


def test_plain_models_are_left_alone():
    plain = tiny.llama()
    assert not is_wrapped(plain) and unwrapped(plain) is plain and describe_adapters(plain, "part") is None
    assert wrap_again(plain, None, "part") is plain and adapter_parameter_names(plain) == set()
    made = get_peft_model(plain, LoraConfig(**LORA))
    assert is_wrapped(made) and unwrapped(made) is plain


CONFIGS = {
    "lora": LoraConfig(**LORA, lora_alpha=3, lora_dropout=0.25, task_type="CAUSAL_LM"),
    "per_layer": LoraConfig(**LORA, rank_pattern={"layers.0.self_attn.q_proj": 4}, layers_to_transform=[0]),
    "saved_modules": LoraConfig(**LORA, modules_to_save=["lm_head"]),
    "dora": LoraConfig(**LORA, use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("key", CONFIGS)
def test_a_rebuilt_part_has_the_same_adapters(key):
    model = wrapped(CONFIGS[key])
    rebuilt = again(model)
    assert type(rebuilt) is type(model) and rebuilt.active_adapters == model.active_adapters
    rebuilt.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(rebuilt.eval()(ids).logits, model.eval()(ids).logits)
    assert describe_adapters(rebuilt, "part") == describe_adapters(model, "part")


@pytest.mark.parametrize("key", CONFIGS)
def test_names_of_what_trains_are_pefts(key):
    model = wrapped(CONFIGS[key])
    assert adapter_parameter_names(model) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("active", ["default", "second"])
def test_several_adapters_and_which_is_active(active):
    model = wrapped()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down_proj"]))
    model.set_adapter(active)
    described = describe_adapters(model, "part")
    assert set(described["configs"]) == {"default", "second"} and described["active"] == [active]
    rebuilt = again(model)
    assert rebuilt.active_adapters == [active] and rebuilt.state_dict().keys() == model.state_dict().keys()


def test_no_path_is_written():
    model = wrapped()
    model.peft_config["default"].base_model_name_or_path = "some/where"
    assert "some/where" not in json.dumps(describe_adapters(model, "part"))


def test_what_cannot_be_stored():
    prompt = wrapped(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match=r"audio: a checkpoint cannot hold .*PROMPT_TUNING.*get_peft_model\(mllm, config\)"
    ):
        describe_adapters(prompt, "audio")
    with pytest.raises(
        ValueError, match=r"audio has adapters injected without a wrapper.*get_peft_model\(part, config\)"
    ):
        describe_adapters(inject_adapter_in_model(LoraConfig(**LORA), tiny.llama()), "audio")
    odd = wrapped()
    odd.peft_config["default"].lora_alpha = torch.tensor(1.0)
    with pytest.raises(ValueError, match="audio: the adapter 'default' = .* JSON"):
        describe_adapters(odd, "audio")


def test_an_adapter_type_that_this_version_does_not_know():
    described = {"configs": {"default": {"peft_type": "TELEPATHY"}}}
    with pytest.raises(ValueError, match=r"audio: unknown adapter type 'TELEPATHY', this peft knows \[.*'LORA'"):
        wrap_again(tiny.llama(), described, "audio")


def test_what_stands_in_an_adapters_options_is_an_object():
    described = {"configs": {"default": {"peft_type": "LORA", "target_modules": ["q_proj"], "loftq_config": "x"}}}
    with pytest.raises(ValueError, match="audio: loftq_config of the LORA adapter is 'x', expected an object or null"):
        wrap_again(tiny.llama(), described, "audio")


def test_peft_that_another_thread_is_just_importing_is_left_alone(monkeypatch):
    model = tiny.llama()
    for module in [name for name in sys.modules if name.split(".")[0] == "peft" and name != "peft"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft"))
    assert not is_wrapped(model) and tuner_layers(model) == []
    check_not_injected(model, "language_model")
    assert not [name for name in sys.modules if name.startswith("peft.")]
