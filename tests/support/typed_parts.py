"""An encoder of a user with facts that nothing tells but its registration: it counts columns, and reads its padding."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from cornstarch_hf import register_encoder_type


class StripConfig(PreTrainedConfig):
    model_type = "users_strip_encoder"

    def __init__(self, hidden_size=12, patch=4, num_channels=3, **kwargs):
        self.hidden_size, self.patch, self.num_channels = hidden_size, patch, num_channels
        super().__init__(**kwargs)


class StripEncoder(PreTrainedModel):
    """One feature for each strip of columns; which strips there are depends on values, so a dry run cannot count."""

    config_class = StripConfig
    main_input_name = "pixel_values"
    input_modalities = ("spectrum",)

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Linear(config.num_channels * config.patch, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values):
        if not torch.isfinite(pixel_values).all():  # reads values
            raise ValueError("not finite")
        strips = pixel_values.mean(2).unflatten(-1, (-1, self.config.patch))  # (items, channels, strips, patch)
        return BaseModelOutput(last_hidden_state=self.embed(strips.transpose(1, 2).flatten(2)))


def strips(inputs, config):
    return inputs["pixel_values"].shape[-1] // config.patch


for model_type in ("users_strip_encoder",):
    register_encoder_type(model_type, count=strips, width_layers="all", kind="image", any_number_of_frames=True)
