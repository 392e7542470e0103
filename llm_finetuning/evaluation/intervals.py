"""95% intervals of figures that are measured on a sample, and of the difference of two models on the same sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
QUANTILES = (0.025, 0.975)
FEWEST_PAIRED = 6
"""Units from which on a paired difference can be told at 95%: that n signs all agree has a chance of 2 / 2^n."""
Z = 1.959964
"""Quantile of the normal distribution for 95%."""


@dataclass(frozen=True)
class Sample:
    """What was measured on each unit: a held-out pair, a question or a ranked pair, never a token.

    The figure is the sum of `values` over the sum of `weights`: a mean, or for a loss the mean of all tokens.
    """

    values: Sequence[float]
    """(n,): each unit's contribution, such as its summed loss in nats, or 1 for yes and 0 for no."""
    weights: Sequence[float] | None = None
    """(n,): such as each unit's tokens; None = 1 each."""

    @property
    def value(self) -> float:
        return float(np.sum(self.values) / np.sum(self._weights))

    @property
    def _weights(self) -> np.ndarray:
        return np.ones(len(self.values)) if self.weights is None else np.asarray(self.weights, float)

    @property
    def is_share(self) -> bool:
        """Whether it counts yes and no."""
        return self.weights is None and all(0 <= value <= 1 for value in self.values)

    def resampled(self) -> np.ndarray:
        """(RESAMPLES,): the figure of as many units drawn with replacement, the same ones for every sample of n."""
        n = len(self.values)
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        return drawn @ np.asarray(self.values, float) / np.maximum(drawn @ self._weights, 1e-300)

    def figure(self) -> dict:
        """{"value", "low", "high", "n"}; low and high are None where one unit says nothing of the others."""
        return {"value": self.value, **self.interval(), "n": len(self.values)}

    def interval(self) -> dict:
        """{"low", "high"} of 95%: Wilson's for shares, else the bootstrap's percentiles (Efron, 1979)."""
        if len(self.values) < 2:
            return {"low": None, "high": None}
        low, high = wilson(self.value, len(self.values)) if self.is_share else np.quantile(self.resampled(), QUANTILES)
        return {"low": float(low), "high": float(high)}


def wilson(share: float, n: int) -> tuple[float, float]:
    """The score interval of a share of n (Wilson, 1927); unlike the bootstrap's, it is no point where all are equal."""
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (share * (1 - share) / n + Z**2 / (4 * n**2)) ** 0.5
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # the ends but for rounding


def difference(first: Sample, second: Sample) -> dict:
    """`second` - `first` on the same units, {"value", "low", "high", "n"}, by a paired bootstrap.

    low and high are None for fewer than FEWEST_PAIRED units. Raises ValueError for samples of different lengths.
    """
    n = len(first.values)
    if n != len(second.values):
        raise ValueError(f"a paired difference needs the same units: {n} and {len(second.values)} were measured")
    found = {"value": second.value - first.value, "low": None, "high": None, "n": n}
    if n >= FEWEST_PAIRED:
        low, high = np.quantile(second.resampled() - first.resampled(), QUANTILES)
        found |= {"low": float(low), "high": float(high)}
    return found


def shown(figure: dict, digits: int = 3) -> str:
    """A figure with its interval and its number, as people read it: '0.123 (0.110 to 0.137, n = 60)'."""
    known = figure["low"] is not None
    within = f"{figure['low']:.{digits}f} to {figure['high']:.{digits}f}, " if known else ""
    return f"{figure['value']:.{digits}f} ({within}n = {figure['n']})"


def is_apart(found: dict) -> bool:
    """Whether the interval of a difference excludes zero: only then one model is better."""
    return found["low"] is not None and (found["low"] > 0 or found["high"] < 0)


def against_zero(found: dict) -> str:
    """A difference with its interval as text, and whether that excludes zero."""
    return f"{shown(found)}, which {'excludes' if is_apart(found) else 'does not exclude'} zero"
