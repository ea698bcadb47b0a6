"""Tiny encoders of videos, and videos for them."""

import numpy as np
from transformers import TimesformerConfig, TimesformerModel, VideoMAEConfig, VideoMAEModel, VJEPA2Config, VJEPA2Model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}


WHOLE = {
    "videomae": lambda: VideoMAEModel(VideoMAEConfig(**SIZES, image_size=8, num_frames=4, intermediate_size=16)),
    "timesformer": lambda: TimesformerModel(
        TimesformerConfig(**SIZES, image_size=8, num_frames=4, intermediate_size=16)
    ),
    "vjepa2": lambda: VJEPA2Model(
        VJEPA2Config(**SIZES, crop_size=8, frames_per_clip=4, pred_hidden_size=16, pred_num_attention_heads=2,
                     pred_num_hidden_layers=1)),
}  # fmt: skip


def film(frames=4, seed=0, size=(12, 10)):
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)
