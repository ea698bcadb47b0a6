"""Inputs of an ordinary item of any encoder, told from the names of its `forward` and from its configuration.

They serve to ask an encoder for the shape of its features before anybody has an item.  Floats are on the meta device, integers
real.  What comes first is likelier; whoever takes them tries one after the other.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..configuration_projector import feature_width
from ..parts.adapters import unwrapped
from ..parts.classes import constructor_options
from ..parts.known_encoders import PATCH_GRIDS
from ..parts.signatures import accepts, forward_parameters
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes
from .counting import FeatureCounter
from .item_sizes import channels_of, configured_sides, first_positive_setting
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
    """Inputs of one item for a `forward` that takes `names`, likelier ones first; of two sizes unless these are configured."""
    every = item_shapes(names, config, kind)
    key = next((key for key in every if key in names), None)
    if key is None:
        return
    for inputs in _in_patches(key, names, config) or [{key: _tensor(key, shape, config)} for shape in every[key]]:
        # These hold for all encoders: of what is made, this encoder gets what it takes.
        yield {name: x for name, x in (inputs | _companions(inputs, key, config)).items() if name in names}


def item_shapes(names: Collection[str], config: PreTrainedConfig, kind: str) -> dict[str, Shapes]:
    """Shapes to try of the inputs of which one holds an item, in order of preference."""
    first = functools.partial(first_positive_setting, config)
    values = channels_of(config) * _patch(config) ** 2
    # Pix2Struct: each patch has its row and its column in front of its values.
    patches = dict.fromkeys((2 + values, 2 + first("patch_embed_hidden_size", default=values)))
    length, channels = first("context_length", default=512), first("num_input_channels", "input_size", default=1)
    state = first("input_dim", "input_size", "hidden_size", default=80)
    width = first("d_model", "feature_size", "hidden_size", default=64)
    return {
        **dict.fromkeys(("pixel_values", "pixel_values_videos", "image"), _pixels(config, kind)),
        "flattened_patches": [(1, 64, size) for size in patches],
        "input_values": _waves(config),
        **dict.fromkeys(("input_features", "audio_mel"), _spectra(names, config)),
        "input_ids": [(1, 16), (1, 24)],
        "past_values": [(1, length, channels), (1, length), (1, 2 * length)],
        "hidden_states": [(1, frames, state) for frames in (1024, 800)],
        "inputs": [(1, 16, width), (1, 24, width)],
    }


def _tensor(key: str, shape: tuple[int, ...], config: PreTrainedConfig) -> Tensor:
    if key == "input_ids":  # no usual id of padding, so that every position counts
        return torch.full(shape, min(5, first_positive_setting(config, "vocab_size", default=6) - 1))
    return torch.empty(shape, device="meta")


def _patch(config: PreTrainedConfig) -> int:
    return first_positive_setting(config, "patch_size", default=16)


def _sides(config: PreTrainedConfig) -> list[tuple[int, int]]:
    """Heights and widths to try: of the configuration, then usual ones."""
    own = [sides] if (sides := configured_sides(config)) else []
    # What divides into whole patches, merged squares and windows.
    unit = 2 * _patch(config) * first_positive_setting(config, "spatial_merge_size", "window_size", default=1)
    # Not only squares: axes of one length cannot be told apart.
    usual = [(224, 224), (256, 192), (64, 64), (4 * unit, 2 * unit), (512, 512), (384, 384)]
    return own + [sides for sides in usual if sides not in own]


def _in_patches(key: str, names: Collection[str], config: PreTrainedConfig) -> list[Inputs]:
    """Patches of one item, where another input tells their numbers along each axis; empty where none does."""
    side, channels = _patch(config), channels_of(config)
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


def _pixels(config: PreTrainedConfig, kind: str) -> Shapes:
    frames = first_positive_setting(config, "num_frames", "frames_per_clip", "num_frames_per_clip", default=8)
    shapes: Shapes = []
    for plane in _sides(config):
        image = (1, channels_of(config), *plane)  # (items, channels, height, width)
        clips = [(1, frames, *image[1:]), (*image[:2], frames, *plane)]  # frames before the channels, or after
        shapes += [*clips, image] if kind == "video" else [image, *clips]
    return shapes


def _waves(config: PreTrainedConfig) -> Shapes:
    bins = first_positive_setting(config, "num_mel_bins", default=80)
    spectrum = (1, first_positive_setting(config, "max_length", default=1024), bins)  # (items, frames, mel bins)
    lengths = (16_000, 24_000)  # 1 and 1.5 seconds at 16 kHz
    # (items, channels, samples), of codecs
    channels = [(1, first_positive_setting(config, "audio_channels", default=1), n) for n in lengths]
    waves = [*((1, n) for n in lengths), *channels]
    return [spectrum, *waves] if hasattr(config, "num_mel_bins") else [*waves, spectrum]


def _spectra(names: Collection[str], config: PreTrainedConfig) -> Shapes:
    default = first_positive_setting(config, "feature_size", "input_size", default=80)
    attributes = (
        *("num_mel_bins", "input_feat_size", "feature_projection_input_dim", "input_dim", "input_feat_per_channel"),
        "subsampling_conv_channels",  # Gemma 4, whose convolutions leave as many channels as there were bins
    )
    bins = dict.fromkeys((first_positive_setting(config, *attributes, default=default), default, 128, 64))
    # Whisper's convolutions halve the frames, so its window has twice as many as it has positions.
    window = 2 * first_positive_setting(config, "max_source_positions", default=512)
    sizes: Shapes = [(mels, frames) for mels in bins for frames in dict.fromkeys((window, 1024, 3000, 800))]
    if "feature_lens" in names:  # items one after the other
        return sizes
    return [shape for mels, frames in sizes for shape in ((1, mels, frames), (1, frames, mels), (1, 1, frames, mels))]


def _companions(inputs: Inputs, key: str, config: PreTrainedConfig) -> Inputs:
    """What some encoders want beside the item itself: masks of all that is valid, lengths, sizes."""
    x = inputs[key]
    # Packed spectra are (mel bins, frames), all else has its positions second.
    length = x.shape[-1] if key == "input_features" and x.ndim == 2 else x.shape[1]
    ones = torch.ones(1, length, dtype=torch.long)
    return {
        **dict.fromkeys(("pixel_attention_mask", "past_values_padding"), ones),
        **dict.fromkeys(("audio_mel_mask", "mask"), ones.bool()),
        "image_sizes": torch.tensor([list(x.shape[-2:])]),
        "input_features_mask": torch.ones(1, x.shape[-1], dtype=torch.long),
        "feature_lens": torch.tensor([length]),
        "freq": torch.zeros(1, 1, dtype=torch.long),
        "is_longer": torch.zeros(1, 1, dtype=torch.bool),
        "merge_sizes": torch.tensor([first_positive_setting(config, "spatial_merge_size", default=1)]),
        "bbox": torch.zeros(1, length, 4, dtype=torch.long),
    }


_MOST_TRIES = 24  # dry runs of one encoder, before its inputs count as unknown


class FeatureAxes(NamedTuple):
    """How features lie in the tensor that a selection names."""

    width: int  # of one feature
    data_format: str | None  # see `Selection`; None for packed features, which have one axis besides


def _axes_of(shapes: Sequence[tuple[int, ...]], expected_width: int | None, guess: bool = False) -> FeatureAxes | None:
    """The axes that some shapes of one item's features leave as the only ones; else, if that may be guessed, the usual ones."""
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
    # (items, tokens, width), or (items, width, rows, columns)
    return (last if len(shape) == 3 else first) if guess else None


def find_feature_axes(module: nn.Module, kind: str, selection: Selection, name: str) -> FeatureAxes | None:
    """How an encoder's selected features lie, by a dry run of an ordinary item; None where no inputs are known that it takes.

    The encoder, PEFT-wrapped or not, is built once more from its configuration, without weights.  ValueError where the
    selection does not exist, or its layers cannot be joined.
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
        stated = selection.data_format  # by the user; then the width is that of the axis which it names
        layout = FeatureAxes(0, stated) if stated is not None else _axes_of(shapes, feature_width(inner.config))
        if layout is not None:  # the width is that of all layers together
            every = dataclasses.replace(selection, drop_prefix=0, data_format=layout.data_format)
            return layout._replace(width=select_features(as_output(output), every, name, items=1)[0].shape[-1])
    usual = _axes_of(shapes, None, guess=True) if shapes else None
    return usual and usual._replace(width=usual.width * len(selection.layers))


def _typical(encoder: Any, start: str) -> list[dict[str, Tensor]]:
    """Inputs of ordinary items of an encoder, with a `start` before their names."""
    inner: Any = unwrapped(encoder.module)
    inputs = typical_inputs(forward_parameters(inner), inner.config, encoder.kind)
    return [{f"{start}{key}": value for key, value in item.items()} for item in itertools.islice(inputs, _MOST_TRIES)]


def find_stand_in(model: Any, name: str) -> dict[str, Tensor]:
    """Inputs of one ordinary item of an encoder, zeros where they are floats; ValueError if none is known that it takes."""
    encoder: Any = model.encoders[name]
    if encoder.stand_in is not None:
        return encoder.stand_in
    counter, failed = FeatureCounter(model.config, model.encoders), None
    # Inputs of joined encoders have their names in front.
    starts = {"": encoder} | {f"{other}.": x for other, x in (encoder.join.others if encoder.join else {}).items()}
    inputs = itertools.product(*(_typical(each, start) for start, each in starts.items()))
    for items in itertools.islice(inputs, _MOST_TRIES):
        item = {key: value for part in items for key, value in part.items()}
        try:
            if counter.dry_count(name, item):
                return {k: torch.zeros_like(x, device="cpu") if x.is_meta else x for k, x in item.items()}
        except ValueError as error:
            failed = error
    raise ValueError(
        f"{name}: there is no item for it in this step, and no inputs are known that could stand in for one: give each step "
        f"an item, freeze the encoder and its projector, or set model.{name}_encoder.stand_in to the inputs of one item."
    ) from failed
