"""The flat part of a training run: its last iterations, over which measures are averaged, if reward is flat there.

A mean over these iterations is taken on many more responses than one evaluation has, and not at one moment. It speaks
of where training settles only if training has settled: `change` says by how much a measure still changes.
"""

import math

import numpy as np

FEWEST = 3  # values that a line can miss: two are always on one
FLAT, DRIFTING, UNDECIDED = "yes", "no", "not known"  # whether a run's reward is flat
ERRORS = 2  # standard errors on either side of a change


def last(rows, share):
    """The last `share` of a run's rows, one per iteration, rounded up: of 30 iterations the last quarter is 8."""
    count = math.ceil(len(rows) * share - 1e-9)  # 0.1 · 30 is 3, and in binary numbers a little more
    return rows[len(rows) - count :]


def change(values):
    """(change, standard error) of a series (N,): by how much its least-squares line rises from first to last value.

    The error is that of Newey and West (Econometrica 55, 1987), because the iterations of a run are not independent:
    residuals up to `lag` iterations apart may be correlated. Its square is scaled by N/(N − 2), for a line has two
    parameters. A series of fewer than FEWEST values, or with one that is not finite, has neither: (nan, nan).
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < FEWEST or not np.isfinite(values).all():
        return math.nan, math.nan
    places = np.arange(count) - (count - 1) / 2
    squares = np.sum(places**2)
    slope = np.sum(places * values) / squares
    scores = places * (values - values.mean() - slope * places)  # what each value adds to the slope's error
    variance = count / (count - 2) * _long_run(scores, lag(count)) / squares**2
    return float(slope * (count - 1)), float(math.sqrt(variance) * (count - 1))


def flatness(change, error, largest):
    """Whether a change is small enough for a measure to count as flat, in words; "" where it was not measured.

    The whole interval change ± 2 errors has to lie within ±largest for FLAT, and outside for DRIFTING.
    """
    if math.isnan(change):
        return ""
    if abs(change) + ERRORS * error <= largest:
        return FLAT
    return DRIFTING if abs(change) - ERRORS * error > largest else UNDECIDED


def mean_variance(values):
    """The variance of the mean of a series (N,) whose neighbouring values may be correlated, as in `change`.

    Its sum of squares is scaled by N/(N − 1), for the mean is estimated. nan for a series that has no `change`.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    if count < FEWEST or not np.isfinite(values).all():
        return math.nan
    return _long_run(values - values.mean(), lag(count)) / (count * (count - 1))


def lag(count):
    """How many iterations apart residuals may be correlated: ⌊4 (N/100)^(2/9)⌋ (Newey and West, RES 61, 1994)."""
    return int(4 * (count / 100) ** (2 / 9))


def _long_run(scores, lag):
    """The variance of the sum of a series whose mean is 0, with Bartlett's weights, which never make it negative."""
    total = np.sum(scores**2)
    for apart in range(1, min(lag, len(scores) - 1) + 1):
        total += 2 * (1 - apart / (lag + 1)) * np.sum(scores[apart:] * scores[:-apart])
    return max(float(total), 0.0)  # rounding may
