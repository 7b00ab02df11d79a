"""What replicates decide: the words of verdicts, the interval that they are read from, and the rule for many claims.

A claim says that a mean difference is above 0, and names δ, the smallest difference that would matter. Its verdict is
read from one interval of the mean over replicates, by where the interval lies among 0 and δ (`verdict`); nothing else
decides.

**Many claims.** A study that plans to test m claims gives each of them, whatever its origin and algorithm, an interval
at the level 1 − 0.05/m (`family_level`, Bonferroni). Then all m intervals hold their true means at once with at least
95 %, and where they do, every verdict of the study is right, of whatever kind: supported, excluded, reversed, too
small, equivalent. No p-value is corrected anywhere else. Holm's procedure would gain nothing: it raises the level of
the remaining tests after each rejection, because fewer null hypotheses can still be true. Here each claim has the null
hypotheses "at most 0" (denied by supported), "at least 0" (denied by reversed) and "at least δ" (denied by excluded),
and whatever the mean is, one of the first two is true. However many verdicts there are, m true null hypotheses remain,
one a claim, and each needs its 0.05/m.

**Lost values.** A replicate whose number is not finite may be the very one that contradicts the others, so that those
which are left decide nothing: there is no interval.

**Small deviations.** Prompts and sampling alone make replicates differ. Where their variance is known, a deviation
between replicates below it is luck, and the interval is made with the known one (`decide`).

Left out: win rates and their intervals over prompts (`statistics`), the critical values of looks (`sequential`), how
many replicates a verdict needs (`power`), and which differences a claim is about (`salsa.report.claims`).
"""

import math
from dataclasses import dataclass, replace

from scipy import stats

from salsa.evaluate.sequential import varies
from salsa.evaluate.statistics import SAME, finite

SUPPORTED, TOO_SMALL, EXCLUDED = "supported", "too small", "excluded"
REVERSED, UNDECIDED, NOT_TESTED = "reversed", "undecided", "not tested"
WORDS = {
    SUPPORTED: "The effect is there: its interval lies above 0.",
    TOO_SMALL: "There is an effect, and it is too small to matter: its interval lies between 0 and the smallest effect "
    "that would.",
    EXCLUDED: "An effect that would matter is excluded: the interval lies below the smallest effect that would.",
    REVERSED: "The effect is in the other direction: its interval lies below 0.",
    UNDECIDED: "The interval holds both 0 and effects that would matter, or there is none: the replicates do not "
    "decide.",
    NOT_TESTED: "The study does not measure what the claim is about.",
}


def verdict(low, high, smallest_effect):
    """The word for an interval (low, high) of a mean claimed to be above 0; UNDECIDED where a bound is nan."""
    if low > 0:
        return TOO_SMALL if high < smallest_effect else SUPPORTED
    if high < 0:
        return REVERSED
    return EXCLUDED if high < smallest_effect else UNDECIDED


def equivalent(low, high, smallest_effect):
    """Whether the interval denies an effect that would matter in either direction: −δ < low and high < δ."""
    return bool(-smallest_effect < low and high < smallest_effect)


def family_level(tests, alpha=0.05):
    """The level of each interval of a study that tests so many claims, 1 − alpha/tests; see the module's docstring."""
    if tests < 1:
        raise ValueError(f"{tests} tests: a family has at least one")
    return 1 - alpha / tests


@dataclass(frozen=True)
class Decision:
    """What the replicates of a claim say.

    Attributes:
        mean, low, high: the mean difference and its interval, in the values' unit; nan where there is none.
        level: of the interval.
        critical: standard errors from the mean to either bound; nan with fewer than two replicates.
        deviation: between replicates, or √sampling_variance where that is larger; nan with fewer than two replicates.
        standard_error: deviation/√replicates.
        floored: whether the deviation is the one of sampling alone.
        replicates: how many values were finite.
        lost: how many were not.
        p: two-sided, of the mean against 0, from this standard error, as if the replicates had been looked at once. It
            describes; where a study is looked at several times, or tests several claims, only the interval decides.
        verdict: one of the words above.
        equivalent: whether the interval lies between −δ and δ.
        contradictory: whether the intervals of several looks have nothing in common (`intersected`).
    """

    mean: float
    low: float
    high: float
    level: float
    critical: float
    deviation: float
    standard_error: float
    floored: bool
    replicates: int
    lost: int
    p: float
    verdict: str
    equivalent: bool
    contradictory: bool = False

    @property
    def has_interval(self):
        """Whether there are bounds."""
        return not math.isnan(self.low)

    @property
    def can_decide(self):
        """Whether further replicates may decide what is undecided: not where one was lost, or looks contradict."""
        return not (self.lost or self.contradictory)


def decide(values, smallest_effect, level=0.95, look=None, sampling_variance=0.0):
    """What paired differences (R,), one a replicate, say about the claim that their mean is above 0.

    The interval is mean ± critical · √(max(s², sampling_variance)/R). The critical value is the quantile of the t
    distribution with R − 1 degrees of freedom, or that of the look.

    The floor keeps the coverage: sampling is part of what makes replicates differ, so the true variance is at least
    sampling_variance, and the interval is never narrower than the plain one, which covers with `level` already. The
    degrees of freedom stay R − 1, since how much training adds to the floor is still learnt from R values.

    Args:
        smallest_effect: δ, in the values' unit; not negative.
        look: None where the number of replicates was fixed beforehand, else the `sequential.Look` that is taken. Where
            there are fewer values than the look has, the critical value is the one of equal tail probability.
        sampling_variance: known variance of one value from prompts and responses alone, the models being given.

    Where a value is not finite, the mean and the deviation are those of the others, and there is no interval. Fewer
    than two values have none. Values that are equal, but for rounding, have none either unless sampling_variance is
    above 0: draws from a normal distribution differ, so the measure is too coarse to show how replicates do. All of
    these are undecided.
    """
    if not (0 <= smallest_effect < math.inf and 0 <= sampling_variance < math.inf):
        raise ValueError(f"smallest_effect {smallest_effect}, sampling_variance {sampling_variance}: give 0 or more")
    given = len(values)
    values = finite(values)
    count, mean = values.size, float(values.mean()) if values.size else math.nan
    critical = critical_value(count, level, look)
    spread = float(values.std(ddof=1)) if varies(values) else 0.0 if count > 1 else math.nan
    floor = math.sqrt(sampling_variance)
    if values.size and floor < SAME * max(1.0, float(abs(values).max())):
        floor = 0.0  # rounding alone
    floored = spread < floor
    deviation = floor if floored else spread
    error = deviation / math.sqrt(count) if count else math.nan
    half = critical * error if error > 0 and count == given else math.nan
    low, high = mean - half, mean + half
    return Decision(
        mean=mean,
        low=low,
        high=high,
        level=level,
        critical=critical,
        deviation=deviation,
        standard_error=error,
        floored=floored,
        replicates=count,
        lost=given - count,
        p=float(2 * stats.t.sf(abs(mean) / error, count - 1)) if half > 0 else math.nan,
        verdict=verdict(low, high, smallest_effect),
        equivalent=equivalent(low, high, smallest_effect),
    )


def intersected(by_look, smallest_effect):
    """The latest of a study's decisions, with the interval that lies in those of all its looks.

    With the probability `level` the intervals of all looks hold the mean at once, so their intersection does: what an
    earlier look decided stays decided. Where they have nothing in common, one of them is wrong, and nobody knows which:
    there is no interval, and the claim is undecided.

    Args:
        by_look: what `decide` said at each look until now, in order; each of the replicates that it had then.
    """
    latest = by_look[-1]
    bounded = [decision for decision in by_look if decision.has_interval]
    if latest.lost or not bounded:
        return latest
    low, high = max(decision.low for decision in bounded), min(decision.high for decision in bounded)
    contradictory = low > high
    if contradictory:
        low, high = math.nan, math.nan
    return replace(
        latest,
        low=low,
        high=high,
        verdict=verdict(low, high, smallest_effect),
        equivalent=equivalent(low, high, smallest_effect),
        contradictory=contradictory,
    )


def critical_value(replicates, level=0.95, look=None):
    """Standard errors from the mean of so many replicates to a bound of its interval; nan for fewer than two."""
    if not 0 < level < 1:
        raise ValueError(f"level {level}: give a share between 0 and 1, such as 0.95")
    if look is not None and replicates > look.replicates:
        raise ValueError(f"{replicates} replicates at the look after {look.replicates}: give the first ones alone")
    if replicates < 2:
        return math.nan
    if look is None:
        return float(stats.t.isf((1 - level) / 2, replicates - 1))
    critical = look.critical(level)
    if replicates == look.replicates:
        return critical
    return float(stats.t.isf(stats.t.sf(critical, look.replicates - 1), replicates - 1))
