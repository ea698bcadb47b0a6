"""What training needs besides batches: optimizer groups by part, and what a run reports about its data."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from .freezing import select_parameters


def parameter_groups(
    model: nn.Module, learning_rates: Mapping[str, float], weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups with a learning rate for each named part.

    Norms and biases get no weight decay, as in `transformers.Trainer`.

    Args:
        model: a composed model, PEFT-wrapped or not.
        learning_rates: by part: a dotted name, a glob, or the last component of one (``"projector"`` is every
            projector, ``"language_model"`` the language model).  A parameter belongs to the longest name that fits it.
        weight_decay: of matrices.

    Returns:
        groups for any `torch.optim` optimizer: `params`, `lr`, `weight_decay`, `name`.  Frozen parameters are left out.

    Raises:
        ValueError: a name that fits nothing, a part in which nothing trains, or trainable parameters that no name
            covers; lists them.
    """
    chosen: dict[str, str] = {}
    for pattern in sorted(learning_rates, key=len):
        chosen |= dict.fromkeys(_fitting(model, pattern), pattern)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for name in trainable if name not in chosen]:
        raise ValueError(
            f"{len(missed)} trainable parameters have no learning rate ({missed[:4]}, ...): name their part too, or freeze it."
        )
    decayed = set(get_parameter_names(model, [nn.LayerNorm], [r"bias", r"(?:^|[._])(?:layer|rms)?_?norm(?:$|[._0-9])"]))
    groups = []
    for pattern, rate in learning_rates.items():
        names = [name for name in trainable if chosen[name] == pattern]
        if not names:
            raise ValueError(f"{pattern!r}: nothing in it trains (frozen, or covered by a longer name): leave it out.")
        for decay in (True, False):
            if params := [trainable[name] for name in names if (name in decayed) == decay]:
                groups.append({"params": params, "lr": rate, "weight_decay": weight_decay * decay, "name": pattern})
    return groups


def _fitting(model: nn.Module, pattern: str) -> set[str]:
    """Parameters at or below a pattern, which may leave out what stands in front of it."""
    try:
        return select_parameters(model, [pattern])
    except ValueError:
        return select_parameters(model, [f"*.{pattern}"])
