"""Configurations of native models with one setting changed: what a conversion must follow, or refuse.  No tests."""

import copy
import random

import torch

# What transformers keeps for itself, and sizes of vocabularies, which inputs depend on.
SKIPPED = {
    "model_type", "architectures", "transformers_version", "dtype", "return_dict", "output_hidden_states",
    "output_attentions", "id2label", "label2id", "problem_type", "is_encoder_decoder", "chunk_size_feed_forward",
    "use_cache", "vocab_size", "num_hidden_layers", "auto_map", "initializer_range", "initializer_factor",
}  # fmt: skip
ACTIVATIONS = ("gelu", "silu", "gelu_pytorch_tanh", "quick_gelu", "gelu_new")
CHOICES = {"default": ["full"], "full": ["default"], "average": ["max"]}
FACTORS = ("scale", "cap", "factor", "scaling")


def other_values(key, value):
    """Values that a setting might have instead."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return ["relu"] if value in ACTIVATIONS else CHOICES.get(value, [])
    if isinstance(value, float):
        return [value * 0.5, value + 0.3] if value else [0.7]
    if isinstance(value, int):
        return [value + 1, value * 2, max(value // 2, 1)] if value > 0 else [value - 1]
    if isinstance(value, list) and value and all(type(x) is int for x in value):
        return [value[:1], [*value, value[-1]], [x - 1 for x in value]]
    return [0.25] if value is None and any(word in key for word in FACTORS) else []


def changes(config, above=()):
    """``(path of a setting, another value)``, parts of the configuration included."""
    for key, value in config.to_dict().items():
        part = getattr(config, key, None)
        if hasattr(part, "to_dict"):
            yield from changes(part, (*above, key))
        elif key not in SKIPPED and not key.startswith("_") and not key.endswith(("_token_id", "_token_index")):
            yield from (((*above, key), other) for other in other_values(key, value))


def changed_models(model, count, seed=0):
    """Up to `count` models of the class with one setting changed each, weights drawn anew; those that can be built."""
    drawn = random.Random(seed)
    found = sorted(changes(model.config), key=str)
    for path, value in drawn.sample(found, min(count, len(found))):
        config = copy.deepcopy(model.config)
        part = config
        for key in path[:-1]:
            part = getattr(part, key)
        setattr(part, path[-1], value)
        try:
            torch.manual_seed(0)
            made = type(model)(type(config).from_dict(config.to_dict())).eval()
        except Exception:  # a value that the native class cannot have, for whatever reason
            continue
        generator = torch.Generator().manual_seed(1)
        for parameter in made.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * 0.1) if parameter.ndim > 1 else parameter.data.add_(noise * 0.1)
        yield ".".join(path), value, made
