"""Methods of transformers that composed models replace, with the parameters that they must have."""

from transformers import GenerationMixin, PreTrainedModel, ProcessorMixin

from cornstarch_hf.parts.versions import CACHE

METHODS = [
    (GenerationMixin, "_maybe_prepare_encoder_kwargs_for_generation", ["inputs_tensor", "model_kwargs", "model_input_name", "generation_config"]),
    (GenerationMixin, "_expand_multimodal_outputs", ["input_ids", "mm_encoder_output", "expand_size", "inputs_embeds"]),
    (GenerationMixin, "_get_logits_processor", ["generation_config", "input_ids_seq_length"]),
    (GenerationMixin, "_extract_generation_mode_kwargs", ["custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"]),
    (GenerationMixin, "_get_candidate_generator", ["generation_config", "input_ids"]),
    (GenerationMixin, "heal_tokens", ["input_ids", "tokenizer"]),
    (GenerationMixin, "prepare_inputs_for_generation", ["input_ids", "next_sequence_length", CACHE, "attention_mask", "inputs_embeds", "is_first_iteration", "kwargs"]),
    (GenerationMixin, "_prepare_cache_for_generation", ["generation_config", "model_kwargs"]),
    (GenerationMixin, "_prepare_position_ids_for_generation", ["inputs_tensor", "model_kwargs"]),
    (GenerationMixin, "_supports_default_dynamic_cache", []),
    (GenerationMixin, "_validate_model_kwargs", ["model_kwargs"]),
    (PreTrainedModel, "_get_dtype_plan", ["dtype"]),
    (PreTrainedModel, "_set_gradient_checkpointing", ["enable", "gradient_checkpointing_func"]),
    (PreTrainedModel, "_init_weights", ["module"]),
    (PreTrainedModel, "initialize_weights", []),
    (PreTrainedModel, "init_weights", []),
    (PreTrainedModel, "init_parallel_plans", []),
    (PreTrainedModel, "get_expanded_tied_weights_keys", ["all_submodels"]),
    (ProcessorMixin, "_get_arguments_from_pretrained", ["pretrained_model_name_or_path", "processor_dict", "kwargs"]),
    (ProcessorMixin, "from_args_and_dict", ["args", "processor_dict", "kwargs"]),
    (ProcessorMixin, "get_possibly_dynamic_module", ["module_name"]),
]  # fmt: skip
