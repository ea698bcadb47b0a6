"""Inputs of an ordinary item of any encoder, told from the names of its `forward` and from its configuration.

They serve to ask an encoder for the shape of its features before anybody has an item.  Floating-point inputs are on the meta
device; integers are real.  What comes first is likelier; whoever takes them tries one after the other.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..configuration_projector import feature_width
from ..limits import is_count
from ..parts.adapters import unwrapped
from ..parts.constructors import constructor_options
from ..parts.known_encoders import PATCH_GRIDS
from ..parts.signatures import accepts, forward_parameters
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes
from .selection import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    LAYERS_FIRST,
    Selection,
    as_output,
    chosen_features,
    select_features,
)

Inputs = dict[str, Tensor]
Shapes = list[tuple[int, ...]]


def typical_inputs(names: Collection[str], config: PreTrainedConfig, kind: str) -> Iterator[Inputs]:
    """Inputs of one item, likelier ones first; of two sizes where the configuration does not fix it.

    Args:
        names: parameters of the encoder's `forward`.
        config: of the encoder.
        kind: of the modality (``"image"``, ``"audio"``, ...).
    """
    for key, recipe in RECIPES.items():
        if key in names:
            alone = ({key: _tensor(key, shape, config)} for shape in recipe(names, config, kind))
            for inputs in _in_patches(key, names, config) or alone:
                # Recipes hold for all encoders: of what they make, this encoder gets what it takes.
                yield {name: x for name, x in (inputs | _companions(inputs, key, config)).items() if name in names}
            return


def first_positive_setting(config: PreTrainedConfig, *attributes: str, default: int) -> int:
    """The first of some attributes that is a positive integer, or the largest entry of a list of such."""
    for attribute in attributes:
        value: Any = getattr(config, attribute, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
            value = max(value)
        if is_count(value):
            return value
    return default


def _tensor(key: str, shape: tuple[int, ...], config: PreTrainedConfig) -> Tensor:
    if key == "input_ids":  # no usual id of padding, so that every position counts
        return torch.full(shape, min(5, first_positive_setting(config, "vocab_size", default=6) - 1))
    return torch.empty(shape, device="meta")


def _channels(config: PreTrainedConfig) -> int:
    return first_positive_setting(config, "num_channels", "in_channels", "in_chans", default=3)


def _patch(config: PreTrainedConfig) -> int:
    return first_positive_setting(config, "patch_size", default=16)


def _sides(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Heights and widths to try: of the configuration, then usual ones."""
    size = getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        size = (size, size)
    own = [(int(size[0]), int(size[1]))] if isinstance(size, (list, tuple)) and len(size) == 2 and all(size) else []
    # What divides into whole patches, merged squares and windows.
    unit = 2 * _patch(config) * first_positive_setting(config, "spatial_merge_size", "window_size", default=1)
    # Not only squares: axes of one length cannot be told apart.
    usual = [(224, 224), (256, 192), (64, 64), (4 * unit, 2 * unit), (512, 512), (384, 384)]
    return own + [sides for sides in usual if sides not in own]


def _in_patches(key: str, names: Collection[str], config: PreTrainedConfig) -> list[Inputs]:
    """Patches of one item, where another input tells their numbers along each axis; empty where none does."""
    side, channels = _patch(config), _channels(config)
    values = channels * side**2  # of a patch
    made: list[tuple[tuple[int, ...], str, list[int]]] = []  # shape, and the other input with what it says
    if grid := next((name for name in names if name.endswith(PATCH_GRIDS)), None):  # of all items in a row
        merging = ("spatial_merge_size", "merge_kernel_size", "spatial_patch_size")
        unit = 2 * first_positive_setting(config, *merging, default=2)
        width = first_positive_setting(config, "hidden_size", default=1)
        for rows, columns in ((unit, unit), (2 * unit, unit)):
            count, told = rows * columns, [rows, columns] if grid == "grid_hws" else [1, rows, columns]
            frames = dict.fromkeys((first_positive_setting(config, "temporal_patch_size", default=1), 1, 2))
            # (patches, values of a patch), then as they are embedded, then as small images
            shapes = [*((count, n * values) for n in frames), (count, width), (count, channels, side, side)]
            made += [(shape, grid, told) for shape in shapes]
    elif "target_sizes" in names:  # side by side, as an image that is one patch high
        made = [((1, channels, side, 4 * n * side), "target_sizes", [n, 4]) for n in (4, 8)]
    elif "spatial_shapes" in names:  # SigLIP 2: (items, patches, values of a patch)
        made = [((1, 4 * n, values), "spatial_shapes", [4, n]) for n in (4, 2)]
    return [{key: _tensor(key, shape, config), name: torch.tensor([told])} for shape, name, told in made]


def _pixels(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    frames = first_positive_setting(config, "num_frames", "frames_per_clip", "num_frames_per_clip", default=8)
    channels, shapes = _channels(config), []
    for height, width in _sides(config):
        image = [(1, channels, height, width)]  # (items, channels, height, width)
        # frames before the channels, or after
        clips = [(1, frames, channels, height, width), (1, channels, frames, height, width)]
        shapes += clips + image if kind == "video" else image + clips
    return shapes


def _waves(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    bins = first_positive_setting(config, "num_mel_bins", default=80)
    spectrum = (1, first_positive_setting(config, "max_length", default=1024), bins)  # (items, frames, mel bins)
    lengths = (16_000, 24_000)  # 1 and 1.5 seconds at 16 kHz
    # (items, channels, samples), of codecs
    channels = [(1, first_positive_setting(config, "audio_channels", default=1), n) for n in lengths]
    waves = [*((1, n) for n in lengths), *channels]
    return [spectrum, *waves] if hasattr(config, "num_mel_bins") else [*waves, spectrum]


def _spectra(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    default = first_positive_setting(config, "feature_size", "input_size", default=80)
    attributes = (
        *("num_mel_bins", "input_feat_size", "feature_projection_input_dim", "input_dim", "input_feat_per_channel"),
        "subsampling_conv_channels",  # Gemma 4, whose convolutions leave as many channels as there were bins
    )
    bins = dict.fromkeys((first_positive_setting(config, *attributes, default=default), default, 128, 64))
    # Whisper's convolutions halve the frames, so its window has twice as many as it has positions.
    window = 2 * first_positive_setting(config, "max_source_positions", default=512)
    sizes = [(mels, frames) for mels in bins for frames in dict.fromkeys((window, 1024, 3000, 800))]
    if "feature_lens" in names:  # items one after the other
        return sizes
    return [shape for mels, frames in sizes for shape in ((1, mels, frames), (1, frames, mels), (1, 1, frames, mels))]


def _series(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    length = first_positive_setting(config, "context_length", default=512)
    channels = first_positive_setting(config, "num_input_channels", "input_size", default=1)
    return [(1, length, channels), (1, length), (1, 2 * length)]


def _flattened(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    values = _channels(config) * _patch(config) ** 2
    width = first_positive_setting(config, "patch_embed_hidden_size", default=values)
    # Pix2Struct: each patch has its row and its column in front of its values.
    return [(1, 64, size) for size in dict.fromkeys((2 + values, 2 + width))]


def _ids(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    return [(1, 16), (1, 24)]


def _states(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    width = first_positive_setting(config, "input_dim", "input_size", "hidden_size", default=80)
    return [(1, frames, width) for frames in (1024, 800)]


def _any(names: Collection[str], config: PreTrainedConfig, kind: str) -> Shapes:
    width = first_positive_setting(config, "d_model", "feature_size", "hidden_size", default=64)
    return [(1, length, width) for length in (16, 24)]


# Shapes to try of the input that holds an item, in order of preference.
RECIPES: dict[str, Callable[[Collection[str], PreTrainedConfig, str], Shapes]] = {
    **dict.fromkeys(("pixel_values", "pixel_values_videos", "image"), _pixels),
    "flattened_patches": _flattened,
    "input_values": _waves,
    **dict.fromkeys(("input_features", "audio_mel"), _spectra),
    "input_ids": _ids,
    "past_values": _series,
    "hidden_states": _states,
    "inputs": _any,
}


def _companions(inputs: Inputs, key: str, config: PreTrainedConfig) -> Inputs:
    """What some encoders want beside the item itself: masks of all that is valid, lengths, sizes."""
    x = inputs[key]
    # Packed spectra are (mel bins, frames), all else has its positions second.
    length = x.shape[-1] if key == "input_features" and x.ndim == 2 else x.shape[1]
    ones = torch.ones(1, length, dtype=torch.long)
    return {
        "image_sizes": torch.tensor([list(x.shape[-2:])]),
        "pixel_attention_mask": ones,
        "input_features_mask": torch.ones(1, x.shape[-1], dtype=torch.long),
        "audio_mel_mask": torch.ones(1, length, dtype=torch.bool),
        "feature_lens": torch.tensor([length]),
        "past_values_padding": ones,
        "freq": torch.zeros(1, 1, dtype=torch.long),
        "is_longer": torch.zeros(1, 1, dtype=torch.bool),
        "merge_sizes": torch.tensor([first_positive_setting(config, "spatial_merge_size", default=1)]),
        "bbox": torch.zeros(1, length, 4, dtype=torch.long),
        "mask": torch.ones(1, length, dtype=torch.bool),
    }


def typical_item(config: PreTrainedConfig, kind: str) -> dict[str, Tensor] | None:
    """Inputs of an ordinary item, where the encoder's configuration fixes their shape; on the meta device."""
    if kind == "image" and getattr(config, "image_size", None) is not None:
        return {"pixel_values": torch.empty(1, _channels(config), *_sides(config)[0], device="meta")}
    if (positions := getattr(config, "max_source_positions", None)) and getattr(config, "num_mel_bins", None):
        return {"input_features": torch.empty(1, config.num_mel_bins, 2 * positions, device="meta")}
    return None


_MOST_TRIES = 24  # dry runs of one encoder, before its inputs count as unknown


class FeatureAxes(NamedTuple):
    """How features lie in the tensor that a selection names."""

    width: int  # of one feature
    data_format: str | None  # see `Selection`; None for packed features, which have one axis besides


def find_feature_axes(module: nn.Module, kind: str, selection: Selection, name: str) -> FeatureAxes | None:
    """The layout of an encoder's features, by running it on shapes with inputs of an ordinary item.

    The encoder is built once more from its configuration, without weights.

    Args:
        module: the encoder, PEFT-wrapped or not.
        kind: of its modality.
        selection: what is taken of its output.
        name: of the modality, for messages.

    Returns:
        None where no inputs are known that it takes.

    Raises:
        ValueError: the selection does not exist, or its layers cannot be joined.
    """
    inner: Any = unwrapped(module)
    config = without_dtypes(with_plain_kernels(copy.deepcopy(inner.config)))
    try:
        made = build_without_weights(functools.partial(type(inner), config, **constructor_options(inner)))
    except Exception:  # a class of somebody's own that needs more than its configuration
        return None
    wanted = ["return_dict", *(["output_hidden_states"] if selection.needs_hidden_states else [])]
    run = functools.partial(weights_to_meta(made.eval()), **{key: True for key in wanted if accepts(made, key)})
    shapes: Shapes = []
    for inputs in itertools.islice(typical_inputs(forward_parameters(inner), inner.config, kind), _MOST_TRIES):
        try:
            output = dry_run(run, inputs)
        except Exception:  # inputs that this encoder does not take: others follow
            continue
        features = chosen_features(as_output(output), selection, name, items=1)[0]
        shapes.append(tuple(features.shape))
        layout = _layout(shapes, feature_width(inner.config))
        if layout is not None:  # the width is that of all layers together
            every = dataclasses.replace(selection, drop_prefix=0, data_format=layout.data_format)
            return layout._replace(width=select_features(as_output(output), every, name, items=1).shape[-1])
    # Where nothing tells, sequences (items, tokens, width) and maps (items, width, rows, columns) are the usual.
    if not shapes or len(shapes[-1]) not in (3, 4):
        return None
    axis, data_format = (-1, CHANNELS_LAST) if len(shapes[-1]) == 3 else (1, CHANNELS_FIRST)
    return FeatureAxes(shapes[-1][axis] * len(selection.layers), data_format)


def _layout(shapes: Shapes, expected_width: int | None) -> FeatureAxes | None:
    """The layout that some shapes of one item's features leave as the only one, None while there are several."""
    shape = shapes[-1]
    if len(shape) == 2:
        return FeatureAxes(shape[-1], None)  # packed, (tokens, width)
    if len(shape) not in (3, 4):
        return None
    if len(shape) == 4 and shape[1] == 1 < shape[0]:  # (layers, items, tokens, width), of one item
        return FeatureAxes(shape[-1], LAYERS_FIRST)
    first, last = FeatureAxes(shape[1], CHANNELS_FIRST), FeatureAxes(shape[-1], CHANNELS_LAST)
    # The width is the axis that is the same whatever the size of the item.
    fixed = [a for a in (1, len(shape) - 1) if len({s[a] for s in shapes if len(s) == len(shape)}) == 1]
    if len(fixed) == 1:
        return first if fixed == [1] else last
    fits = [layout for layout in (first, last) if layout.width == expected_width]
    if len(fits) == 1:  # or the only one that is as long as the configuration says
        return fits[0]
    if len(shape) == 4 and shape[1] != shape[3]:  # a square map
        if shape[2] == shape[3]:
            return first
        if shape[1] == shape[2]:
            return last
    return None
