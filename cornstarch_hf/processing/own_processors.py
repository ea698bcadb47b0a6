"""Processors, called by `subprocessors`, for items that transformers has none for: computed features and time series."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ..limits import check_count
from .media import held
from .subprocessors import ITEM_PROCESSORS, ItemProcessor


class PrecomputedFeaturesProcessor(ItemProcessor):
    """Batches features that were computed elsewhere, for `PrecomputedFeatures`.

    Args:
        feature_size: their width.

    Raises:
        ValueError: a size that is no positive integer.
    """

    model_input_names = ("features", "attention_mask")

    def __init__(self, feature_size: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.feature_size = check_count(feature_size, "feature_size")

    def __call__(self, items: Sequence[Any], return_tensors: str = "pt", name: str = "features") -> BatchFeature:
        """Check and pad features; ValueError for what is of another width, rank or dtype, empty or not finite.

        Args:
            items: arrays or tensors ``(n_i, feature_size)`` of any n_i >= 1 in float16, bfloat16 or float32, or lists of rows
                of numbers, which become float32; ``(feature_size,)`` is one feature.

        Returns:
            `features` ``(items, most features, feature_size)`` in the one dtype that holds all items exactly, zeros after the
            last feature of each; `attention_mask` ``(items, most features)``.
        """
        rows = [self._ready(item, f"{name}, item {i}") for i, item in enumerate(items)]
        dtype = functools.reduce(torch.promote_types, [row.dtype for row in rows])  # float16 and bfloat16 make float32
        # (items, most features, feature_size)
        features = pad_sequence([row.to(dtype) for row in rows], batch_first=True)
        # (items, most features), True where a row is a feature
        mask = torch.arange(features.shape[1])[None] < torch.tensor([len(row) for row in rows])[:, None]
        return BatchFeature({"features": features, "attention_mask": mask.long()}, return_tensors)

    def _ready(self, item: Any, where: str) -> torch.Tensor:
        values = _floats(item, where, ("features", "embeddings", "array"))
        values = values[None] if values.ndim == 1 else values  # (feature_size,) -> (1, feature_size)
        if values.ndim != 2 or values.shape[1] != self.feature_size or len(values) == 0:
            expected = f"(n, {self.feature_size}) with n >= 1"
            raise ValueError(f"{where}: expected features of shape {expected}, got {tuple(values.shape)}.")
        return values


class TimeSeriesProcessor(ItemProcessor):
    """Batches time series for encoders that take `past_values` (TimesFM, PatchTST, PatchTSMixer).

    Args:
        num_channels: values at each time; None for encoders that take ``(items, length)``.
        context_length: the length that an encoder of fixed length takes.
        patch_length: series are filled up to a multiple of it, at their start as TimesFM does, and marked so in
            `past_values_padding`; shorter ones of a batch further by whole patches at their end.
        frequency: TimesFM's class of the sampling interval: 0 up to days, 1 weeks and months, 2 quarters and longer.

    Raises:
        ValueError: a size that is no positive integer, `patch_length` with channels or a fixed length, an unknown frequency.
    """

    model_input_names = ("past_values", "past_values_padding", "freq")

    def __init__(
        self,
        num_channels: int | None = None,
        context_length: int | None = None,
        patch_length: int | None = None,
        frequency: int = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        sizes = {"num_channels": num_channels, "context_length": context_length, "patch_length": patch_length}
        for key, value in sizes.items():
            setattr(self, key, None if value is None else check_count(value, key))
        if patch_length is not None and (num_channels is not None or context_length is not None):
            raise ValueError("patch_length is for series of one channel and any length: leave the other sizes out.")
        if frequency not in (0, 1, 2):
            raise ValueError(f"frequency must be 0, 1 or 2, got {frequency!r}.")
        self.frequency = frequency

    def __call__(self, items: Sequence[Any], return_tensors: str = "pt", name: str = "series") -> BatchFeature:
        """Check and stack series; ValueError where their shapes do not fit, or values are not finite.

        Args:
            items: arrays, tensors or lists of numbers, ``(length,)``, or arrays ``(length, num_channels)``; floats
                or integers, rounded to float32.

        Returns:
            `past_values` ``(items, length)`` or ``(items, length, num_channels)`` in float32, `past_values_padding` of the
            length (1 where a value is padding), `freq` ``(items, 1)``; the encoder is given those that it takes.
        """
        series = [self._ready(item, f"{name}, item {i}") for i, item in enumerate(items)]
        lengths = [len(x) for x in series]
        if self.patch_length is None and len(set(lengths)) > 1:
            i = next(i for i, n in enumerate(lengths) if n != lengths[0])
            reason = "this encoder cannot be told which are padding, so that series of one call must have one length."
            raise ValueError(f"{name}, item {i}: the series has {lengths[i]} values, item 0 has {lengths[0]}: {reason}")
        patch = self.patch_length or 1
        most = max(n + -n % patch for n in lengths)
        values, padding = [], []
        for x in series:
            start = -len(x) % patch  # padding in front, up to whole patches
            around = (start, most - len(x) - start)  # padding before and behind the series
            values.append(pad(x, (0, 0) * (x.ndim - 1) + around))  # (most,) or (most, num_channels)
            padding.append(pad(torch.zeros(len(x), dtype=torch.long), around, value=1))  # 1 on padding
        found = {"past_values": torch.stack(values), "past_values_padding": torch.stack(padding)}
        return BatchFeature(found | {"freq": torch.full((len(series), 1), self.frequency)}, return_tensors)

    def _ready(self, item: Any, where: str) -> torch.Tensor:
        values = _floats(item, where, ("past_values", "series", "array"), rounded=True)
        if self.num_channels == 1 and values.ndim == 1:
            values = values[:, None]  # (length,) -> (length, 1)
        channels = () if self.num_channels is None else (self.num_channels,)
        if values.ndim == 0 or len(values) == 0 or values.shape[1:] != channels:
            expected = "(length,)" if not channels else f"(length, {self.num_channels})"
            raise ValueError(f"{where}: expected a series of shape {expected}, got {tuple(values.shape)}.")
        if self.context_length is not None and len(values) != self.context_length:
            remedy = f"the encoder takes {self.context_length}: choose a window of that length, or resample it."
            raise ValueError(f"{where}: the series has {len(values)} values, {remedy}")
        return values


# By name, for processors that are built from their description.
ITEM_PROCESSORS |= {cls.__name__: cls for cls in (PrecomputedFeaturesProcessor, TimeSeriesProcessor)}


def default_processor(kind: str, config: Any) -> ItemProcessor | None:
    """The processor for an encoder of this kind and configuration, None where transformers has one."""
    if config.model_type == "precomputed_features":
        return PrecomputedFeaturesProcessor(feature_size=config.feature_size)
    if kind != "time":
        return None
    if (channels := getattr(config, "num_input_channels", None)) is not None:  # its encoder takes one shape
        return TimeSeriesProcessor(num_channels=channels, context_length=config.context_length)
    return TimeSeriesProcessor(patch_length=getattr(config, "patch_length", None))


def _floats(item: Any, where: str, keys: tuple[str, ...], rounded: bool = False) -> torch.Tensor:
    """An item's numbers as a tensor: floats as they are, lists as float32; with `rounded` any numbers as float32."""
    item = held(item, keys)
    if isinstance(item, (list, tuple)):
        try:
            item = np.asarray(item, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: the list does not hold rows of numbers of one length ({error}).") from error
    if not isinstance(item, (np.ndarray, torch.Tensor)):
        raise TypeError(f"{where}: expected numbers (array, tensor, list), got {type(item).__name__}.")
    if isinstance(item, np.ndarray):
        if item.dtype.kind not in "fiu" or item.dtype.itemsize > 8:
            raise TypeError(f"{where}: expected numbers, got an array of {item.dtype}: convert it to float32.")
        # A copy: torch takes no negative strides, also along an axis of one entry, and no other order of bytes.
        item = torch.from_numpy(item.astype(item.dtype.newbyteorder("="), order="C"))
    values = item.detach().cpu()
    if rounded and values.dtype is not torch.bool and not values.is_complex():
        values = values.to(torch.float32)
    if values.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        expected = "float32, float16 or bfloat16: convert them yourself, e.g. x.astype('float32')."
        raise ValueError(f"{where}: the values are {str(values.dtype).removeprefix('torch.')}, expected {expected}")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{where}: there are values that are not finite (NaN or infinity): remove or replace them.")
    return values
