"""Tiny random language models of every type that transformers' causal-LM Auto class knows.  A plain module, no tests."""

import transformers
from packaging.version import Version
from shrunk import built, changes_of
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cornstarch_hf import MultimodalConfig

VOCABULARY, HIDDEN = 320, 32
DEFAULT = object()  # a size of `shrunk` that the class computes itself
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Multi-head latent attention (DeepSeek): as many keys as queries, low ranks, one dense and one sparse layer.
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip
INDEXED = LATENT | {"index_n_heads": 8, "index_head_dim": 16, "index_topk": 8}
# Linear attention (gated delta rule) in every layer but the last.
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
KIMI = LATENT | {
    "linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"],
    "num_experts_per_token": 2, "num_expert_group": 1, "head_dim": 8,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
DECODER = {"is_decoder": True}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
BOTH = ["sliding_attention", "full_attention"]
INKLING = {
    "head_dim": 8, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "d_rel": 4,
    "rel_extent": 16, "sliding_window_size": 16, "layer_types": ["hybrid", "hybrid_sliding"],
    "moe_intermediate_size": 16, "unpadded_vocab_size": None,
}  # fmt: skip
QWEN4 = LINEAR | {
    "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 4, "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4, "indexer_compress_ratio": 1,
    "ple_layer_ids": [1], "ple_embed_dim": 16, "ngram_vocab_size_base": 64, "heads_per_ngram": 2,
    "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 1,
}  # fmt: skip
DOTS3 = INDEXED | {
    "whole": True, "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "n_routed_experts": 4, "shared_experts_intermediate_size": 16, "sliding_window": 16,
    "layer_types": ["indexed_attention", "sliding_attention"], "max_position_embeddings": 512, "head_dim": 16,
    "per_layer_config": {1: {"num_attention_heads": 2, "num_key_value_heads": 2}},
}  # fmt: skip
GEMMA4 = {
    "whole": True, "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "layer_types": [*BOTH, *BOTH], "num_kv_shared_layers": 2,
    "max_position_embeddings": 512,
}  # fmt: skip

# model_type -> what is particular to it, on top of the table of sizes of `shrunk`
CASES: dict[str, dict] = {
    "axk1": LATENT,
    "axk2": INDEXED | {"gated_norm_rank": 4, "layer_types": ["indexed_attention"] * 2},
    "bailing_hybrid": KIMI,
    "blt": {"encoder_hash_byte_group_vocab": 40},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "camembert": DECODER | {"pad_token_id": 1},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(BOTH, ROPE), "layer_types": BOTH},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "sliding_window": 16, "layer_types": [*BOTH, *BOTH]},
    "cpmant": {"dim_ff": 48, "dim_head": 8},
    "ctrl": {"dff": 48},
    "data2vec-text": DECODER | {"pad_token_id": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": INDEXED | {"layer_types": ["indexed_attention"] * 2},
    "deepseek_v4": {"q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "head_dim": 16},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "electra": DECODER,
    "ernie": DECODER,
    "falcon": {"head_dim": DEFAULT},
    "dots3_note": DOTS3,
    "dots3_note_text": DOTS3,
    "gemma3n_text": GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 300, "laurel_rank": 4,
                              "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": GEMMA4 | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 320},
    "gemma4_unified_text": GEMMA4,
    "gemma4_assistant": {"whole": True},
    "gemma4_unified_assistant": {"whole": True, "text_config": {k: v for k, v in GEMMA4.items() if k != "whole"} | {
        "model_type": "gemma4_unified_text", "num_kv_shared_layers": 4}},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 32, "mamba_d_head": 8, "mamba_expand": 1},
    "flint": {"mlp_only_layers": [0], "shared_expert_intermediate_size": 16, "moe_intermediate_size": 16},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED | {"layer_types": ["indexed_attention"] * 2},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "kimi_linear": KIMI,
    "jetmoe": {"num_key_value_heads": 2, "num_attention_heads": DEFAULT, "kv_channels": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "moe_intermediate_size": 16},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", *BOTH]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "megatron-bert": DECODER,
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_experts": 4, "moe_intermediate_size": [16, 16]},
    "hy_v4": INDEXED | {"layer_types": ["indexed_attention"] * 2, "indexer_types": ["full", "shared"]},
    "inkling_text": INKLING,
    "inkling2_text": INKLING | {"unpadded_vocab_size": 320},
    "inkling2_loop_text": INKLING | {
        "unpadded_vocab_size": 320, "num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "loop_gate_rank": 4,
        "n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2,
    },
    "lara_mini": LINEAR,
    "longcat_flash": LATENT,
    "minicpm3": LATENT,
    "minimax_m3_vl_text": {"shared_intermediate_size": 16, "dense_intermediate_size": 16, "index_head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "intermediate_size": 48,
    },
    "olmo_hybrid": LINEAR | {"linear_num_key_heads": 4},
    "prophetnet": {"num_hidden_layers": DEFAULT, "num_encoder_layers": 2, "num_decoder_layers": 2,
                   "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "moe_intermediate_size": 16},
    "qwen3_5": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": QWEN4,
    "qwen4_exp_text": QWEN4,
    "reformer": DECODER | {"attn_layers": ["local", "lsh"], "attention_head_size": 8, "feed_forward_size": 48,
                           "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "sarvam_mla": LATENT,
    "sarvam_moe": {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "rembert": DECODER | {"input_embedding_size": 32, "output_embedding_size": 32},
    "roberta": DECODER | {"pad_token_id": 1},
    "roberta-prelayernorm": DECODER | {"pad_token_id": 1},
    "roc_bert": DECODER | {"shape_vocab_size": 40, "shape_embed_dim": 8, "pronunciation_vocab_size": 40,
                           "pronunciation_embed_dim": 8},
    "roformer": DECODER,
    "xlnet": {"d_inner": 48, "d_head": 8},
    "xlm-roberta": DECODER | {"pad_token_id": 1},
    "xlm-roberta-xl": DECODER | {"pad_token_id": 1},
    "xmod": DECODER | {"pad_token_id": 1, "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
              "attention_head_dim": 16},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "adapter_rank": 4,
               "mamba_d_state": 8, "n_mamba_heads": 4, "chunk_size": 8, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def model_class(model_type: str):
    """The class that `AutoModelForCausalLM` takes for a model type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, name[0] if isinstance(name, (tuple, list)) else name)


def configuration(model_type: str):
    """A tiny configuration; of a composite model's type, that of its language model."""
    config_class = CONFIG_MAPPING[model_type]
    cls = model_class(model_type)
    # Some types are of another one's class (EXAONE is a Llama), with a configuration of their own.
    composite = cls.config_class is not None and not issubclass(config_class, cls.config_class)
    if composite and any(issubclass(part, PreTrainedConfig) for part in (config_class.sub_configs or {}).values()):
        config_class = cls.config_class
    changes = dict(CASES.get(model_type, {}))
    sizes = {} if changes.pop("whole", False) else changes_of(config_class())
    values = sizes | SPECIAL | changes
    return config_class(**{key: value for key, value in values.items() if value is not DEFAULT})


def build(model_type: str, seed: int = 0):
    """A tiny language model of that type with random weights, in evaluation mode."""
    return built(model_class(model_type), configuration(model_type), seed)


TORN_OFF = "counts positions from the start of a row, padding included"
# model_type -> words of the error that composing with it raises
REFUSED = {
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
         "prophetnet", "trocr", "whisper"), TORN_OFF
    ),
    "blt": "cuts bytes into patches by the ids themselves",
    "cpmant": "forward has no `inputs_embeds`",
    "deepseek_v4": "routes tokens to experts by a hash of their ids",
    "git": "puts its own image before the text",
    "musicgen": "has several tables of embeddings",
    "musicgen_melody": "has several tables of embeddings",
    "reformer": "attends within random hash buckets",
    "rwkv": "ignores the attention mask",
    "xlm": "reads an attention mask as lengths",
    "xlnet": "is trained on permutations of the text",
    "xlstm": "forward has no `attention_mask`",
}  # fmt: skip
# model_type -> words of the error that transformers itself raises when it is built
UNBUILT = {"gemma4_assistant": "hidden_size_per_layer_input must be 0, got 256"}
if Version(transformers.__version__) < Version("5.24"):
    UNBUILT["gemma4_unified_assistant"] = "The set of layer types producing a cache is different"
else:
    REFUSED["gemma4_unified_assistant"] = "drafts tokens from another model's keys and values"
# Whole multimodal models, to be used as they are or taken apart, not language models of their own.
WHOLE = {
    *("fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "got_ocr2", "moss_transcribe_diarize"),
    "phi4_multimodal",
}
TYPES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - WHOLE - {MultimodalConfig.model_type})
SUPPORTED = [model_type for model_type in TYPES if model_type not in REFUSED | UNBUILT]


def rows() -> list[tuple[str, str, str]]:
    """``(model type, class, "yes" or the words of the error)`` of every type, for the table in the documents."""
    return [(t, model_class(t).__name__, (REFUSED | UNBUILT).get(t, "yes")) for t in TYPES]
