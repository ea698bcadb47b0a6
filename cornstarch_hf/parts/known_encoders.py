"""Inputs that an encoder draws at random, in evaluation too, unless it is given them.  Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

# Numbers of patches of packed items along their axes, one row per item.
GRIDS = ("grid_thw", "grid_hws", "target_sizes")


class Drawn(NamedTuple):
    """An input that an encoder draws.

    Attributes:
        name: of the input.
        fixed: ``fn(inputs, config) -> Tensor``, one that keeps items as they are.
        loss: ``fn(config) -> str | None``, what an item loses by chance and what to do; None where it loses nothing.
    """

    name: str
    fixed: Callable[[Mapping[str, Any], PreTrainedConfig], Tensor]
    loss: Callable[[PreTrainedConfig], str | None]


def _patches_in_order(inputs: Mapping[str, Any], config: PreTrainedConfig) -> Tensor:
    """ViT-MAE keeps the patches of the least noise, in the order of their noise (He et al. 2021, arXiv 2111.06377)."""
    pixels = inputs["pixel_values"]
    height, width = (size // config.patch_size for size in pixels.shape[-2:])
    noise = torch.arange(height * width, dtype=torch.float32, device=pixels.device)
    return noise.expand(len(pixels), -1)


def _masked_patches(config: PreTrainedConfig) -> str | None:
    if not config.mask_ratio:
        return None
    return (
        f"leaves out {config.mask_ratio:.0%} of an image's patches, drawn at random, in evaluation as well: set its "
        "config.mask_ratio = 0, or pass `noise` with the images and name it in additional_args"
    )


RANDOM_INPUTS: dict[str, Drawn] = {"vit_mae": Drawn("noise", _patches_in_order, _masked_patches)}


def deterministic_inputs(inputs: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Tensor]:
    """What to add to an encoder's inputs so that items give the same features each time."""
    drawn = RANDOM_INPUTS.get(config.model_type)
    if drawn is None or inputs.get(drawn.name) is not None:
        return {}
    return {drawn.name: drawn.fixed(inputs, config)}


def _dropped_values(config: PreTrainedConfig) -> str | None:
    share = config.speech_decoder_prenet_dropout
    if not share:
        return None
    return (
        f"drops {share:.0%} of the values in its prenet, drawn at random, in evaluation as well: set its "
        "config.speech_decoder_prenet_dropout = 0"
    )


def _drawn_keys(config: PreTrainedConfig) -> str | None:
    if config.attention_type != "prob":
        return None
    return (
        "attends to keys that are drawn at random, in evaluation as well: set attention_type='full' in its "
        "configuration before it is built"
    )


# What no input makes up for, by class or model type; functions as `Drawn.loss`.
RANDOM_BY_SETTING: dict[str, Callable[[PreTrainedConfig], str | None]] = {
    "SpeechT5DecoderWithSpeechPrenet": _dropped_values,
    "informer": _drawn_keys,
}


def refuse_random_encoder(config: PreTrainedConfig, additional_args: Sequence[str], who: str) -> None:
    """Refuse an encoder that leaves out a part of each item at random, unless it is given what it would draw.

    Raises:
        ValueError: it does.
    """
    drawn = RANDOM_INPUTS.get(config.model_type)
    losses = [drawn.loss] if drawn is not None and drawn.name not in additional_args else []
    losses += [RANDOM_BY_SETTING[key] for key in (who, config.model_type) if key in RANDOM_BY_SETTING]
    for loss in losses:
        if reason := loss(config):
            raise ValueError(f"{who} {reason}.")


def grid_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """The grid of packed items, ``(items, 2 or 3)``, None where there is none."""
    return next((v for k, v in inputs.items() if k.endswith(GRIDS) and isinstance(v, Tensor)), None)
