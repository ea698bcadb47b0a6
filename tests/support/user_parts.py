"""Parts as a user would write them in a file of their own: an encoder, a projection, callbacks."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cornstarch_hf import register_callback, register_projector


class PatchConfig(PreTrainedConfig):
    model_type = "users_patch_encoder"

    def __init__(self, width=12, patch=4, num_channels=3, **kwargs):
        self.hidden_size, self.patch, self.num_channels = width, patch, num_channels
        super().__init__(**{k: v for k, v in kwargs.items() if k != "hidden_size"})
        if "hidden_size" in kwargs:
            self.hidden_size = kwargs["hidden_size"]


class PatchEncoder(PreTrainedModel):
    config_class = PatchConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Conv2d(config.num_channels, config.hidden_size, config.patch, config.patch)
        self.post_init()

    def forward(self, pixel_values):
        return BaseModelOutput(last_hidden_state=self.embed(pixel_values).flatten(2).transpose(1, 2))


class GatedProjection(nn.Module):
    def __init__(self, in_features, out_features, gain=1.0):
        super().__init__()
        self.in_features, self.out_features, self.gain = in_features, out_features, gain
        self.up, self.gate = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.gain * self.up(x) * torch.sigmoid(self.gate(x))


class Halving(nn.Module):
    """Adds each feature to its neighbour: half as many, which a dry run finds out."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x):
        return self.linear(x[:, 0::2][:, : x.shape[1] // 2] + x[:, 1::2])


class Rows(nn.Module):
    """One feature for each row of an image: takes the grid and says its count."""

    needs_grid = True

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = nn.Linear(in_features, out_features)

    def feature_count(self, length, grid):
        return length // grid[-1]

    def forward(self, x, grid):
        return self.linear(x.reshape(len(x), -1, grid[-1], x.shape[-1]).mean(2))


class Newline(nn.Module):
    """Appends a learnt feature to each item."""

    def __init__(self, hidden_size):
        super().__init__()
        self.hidden_size = hidden_size
        self.newline = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, inputs, output):
        end = self.newline.expand(len(output[0]), 1, -1).to(output[0])
        output.last_hidden_state = torch.cat([output[0], end], dim=1)
        return output


def drop_tokens(inputs, output, count=1):
    output.last_hidden_state = output[0][:, count:]
    return output


register_projector("users_gated", GatedProjection)
register_projector("users_halving", Halving)
register_projector("users_rows", Rows)
register_callback("users_newline", Newline)
register_callback("users_drop", drop_tokens, feature_count=lambda inputs, num_features, count=1: num_features - count)


def doubled_positions(query, *, by=2):
    """A rule of positions: each token is some places behind the one before."""
    return (query.valid.long().cumsum(-1) - 1).clamp(min=0) * by


doubled_positions.numbers_text, doubled_positions.needs_grids = True, False
