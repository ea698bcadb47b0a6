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


def unpadded_patches(inputs: Mapping[str, Any], tokens: int) -> list[int] | None:
    """Tokens of each time series, where an input tells which values are padding; None without padding at the end.

    Args:
        inputs: of the encoder; `past_values_padding` ``(items, length)`` is 1 where a value is padding.
        tokens: of the longest series, each of equally many values.
    """
    padding = inputs.get("past_values_padding")
    if not isinstance(padding, Tensor) or padding.ndim != 2 or padding.shape[1] % tokens:
        return None
    patches = (padding == 0).unflatten(1, (tokens, -1)).any(-1)  # (items, tokens)
    return None if bool(patches.all()) else patches.sum(-1).tolist()


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`(height // patch_size) * (width // patch_size)`"""
    height, width = inputs["pixel_values"].shape[-2:]
    rows, columns = _pair(config.patch_size)
    return (height // rows) * (width // columns)


def _patches_and_class(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`(height // patch_size) * (width // patch_size) + 1`"""
    return _patches(inputs, config) + 1


def _merged_patches(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`t * h * w / spatial_merge_size ** 2` of the grid"""
    return int(inputs["grid_thw"].prod()) // config.spatial_merge_size**2


def _window(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int | None:
    """`max_source_positions`; with a mask by a dry run"""
    if inputs.get("attention_mask") is not None:
        return None
    return config.max_source_positions


def _waveform(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int | None:
    """`(samples - kernel) // stride + 1`, once per convolution; with an adapter by a dry run"""
    if config.add_adapter:
        return None
    length = inputs["input_values"].shape[-1]
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        length = (length - kernel) // stride + 1
    return length


def _rows(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """rows of `features`, those of its mask"""
    mask = inputs.get("attention_mask")
    return inputs["features"].shape[1] if mask is None else int(mask.sum())


def _tokens(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """tokens of the text"""
    return inputs["input_ids"].shape[-1]


def _series(inputs: Mapping[str, Any], config: PreTrainedConfig) -> int:
    """`values // patch_length`, without patches of padding"""
    patches = inputs["past_values"].shape[-1] // config.patch_length
    lengths = unpadded_patches(inputs, patches)
    return patches if lengths is None else lengths[0]


_TEXTS = ("bert", "deberta-v2", "distilbert", "esm", "modernbert", "mpnet", "xlm-roberta")


# Features of one item by the encoder's model type, None where the rule does not hold; each is tested against the
# encoder, and its docstring stands in the documents.
COUNT_RULES: dict[str, Callable[[Mapping[str, Any], PreTrainedConfig], int | None]] = {
    "clip_vision_model": _patches_and_class,
    "dinov2": _patches_and_class,
    "siglip_vision_model": _patches,
    "timesfm": _series,
    "timesfm2_5": _series,
    "vit": _patches_and_class,
    "precomputed_features": _rows,
    "whisper": _window,
    "wav2vec2": _waveform,
    **dict.fromkeys(_TEXTS, _tokens),
    "qwen2_vl_vision": _merged_patches,
}


# Types whose hidden states all are as long as the last one.
COUNT_RULES_OF_EACH_LAYER = {
    "clip_vision_model",
    "dinov2",
    "siglip_vision_model",
    "vit",
    "wav2vec2",
    "whisper",
    *_TEXTS,
}


# Model types whose features are sequences of the width that their configuration names: no dry run is needed to know.
WIDTH_AS_CONFIGURED = frozenset(
    [
        *("clip_vision_model", "dinov2", "siglip_vision_model", "vit", "qwen2_vl_vision", "whisper", "wav2vec2", "esm"),
        *("bert", "precomputed_features"),
    ]
)


# Those of which that holds only after patches were merged.
WIDTH_AS_CONFIGURED_AT_LAST = frozenset(["qwen2_vl_vision"])


# Model types whose features of an item change with its padding, whatever the mask says: each length is encoded apart.
FEATURES_DEPEND_ON_PADDING = frozenset(
    ["pe_audio_encoder", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "phi4_multimodal_audio"]
)


# Classes that give no features, and what to take instead.
NO_ENCODERS = {
    **dict.fromkeys(
        ("EncodecModel", "XcodecModel", "Xcodec2Model"),
        "codes and sounds made of them: take an encoder of audio features",
    ),
    "MimiModel": "codes and sounds made of them: take MimiEncoderModel",
    "NeuCodecModel": "sounds: take an encoder of audio features",
    "WavTokenizerEncoderModel": "codes of sounds: take an encoder of audio features",
    "WavTokenizerModel": "codes of sounds and sounds made of them: take an encoder of audio features",
    "Apertus1p5VisionTokenizerModel": "codes of images: take an encoder of image features",
    "UnivNetModel": "sounds made of spectra: take an encoder of audio features",
}


# Towers of images that state a number of frames: they take the frames of videos as images that follow each other.
FRAMES_IN_A_ROW = frozenset(["xclip_vision_model"])


# Towers that state videos and take each frame as an image.
FRAMES_AS_IMAGES = frozenset(["instructblipvideo_vision_model"])


# Attributes of configurations whose towers merge patches from stage to stage, one entry per stage.
STAGES = ("depths", "depth", "hidden_sizes", "embed_dims")


# Encoders of whole videos that take any number of frames (`configuration.num_frames` is what they were trained with).
ANY_NUMBER = frozenset(["timesformer"])


# Types whose positions begin after the number of the padding token, as in RoBERTa.
_AFTER_PADDING = frozenset(
    [
        *(
            "camembert",
            "data2vec-text",
            "esm",
            "ibert",
            "layoutlmv3",
            "lilt",
            "longformer",
            "luke",
            "markuplm",
            "mpnet",
            "roberta",
        ),
        *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        *("altclip_text_model", "bridgetower_text_model", "clap_text_model"),
    ]
)
