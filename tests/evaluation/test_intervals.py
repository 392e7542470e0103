"""Intervals that hold what they promise, against scipy's and by simulation."""

import numpy as np
import pytest
from scipy import stats

from llm_finetuning.evaluation import intervals
from llm_finetuning.evaluation.intervals import Sample


@pytest.mark.parametrize(("yes", "n"), [(0, 12), (7, 12), (60, 60), (113, 200)])
def test_shares_get_wilsons_interval(yes, n):
    low, high = stats.binomtest(yes, n).proportion_ci(method="wilson")
    found = Sample([1.0] * yes + [0.0] * (n - yes)).figure()
    assert (found["value"], found["n"]) == (yes / n, n)
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=1e-6)


def test_losses_get_the_bootstraps_interval():
    chance = np.random.default_rng(1)
    tokens = chance.integers(1, 80, 150)
    values = chance.gamma(2.0, 0.7, 150) * tokens
    theirs = stats.bootstrap(
        (values, tokens),
        lambda v, t, axis: v.sum(axis) / t.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    found = Sample(values.tolist(), tokens.tolist()).figure()
    width = theirs.high - theirs.low
    assert found["value"] == pytest.approx(values.sum() / tokens.sum())
    assert found["low"] == pytest.approx(theirs.low, abs=0.06 * width)
    assert found["high"] == pytest.approx(theirs.high, abs=0.06 * width)


def drawn(chance, n: int = 80, shift: float = 0.0) -> Sample:
    """Losses of n pairs of different lengths around 1.5 nats a token."""
    tokens = chance.integers(5, 60, n)
    return Sample((tokens * (1.5 + shift + 0.4 * chance.standard_normal(n))).tolist(), tokens.tolist())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    chance = np.random.default_rng(3)
    found = [drawn(chance).interval() for _ in range(300)]
    held = sum(interval["low"] <= 1.5 <= interval["high"] for interval in found)
    assert 0.90 <= held / 300 <= 0.985


def test_no_difference_is_claimed_where_there_is_none():
    """Two models of the same quality: at most a few of a hundred comparisons come out apart."""
    chance = np.random.default_rng(4)
    apart = [intervals.is_apart(intervals.difference(drawn(chance), drawn(chance))) for _ in range(100)]
    assert sum(apart) <= 10
    same = drawn(chance)
    assert intervals.difference(same, same) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 80}


def test_pairing_finds_a_small_difference():
    """On the same pairs the pairs' own spread cancels out."""
    chance = np.random.default_rng(5)
    first = drawn(chance, 60)
    second = Sample([v - 0.05 * w for v, w in zip(first.values, first.weights, strict=True)], first.weights)
    found = intervals.difference(first, second)
    assert found["value"] == pytest.approx(-0.05) and intervals.is_apart(found)
    assert first.interval()["low"] < second.value < first.interval()["high"], "apart they could not be told apart"


def test_one_unit_has_no_interval_and_other_units_are_refused():
    one = Sample([0.7], [2.0])
    assert one.figure() == {"value": 0.35, "low": None, "high": None, "n": 1}
    assert not intervals.is_apart(intervals.difference(one, one))
    with pytest.raises(ValueError, match="the same units: 1 and 2"):
        intervals.difference(one, Sample([1.0, 1.0]))


@pytest.mark.parametrize(("n", "apart"), [(2, False), (5, False), (6, True), (60, True)])
def test_units_that_all_differ_alike_say_something_where_there_are_enough(n, apart):
    """The bootstrap of equal differences is a point, however few they are; by chance n signs agree in 2 of 2^n."""
    yes, no = Sample([1.0] * n), Sample([0.0] * n)
    assert intervals.is_apart(intervals.difference(no, yes)) is apart
    assert not intervals.is_apart(intervals.difference(yes, yes))
    assert yes.figure()["low"] < 1.0 == yes.figure()["high"]
