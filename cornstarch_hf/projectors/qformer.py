"""Token reduction by a Q-Former: learnt queries that attend to an item through BLIP-2's own module.

`native` builds projectors of whole native models of the same part.  Checkpoints carry this file only where they name the type.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2CLS

from ..limits import check_count
from ..parts.registries import register_projector
from .heads import check_choice
from .projector import Grid

COUNTS = (
    *("num_query_tokens", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("cross_attention_frequency", "intermediate_size"),
)


class QFormerBridge(nn.Module):
    """Learnt queries that attend to an item through a Q-Former, then a linear layer (BLIP-2, https://arxiv.org/abs/2301.12597).

    Args:
        qformer: a Q-Former of transformers, with what it reads of items as wide as they are.
        num_query_tokens: queries, all zero at first.
        out_features: width behind the linear layer.
    """

    def __init__(self, qformer: Any, num_query_tokens: int, out_features: int):
        super().__init__()
        width = qformer.config.hidden_size
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, width))
        self.qformer = qformer
        self.language_projection = nn.Linear(width, out_features)

    def forward(self, features: Tensor, input_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Features ``(items, length, width)`` to ``(items, queries, out)``; ids and mask ``(items, text)`` instruct it."""
        queries = self.query_tokens.expand(len(features), -1, -1)  # (items, queries, hidden)
        seen = torch.ones(features.shape[:-1], dtype=torch.long, device=features.device)
        text: dict[str, Any] = {}
        if input_ids is not None:
            valid = torch.ones_like(input_ids) if mask is None else mask
            every = torch.ones(queries.shape[:-1], dtype=torch.long, device=features.device)
            text = {"input_ids": input_ids, "attention_mask": torch.cat([every, valid.to(every.device)], dim=1)}
        attended = self.qformer(
            query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=seen, return_dict=True, **text
        )[0]
        return self.language_projection(attended[:, : queries.shape[1]])  # (items, queries, out)


class QFormerProjection(QFormerBridge):
    """Gathers an item's features in a fixed number of learnt queries, by transformers' `Blip2QFormerModel`.

    As in BLIP-2 (https://arxiv.org/abs/2301.12597): queries, Q-Former, linear layer.  Fresh queries are random, as its authors
    draw them; equal ones would stay equal.  Items of different lengths are gathered apart, those of one length together.

    Args:
        in_features, out_features: widths of the encoder's features and of the language model.
        activation: of the Q-Former's MLPs, a key of `transformers.activations.ACT2CLS`.
        num_query_tokens: features left of each item, whatever its length.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the Q-Former.
        cross_attention_frequency: every how many layers, from the first one on, the queries attend to the item.
        layer_norm_eps: of all norms.
        hidden_dropout_prob, attention_probs_dropout_prob: in training.
        initializer_range: standard deviation of fresh weights and queries.

    Raises:
        ValueError: an option that makes no sense, an item without features.
    """

    num_query_tokens: int
    initializer_range: float

    def __init__(
        self, in_features: int, out_features: int, activation: str = "gelu", *, num_query_tokens: int = 32,
        hidden_size: int = 768, num_hidden_layers: int = 12, num_attention_heads: int = 12,
        cross_attention_frequency: int = 2, intermediate_size: int = 3072, layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1, attention_probs_dropout_prob: float = 0.1, initializer_range: float = 0.02,
    ):  # fmt: skip
        options = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        self.check_options(**{k: v for k, v in options.items() if k not in ("in_features", "out_features")})
        from transformers import Blip2QFormerConfig, Blip2QFormerModel  # slow, and few programs need them

        of_qformer = {k: v for k, v in options.items() if k in Blip2QFormerConfig().to_dict()}
        config = Blip2QFormerConfig(**of_qformer, hidden_act=activation, encoder_hidden_size=in_features)
        super().__init__(Blip2QFormerModel(config), num_query_tokens, out_features)
        for key, value in options.items():  # by which `constructor_arguments` describes it again
            setattr(self, key, value)
        nn.init.normal_(self.query_tokens, std=initializer_range)

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check options, whether given for a module or in a configuration (ValueError)."""
        for key in options.keys() & set(COUNTS):
            check_count(options[key], key)
        width, heads = options.get("hidden_size", 768), options.get("num_attention_heads", 12)
        if width % heads:
            raise ValueError(f"num_attention_heads={heads} must divide hidden_size={width}.")
        check_choice(options.get("activation", "gelu"), ACT2CLS, "activation")
        ranges = {"layer_norm_eps": "above 0", "initializer_range": "above 0"}
        ranges |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), "from 0 up to, and without, 1")
        for key, expected in ranges.items():
            value = options.get(key, 0.5)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (0 < value < 1 or (value == 0 and key.endswith("prob"))):
                below = "" if key.endswith("prob") else " and below 1"
                raise ValueError(f"{key} must be a number {expected}{below}, got {value!r}.")

    def init_own_weights(self) -> None:
        """Draw the queries, unless they have been loaded."""
        init.normal_(self.query_tokens, std=self.initializer_range)

    def feature_count(self, length: int, grid: Grid | None = None) -> int:
        """As many as there are queries; ValueError for an item without features."""
        if not length:
            raise ValueError("A Q-Former cannot gather from an item without features.")
        return self.num_query_tokens

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """``(items, length, in_features)`` to ``(items, num_query_tokens, out_features)``."""
        self.feature_count(features.shape[1])  # refuses items without features
        return super().forward(features)


register_projector("qformer", QFormerProjection)
