"""Verdicts are read from intervals alone, and intervals are what a plain computation of them says."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from salsa.evaluate import decisions, sequential

LOOKS = (8, 16, 24, 32, 40, 48)


@pytest.mark.parametrize(
    "low, high, smallest, word",
    [
        (0.1, 0.3, 0.2, decisions.SUPPORTED),
        (0.1, 0.2, 0.2, decisions.SUPPORTED),  # an effect of δ is not excluded
        (0.1, 0.15, 0.2, decisions.TOO_SMALL),
        (0.0, 0.1, 0.2, decisions.EXCLUDED),
        (-0.1, 0.1, 0.2, decisions.EXCLUDED),
        (-0.1, 0.0, 0.2, decisions.EXCLUDED),
        (-0.2, -0.1, 0.2, decisions.REVERSED),
        (-0.1, 0.2, 0.2, decisions.UNDECIDED),
        (-0.1, 0.3, 0.2, decisions.UNDECIDED),
        (-0.1, 0.1, 0.0, decisions.UNDECIDED),
        (0.1, 0.3, 0.0, decisions.SUPPORTED),
        (math.nan, math.nan, 0.2, decisions.UNDECIDED),
    ],
)
def test_a_verdict_says_where_the_interval_lies(low, high, smallest, word):
    assert decisions.verdict(low, high, smallest) == word
    assert word in decisions.WORDS


def test_a_decision_is_the_t_interval_of_the_values():
    values = np.random.default_rng(0).normal(0.5, 1, 12)
    decision = decisions.decide(values, 0.2)
    test = stats.ttest_1samp(values, 0)
    assert (decision.low, decision.high) == pytest.approx(test.confidence_interval(0.95))
    assert decision.p == pytest.approx(test.pvalue) and decision.replicates == 12 and not decision.floored


def test_a_look_takes_its_critical_value():
    values = np.random.default_rng(0).normal(0.5, 1, 24)
    decision = decisions.decide(values, 0.2, look=sequential.Look(LOOKS, 2))
    assert decision.critical == sequential.critical_values(LOOKS)[2] == pytest.approx(3.088, abs=0.001)
    assert decision.high - decision.low == pytest.approx(2 * decision.critical * values.std(ddof=1) / math.sqrt(24))


def plain_decision(values, smallest, critical, variance):
    """(low, high, word) by loops, for values that are not all equal."""
    count = len(values)
    mean = math.fsum(values) / count
    deviation = math.sqrt(max(math.fsum((value - mean) ** 2 for value in values) / (count - 1), variance))
    low, high = (mean + side * critical * deviation / math.sqrt(count) for side in (-1, 1))
    above_0, below_0, below_smallest = low > 0, high < 0, high < smallest
    words = {
        (True, False, False): "supported",
        (True, False, True): "too small",
        (False, True, True): "reversed",
        (False, False, True): "excluded",
        (False, False, False): "undecided",
    }
    return low, high, words[above_0, below_0, below_smallest]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(-1000, 1000), min_size=2, max_size=40).filter(lambda values: len(set(values)) > 1),
    st.integers(0, 500),
    st.sampled_from([0.8, 0.95, 0.99]),
    st.sampled_from([0, 100, 10**5]),
)
def test_a_decision_by_loops(values, smallest, level, variance):
    critical = stats.t.ppf((1 + level) / 2, len(values) - 1)
    low, high, word = plain_decision(values, smallest, critical, variance)
    decision = decisions.decide(values, smallest, level, sampling_variance=variance)
    assert (decision.low, decision.high) == pytest.approx((low, high))
    assert decision.verdict == word or min(abs(bound - at) for bound in (low, high) for at in (0, smallest)) < 1e-6
    assert decision.equivalent == (-smallest < decision.low and decision.high < smallest)
    assert decision.deviation == pytest.approx(decision.standard_error * math.sqrt(len(values)))
    assert decision.floored == (np.var(values, ddof=1) < variance)
    assert (decision.p < 1 - level) == (decision.low > 0 or decision.high < 0)
    mirrored = decisions.decide([-value for value in values], smallest, level, sampling_variance=variance)
    assert (mirrored.low, mirrored.high) == pytest.approx((-high, -low))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.floats(0.01, 100), st.floats(-5, 5), st.integers(0, 1000))
def test_a_decision_at_a_look_by_loops_and_in_other_units(place, unit, effect, seed):
    values = np.random.default_rng(seed).normal(effect, 1, LOOKS[place])
    look = sequential.Look(LOOKS, place)
    critical = sequential.critical_values(LOOKS)[place]
    decision = decisions.decide(values * unit, unit, look=look)
    low, high, word = plain_decision(list(values), 1.0, critical, 0.0)
    assert (decision.low, decision.high) == pytest.approx((low * unit, high * unit))
    assert (decision.verdict, decision.critical) == (word, critical)


def test_a_look_of_fewer_values():
    values = np.random.default_rng(0).normal(0.5, 1, 22)
    decision = decisions.decide(values, 0.2, look=sequential.Look(LOOKS, 2))
    planned = sequential.critical_values(LOOKS)[2]
    assert decision.replicates == 22 and decision.critical > planned and decision.has_interval
    assert stats.t.sf(decision.critical, 21) == pytest.approx(stats.t.sf(planned, 23))
    with pytest.raises(ValueError, match="give the first ones alone"):
        decisions.decide(values, 0.2, look=sequential.Look(LOOKS, 1))


@pytest.mark.parametrize("look", [None, sequential.Look(LOOKS, 2)])
@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_lost_leaves_nothing_decided(look, lost):
    values = np.random.default_rng(0).normal(5, 1, 24)
    assert decisions.decide(values, 0.2, look=look).verdict == decisions.SUPPORTED
    values[7] = lost
    decision = decisions.decide(values, 0.2, look=look)
    assert (decision.verdict, decision.replicates, decision.lost) == (decisions.UNDECIDED, 23, 1)
    assert math.isnan(decision.low) and math.isnan(decision.p) and not decision.can_decide
    assert decision.mean == pytest.approx(np.delete(values, 7).mean())
    assert decisions.intersected([decisions.decide(values[:7], 0.2), decision], 0.2) == decision


@pytest.mark.parametrize("values", [[], [math.nan], [0.5], [0.5, math.inf], [0.1 + 0.2, 0.3], [0.3] * 12, [0.0] * 12])
@pytest.mark.parametrize("smallest", [0.0, 0.1])
def test_no_verdict_without_a_deviation(values, smallest):
    decision = decisions.decide(values, smallest)
    finite = [value for value in values if math.isfinite(value)]
    assert decision.verdict == decisions.UNDECIDED and not decision.equivalent and not decision.floored
    assert decision.mean == pytest.approx(np.mean(finite) if finite else math.nan, nan_ok=True)
    assert math.isnan(decision.low) and math.isnan(decision.high) and math.isnan(decision.p)
    assert decision.replicates == len(finite)


def test_a_known_variance_gives_equal_values_an_interval_and_one_value_none():
    decision = decisions.decide([0.3] * 4, 0.1, sampling_variance=0.04)
    half = stats.t.ppf(0.975, 3) * 0.1
    assert (decision.low, decision.high) == pytest.approx((0.3 - half, 0.3 + half))
    assert decision.floored and decision.deviation == pytest.approx(0.2)
    assert decisions.decide([0.3], 0.1, sampling_variance=0.04).verdict == decisions.UNDECIDED
    assert not decisions.decide([0.3] * 4, 0.1, sampling_variance=1e-32).has_interval  # the rounding of equal scores


@pytest.mark.parametrize(
    "arguments", [(-0.1,), (math.nan,), (math.inf,), (0.1, 95), (0.1, 0.95, None, -1), (0.1, 0.95, None, math.nan)]
)
def test_settings_that_mean_nothing(arguments):
    with pytest.raises(ValueError):
        decisions.decide([0.1, 0.2, 0.3], *arguments)


@pytest.mark.parametrize("truths", [[0, 0, 0, 0], [0, 0.3, 1, -0.5], [1, 1, 1, 1]])
def test_all_verdicts_of_a_family_are_right_at_once(truths):
    """In 95 % of studies no claim is said to be above 0, below 0 or below δ = 1 that is not."""
    studies, generator = 1500, np.random.default_rng(len(truths))
    level, wrong = decisions.family_level(len(truths)), 0
    for _ in range(studies):
        samples = [generator.normal(truth, 1, 6) for truth in truths]
        words = [decisions.decide(values, 1.0, level).verdict for values in samples]
        wrong += any(
            (word in (decisions.SUPPORTED, decisions.TOO_SMALL) and truth <= 0)
            or (word == decisions.REVERSED and truth >= 0)
            or (word in (decisions.EXCLUDED, decisions.TOO_SMALL, decisions.REVERSED) and truth >= 1)
            for truth, word in zip(truths, words, strict=True)
        )
    assert wrong / studies < 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)


def test_the_level_of_a_family():
    assert decisions.family_level(1) == 0.95 and decisions.family_level(10, 0.1) == pytest.approx(0.99)
    with pytest.raises(ValueError, match="at least one"):
        decisions.family_level(0)


def at_looks(values, smallest, looks, variances=None):
    """The decision of each look, each with its own floor."""
    variances = variances or [0.0] * len(looks)
    return [
        decisions.decide(values[:count], smallest, 0.95, sequential.Look(looks, place), variance)
        for place, (count, variance) in enumerate(zip(looks, variances, strict=True))
        if count <= len(values)
    ]


def test_what_an_earlier_look_decided_stays_decided():
    values = [1.0 + 0.01 * (-1) ** i for i in range(8)] + [1.0 + 9 * (-1) ** i for i in range(8)]  # then it scatters
    early, late = at_looks(values, 0.5, (8, 16, 24))
    both = decisions.intersected([early, late], 0.5)
    assert (early.verdict, late.verdict, both.verdict) == ("supported", "undecided", "supported")
    assert (both.low, both.high) == (max(early.low, late.low), min(early.high, late.high))
    assert (both.mean, both.replicates, both.deviation) == (late.mean, 16, late.deviation)
    assert not both.contradictory


def test_looks_that_contradict_each_other_decide_nothing():
    values = [1.0 + 0.001 * (-1) ** i for i in range(8)] + [0.0 + 0.001 * (-1) ** i for i in range(16)]
    first, last = at_looks(values, 0.5, (8, 24))
    assert first.low > last.high
    both = decisions.intersected([first, last], 0.5)
    assert (both.verdict, both.contradictory, both.can_decide) == ("undecided", True, False)
    assert math.isnan(both.low) and math.isnan(both.high) and not both.equivalent
    assert both.mean == last.mean
    wider = at_looks(values, 0.5, (8, 24), [1.0, 0.0])  # the first look knew of a large variance of sampling
    assert not decisions.intersected(wider, 0.5).contradictory


def test_a_look_without_an_interval_denies_nothing():
    values = [0.3] * 8 + [0.3, 0.1, 0.4, 0.2, 0.5, 0.1, 0.6, 0.2]
    first, last = at_looks(values, 0.5, (8, 16))
    assert not first.has_interval
    assert decisions.intersected([first, last], 0.5) == last


def test_the_first_look_is_decided_as_alone():
    (first,) = at_looks([0.3, 0.1, 0.4, 0.2, 0.5, 0.1, 0.6, 0.2], 0.5, (8, 16))
    assert decisions.intersected([first], 0.5) == first
