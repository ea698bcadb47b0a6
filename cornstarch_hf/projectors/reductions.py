"""Token reduction: modules that make fewer features of an item's, and project them.  Blocks and frames are joined here.

Pooling, convolutions (`windows`) and the `resampler` build on this module; each file registers its own types.
"""

import math
from collections.abc import Sequence
from inspect import Parameter, Signature, signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..limits import is_count
from ..parts.registries import register_projector
from .heads import HEAD_DEFAULTS, NORMS, activation_module, check_choice, check_head
from .projector import Grid


def item_axes(length: int, grid: Grid | None, dims: int) -> tuple[int, tuple[int, ...]]:
    """How many parts of an item's `length` features are reduced alone, and the `dims` sizes of one.

    Args:
        grid: ``(height, width)`` or ``(frames, height, width)``; None takes a square, where `dims` is 2 or 3 (ValueError
            for no square, or a grid of another number of features).
        dims: axes that are reduced: 1 for a sequence, 2 for each frame alone, 3 for frames too.
    """
    if dims == 1:  # a sequence, whatever grid there is
        return 1, (length,)
    if grid is None:
        side = math.isqrt(length)
        if side * side != length or not length:
            raise ValueError(
                f"{length} features are no square (the next smaller one is {side} x {side} = {side * side}): remove class "
                f"and register tokens by drop_prefix={length - side * side}, or say the grid."
            )
        grid = (side, side)
    frames, height, width = (1, *grid) if len(grid) == 2 else grid  # an image is one frame
    if frames * height * width != length or not length:
        shown = f"{' x '.join(map(str, grid))} = {frames * height * width}"
        raise ValueError(f"A grid of {shown} does not hold {length} features.")
    return (frames, (height, width)) if dims == 2 else (1, (frames, height, width))


def to_axes(features: Tensor, parts: int, axes: Sequence[int]) -> Tensor:
    """``(items, parts * axes, width)`` to ``(items * parts, width, *axes)``."""
    maps = features.reshape(len(features) * parts, *axes, features.shape[-1])
    return maps.movedim(-1, 1)  # channels first, as torch pools and convolves them


def from_axes(maps: Tensor, parts: int) -> Tensor:
    """``(items * parts, width, *axes)`` to ``(items, parts * axes, width)``."""
    return maps.flatten(2).transpose(1, 2).reshape(len(maps) // parts, -1, maps.shape[1])


def pad_end(features: Tensor, axes: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """Append zeros to ``(items, *axes, width)`` until the axes have the wanted sizes."""
    missing = [want - have for have, want in zip(axes, wanted, strict=True)]
    # torch takes (before, after) of the last axis first, and that is the width.
    return F.pad(features, [0, 0, *pad_after(missing)]) if any(missing) else features


def pad_after(sizes: Sequence[int]) -> list[int]:
    """Numbers of zeros behind each axis as `torch.nn.functional.pad` takes them: in pairs, of the last axis first."""
    return [n for size in reversed(sizes) for n in (0, size)]


def blocks_to_channels(features: Tensor, axes: Sequence[int], factor: int, channel_order: str) -> Tensor:
    """Join each ``factor x factor`` block of maps ``(items, rows * columns, width)`` into one feature (space to depth).

    `axes` are rows and columns, multiples of `factor`.  In the `channel_order` ``"block"`` the block's features stand one
    after the other, row by row; in ``"channel"`` for each channel its values in the block.
    """
    rows, columns = (size // factor for size in axes)  # of blocks
    blocks = features.reshape(len(features), rows, factor, columns, factor, features.shape[-1])
    # "block": (items, rows, columns, factor, factor, width); "channel": (items, rows, columns, width, factor, factor)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5) if channel_order == "block" else blocks.permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(len(features), rows * columns, -1)  # (items, rows * columns, width * factor**2)


def divided(size: int, by: int, remainder: str, what: str) -> int:
    """How many windows of `by` an axis of `size` has; ValueError for a rest (``"error"``), or nothing else (``"drop"``)."""
    if remainder == "error" and size % by:
        raise ValueError(
            f"{what}={by} does not divide {size} features along an axis ({size % by} would be left): give items of other "
            "sizes, or choose what happens to the rest by remainder=."
        )
    count = size // by if remainder == "drop" else -(-size // by)  # rounded up: padded, or with a smaller last window
    if not count and size:
        raise ValueError(f"{what}={by} leaves nothing of {size} features along an axis: choose a smaller one.")
    return count


def per_axis(value: Any, dims: int, name: str) -> list[int]:
    """One positive integer per axis, from one for all or a list; ValueError for anything else."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * dims
    if len(values) != dims or not all(is_count(v) for v in values):
        expected = f"a positive integer or a list of {dims} (one per axis, dims={dims})"
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return values


class ProjectionHead(nn.Module):
    """Maps ``(..., in_features)`` to ``(..., out_features)``, each feature alone.

    With one layer: ``norm_post(linear_1(norm(x)))``.  With two, as in InternVL (https://arxiv.org/abs/2312.14238),
    Voxtral (https://arxiv.org/abs/2507.13264) and Ultravox (https://github.com/fixie-ai/ultravox):
    ``norm_post(linear_2(norm_mid(act(linear_1(norm(x))))))``.

    Args:
        activation: a key of `transformers.activations.ACT2CLS`; used by two layers.
        hidden_size: width between the two layers; `out_features` when None.
        gated: `linear_1` gives twice the hidden width, values and gates, and ``values * act(gates)`` goes on
            (SwiGLU with ``activation="silu"``, https://arxiv.org/abs/2002.05202).
        norm, norm_mid, norm_post: ``"none"``, ``"layer_norm"`` or ``"rms_norm"`` before, between and after the layers.
        norm_eps: of the norms; by default 1e-5 for LayerNorm, 1e-6 for RMSNorm.

    Raises:
        ValueError: an option that does not exist or makes no sense; an unknown activation.
    """

    def __init__(self, in_features: int, out_features: int, activation: str = "gelu", **options: Any):
        super().__init__()
        if unknown := sorted(set(options) - set(HEAD_DEFAULTS)):
            raise ValueError(f"A projection head has no options {unknown}, expected some of {sorted(HEAD_DEFAULTS)}.")
        chosen = HEAD_DEFAULTS | options
        check_head(chosen)
        self.act = activation_module(activation)
        self.gated, bias, eps = chosen["gated"], chosen["bias"], chosen["norm_eps"]
        self.norm = NORMS[chosen["norm"]](in_features, eps)
        self.linear_2: nn.Module | None = None
        if chosen["num_layers"] == 1:  # neither activation, gate nor norm_mid
            self.linear_1 = nn.Linear(in_features, out_features, bias=bias)
        else:
            hidden = chosen["hidden_size"] or out_features
            self.linear_1 = nn.Linear(in_features, 2 * hidden if self.gated else hidden, bias=bias)
            self.norm_mid = NORMS[chosen["norm_mid"]](hidden, eps)
            self.linear_2 = nn.Linear(hidden, out_features, bias=bias)
        self.norm_post = NORMS[chosen["norm_post"]](out_features, eps)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.linear_1(self.norm(features))
        if self.linear_2 is None:
            return self.norm_post(hidden)  # (..., out_features)
        if self.gated:
            values, gates = hidden.chunk(2, dim=-1)  # (..., 2 * hidden) to (..., hidden) each
            hidden = values * self.act(gates)
        else:
            hidden = self.act(hidden)
        return self.norm_post(self.linear_2(self.norm_mid(hidden)))  # (..., hidden) to (..., out_features)


class Reduction(nn.Module):
    """What a token-reducing projection has in common: options by name, a count, and a head.

    A subclass gives ``reduced_axes(axes)``, the sizes of the axes after the reduction (ValueError where it does not fit
    them), and ``reduce(features, parts, axes)``, from ``(items, parts * axes, in_features)`` to ``(items, fewer,
    reduced_width)``.  Its options are keywords with the defaults of `DEFAULTS`, each kept in an attribute of its name.
    """

    DEFAULTS: dict[str, Any] = HEAD_DEFAULTS
    CHOICES: dict[str, tuple] = {}  # of options that have few values
    COUNTS: tuple[str, ...] = ()  # options that are positive integers, or None where that is their default
    dims: int = 1
    if TYPE_CHECKING:  # each option is an attribute of its name

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # `options_of` and `constructor_arguments` read signatures: they are to name the options, not ``**options``.
        _, *fixed, _ = signature(Reduction.__init__).parameters.values()  # sizes and activation
        options = [Parameter(key, Parameter.KEYWORD_ONLY, default=value) for key, value in cls.DEFAULTS.items()]
        cls.__signature__ = Signature([*fixed, *options])  # type: ignore[attr-defined]

    def __init__(self, in_features: int, out_features: int, activation: str = "gelu", **options: Any):
        super().__init__()
        self.check_options(**options)
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        for key, value in (self.DEFAULTS | options).items():  # by which `constructor_arguments` describes it again
            setattr(self, key, value)
        self._build()

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Check options, whether given for a module or in a configuration (TypeError, ValueError)."""
        if unknown := sorted(set(options) - set(cls.DEFAULTS)):
            raise TypeError(f"{cls.__name__} has no options {unknown}, expected some of {sorted(cls.DEFAULTS)}.")
        chosen = cls.DEFAULTS | options
        check_head(chosen)
        for key, choices in cls.CHOICES.items():
            check_choice(chosen[key], choices, key)
        for key in cls.COUNTS:
            if not is_count(chosen[key]) and (chosen[key] is not None or cls.DEFAULTS[key] is not None):
                raise ValueError(f"{key} must be an integer >= 1, got {chosen[key]!r}.")
        cls._check(chosen)

    @classmethod
    def _check(cls, chosen: dict[str, Any]) -> None:
        """Check what only this class has."""

    def _build(self, head_width: int | None = None) -> None:
        chosen = {key: getattr(self, key) for key in HEAD_DEFAULTS}
        self.head = ProjectionHead(self.reduced_width, head_width or self.out_features, self.activation, **chosen)

    @property
    def reduced_width(self) -> int:
        """Width between reduction and head."""
        return self.in_features

    @property
    def needs_grid(self) -> bool:
        """Whether it must be given the grid of an item's features."""
        return self.dims > 1

    def feature_count(self, length: int, grid: Grid | None = None) -> int:
        """How many of an item's `length` features, of that grid, are left; ValueError where `forward` would raise it."""
        parts, axes = item_axes(length, grid, self.dims)
        return parts * math.prod(self.reduced_axes(axes))

    def forward(self, features: Tensor, grid: Grid | None = None) -> Tensor:
        """``(items, length, in_features)`` of one grid to ``(items, feature_count(length, grid), out_features)``.

        The grid is ``(height, width)`` or ``(frames, height, width)``, row by row; None takes a square where one is needed.
        """
        parts, axes = item_axes(features.shape[1], grid, self.dims)
        reduced = self.reduce(features, parts, axes)  # (items, fewer, reduced_width)
        return self.head(reduced)  # (items, fewer, out_features)

    def extra_repr(self) -> str:
        """Every argument: two modules of equal text and equal weights compute the same."""
        keys = ("in_features", "out_features", "activation", *self.DEFAULTS)
        return ", ".join(f"{key}={getattr(self, key)!r}" for key in keys)


class PixelShuffleProjection(Reduction):
    """Joins each square block of an image's features into one, then projects it; takes a `ProjectionHead`'s options too.

    As in InternVL (https://arxiv.org/abs/2404.16821; its ``downsample_ratio=0.5`` is ``scale_factor=2``) and Idefics3
    (https://arxiv.org/abs/2408.12637; ``num_layers=1, norm="none", bias=False``), whose channel order is the same.

    Args:
        scale_factor: side of a block; `scale_factor` squared times fewer features.
        channel_order: ``"block"`` as in those, Llama 4, Aya Vision and LFM2-VL; ``"channel"`` as `torch.nn.Unfold` and
            `torch.nn.PixelUnshuffle` order them, e.g. in Mistral 3's patch merger.
        remainder: where the grid does not divide: ``"error"``, or ``"pad"`` with zeros at the right and the bottom.
    """

    DEFAULTS = {
        "scale_factor": 2, "channel_order": "block", "remainder": "error", **HEAD_DEFAULTS, "norm": "layer_norm",
    }  # fmt: skip
    CHOICES = {"remainder": ("error", "pad"), "channel_order": ("block", "channel")}
    dims = 2

    @classmethod
    def _check(cls, chosen: dict[str, Any]) -> None:
        if not is_count(factor := chosen["scale_factor"]):
            raise ValueError(
                f"scale_factor must be an integer >= 1, got {factor!r}: a downsample_ratio of 0.5 is scale_factor=2."
            )

    @property
    def reduced_width(self) -> int:
        return self.in_features * self.scale_factor**2

    def reduced_axes(self, axes: Sequence[int]) -> list[int]:
        return [divided(size, self.scale_factor, self.remainder, "scale_factor") for size in axes]

    def reduce(self, features: Tensor, parts: int, axes: Sequence[int]) -> Tensor:
        padded = [n * self.scale_factor for n in self.reduced_axes(axes)]
        maps = features.reshape(-1, *axes, self.in_features)  # (items * parts, rows, columns, in_features)
        maps = pad_end(maps, axes, padded).flatten(1, 2)  # (items * parts, padded rows * columns, in_features)
        joined = blocks_to_channels(maps, padded, self.scale_factor, self.channel_order)
        return joined.reshape(len(features), -1, self.reduced_width)  # (items, parts * blocks, reduced_width)


class FrameStackProjection(Reduction):
    """Joins consecutive features of a sequence into one, then projects it; takes a `ProjectionHead`'s options too.

    As in SLAM-ASR (https://arxiv.org/abs/2402.08846), Voxtral (https://arxiv.org/abs/2507.13264; ``remainder="error"``)
    and Ultravox (https://github.com/fixie-ai/ultravox; ``stack_factor=8, gated=True, activation="silu",
    norm="rms_norm"`` and ``norm_mid`` or ``norm_post="rms_norm"``).

    Args:
        stack_factor: how many are joined.
        remainder: where it does not divide: ``"pad"`` with zeros, as in Ultravox; ``"error"``; ``"drop"``, as in SLAM-ASR.
    """

    DEFAULTS = {"stack_factor": 4, "remainder": "pad", **HEAD_DEFAULTS, "bias": False}
    CHOICES = {"remainder": ("pad", "error", "drop")}
    COUNTS = ("stack_factor",)

    @property
    def reduced_width(self) -> int:
        return self.in_features * self.stack_factor

    def reduced_axes(self, axes: Sequence[int]) -> list[int]:
        return [divided(axes[0], self.stack_factor, self.remainder, "stack_factor")]

    def reduce(self, features: Tensor, parts: int, axes: Sequence[int]) -> Tensor:
        (count,) = self.reduced_axes(axes)
        whole = count * self.stack_factor
        kept = features[:, :whole]  # shorter by what "drop" drops
        padded = pad_end(kept, kept.shape[1:2], [whole])  # (items, whole, in_features)
        return padded.reshape(len(features), count, self.reduced_width)


register_projector("pixel_shuffle", PixelShuffleProjection)
register_projector("frame_stack", FrameStackProjection)
