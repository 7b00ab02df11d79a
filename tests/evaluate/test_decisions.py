"""Verdicts are read from intervals alone, and intervals are what a plain computation of them says."""

import math

import numpy as np
import pytest
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
