"""Inputs that an encoder draws at random, in evaluation too, unless it is given them.  Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig


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


DRAWN: dict[str, Drawn] = {"vit_mae": Drawn("noise", _patches_in_order, _masked_patches)}


def fixed_inputs(inputs: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Tensor]:
    """What to add to an encoder's inputs so that items give the same features each time."""
    drawn = DRAWN.get(config.model_type)
    if drawn is None or inputs.get(drawn.name) is not None:
        return {}
    return {drawn.name: drawn.fixed(inputs, config)}


# Classes that drop values of each item at random, in evaluation too, and the setting that says how many.
DROPS = {"SpeechT5DecoderWithSpeechPrenet": "speech_decoder_prenet_dropout"}


def check_whole_items(config: PreTrainedConfig, additional_args: Sequence[str], who: str) -> None:
    """Refuse an encoder that leaves out a part of each item at random, unless it is given what it would draw.

    Raises:
        ValueError: it does.
    """
    drawn = DRAWN.get(config.model_type)
    if drawn is not None and drawn.name not in additional_args and (loss := drawn.loss(config)):
        raise ValueError(f"{who} {loss}.")
    setting = DROPS.get(who)
    if setting is not None and (share := getattr(config, setting, 0)):
        raise ValueError(
            f"{who} drops {share:.0%} of the values in its prenet, drawn at random, in evaluation as well: set its "
            f"config.{setting} = 0."
        )
    if config.model_type == "informer" and config.attention_type == "prob":
        raise ValueError(
            f"{who} attends to keys that are drawn at random, in evaluation as well: set attention_type='full' in its "
            "configuration before it is built."
        )
