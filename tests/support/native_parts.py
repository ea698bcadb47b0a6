"""Native modules that reduce, tiny and random, and the copying of their weights into this package's projections."""

import torch
from torch import nn

from cornstarch_hf import MultimodalProjector, MultimodalProjectorConfig


def config(**values):
    """A configuration of whatever a native module reads; dicts become such configurations too."""
    made = type("Config", (), {})()
    for key, value in values.items():
        setattr(made, key, config(**value) if isinstance(value, dict) else value)
    return made


def randomized(module, seed=0):
    """The module with every parameter drawn at random, so that no norm and no bias is neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def projector(projection_type, in_features, out_features, **options):
    """A projector of a type, with the weights that are given by `weights={name: tensor}`."""
    weights = options.pop("weights", None)
    made = MultimodalProjector(
        MultimodalProjectorConfig(
            projection_type=projection_type, in_features=in_features, out_features=out_features, **options
        )
    ).eval()
    if weights is not None:
        made.projection.load_state_dict(weights)
    return made


def linears(native, *names):
    """``{"head.linear_1.weight": ...}`` of the native linear layers of those names, in order."""
    weights = {}
    for i, name in enumerate(names, 1):
        layer = native.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weights |= {f"head.linear_{i}.{key}": value for key, value in layer.state_dict().items()}
    return weights
