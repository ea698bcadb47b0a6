"""Token reduction by learnt queries: a Perceiver resampler.  Its base is in `reductions`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from ..parts.registries import register_projector
from .heads import HEAD_DEFAULTS, NORMS
from .projector import Grid
from .reductions import ProjectionHead, Reduction

QUERY_STD = 0.02


class PerceiverAttention(nn.Module):
    """Queries attend to the context and to themselves; grouped key and value heads, no biases."""

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, head_dim: int):
        super().__init__()
        self.head_dim, self.groups = head_dim, num_heads // num_kv_heads
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """``(items, queries, width)`` and ``(items, length, width)`` to ``(items, queries, width)``."""
        seen = torch.cat([context, queries], dim=1)  # (items, length + queries, width)
        q, k, v = (
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (items, heads or kv_heads, tokens, head_dim)
            for x in (self.q_proj(queries), self.k_proj(seen), self.v_proj(seen))
        )
        # Each key and value head serves `groups` query heads: (items, heads, length + queries, head_dim).
        k, v = k.repeat_interleave(self.groups, dim=1), v.repeat_interleave(self.groups, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v)  # (items, heads, queries, head_dim)
        return self.o_proj(attended.transpose(1, 2).flatten(2))  # (items, queries, heads * head_dim) to (..., width)


class PerceiverLayer(nn.Module):
    """Attention and a gated MLP of four times the width, each after an RMSNorm and with a residual connection."""

    def __init__(self, width: int, activation: str, eps: float | None, *heads: int):
        super().__init__()
        self.query_norm, self.context_norm, self.mlp_norm = (NORMS["rms_norm"](width, eps) for _ in range(3))
        self.attention = PerceiverAttention(width, *heads)
        self.mlp = ProjectionHead(width, width, activation, hidden_size=4 * width, gated=True, bias=False)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """``(items, queries, width)`` and ``(items, length, width)`` to ``(items, queries, width)``."""
        queries = queries + self.attention(self.query_norm(queries), self.context_norm(context))
        return queries + self.mlp(self.mlp_norm(queries))


class ResamplerProjection(Reduction):
    """Projects an item's features and gathers them in a fixed number of learnt queries.

    The Perceiver resampler (https://arxiv.org/abs/2103.03206, https://arxiv.org/abs/2204.14198) in the form of Idefics2
    (https://arxiv.org/abs/2405.02246), projection first; there with ``activation="silu"`` and the language model's
    `intermediate_size` as `hidden_size`.  Fresh queries are random: equal ones, as that model's configuration starts
    with, would stay equal.

    Args:
        num_queries: features left of each item, whatever its length.
        depth: layers.
        num_heads, num_kv_heads, head_dim: of the attention.
        query_size: width of the queries; `out_features` when None, else a linear layer follows.
        **options: of the `ProjectionHead` before the queries; `norm_eps` of all norms.
    """

    DEFAULTS = {
        "num_queries": 64, "depth": 3, "num_heads": 16, "num_kv_heads": 4, "head_dim": 96, "query_size": None,
        **HEAD_DEFAULTS, "gated": True, "bias": False,
    }  # fmt: skip
    COUNTS = ("num_queries", "depth", "num_heads", "num_kv_heads", "head_dim", "query_size")

    @classmethod
    def _check(cls, chosen: dict[str, Any]) -> None:
        if chosen["num_heads"] % chosen["num_kv_heads"]:
            raise ValueError(f"num_kv_heads={chosen['num_kv_heads']} must divide num_heads={chosen['num_heads']}.")

    def init_own_weights(self) -> None:
        """Draw the queries, unless they have been loaded."""
        init.normal_(self.queries, std=QUERY_STD)

    def _build(self, head_width: int | None = None) -> None:
        width, out = self.query_size or self.out_features, self.out_features
        super()._build(width)
        self.queries = nn.Parameter(torch.empty(self.num_queries, width))
        nn.init.normal_(self.queries, std=QUERY_STD)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        layers = (PerceiverLayer(width, self.activation, self.norm_eps, *heads) for _ in range(self.depth))
        self.layers = nn.ModuleList(layers)
        self.query_norm = NORMS["rms_norm"](width, self.norm_eps)
        self.output = nn.Identity() if width == out else nn.Linear(width, out, bias=self.bias)

    def reduced_axes(self, axes: Sequence[int]) -> list[int]:
        if not axes[0]:
            raise ValueError("A resampler cannot gather from an item without features.")
        return [self.num_queries]

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """``(items, length, in_features)`` to ``(items, num_queries, out_features)``."""
        self.reduced_axes(features.shape[1:2])  # refuses items without features
        context = self.head(features)  # (items, length, width)
        queries = self.queries.to(context.dtype).expand(len(features), -1, -1)  # (items, num_queries, width)
        for layer in self.layers:
            queries = layer(queries, context)
        return self.output(self.query_norm(queries))  # (items, num_queries, out_features)


register_projector("resampler", ResamplerProjection)
