"""Optimizer groups with a learning rate for each part of a model."""

import fnmatch
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..parts.freezing import select_parameters

# What transformers.Trainer leaves without weight decay.
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups with a learning rate for each named part.

    Norms and biases get no weight decay, as in `transformers.Trainer`, which takes an optimizer with these groups:
    ``Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, rates)), None))``.

    Args:
        model: a composed model, PEFT-wrapped or not.
        learning_rates: by part: a dotted name or glob as in `freeze`, also without what stands in front of it
            (``"projector"`` is every projector).  Where two cover a parameter, the one that covers fewer counts.
        weight_decay: of everything that is no norm or bias.

    Returns:
        groups of what trains, for any `torch.optim` optimizer: `params`, `lr`, `weight_decay` and the part's `name`.

    Raises:
        ValueError: a name that fits or trains nothing, two for the same parameters, trainable parameters without one.
    """
    covered = {pattern: _covered(model, pattern) for pattern in learning_rates}
    chosen: dict[str, str] = {}
    for pattern in sorted(covered, key=lambda key: -len(covered[key])):  # the last, smallest one counts
        for other in covered:
            if other != pattern and covered[other] == covered[pattern]:
                raise ValueError(f"{pattern!r} and {other!r} name the same parameters: keep one of them.")
        chosen |= dict.fromkeys(covered[pattern], pattern)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for name in trainable if name not in chosen]:
        raise ValueError(
            f"{len(missed)} trainable parameters have no learning rate, {missed[0]} first: name their part too, or freeze it."
        )
    from transformers.trainer_pt_utils import get_parameter_names  # slow to import

    groups, decayed = [], set(get_parameter_names(model, [nn.LayerNorm], UNDECAYED))
    for pattern, rate in learning_rates.items():
        names = [name for name in trainable if chosen[name] == pattern]
        if not names:
            raise ValueError(f"{pattern!r}: nothing in it trains (frozen, or named by another part): leave it out.")
        for decay in (True, False):  # one rate, two groups: with weight decay and without
            if params := [trainable[name] for name in names if (name in decayed) == decay]:
                groups.append({"params": params, "lr": rate, "weight_decay": weight_decay * decay, "name": pattern})
    return groups


def _covered(model: nn.Module, pattern: str) -> set[str]:
    """Trainable or not, the parameters at or below a pattern, which may leave out what stands in front of it."""
    try:
        return select_parameters(model, [pattern])
    except ValueError:
        owners = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
        # "projector" then means every module of that name, wherever it lies.
        return select_parameters(model, fnmatch.filter(owners, f"*.{pattern}") or [pattern])
