"""One configuration of each adapter type that the installed PEFT has; a type without one fails `test_peft_tuners`."""

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

QV = ["q_proj", "v_proj"]
PROMPTS = {"num_virtual_tokens": 2}
# What a type needs beside a rank of 2 and the layers of `QV`.
OPTIONS = {
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CARTRIDGE": PROMPTS,
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "FOURIERFT": {"n_frequency": 8},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": r".*(layer_?norm1?|input_layernorm)"},
    "OFT": {"oft_block_size": 4, "r": 0},
    "PREFIX_TUNING": PROMPTS,
    "PROMPT_TUNING": PROMPTS,
    "PVERA": {"r": 4, "target_modules": ["o_proj", "out_proj"]},
    "P_TUNING": PROMPTS | {"encoder_hidden_size": 8},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {"r": None},
    "TINYLORA": {"u": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 7], "target_modules": ["embed_tokens"]},
    "UNILORA": {"theta_d_length": 16},
    "VBLORA": {"num_vectors": 8, "vector_length": 4},
    "VERA": {"r": 4, "target_modules": ["o_proj", "out_proj"]},
    "WAVEFT": {"n_frequency": 8},
}
# Types that PEFT itself does not put around a plain causal language model of transformers or around a composed one: of certain
# architectures, of calls with further arguments, of adapters that exist already.
NOT_FOR_COMPOSED = {"ADAPTION_PROMPT", "MULTITASK_PROMPT_TUNING", "POLY", "SHADOW", "XLORA"}
PROMPT_LEARNING = {"CARTRIDGE", "CPT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
EVERY = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
AROUND = [kind for kind in EVERY if kind not in NOT_FOR_COMPOSED]
INSIDE = [kind for kind in AROUND if kind not in PROMPT_LEARNING]


def config(kind, within=None, **more):
    """A small configuration of a type; its layers those `within` a part of a composed model, by name."""
    found = next(value for key, value in PEFT_TYPE_TO_CONFIG_MAPPING.items() if key.value == kind)
    fields = found.__dataclass_fields__
    usual = {"r": 2} if "r" in fields and kind != "ADALORA" else {}
    usual |= {"target_modules": QV} if "target_modules" in fields else {}
    options = usual | OPTIONS.get(kind, {}) | more
    if within and (targets := options.get("target_modules")):
        names = targets if isinstance(targets, str) else rf".*\.({'|'.join(targets)})"
        options["target_modules"] = rf".*{within}{names}"
    return found(**options)


def moved(model, only="", seed=5):
    """The model with what trains moved off its start, so that a lost adapter shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and only in name:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return model
