"""Token reduction by windows: average pooling and strided convolutions.  The base of both is in `reductions`."""

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..limits import is_count
from ..parts.registries import register_projector
from .heads import HEAD_DEFAULTS, activation_module
from .reductions import Reduction, divided, from_axes, pad_after, per_axis, to_axes


def convolved(size: int, kernel: int, stride: int, padding: int, remainder: str) -> tuple[int, int]:
    """Windows of a convolution along an axis, and zeros to append (beside `padding`) so that it sees every position."""
    padded = size + 2 * padding
    count = (padded - kernel) // stride + 1 if padded >= kernel else 0
    # Real positions behind the end of the last window, at (count - 1) * stride + kernel.
    unseen = size + padding - ((count - 1) * stride + kernel if count else 0)
    if unseen > 0 and remainder == "error":
        raise ValueError(
            f"A convolution with kernel_size={kernel}, stride={stride}, padding={padding} leaves {unseen} of {size} "
            "features along an axis unseen: choose a larger padding or kernel_size, or remainder='pad' or 'drop'."
        )
    if unseen > 0 and remainder == "pad":
        count += -(-unseen // stride) if count else 1  # as many more as reach the last position
        return count, (count - 1) * stride + kernel - padded
    if not count:
        raise ValueError(f"kernel_size={kernel} with padding={padding} does not fit {size} features along an axis.")
    return count, 0


class AvgPoolProjection(Reduction):
    """Averages windows of features, then projects the means; takes a `ProjectionHead`'s options too.

    As in Gemma 3 (https://arxiv.org/abs/2503.19786): ``num_tokens=256``, RMSNorm, one layer without bias.

    Args:
        pool_size: window along each axis, one number or a list of `dims`; 2 where `num_tokens` is not given either.
        num_tokens: features left of an item (with ``dims=2`` of each frame): a number, which must be a square or (with
            ``dims=3``) a cube, or a list of `dims` numbers.  Windows are equal where the axes divide, else as
            `torch.nn.AdaptiveAvgPool2d` lays them.
        dims: 1 pools a sequence, 2 the rows and columns of each frame, 3 frames too.  A composed model chooses 2 for images
            and videos, else 1.
        remainder: where `pool_size` does not divide an axis: ``"partial"`` averages what is there in the last window;
            ``"error"``; ``"drop"`` the rest, as in Qwen2-Audio.
    """

    DEFAULTS = {
        "pool_size": None, "num_tokens": None, "dims": 2, "remainder": "partial", **HEAD_DEFAULTS, "num_layers": 1,
        "norm": "rms_norm", "bias": False,
    }  # fmt: skip
    CHOICES = {"remainder": ("partial", "error", "drop"), "dims": (1, 2, 3)}

    @classmethod
    def _check(cls, chosen: dict[str, Any]) -> None:
        if chosen["pool_size"] is not None and chosen["num_tokens"] is not None:
            raise ValueError("pool_size and num_tokens exclude each other: give the window, or how many are left.")
        if chosen["num_tokens"] is not None:
            tokens_per_axis(chosen["num_tokens"], chosen["dims"])
        elif chosen["pool_size"] is not None:
            per_axis(chosen["pool_size"], chosen["dims"], "pool_size")

    def _windows(self, axes: Sequence[int]) -> list[tuple[int, int]]:
        """Size and window of each axis, where `num_tokens` is not given."""
        return list(zip(axes, per_axis(self.pool_size or 2, self.dims, "pool_size"), strict=True))

    def reduced_axes(self, axes: Sequence[int]) -> list[int]:
        if self.num_tokens is None:
            return [divided(size, window, self.remainder, "pool_size") for size, window in self._windows(axes)]
        wanted = tokens_per_axis(self.num_tokens, self.dims)
        if any(size < want for size, want in zip(axes, wanted, strict=True)):
            asked_for, there = (" x ".join(map(str, sizes)) for sizes in (wanted, axes))
            raise ValueError(
                f"num_tokens asks for {asked_for} features, but the item has {there}: choose fewer, or give pool_size instead."
            )
        return wanted

    def reduce(self, features: Tensor, parts: int, axes: Sequence[int]) -> Tensor:
        sizes = list(zip(axes, self.reduced_axes(axes), strict=True))  # before and after, of each axis
        if not features.numel():
            return features
        maps = to_axes(features, parts, axes).contiguous()  # (items * parts, in_features, *axes)
        if self.num_tokens is None:
            windows = [
                min(pair) for pair in self._windows(axes)
            ]  # none is larger than its axis: of three torch demands it
        elif all(size % want == 0 for size, want in sizes):
            windows = [size // want for size, want in sizes]  # equal ones; torch sums them as Gemma 3 does
        else:
            adaptive_pool = getattr(F, f"adaptive_avg_pool{self.dims}d")
            return from_axes(adaptive_pool(maps, [want for _, want in sizes]), parts)
        pool = getattr(F, f"avg_pool{self.dims}d")
        maps = pool(maps, windows, ceil_mode=self.remainder == "partial")
        return from_axes(maps, parts)  # (items, parts * windows, in_features)


def tokens_per_axis(num_tokens: int | list[int], dims: int) -> list[int]:
    """`num_tokens` along each axis; ValueError for what is no positive integer or list, or no square or cube."""
    values = per_axis(num_tokens, dims, "num_tokens")
    if not isinstance(num_tokens, int):
        return values
    side = round(num_tokens ** (1 / dims))  # a number is that of all features: 256 in a plane are 16 x 16
    if side**dims != num_tokens:
        form = f"{'square' if dims == 2 else 'cube'} ({side}**{dims} = {side**dims})"
        raise ValueError(
            f"num_tokens={num_tokens} is no {form}, so it says nothing about {dims} axes: give a list of {dims} numbers."
        )
    return [side] * dims


class ConvProjection(Reduction):
    """Strided convolutions, then a projection; takes a `ProjectionHead`'s options too.

    As in GOT-OCR 2.0 (https://arxiv.org/abs/2409.01704): ``num_convs=2, activation="linear"``, `conv_sizes` of its widths.

    Args:
        kernel_size, stride: of each convolution, along each axis (one number or a list of `dims`).
        padding: zeros around the item along each axis; ``(kernel_size - 1) // 2`` when None.
        num_convs: how many convolutions, each followed by the activation.
        conv_sizes: widths after each; `out_features` for all when None.
        dims: as in `AvgPoolProjection`; weights depend on it.
        remainder: where positions at the end are in no window: ``"error"``, ``"pad"`` with zeros, or ``"drop"``.
    """

    DEFAULTS = {
        "kernel_size": 3, "stride": 2, "padding": None, "num_convs": 1, "conv_sizes": None, "conv_bias": False, "dims": 2,
        "remainder": "error", **HEAD_DEFAULTS, "num_layers": 1,
    }  # fmt: skip
    CHOICES = {"remainder": ("error", "pad", "drop"), "dims": (1, 2, 3)}
    COUNTS = ("num_convs",)

    @classmethod
    def _check(cls, chosen: dict[str, Any]) -> None:
        dims, sizes = chosen["dims"], chosen["conv_sizes"]
        kernel, stride, padding = convolution_axes(chosen["kernel_size"], chosen["stride"], chosen["padding"], dims)
        for k, s, p in zip(kernel, stride, padding, strict=True):
            if s > k:
                raise ValueError(f"stride={s} is larger than kernel_size={k}: features between windows would be lost.")
            if p >= k:
                raise ValueError(f"padding={p} is not smaller than kernel_size={k}: some windows would see only zeros.")
        if sizes is not None and (len(sizes) != chosen["num_convs"] or not all(is_count(n) for n in sizes)):
            raise ValueError(f"conv_sizes must be {chosen['num_convs']} positive integers (num_convs), got {sizes!r}.")

    def _build(self, head_width: int | None = None) -> None:
        widths = itertools.pairwise([self.in_features, *(self.conv_sizes or [self.out_features] * self.num_convs)])
        self.along_axes = convolution_axes(self.kernel_size, self.stride, self.padding, self.dims)
        make = getattr(nn, f"Conv{self.dims}d")
        self.convs = nn.ModuleList(make(a, b, *self.along_axes, bias=self.conv_bias) for a, b in widths)
        self.act = activation_module(self.activation)
        super()._build()

    @property
    def reduced_width(self) -> int:
        return self.conv_sizes[-1] if self.conv_sizes else self.out_features

    def _steps(self, axes: Sequence[int]) -> list[list[tuple[int, int]]]:
        """For each convolution the size and the zeros to append along each axis."""
        steps = []
        for _ in range(self.num_convs):
            pairs = zip(axes, *self.along_axes, strict=True)
            steps.append([convolved(size, k, s, p, self.remainder) for size, k, s, p in pairs])
            axes = [size for size, _ in steps[-1]]
        return steps

    def reduced_axes(self, axes: Sequence[int]) -> list[int]:
        return [size for size, _ in self._steps(axes)[-1]]

    def reduce(self, features: Tensor, parts: int, axes: Sequence[int]) -> Tensor:
        maps = to_axes(features, parts, axes)  # (items * parts, in_features, *axes)
        for conv, step in zip(self.convs, self._steps(axes), strict=True):
            extra = [zeros for _, zeros in step]
            maps = self.act(conv(F.pad(maps, pad_after(extra)) if any(extra) else maps))  # (..., width, *smaller axes)
        return from_axes(maps, parts)  # (items, parts * positions, reduced_width)


def convolution_axes(kernel_size: Any, stride: Any, padding: Any, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Kernel, stride and padding along each axis; ValueError for what is no such number."""
    kernel, strides = per_axis(kernel_size, dims, "kernel_size"), per_axis(stride, dims, "stride")
    if padding is None:
        return kernel, strides, [(k - 1) // 2 for k in kernel]  # odd kernels with stride 1 then keep the size
    values = list(padding) if isinstance(padding, (list, tuple)) else [padding] * dims
    if len(values) != dims or not all(is_count(p, least=0) for p in values):
        raise ValueError(f"padding must be an integer >= 0 or a list of {dims} (one per axis), got {padding!r}.")
    return kernel, strides, values


register_projector("avg_pool", AvgPoolProjection)
register_projector("conv", ConvProjection)
