"""Classes by name: names that lead back to their class, and constructor arguments that no configuration holds."""

import pytest
import tiny
import torch
import user_parts
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel, ViTModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from cornstarch_hf.parts.classes import class_name, constructor_options, language_model_class, resolve_class


@pytest.mark.parametrize("key", tiny.ENCODERS)
def test_names_lead_back_to_the_class(key):
    model = tiny.ENCODERS[key][1]()
    name = class_name(type(model), model.config)
    assert name == type(model).__name__ and resolve_class(name, model.config, key) is type(model)


def test_a_class_of_another_model_is_found_by_its_full_path():
    path = "transformers.models.vit.modeling_vit.ViTModel"
    assert resolve_class(path, LlamaConfig(), "x") is ViTModel
    assert resolve_class(class_name(ViTModel, LlamaConfig()), LlamaConfig(), "x") is ViTModel


def test_a_bare_name_is_only_given_to_a_class_beside_its_configuration():
    assert class_name(ViTModel, LlamaConfig()) == "transformers.models.vit.modeling_vit.ViTModel"
    assert class_name(LlamaModel, LlamaConfig()) == "LlamaModel"


def test_imported_classes_are_found_and_local_ones_have_no_name():
    config = user_parts.PatchConfig()
    assert class_name(user_parts.PatchEncoder, config) == "PatchEncoder"
    assert resolve_class("PatchEncoder", config, "vision") is user_parts.PatchEncoder

    def another():
        class PatchEncoder(PreTrainedModel):
            config_class = user_parts.PatchConfig

            def forward(self, x):
                return x

        return PatchEncoder

    local = another()
    with pytest.raises(ValueError, match=r"another\.<locals>\.PatchEncoder cannot be found by its name"):
        class_name(local, config)
    with pytest.raises(ValueError, match=r"vision: .*'PatchEncoder' .*PatchConfig, found 2\. Import"):
        resolve_class("PatchEncoder", config, "vision")


@pytest.mark.parametrize(
    "name",
    [
        "Nothing",
        "",
        None,
        "os.system",
        "transformers.models.llama.modeling_llama.LlamaRMSNorm",
        "transformers.models.llama.modeling_llama.torch",
        "transformers.models.nothing.modeling_nothing.Model",
    ],
)
def test_what_is_no_model_class(name):
    with pytest.raises(
        ValueError, match=f"text: the model class {name!r} is not in transformers.*LlamaConfig, found 0"
    ):
        resolve_class(name, LlamaConfig(), "text")


def test_only_the_class_that_auto_chooses_needs_no_name():
    assert language_model_class(LlamaConfig()) is LlamaForCausalLM
    assert language_model_class(tiny.clip().config) is None
    assert resolve_class("LlamaModel", LlamaConfig(), "text") is LlamaModel


@pytest.mark.parametrize("pooling", [True, False])
def test_boolean_arguments_are_read_from_the_weights(pooling):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    made = BertModel(config, add_pooling_layer=pooling)
    options = constructor_options(made)
    assert options == ({} if pooling else {"add_pooling_layer": False})
    with torch.device("meta"):
        assert type(made)(config, **options).state_dict().keys() == made.state_dict().keys()
    assert constructor_options(WhisperEncoder(tiny.whisper().config)) == {}


def test_adapters_do_not_count_and_nothing_fits_a_changed_model():
    changed = tiny.esm()
    inner = get_peft_model(tiny.esm(), LoraConfig(r=2, target_modules=["query"])).get_base_model()
    assert constructor_options(inner) == constructor_options(changed) == {"add_pooling_layer": False}
    changed.extra = torch.nn.Linear(1, 1)
    assert constructor_options(changed) == {}
