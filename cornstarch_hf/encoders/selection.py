"""Pure functions from an encoder's output to the features that are projected: field, layer, prefix, axes, lengths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..parts.adapters import unwrapped
from ..parts.known_encoders import encoder_type


@dataclass
class EncoderOutput(BaseModelOutputWithPooling):
    """What callbacks see and what an encoder gives.

    Attributes:
        last_hidden_state: features, ``(items, tokens, width)``, or ``(sum of tokens, width)`` with `feature_lens`.
        pooler_output: after projection, a list with one ``(tokens_i, hidden)`` tensor per item.
        hidden_states, attentions: the encoder's own, when asked for.
        feature_lens: ``(items,)`` number of features of each item, where it differs from the tensor's shape.
        feature_grids: ``(items, 2 or 3)`` height and width, or frames, height and width, of the grid in which each item's
            features lie, row by row; where it is known beforehand, or stated by a callback.
        deepstack_features: features for the first layers of the language model, of each level one tensor per item.
    """

    feature_lens: Tensor | None = None
    feature_grids: Tensor | None = None
    deepstack_features: Any = None

    @property
    def lengths(self) -> list[int] | None:
        """`feature_lens` as integers."""
        return Features(None, self.feature_lens).lengths


class Features(NamedTuple):
    """What steps of an encoder hand on; callbacks get an `EncoderOutput` of it, which takes longer to make."""

    last_hidden_state: Any
    feature_lens: Any = None
    feature_grids: Any = None

    def within(self, others: Mapping[str, Any]) -> EncoderOutput:
        """An output of these and the other fields of another one."""
        return with_features(others, self[0], self.feature_lens, feature_grids=self.feature_grids)

    @property
    def lengths(self) -> list[int] | None:
        """`feature_lens` as integers."""
        return None if self.feature_lens is None else torch.as_tensor(self.feature_lens).tolist()


CHANNELS_FIRST, CHANNELS_LAST, LAYERS_FIRST = "channels_first", "channels_last", "layers_first"
DATA_FORMATS = (CHANNELS_FIRST, CHANNELS_LAST, LAYERS_FIRST)
# What autoencoders and vocoders make of their features, and how far it is off.
_GENERATED = ("loss", "audio_values", "waveforms", "logits")


@dataclass(frozen=True)
class Selection:
    """Which of an encoder's outputs is projected."""

    # An output field, None for the last hidden state (the merged tokens of packed towers).
    output: str | None = None
    # Index into the hidden states, or several that are concatenated; -1 is the last hidden state.
    layer: int | Sequence[int] = -1
    # Leading tokens (CLS, registers) to drop of each item.
    drop_prefix: int = 0
    # Which axis holds the features' width: last, first (after that of the items), or a stack of hidden states with the items
    # second, of which the last one is taken; None: last of sequences, first of maps unless their width shows that it is last.
    data_format: str | None = None

    def __post_init__(self):
        layers = self.layer if isinstance(self.layer, (list, tuple)) else [self.layer]
        if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise ValueError(f"layer must be an integer or a list of integers, got {self.layer!r}.")
        if self.data_format not in (None, *DATA_FORMATS):
            raise ValueError(f"data_format must be one of {list(DATA_FORMATS)} or None, got {self.data_format!r}.")

    @property
    def layers(self) -> list[int]:
        """`layer` as a list."""
        return [self.layer] if isinstance(self.layer, int) else list(self.layer)

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the encoder must return all its hidden states."""
        return self.output is None and self.layer != -1


def as_output(raw: Any) -> EncoderOutput:
    """An encoder's output, in whatever form, as an `EncoderOutput` that keeps all of its fields."""
    if isinstance(raw, EncoderOutput):
        return raw
    if isinstance(raw, Tensor):
        return EncoderOutput(last_hidden_state=raw)
    if isinstance(raw, tuple) and raw:
        return EncoderOutput(last_hidden_state=raw[0])  # as with return_dict=False
    if not isinstance(raw, Mapping):
        raise TypeError(f"Expected a model output, a tuple or a tensor, got {type(raw).__name__}.")
    last = raw.get("last_hidden_state")
    if last is None:
        # Some encoders name their features otherwise: the first field that could be features counts.
        last = next((v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim >= 2 and k not in _GENERATED), None)
    return with_features(raw, last, raw.get("feature_lens"))


def with_features(output: Mapping[str, Any], features: Any, lens: Any, **changes: Any) -> EncoderOutput:
    """A copy of an output with other features (first, so that ``output[0]`` finds them) and item lengths."""
    copied = EncoderOutput(last_hidden_state=features)
    lens = lens if lens is None or isinstance(lens, Tensor) else torch.tensor(lens)
    for key, value in {**output, "feature_lens": lens, **changes}.items():
        if key != "last_hidden_state" and value is not None:
            copied[key] = value
    return copied


def select_features(
    output: EncoderOutput, selection: Selection, name: str, width: int | None = None, items: int | None = None
) -> tuple[Tensor, tuple[int, int] | None]:
    """The features that a selection names, ``(items, tokens, width)``, or ``(sum of tokens, width)`` for packed towers.

    With them rows and columns of the map that they are, None where they are none, or a prefix is dropped.  The expected width
    tells channels-first from channels-last maps, the number of items merged tokens from pooled vectors.  ValueError where there
    is no such field, layer or prefix, and for an output of another rank.
    """
    chosen = chosen_features(output, selection, name, items)
    # one (items, tokens, width) per layer, or (sum of tokens, width)
    features = [_as_tokens(x, selection, width, name) for x in chosen]
    if len({x.shape[:-1] for x in features}) > 1:
        raise ValueError(
            f"{name}: hidden states of different sizes cannot be joined, layer={selection.layer!r} gave the shapes "
            f"{[tuple(x.shape) for x in features]}: choose layers of one stage."
        )
    joined = features[0] if len(features) == 1 else torch.cat(features, dim=-1)  # (items, tokens, layers * width)
    if selection.drop_prefix:
        if joined.ndim != 3 or joined.shape[1] <= selection.drop_prefix:
            raise ValueError(
                f"{name}: drop_prefix={selection.drop_prefix} needs features of shape (items, tokens, width) with more "
                f"tokens than that, got {tuple(joined.shape)}."
            )
        return joined[:, selection.drop_prefix :], None  # (items, tokens - drop_prefix, width)
    if chosen[0].ndim != 4 or selection.data_format == LAYERS_FIRST:
        return joined, None
    # (items, rows, columns, width), or (items, width, rows, columns)
    first = 1 if _channels_last(chosen[0], selection, width) else 2
    return joined, (int(chosen[0].shape[first]), int(chosen[0].shape[first + 1]))


def chosen_features(output: EncoderOutput, selection: Selection, name: str, items: int | None = None) -> list[Tensor]:
    """The tensors that a selection names, as the encoder gave them, one per layer; arguments as of `select_features`."""
    if selection.output is not None:
        value = output.get(selection.output)
        if not isinstance(value, Tensor):
            present = [key for key, item in output.items() if isinstance(item, Tensor)]
            raise ValueError(f"{name}: the encoder's output has no tensor {selection.output!r}, it has {present}.")
        return [value]
    if selection.layer == -1:
        if (last := output.last_hidden_state) is None:
            raise ValueError(f"{name}: the output has no features, it has {list(output)}; name one by output=.")
        return [_merged(last, output.pooler_output, items)]
    states = output.hidden_states
    if states is None:
        raise ValueError(f"{name}: layer={selection.layer!r} needs hidden states, which this encoder does not return.")
    for layer in selection.layers:
        if not -len(states) <= layer < len(states):
            raise ValueError(
                f"{name}: layer {layer} does not exist, the encoder gives {len(states)} hidden states: choose one from "
                f"{-len(states)} to {len(states) - 1}."
            )
        if not isinstance(states[layer], Tensor):
            what = type(states[layer]).__name__
            raise ValueError(f"{name}: hidden state {layer} is a {what} and no tensor: choose another layer=, or -1.")
    return [states[layer] for layer in selection.layers]


def _merged(last: Any, pooled: Any, items: int | None) -> Tensor:
    """The last hidden state, or `pooler_output` where that holds an item's merged tokens and no vector of the whole item."""
    if not isinstance(pooled, Tensor) or last.ndim not in (2, 3) or pooled.ndim not in (2, 3):
        return last
    if last.ndim == 2:  # packed; a third axis holds the patches that one token is made of
        return pooled.flatten(1)  # (sum of merged tokens, width)
    if pooled.ndim == 3:
        return pooled  # (items, merged tokens, width)
    if items is None or len(pooled) == items or len(pooled) % items:
        return last  # one pooled vector of each item, or nothing that divides among them
    return pooled.unflatten(0, (items, -1))  # the same number of each item: they have one shape


def _channels_last(features: Tensor, selection: Selection, width: int | None) -> bool:
    if selection.data_format is not None:
        return selection.data_format == CHANNELS_LAST
    # A sequence has them last, a map first, unless the last axis alone has the expected width.
    return features.ndim == 3 or (width is not None and features.shape[-1] == width and features.shape[1] != width)


def _as_tokens(features: Tensor, selection: Selection, width: int | None, name: str) -> Tensor:
    if features.ndim == 4 and selection.data_format == LAYERS_FIRST:
        return features[-1]  # (layers, items, tokens, width) -> (items, tokens, width)
    if features.ndim in (3, 4) and not _channels_last(features, selection, width):
        return features.flatten(2).transpose(1, 2)  # (items, width, ...) -> (items, tokens, width)
    if features.ndim in (2, 3):
        return features
    if features.ndim != 4:
        raise ValueError(
            f"{name}: the encoder's features have the shape {tuple(features.shape)}, expected (items, tokens, width), "
            "(items, width, height, width of map) or packed (tokens, width): reshape them in postprocess_module_callback."
        )
    return features.flatten(1, 2)  # (items, rows, columns, width) -> (items, tokens, width)


def rows_of_items(features: Tensor, items: int) -> Tensor:
    """Features with one row per item, of ``(rows, tokens, width)`` with several for each, such as one per frame (TimeSformer).

    Packed ones, and rows that do not divide, stay; several items in one row become packed, ``(sum of tokens, width)``.
    """
    if features.ndim == 3 and len(features) == 1 < items:
        return features[0]
    if features.ndim != 3 or len(features) <= items or not items or len(features) % items:
        return features
    return features.unflatten(0, (items, -1)).flatten(1, 2)  # (items, rows / items * tokens, width)


def lengths_of(output: EncoderOutput | Features) -> list[int] | None:
    """Features of each item before they are projected; None where the tensor does not tell."""
    features: Any = output.last_hidden_state
    if output.lengths is not None or not isinstance(features, Tensor) or features.ndim != 3:
        return output.lengths
    return [features.shape[1]] * len(features)


def placed(value: Any, weight: Tensor | None, module: Any = None) -> Any:
    """A tensor on the weight's device, in its dtype if it is floating-point and no `module` casts it by itself."""
    if not isinstance(value, Tensor) or weight is None or weight.is_meta:
        return value
    keeps = not value.is_floating_point() or (
        module is not None and encoder_type(unwrapped(module).config).casts_inputs
    )
    return value.to(weight.device, value.dtype if keeps else weight.dtype)


def wishes(callback: Any, encoder: Any) -> dict[str, Any]:
    """The encoder's configuration and its modality's name, for a callback whose attributes `takes_config`, `takes_name` ask."""
    target, known = (
        getattr(callback, "func", callback),
        {"config": unwrapped(encoder.module).config, "name": encoder.name},
    )
    return {key: value for key, value in known.items() if getattr(target, f"takes_{key}", False)}
