"""Canaries: every private hook of transformers that the package uses, by name, as it was when the use was written."""

import inspect

import pytest
import tiny
import torch
from helpers import needs_5_23
from hooks import METHODS
from torch.utils import _device, _python_dispatch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, modeling_utils
from transformers.generation import utils as generation_utils
from transformers.models.auto import auto_factory, modeling_auto
from transformers.utils import chat_template_utils, generic


@pytest.mark.parametrize(("owner", "name", "parameters"), METHODS, ids=lambda x: x if isinstance(x, str) else "")
def test_methods(owner, name, parameters):
    found = [p for p in inspect.signature(getattr(owner, name)).parameters if p not in ("self", "cls")]
    assert found[: len(parameters)] == parameters


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((PreTrainedModel, name) for name in (
            "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_no_split_modules", "_skip_keys_device_placement",
            "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing",
            "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_save", "_is_stateful", "_can_compile_fullgraph",
            "_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend",
        )),
        (PreTrainedConfig, "_attn_implementation"),
        (PreTrainedConfig, "_experts_implementation"),
        (PreTrainedConfig, "sub_configs"),
        (PreTrainedTokenizerBase, "pad"),
        (auto_factory._BaseAutoModelClass, "_model_mapping"),
        (modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        (modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
        (modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
        (generic.TransformersKwargs, "__optional_keys__"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_attributes(owner, name):
    assert hasattr(owner, name)


def test_generation_drops_and_hands_on_what_the_overrides_rely_on():
    assert "mm_encoder_outputs" in generation_utils.MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
    assert "_maybe_prepare_encoder_kwargs_for_generation" in inspect.getsource(GenerationMixin.generate)
    assert "model_kwargs=model_kwargs" in inspect.getsource(GenerationMixin.generate)


@needs_5_23
def test_what_older_versions_do_not_have():
    assert hasattr(generation_utils, "_slice_mm_encoder_output"), "chunks of a prefill get their features"
    assert 'f"{modality}_token_id"' in inspect.getsource(GenerationMixin._prefill)
    assert chat_template_utils._REASONING_FIELDS[:2] == ("reasoning_content", "thinking"), "templates read these"


def test_marks_that_keep_weights_from_being_initialised():
    assert "_is_hf_initialized" in inspect.getsource(PreTrainedModel._initialize_weights)
    assert "_attn_implementation_internal" in inspect.getsource(PreTrainedConfig._attn_implementation.fset)
    assert "_experts_implementation_internal" in inspect.getsource(PreTrainedConfig._experts_implementation.fset)


def test_checkpointing_layers_hand_themselves_to_their_own_function():
    from transformers.modeling_layers import GradientCheckpointingLayer

    source = inspect.getsource(GradientCheckpointingLayer)
    assert "self._gradient_checkpointing_func(" in source and "self.gradient_checkpointing and self.training" in source


def test_helpers_that_render_templates():
    from transformers.utils.chat_template_utils import render_jinja_template

    wanted = {
        "conversations",
        "chat_template",
        "return_assistant_tokens_mask",
        "continue_final_message",
        "add_generation_prompt",
    }
    assert wanted <= set(inspect.signature(render_jinja_template).parameters)
    assert chat_template_utils._get_template_variables("{{ day }}") == {"day"}
    assert chat_template_utils._get_template_literal_text("{{ 'a' }}b")


def test_text_is_encoded_without_the_tokens_that_were_added():
    made = tiny.tokenizer()
    made.add_tokens(["<tool>"])
    ids = made._encode_without_added_tokens("<tool>")
    assert made.convert_tokens_to_ids("<tool>") not in ids and made.decode(ids) == "<tool>"


def test_initialisation_asks_each_part_about_its_modules_and_respects_what_is_made():
    """`_init_weights` is called with every module of a model, and `initialization` leaves marked tensors alone."""
    from transformers import initialization

    from cornstarch_hf import MultimodalProjector, MultimodalProjectorConfig

    seen = []

    class Watched(MultimodalProjector):
        def _init_weights(self, module):
            seen.append(type(module).__name__)
            super()._init_weights(module)

    Watched(MultimodalProjectorConfig(projection_type="resampler", in_features=8, out_features=8))
    assert {"ResamplerProjection", "Linear", "RMSNorm"} <= set(seen)
    made, fresh = torch.nn.Parameter(torch.zeros(9)), torch.nn.Parameter(torch.zeros(9))
    made._is_hf_initialized = True
    with torch.no_grad():
        for tensor in (made, fresh):
            initialization.normal_(tensor)
    assert made.eq(0).all() and not fresh.eq(0).any()


def test_the_environment_of_chat_templates_is_where_the_bounded_one_is_taken_from():
    from transformers.utils.chat_template_utils import _compile_jinja_template

    found = _compile_jinja_template("").environment
    assert {"raise_exception", "strftime_now", "namespace", "dict", "range"} <= set(found.globals)
    assert hasattr(found, "activate_tracker") and "tojson" in found.filters


def test_what_building_without_weights_relies_on():
    asks = inspect.getsource(modeling_utils.get_torch_context_manager_or_global_device)
    assert "torch.tensor([]).device" in asks
    assert 'get_torch_context_manager_or_global_device() != torch.device("meta")' in inspect.getsource(
        PreTrainedModel.init_weights
    )
    assert "param.grad_fn" in inspect.getsource(torch.nn.Module.register_parameter), "where a mode sees a parameter"
    entered = inspect.getsource(_python_dispatch.TorchDispatchMode.__enter__)
    left = inspect.getsource(_python_dispatch.TorchDispatchMode.__exit__)
    assert "_push_mode(self)" in entered and "_pop_mode(" in left and torch.empty in _device._device_constructors()
