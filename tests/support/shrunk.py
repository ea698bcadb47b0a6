"""Tiny configurations of any class: its defaults with every size, count and stack made small.  A plain module, no tests."""

import torch
from transformers import PreTrainedConfig

# What a number of this name becomes, where the class has it and it is larger.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "hidden_dim", "embedding_size"), 32),
    **dict.fromkeys(
        ("encoder_hidden_size", "out_hidden_size", "output_dim", "projection_dim", "decoder_hidden_size"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner", "moe_intermediate_size"), 48
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer", "num_layers", "depth", "n_layers"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "encoder_attention_heads", "decoder_attention_heads", "n_head", "num_heads", "n_heads"),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("vocab_size",), 320),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions"), 512),
    **dict.fromkeys(("image_size",), 32),
    **dict.fromkeys(("patch_size",), 8),
}


def changes_of(config: PreTrainedConfig) -> dict:
    """The numbers of a configuration that become smaller, sub-configurations as nested dictionaries."""
    values: dict = {}
    for name in [*SIZES, *(config.sub_configs or {})]:
        value = getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            values[name] = {"model_type": value.model_type} | changes_of(value)
        elif isinstance(value, int) and not isinstance(value, bool) and value > SIZES.get(name, value):
            values[name] = SIZES[name]
    return values


def shrunk(config_class: type[PreTrainedConfig], **changes) -> PreTrainedConfig:
    """A tiny configuration of a class; `changes` are for what the table of sizes gets wrong or does not know."""
    return config_class(**changes_of(config_class()) | changes)


def built(model_class, config: PreTrainedConfig, seed: int = 0, **options):
    """A model with random weights, the same each time, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config, **options).eval()
