"""How many replicates a verdict needs: from how replicates differ, never from the mean that was observed.

The mean that a few replicates happen to have says little, and a number that is computed from it says less: it is small
where the claim looks decided already. So two questions are asked of means that matter: with which probability is the
claim *supported* where its effect is δ, the smallest that would matter, and with which is an effect of δ *excluded*
where there is none at all? With the interval mean ± c·s/√n, both have the same answer, the probability that a
noncentral t variable of n − 1 degrees of freedom and noncentrality √n·δ/σ exceeds c. σ is known only as far as a pilot
tells: its interval (χ²) gives a range of numbers, wide after few replicates.

Where a study is looked at several times (`sequential`), probabilities are over simulated studies of a fixed seed. They
are those of a study that goes as far as the look in question, as it does while any of its claims is undecided, and
whose interval is what the intervals of all looks until then have in common.

Left out: the other claims, which end a study only where this one is decided, too (`benchmarks/coverage.py --part
claims` simulates whole studies), and the floor that known sampling variance puts under a study's deviation
(`decisions.decide`), which costs a little power where replicates differ by sampling alone.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from salsa.evaluate import sequential

STUDIES = 50_000  # simulated, so that a power of 80 % has a standard error of 0.2 %
MOST = 100_000  # the largest number of replicates that is computed


class Power(NamedTuple):
    """What a study may expect.

    Attributes:
        supported: probability that the interval comes to lie above 0.
        excluded: probability that it comes to lie below the smallest effect.
        replicates: that it takes to decide this claim, in the mean; all of them where it stays undecided.
    """

    supported: float
    excluded: float
    replicates: float


class Needed(NamedTuple):
    """How many replicates a power takes; math.inf where the last planned look, or `MOST` replicates, have less.

    Attributes:
        replicates: at the pilot's deviation.
        low, high: at the two ends of the deviation's interval.
    """

    replicates: float
    low: float
    high: float


def power(n, deviation, effect, smallest_effect, level=0.95, looks=None):
    """What n replicates decide where their differences are normal with this mean (`effect`) and deviation.

    Args:
        looks: None where the study is looked at once, after n replicates; else the plan of looks, of which those up to
            n are taken, whether or not one of them decides. None of them up to n: nothing is decided.
    """
    _check(deviation, smallest_effect, level)
    if looks is None:
        if n < 2:
            raise ValueError(f"{n} replicates have no interval; give at least 2")
        critical = float(stats.t.isf((1 - level) / 2, n - 1))
        distances = (effect, smallest_effect - effect)
        return Power(*(_passes(n, distance / deviation, critical) for distance in distances), float(n))
    looks = sequential.checked(looks)
    place = sum(look <= n for look in looks) - 1
    if place < 0:
        return Power(0.0, 0.0, float(n))
    return Power(*(float(values[place]) for values in _decided_by(looks, level, effect, smallest_effect, deviation)))


def _check(deviation, smallest_effect, level):
    if not (0 < deviation < math.inf and 0 < smallest_effect < math.inf):
        raise ValueError(f"deviation {deviation}, smallest_effect {smallest_effect}: both have to be above 0")
    if not 0 < level < 1:
        raise ValueError(f"level {level}: give a share between 0 and 1, such as 0.95")


def _passes(n, standardized, critical):
    """P(T > critical) for the t statistic of n normal values whose mean is so many deviations."""
    return float(1 - special.nctdtr(n - 1, math.sqrt(n) * standardized, critical))


def needed(deviation, degrees_of_freedom, smallest_effect, level=0.95, power=0.8, looks=None, sampling_variance=0.0):
    """The smallest number of replicates with this power to support an effect of δ, and to exclude δ where none is.

    Args:
        deviation: of the replicates of a pilot, with so many degrees of freedom (replicates − 1, where they are of one
            arm). Its interval at 95 % gives `low` and `high`.
        looks: None for a number that is fixed beforehand, else the plan of looks: the answer is then one of them.
        sampling_variance: known variance of one replicate's difference from prompts and responses alone, which no
            deviation lies below.
    """
    _check(deviation, smallest_effect, level)
    if not (degrees_of_freedom >= 1 and 0 < power < 1):
        raise ValueError(f"{degrees_of_freedom} degrees of freedom, power {power}: give at least 1, and a share")
    deviations = (deviation, *deviation_interval(deviation, degrees_of_freedom))
    floored = (max(value, math.sqrt(sampling_variance)) for value in deviations)
    return Needed(*(_needed(value / smallest_effect, level, power, looks) for value in floored))


def widening(looks, level=0.95):
    """By what factor the last of several looks has a wider interval than as many replicates that are looked at once."""
    if not looks:
        return 1.0
    once = float(stats.t.isf((1 - level) / 2, looks[-1] - 1))
    return sequential.Look(looks, len(looks) - 1).critical(level) / once


def deviation_interval(deviation, degrees_of_freedom, level=0.95):
    """(low, high) of the true deviation of normal values, from their estimate: degrees_of_freedom·s²/σ² is χ²."""
    tails = stats.chi2.isf([(1 - level) / 2, (1 + level) / 2], degrees_of_freedom)
    return tuple((deviation * np.sqrt(degrees_of_freedom / tails)).tolist())


def _needed(deviation, level, wanted, looks):
    """As `needed`, for one deviation in units of the smallest effect."""
    if looks is not None:
        looks = sequential.checked(looks)
        supported, _, _ = _decided_by(looks, level, 1.0, 1.0, deviation)
        return next((look for look, share in zip(looks, supported, strict=True) if share >= wanted), math.inf)

    def enough(n):
        critical = float(stats.t.isf((1 - level) / 2, n - 1))
        return _passes(n, 1 / deviation, critical) >= wanted

    high = 2
    while not enough(high):
        high *= 2
        if high > MOST:
            return math.inf
    low = high // 2  # has too little power, or is 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _decided_by(looks, level, effect, smallest_effect, deviation):
    """By each look (K,): shares of studies whose interval lies above 0, and below δ; the mean replicates to decide."""
    means, deviations = _studies(looks)  # (K, S)
    numbers = np.array(looks)
    halves = np.array(sequential.critical_values(looks, level))[:, None] * deviations / np.sqrt(numbers)[:, None]
    low = np.maximum.accumulate(means - halves + effect / deviation)
    high = np.minimum.accumulate(means + halves + effect / deviation)
    agree = low <= high  # intervals of several looks that have nothing in common decide nothing
    above_0, below_smallest = agree & (low > 0), agree & (high < smallest_effect / deviation)
    decided = above_0 | below_smallest
    first = np.where(decided.any(axis=0), decided.argmax(axis=0), len(looks) - 1)  # (S,)
    replicates = np.minimum(numbers[first], numbers[:, None])
    return above_0.mean(axis=1), below_smallest.mean(axis=1), replicates.mean(axis=1)


@functools.lru_cache(maxsize=8)
def _studies(looks, seed=0):
    """Means and deviations (K, S) of the standard normal values of S simulated studies at each look."""
    generator = np.random.default_rng(seed)
    total, squares = np.zeros((2, STUDIES))
    means, deviations, before = [], [], 0
    for look in looks:
        new = look - before
        increment = generator.normal(0, math.sqrt(new), STUDIES)
        scatter = generator.chisquare(new - 1, STUDIES) if new > 1 else 0.0
        total, squares = total + increment, squares + increment**2 / new + scatter
        means.append(total / look)
        deviations.append(np.sqrt(np.maximum(squares - total**2 / look, 0) / (look - 1)))
        before = look
    return np.array(means), np.array(deviations)
