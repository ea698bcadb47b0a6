"""What projections have in common: norms, activations and the options of a head.  Knows no token counts."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2CLS, ACT2FN

from ..limits import check_count


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` (https://arxiv.org/abs/1910.07467) computed in float32 at least, as language models do."""

    def forward(self, x: Tensor) -> Tensor:
        # torch's own norm computes in the dtype of its input: in bfloat16 the sum of squares would lose digits.
        precise = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(precise), self.normalized_shape, self.weight.to(precise), self.eps).to(x.dtype)


# name -> how a norm of a width is made; an epsilon of None is the one that most models have
NORMS: dict[str, Callable[[int, float | None], nn.Module]] = {
    "none": lambda width, eps: nn.Identity(),
    "layer_norm": lambda width, eps: nn.LayerNorm(width, eps=1e-5 if eps is None else eps),
    "rms_norm": lambda width, eps: RMSNorm(width, eps=1e-6 if eps is None else eps),
}
HEAD_DEFAULTS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": None, "gated": False, "bias": True,
    "norm": "none", "norm_mid": "none", "norm_post": "none", "norm_eps": None,
}  # fmt: skip


def check_choice(value: Any, choices: Any, name: str) -> None:
    """ValueError that lists the choices for a value that is none of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown, expected one of {sorted(choices)}.")


def check_head(chosen: dict[str, Any]) -> None:
    """ValueError for options of a `ProjectionHead`, all of them given, that make no sense."""
    for key in ("norm", "norm_mid", "norm_post"):
        check_choice(chosen[key], NORMS, key)
    check_choice(chosen["num_layers"], (1, 2), "num_layers")
    if chosen["hidden_size"] is not None:
        check_count(chosen["hidden_size"], "hidden_size")
    eps = chosen["norm_eps"]
    if eps is not None and not (isinstance(eps, (int, float)) and eps > 0):
        raise ValueError(f"norm_eps must be a positive number, got {eps!r}.")
    for key in ("gated", "bias"):
        if not isinstance(chosen[key], bool):
            raise ValueError(f"{key} must be True or False, got {chosen[key]!r}.")


def activation_module(name: str) -> nn.Module:
    """A fresh activation module of transformers by its name; ValueError that lists the names."""
    check_choice(name, ACT2CLS, "activation")
    return copy.deepcopy(ACT2FN[name])  # some entries of ACT2FN are one module that everybody would share
