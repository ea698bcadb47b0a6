"""Parts of a user in several files: this one imports one beside it, names of the package, and registers by a loop."""

import user_parts
from user_parts import PatchConfig, PatchEncoder

from cornstarch_hf import register_callback, register_feature_count


class WideConfig(PatchConfig):
    model_type = "users_wide_encoder"

    def __init__(self, width=12, **kwargs):
        super().__init__(width, **kwargs)


class WideEncoder(PatchEncoder):
    config_class = WideConfig


def doubled(inputs, output):
    output.last_hidden_state = output[0] * 2
    return output


def kept(inputs, num_features):
    return num_features


def counted(inputs, encoder_config):
    return (inputs["pixel_values"].shape[-1] // encoder_config.patch) ** 2 + 0 * len(user_parts.__name__)


for name in ("users_doubled",):
    register_callback(name, doubled, kept)
register_feature_count("users_wide_encoder", counted)
