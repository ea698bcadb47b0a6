"""What projects reduced features: norm → linear → activation → linear, every step a choice.  Knows no token counts."""

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


class ProjectionHead(nn.Module):
    """Maps ``(..., in_features)`` to ``(..., out_features)``, each feature alone.

    With one layer: ``norm_post(linear_1(norm(x)))``.  With two, as in InternVL (https://arxiv.org/abs/2312.14238),
    Voxtral (https://arxiv.org/abs/2507.13264) and Ultravox (https://github.com/fixie-ai/ultravox):
    ``norm_post(linear_2(norm_mid(act(linear_1(norm(x))))))``.

    Args:
        activation: a key of `transformers.activations.ACT2CLS`; used by two layers.
        hidden_size: width between the two layers; `out_features` when None.
        gated: `linear_1` gives twice the hidden width, values and gates, and ``values * act(gates)`` goes on
            (SwiGLU with ``activation="silu"``, https://arxiv.org/abs/2002.05202).
        norm, norm_mid, norm_post: ``"none"``, ``"layer_norm"`` or ``"rms_norm"`` before, between and after the layers.
        norm_eps: of the norms; by default 1e-5 for LayerNorm, 1e-6 for RMSNorm.

    Raises:
        ValueError: an option that does not exist or makes no sense; an unknown activation.
    """

    def __init__(self, in_features: int, out_features: int, activation: str = "gelu", **options: Any):
        super().__init__()
        if unknown := sorted(set(options) - set(HEAD_DEFAULTS)):
            raise ValueError(f"A projection head has no options {unknown}, expected some of {sorted(HEAD_DEFAULTS)}.")
        chosen = HEAD_DEFAULTS | options
        check_head(chosen)
        self.act = activation_module(activation)
        self.gated, bias, eps = chosen["gated"], chosen["bias"], chosen["norm_eps"]
        self.norm = NORMS[chosen["norm"]](in_features, eps)
        self.linear_2: nn.Module | None = None
        if chosen["num_layers"] == 1:  # neither activation, gate nor norm_mid
            self.linear_1 = nn.Linear(in_features, out_features, bias=bias)
        else:
            hidden = chosen["hidden_size"] or out_features
            self.linear_1 = nn.Linear(in_features, 2 * hidden if self.gated else hidden, bias=bias)
            self.norm_mid = NORMS[chosen["norm_mid"]](hidden, eps)
            self.linear_2 = nn.Linear(hidden, out_features, bias=bias)
        self.norm_post = NORMS[chosen["norm_post"]](out_features, eps)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.linear_1(self.norm(features))
        if self.linear_2 is None:
            return self.norm_post(hidden)  # (..., out_features)
        if self.gated:
            values, gates = hidden.chunk(2, dim=-1)  # (..., 2 * hidden) to (..., hidden) each
            hidden = values * self.act(gates)
        else:
            hidden = self.act(hidden)
        return self.norm_post(self.linear_2(self.norm_mid(hidden)))  # (..., hidden) to (..., out_features)


def activation_module(name: str) -> nn.Module:
    """A fresh activation module of transformers by its name; ValueError that lists the names."""
    check_choice(name, ACT2CLS, "activation")
    return copy.deepcopy(ACT2FN[name])  # some entries of ACT2FN are one module that everybody would share
