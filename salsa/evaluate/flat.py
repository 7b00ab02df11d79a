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
    count = len(values)
    places = np.arange(count) - (count - 1) / 2
    slope, residuals = _line(values, places)
    squares = np.sum(places**2)
    scores = places * residuals  # what each value adds to the slope's error
    if math.isnan(slope):
        return math.nan, math.nan
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
    """The variance of the mean of a series (N,), by how its values scatter around their line, as in `change`.

    A rise that all of the series takes part in is no scatter, and counts for nothing. Of correlated values it is a
    little too small, as a floor has to be, for few are averaged. nan where there is no `change`.
    """
    count = len(values)
    slope, residuals = _line(values, np.arange(count) - (count - 1) / 2)
    return math.nan if math.isnan(slope) else _long_run(residuals, lag(count)) / (count * (count - 2))


def _line(values, places):
    """(slope, residuals) of the least-squares line through values at places of mean 0; nan where it has no error."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < FEWEST or not np.isfinite(values).all():
        return math.nan, np.full(len(values), math.nan)
    slope = np.sum(places * values) / np.sum(places**2)
    return slope, values - values.mean() - slope * places


def lag(count):
    """How many iterations apart residuals may be correlated: ⌊4 (N/100)^(2/9)⌋ (Newey and West, RES 61, 1994)."""
    return int(4 * (count / 100) ** (2 / 9))


def _long_run(scores, lag):
    """The variance of the sum of a series whose mean is 0, with Bartlett's weights, which never make it negative."""
    total = np.sum(scores**2)
    for apart in range(1, min(lag, len(scores) - 1) + 1):
        total += 2 * (1 - apart / (lag + 1)) * np.sum(scores[apart:] * scores[:-apart])
    return max(float(total), 0.0)  # rounding may
