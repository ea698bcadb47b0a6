"""Where an encoder's features lie in its output: their width, and which axis holds it; found by a dry run."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..configuration_projector import feature_width
from ..parts.adapters import unwrapped
from ..parts.classes import constructor_options
from ..parts.shapes_only import dry_run, weights_to_meta
from ..parts.signatures import accepts, forward_parameters
from ..parts.weightless import build_without_weights, without_dtypes
from .feature_layout import typical_inputs
from .selection import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    LAYERS_FIRST,
    Selection,
    as_output,
    chosen_features,
    select_features,
)

_MOST_TRIES = 24


class FeatureAxes(NamedTuple):
    """How features lie in the tensor that a selection names.

    Attributes:
        width: of one feature.
        data_format: see `Selection`; None for packed features, which have one axis besides.
    """

    width: int
    data_format: str | None


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
    made = built_on_meta(inner)
    if made is None:
        return None
    shapes: list[tuple[int, ...]] = []
    wanted = {"return_dict": True} | ({"output_hidden_states": True} if selection.needs_hidden_states else {})
    wanted = {key: value for key, value in wanted.items() if accepts(made, key)}
    candidates = typical_inputs(forward_parameters(inner), inner.config, kind)
    for _, inputs in zip(range(_MOST_TRIES), candidates, strict=False):
        output = _tried(functools.partial(made, **wanted), inputs)
        if output is None:
            continue
        features = chosen_features(as_output(output), selection, name, items=1)
        shapes.append(tuple(features[0].shape))
        layout = _layout(shapes, feature_width(inner.config))
        if layout is not None and len(features) == 1:
            return layout
        if layout is not None:
            every = dataclasses.replace(selection, drop_prefix=0, data_format=layout.data_format)
            return layout._replace(width=select_features(as_output(output), every, name, items=1).shape[-1])
    return _assumed(shapes, feature_width(inner.config), selection)


def built_on_meta(inner: Any) -> nn.Module | None:
    """A model of the same class and configuration without weights; None where its class cannot be built so."""
    config = without_dtypes(with_plain_kernels(copy.deepcopy(inner.config)))
    try:
        made = build_without_weights(functools.partial(type(inner), config, **constructor_options(inner)))
    except Exception:  # a class of somebody's own that needs more than its configuration
        return None
    return weights_to_meta(made.eval())


def with_plain_kernels(config: Any) -> Any:
    """A configuration whose attention and experts run on any device (in place): kernels do not take shapes alone."""
    if getattr(config, "_attn_implementation", None) not in (None, "eager", "sdpa"):
        config._attn_implementation = "eager"
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "batched_mm"
    return config


def _tried(run: Any, inputs: dict[str, Tensor]) -> Any:
    try:
        return dry_run(run, inputs)
    except Exception:  # inputs that this encoder does not take: others follow
        return None


def _layout(shapes: Sequence[tuple[int, ...]], expected_width: int | None) -> FeatureAxes | None:
    """The layout that some shapes of one item's features leave as the only one, None while there are several."""
    shape = shapes[-1]
    if len(shape) == 2:
        return FeatureAxes(shape[-1], None)
    if len(shape) not in (3, 4):
        return None
    if len(shape) == 4 and shape[1] == 1 < shape[0]:
        return FeatureAxes(shape[-1], LAYERS_FIRST)
    first, last = FeatureAxes(shape[1], CHANNELS_FIRST), FeatureAxes(shape[-1], CHANNELS_LAST)
    fixed = [a for a in (1, len(shape) - 1) if len({s[a] for s in shapes if len(s) == len(shape)}) == 1]
    if len(fixed) == 1:
        return first if fixed == [1] else last
    fits = [layout for layout in (first, last) if layout.width == expected_width]
    if len(fits) == 1:
        return fits[0]
    if len(shape) == 4 and shape[1] != shape[3]:  # a square map
        if shape[2] == shape[3]:
            return first
        if shape[1] == shape[2]:
            return last
    return None


def _assumed(shapes: Sequence[tuple[int, ...]], expected_width: int | None, selection: Selection) -> FeatureAxes | None:
    """The usual layout, where nothing tells: sequences with their width last, maps with it first."""
    if not shapes or len(shapes[-1]) not in (3, 4):
        return None
    layers = 1 if isinstance(selection.layer, int) else len(selection.layer)
    shape = shapes[-1]
    if len(shape) == 3:
        return FeatureAxes(shape[-1] * layers, CHANNELS_LAST)
    return FeatureAxes(shape[1] * layers, CHANNELS_FIRST)
