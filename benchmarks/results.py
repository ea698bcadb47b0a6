"""What a measurement gives: raw samples of both models in pairs, their ratios, and the target they are held against."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Target:
    """A bound on the ratio of ours to native, on its inverse, or on the difference of counts; one of them.

    Attributes:
        at_most: upper bound of ours / native.
        at_least: lower bound of native / ours.
        more: upper bound of ours - native.
    """

    at_most: float | None = None
    at_least: float | None = None
    more: float | None = None

    def __str__(self) -> str:
        if self.more is not None:
            return f"ours ≤ native + {self.more:g}" if self.more else "ours ≤ native"
        return f"ours / native ≤ {self.at_most}" if self.at_least is None else f"native / ours ≥ {self.at_least}"


@dataclass
class Result:
    """Samples of one measurement, a pair by index.

    Attributes:
        group: the measurement's name on the command line.
        name: what was measured.
        unit: of the samples; of ``pairs/s`` more is better, of all others less.
        native: samples of the native model.
        ours: samples of the composed model, taken in turn with the native ones.
        target: what the ratio is held against, if anything.
        notes: further figures for the JSON file.
    """

    group: str
    name: str
    unit: str
    native: list[float]
    ours: list[float]
    target: Target | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.native or len(self.native) != len(self.ours):
            raise ValueError(
                f"{self.name}: {len(self.native)} samples of the native model and {len(self.ours)} of the composed one "
                "are no pairs."
            )

    @property
    def ratios(self) -> list[float]:
        """Cost of ours by cost of native, pair by pair: below 1 ours is better, whatever the unit."""
        pairs = zip(self.native, self.ours, strict=True)
        return [a / b if self.unit.endswith("/s") else b / a for a, b in pairs]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return median(self.ratios)

    @property
    def inverse(self) -> float:
        """The median of native by ours: how many times better ours is."""
        return median(1 / ratio for ratio in self.ratios)

    @property
    def bound(self) -> float | None:
        """The target as a bound of `ratio`; None without one."""
        if self.target is None:
            return None
        if self.target.more is not None:
            return 1 + self.target.more / median(self.native)
        return self.target.at_most or 1 / (self.target.at_least or 1)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        if self.target.more is not None:
            return median(self.ours) <= median(self.native) + self.target.more
        if self.target.at_least is not None:
            return self.inverse >= self.target.at_least
        return self.ratio <= (self.target.at_most or 0)


def in_turn(
    native: Callable[[], float], ours: Callable[[], float], pairs: int, warm_up: int = 1
) -> tuple[list[float], list[float]]:
    """Samples of two measurements taken in turn, so that what disturbs the machine disturbs both.

    Args:
        native: takes one sample.
        ours: takes one sample.
        pairs: how many of each are kept.
        warm_up: how many of each are taken before and thrown away.
    """
    taken: Sequence[tuple[float, float]] = [(native(), ours()) for _ in range(warm_up + pairs)][warm_up:]
    return [a for a, _ in taken], [b for _, b in taken]
