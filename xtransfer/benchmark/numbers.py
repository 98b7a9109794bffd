"""The arithmetic of a measurement: rates of bursts, ratios of pairs, and their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Burst:
    """An uninterrupted piece of work of one side.

    Attributes:
      seconds: the time on the clock.
      examples: the number of texts.
      tokens: the number of their tokens, truncated and with special ones.
      slots: the number of token positions in the batches, with padding.
    """

    seconds: float
    examples: int
    tokens: int
    slots: int

    @property
    def examples_per_second(self) -> float:
        """The rate in texts."""
        return self.examples / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """The rate in tokens, without padding."""
        return self.tokens / self.seconds

    @property
    def real_share(self) -> float:
        """The share of the token positions that is not padding."""
        return self.tokens / self.slots


@dataclass(frozen=True)
class Spread:
    """The median of several numbers, the smallest and the largest of them, and how many there are."""

    median: float
    least: float
    most: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least one number."""
    return Spread(statistics.median(values), min(values), max(values), len(values))


def ratios(ours: Sequence[Burst], peer: Sequence[Burst]) -> list[float]:
    """Return our examples per second over the peer's, pair by pair; above 1 we are faster."""
    pairs = zip(ours, peer, strict=True)
    return [mine.examples_per_second / theirs.examples_per_second for mine, theirs in pairs]


def amount_for(burst: Burst, seconds: float, unit: int, most: int) -> int:
    """Return the number of examples that take about `seconds` at the rate of `burst`.

    Args:
      burst: a finished burst.
      seconds: the time to fill.
      unit: the result is a positive multiple of this, rounded up.
      most: the result is at most this, rounded down to a multiple of `unit`.
    """
    units = math.ceil(burst.examples_per_second * seconds / unit)
    return unit * max(1, min(units, most // unit))
