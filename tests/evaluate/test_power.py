"""Power and needed replicates against simulated studies that are decided one by one, and against a plain search."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from salsa.evaluate import decisions, power, sequential

LOOKS = (8, 16, 24, 32, 40, 48)


def plain_power(n, standardized, level=0.95):
    """The chance that t exceeds its quantile, by the definition of a noncentral t variable."""
    critical = stats.t.ppf((1 + level) / 2, n - 1)
    deviations = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, n - 1) / (n - 1))
    return float(stats.norm.sf(critical * deviations - math.sqrt(n) * standardized).mean())


@pytest.mark.parametrize("n, deviation, effect", [(3, 1.0, 0.5), (8, 0.5, 0.5), (16, 1.5, 0.0), (40, 2.0, 0.9)])
@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 6])
def test_the_power_of_a_fixed_number(n, deviation, effect, level):
    computed = power.power(n, deviation, effect, 1.0, level)
    assert computed.supported == pytest.approx(plain_power(n, effect / deviation, level), abs=1e-3)
    assert computed.excluded == pytest.approx(plain_power(n, (1 - effect) / deviation, level), abs=1e-3)
    assert computed.replicates == n


@pytest.mark.parametrize("n, deviation, effect", [(48, 1.0, 1.0), (32, 1.5, 0.0), (24, 1.0, 0.5), (8, 0.3, 1.0)])
def test_the_power_of_looks_is_the_share_of_studies_so_decided(n, deviation, effect):
    """Each study goes as far as n, one by one; its interval is what those of all its looks have in common."""
    studies, generator = 1200, np.random.default_rng(n)
    counts = np.zeros(3)
    for _ in range(studies):
        values, low, high, decided_at = generator.normal(effect, deviation, 48), -math.inf, math.inf, n
        for place, replicates in enumerate(look for look in LOOKS if look <= n):
            decision = decisions.decide(values[:replicates], 1.0, look=sequential.Look(LOOKS, place))
            low, high = max(low, decision.low), min(high, decision.high)
            if low <= high and (low > 0 or high < 1):
                decided_at = min(decided_at, replicates)
        counts += [low <= high and low > 0, low <= high and high < 1, decided_at]
    supported, excluded, replicates = counts / studies
    computed = power.power(n, deviation, effect, 1.0, looks=LOOKS)
    assert (computed.supported, computed.excluded) == pytest.approx((supported, excluded), abs=4 * 0.5 / studies**0.5)
    assert computed.replicates == pytest.approx(replicates, abs=4 * 16 / studies**0.5)


def test_before_the_first_look_nothing_is_decided():
    assert power.power(7, 1.0, 1.0, 1.0, looks=LOOKS) == (0, 0, 7)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.2, 4), st.integers(1, 30), st.sampled_from([0.8, 0.9]), st.sampled_from([0.95, 0.99]))
def test_needed_is_the_first_number_with_this_power(deviation, freedom, wanted, level):
    needed = power.needed(deviation, freedom, 1.0, level, wanted)
    assert power.power(needed.replicates, deviation, 1.0, 1.0, level).supported >= wanted
    before = max(needed.replicates - 1, 2)
    assert before == needed.replicates or power.power(before, deviation, 1.0, 1.0, level).supported < wanted
    assert needed.low <= needed.replicates <= needed.high
    assert power.needed(3 * deviation, freedom, 3.0, level, wanted) == needed


@pytest.mark.parametrize("deviation, wanted", [(0.2, 0.8), (1.0, 0.8), (1.0, 0.9), (2.0, 0.8), (3.0, 0.9)])
def test_needed_of_looks_is_the_first_look_with_this_power(deviation, wanted):
    reached = [look for look in LOOKS if power.power(look, deviation, 1.0, 1.0, looks=LOOKS).supported >= wanted]
    needed = power.needed(deviation, 10, 1.0, power=wanted, looks=LOOKS)
    assert needed.replicates == (reached[0] if reached else math.inf)
    assert needed.low <= needed.replicates <= needed.high


def test_an_effect_of_delta_is_excluded_as_easily_as_it_is_supported():
    for looks in (None, LOOKS):
        at_delta, at_0 = (power.power(32, 1.5, effect, 1.0, looks=looks) for effect in (1.0, 0.0))
        assert at_delta.supported == pytest.approx(at_0.excluded, abs=0.01)


def test_the_last_look_widens_an_interval_a_little():
    assert power.widening(None) == power.widening([]) == 1
    assert power.widening(LOOKS) == pytest.approx(2.15 / 2.0117, abs=0.005)  # the last critical value, and t's quantile
    assert power.widening([30]) == pytest.approx(1, abs=1e-6)


def test_the_deviation_of_a_pilot_is_known_so_far():
    low, high = power.deviation_interval(2.0, 7)
    assert (low, high) == pytest.approx((2 * math.sqrt(7 / 16.0128), 2 * math.sqrt(7 / 1.68987)), rel=1e-5)  # a table
    needed = power.needed(2.0, 7, 1.0)
    ends = [power.needed(deviation, 7, 1.0).replicates for deviation in (low, high)]
    assert [needed.low, needed.high] == ends
    drawn = np.random.default_rng(0).normal(0, 3, (4000, 8)).std(axis=1, ddof=1)
    covered = np.mean([power.deviation_interval(s, 7)[0] <= 3 <= power.deviation_interval(s, 7)[1] for s in drawn])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_no_deviation_lies_below_the_one_of_sampling():
    assert power.needed(0.1, 7, 1.0, sampling_variance=4.0) == power.Needed(34, 34, 34)
    needed = power.needed(2.0, 7, 1.0, sampling_variance=1.0)
    assert needed == power.needed(2.0, 7, 1.0) and power.needed(2.0, 7, 1.0, sampling_variance=3.9).low > needed.low


def test_more_than_can_be_had_is_infinite():
    assert power.needed(1000.0, 7, 1.0).replicates == math.inf
    assert power.needed(10.0, 7, 1.0, looks=LOOKS).replicates == math.inf


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0.0, 7, 1.0), "above 0"),
        ((math.nan, 7, 1.0), "above 0"),
        ((1.0, 7, 0.0), "above 0"),
        ((1.0, 0, 1.0), "at least 1"),
        ((1.0, 7, 1.0, 95), "level"),
        ((1.0, 7, 1.0, 0.95, 1.0), "power"),
    ],
)
def test_what_has_no_answer(arguments, message):
    with pytest.raises(ValueError, match=message):
        power.needed(*arguments)
    with pytest.raises(ValueError, match="at least 2"):
        power.power(1, 1.0, 1.0, 1.0)
