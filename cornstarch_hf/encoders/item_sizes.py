"""Sizes of items: the one that a configuration fixes, and what to say of another that the encoder does not take."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..limits import is_count
from ..parts.adapters import unwrapped
from ..parts.classes import constructor_options
from ..parts.signatures import forward_parameters
from ..parts.weightless import build_without_weights, dry_run, weights_to_meta, with_plain_kernels, without_dtypes

SWITCH = "interpolate_pos_encoding"  # an argument of encoders whose tables of positions fit one size without it


def first_positive_setting(config: PreTrainedConfig, *attributes: str, default: int) -> int:
    """The first of some attributes that is a positive integer, or the largest entry of a list of such."""
    for attribute in attributes:
        value: Any = getattr(config, attribute, None)
        if isinstance(value, (list, tuple)) and value and all(isinstance(x, int) for x in value):
            value = max(value)
        if is_count(value):
            return value
    return default


def channels_of(config: PreTrainedConfig) -> int:
    """Channels of an image, by an encoder's configuration."""
    return first_positive_setting(config, "num_channels", "in_channels", "in_chans", default=3)


def configured_sides(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Height and width of an image by an encoder's configuration, None where it does not name both."""
    size: Any = getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    size = (size, size) if isinstance(size, int) else size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 and all(size) else None


def typical_item(config: PreTrainedConfig, kind: str) -> dict[str, Tensor] | None:
    """Inputs of an ordinary item, where the encoder's configuration fixes their shape; on the meta device."""
    if kind == "image" and (sides := configured_sides(config)):
        return {"pixel_values": torch.empty(1, channels_of(config), *sides, device="meta")}
    if (positions := getattr(config, "max_source_positions", None)) and getattr(config, "num_mel_bins", None):
        return {"input_features": torch.empty(1, config.num_mel_bins, 2 * positions, device="meta")}
    return None


def _fixed_shapes(config: PreTrainedConfig, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes that a configuration may fix: those of `typical_item`, of videos and of spectra that are windows."""
    if (item := typical_item(config, kind)) is not None:
        return {key: tuple(value.shape) for key, value in item.items()}
    frames: Any
    length: Any
    frames, length = getattr(config, "num_frames", None), getattr(config, "max_length", None)
    if kind == "video" and (sides := configured_sides(config)) and is_count(frames):
        return {"pixel_values": (1, frames, channels_of(config), *sides)}
    bins: Any = getattr(config, "num_mel_bins", None)
    return {"input_values": (1, length, bins)} if is_count(length) and is_count(bins) else {}


def has_other_size(inputs: Mapping[str, Any], config: PreTrainedConfig, kind: str) -> bool:
    """Whether items have another size than the encoder's configuration fixes; False where it fixes none."""
    shapes = _fixed_shapes(config, kind)
    return any(isinstance(x := inputs.get(k), Tensor) and x.shape[1:] != size[1:] for k, size in shapes.items())


def refused_size(module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str) -> str | None:
    """What to say of items whose size an encoder, without weights, does not take; None where it takes them, or all fails.

    Found by running it on shapes: of these items, and of an ordinary one.  `inputs` are by the names of its `forward`.
    """
    config: Any = unwrapped(module).config
    if not has_other_size(inputs, config, kind):
        return None
    ((key, ordinary),) = _fixed_shapes(config, kind).items()
    settings = {SWITCH: inputs[SWITCH]} if inputs.get(SWITCH) is not None else {}
    shape = tuple(inputs[key].shape)

    def failure(size: tuple[int, ...]) -> Exception | None:
        try:
            dry_run(module, {key: torch.empty(size, device="meta"), **settings})
        except Exception as error:
            return error
        return None

    failed = failure(shape)
    if failed is None:
        return None
    # As many channels may be all that is wrong.
    nearest = (*ordinary[:2], *shape[2:]) if len(shape) == len(ordinary) else ordinary
    taken = next((size for size in (nearest, ordinary) if failure(size) is None), None)
    if taken is None:
        return None
    expected, got = (" x ".join(map(str, size[1:])) for size in (taken, shape))
    if len(shape) != len(ordinary):
        expected, got = f"shape (items, {', '.join(map(str, ordinary[1:]))})", f"shape {shape}"
    remedy = "let its processor make it, by the settings it came with (do_resize, do_center_crop, size, crop_size)"
    if kind == "audio":
        remedy = (
            "let its processor make such windows, as it does by default (padding, truncation), and split longer sounds"
        )
    elif shape[1:2] != taken[1:2]:
        remedy = "let its processor make it"
    elif SWITCH in forward_parameters(module):
        remedy += f"; or pass {SWITCH}=True to the model, and in {name}_kwargs= to the processor"
    cause = f"{type(failed).__name__}: {failed!s:.200}"
    return f"{type(unwrapped(module)).__name__} takes {key} of {expected}, got {got} ({cause}): {remedy}."


def refused_by(
    module: nn.Module, inputs: Mapping[str, Any], kind: str, name: str, error: Exception | None = None
) -> str | None:
    """As `refused_size`, of an encoder with weights that raised an error; one without is built of it."""
    inner: Any = unwrapped(module)
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    if weight is None or weight.is_meta or isinstance(error, torch.OutOfMemoryError):  # a dry run explains by itself
        return None
    if not has_other_size(inputs, inner.config, kind):
        return None
    config = without_dtypes(with_plain_kernels(copy.deepcopy(inner.config)))
    try:
        made = build_without_weights(functools.partial(type(inner), config, **constructor_options(inner)))
    except Exception:  # a class of somebody's own that needs more than its configuration: its own error stands
        return None
    return refused_size(weights_to_meta(made.eval()), inputs, kind, name)
