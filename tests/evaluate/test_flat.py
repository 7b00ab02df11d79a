"""The flat part of training: which iterations it is, and its change against lines and errors that loops compute."""

import math

import numpy as np
import pytest

from salsa.evaluate import flat


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(30, 0.25, 8), (120, 0.25, 30), (30, 0.1, 3), (6, 0.25, 2), (1, 0.25, 1), (4, 1, 4)],
)
def test_the_last_part_is_rounded_up(count, share, expected):
    rows = list(range(count))
    assert flat.last(rows, share) == rows[count - expected :]


def test_nothing_has_no_last_part():
    assert flat.last([], 0.25) == []


def naive_change(values, lag):
    """The line by its normal equations, and the sandwich (X'X)⁻¹ S (X'X)⁻¹ of Newey and West, by loops."""
    count = len(values)
    design = [(1.0, float(i)) for i in range(count)]
    inverse = np.linalg.inv(np.array([[sum(row[i] * row[j] for row in design) for j in (0, 1)] for i in (0, 1)]))
    line = inverse @ np.array([sum(row[i] * y for row, y in zip(design, values, strict=True)) for i in (0, 1)])
    residuals = [y - line[0] - line[1] * i for i, y in enumerate(values)]
    middle = np.zeros((2, 2))
    for s in range(count):
        for t in range(count):
            if abs(s - t) <= lag:
                weight = 1 - abs(s - t) / (lag + 1)
                middle += weight * residuals[s] * residuals[t] * np.outer(design[s], design[t])
    covariance = inverse @ middle @ inverse * count / (count - 2)
    return line[1] * (count - 1), math.sqrt(covariance[1, 1]) * (count - 1)


@pytest.mark.parametrize(("count", "lag"), [(4, 1), (8, 2), (30, 3), (100, 4), (250, 4)])
def test_change_equals_a_naive_line_and_its_sandwich(count, lag):
    noise = np.random.default_rng(count).normal(size=count)
    values = 0.3 + 0.01 * np.arange(count) + np.convolve(noise, [1.0, 0.6])[:count]
    assert flat.lag(count) == lag
    assert flat.change(values) == pytest.approx(naive_change(list(values), lag), rel=1e-10)


def test_a_line_without_noise_has_its_rise_and_no_error():
    change, error = flat.change([1.0, 1.5, 2.0, 2.5])
    assert change == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-12)
    assert flat.change([0.7] * 9) == pytest.approx((0, 0), abs=1e-12)


def test_what_has_no_line():
    for values in ([], [1.0, 2.0], [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]):
        assert all(math.isnan(x) for x in flat.change(values))


@pytest.mark.parametrize(("count", "lag"), [(4, 1), (20, 2), (100, 4)])
def test_the_variance_of_a_mean_equals_loops(count, lag):
    noise = np.random.default_rng(count).normal(size=count)
    values = 0.3 + 0.01 * np.arange(count) + np.convolve(noise, [1.0, 0.6])[:count]
    left, total = values - np.polyval(np.polyfit(range(count), values, 1), range(count)), 0.0
    for s in range(count):
        for t in range(count):
            total += max(0, 1 - abs(s - t) / (lag + 1)) * left[s] * left[t]
    assert flat.mean_variance(values) == pytest.approx(total / count**2 * count / (count - 2), rel=1e-8)
    assert flat.mean_variance([0.7] * count) == pytest.approx(0, abs=1e-30)
    assert math.isnan(flat.mean_variance(values[:2])) and math.isnan(flat.mean_variance([*values, math.nan]))


def test_the_variance_of_a_mean_is_that_of_many_series():
    noise = np.random.default_rng(0).normal(size=(2000, 61))
    series = noise[:, 1:] + 0.4 * noise[:, :-1]
    estimate = np.mean([flat.mean_variance(values) for values in series])
    assert 0.7 < estimate / series.mean(axis=1).var() < 1.02  # never too large: it is a floor


def test_the_error_is_that_of_many_autocorrelated_series():
    """The spread of changes is what `change` says, and more than what independent noise would have."""
    rng, changes, errors, naive = np.random.default_rng(0), [], [], []
    for _ in range(2000):
        noise = rng.normal(size=101)
        values = noise[1:] + 0.7 * noise[:-1]
        change, error = flat.change(values)
        changes.append(change)
        errors.append(error)
        naive.append(np.std(values, ddof=1) / math.sqrt(np.sum((np.arange(100) - 49.5) ** 2)) * 99)
    assert np.mean(errors) == pytest.approx(np.std(changes), rel=0.12)
    assert np.mean(naive) < 0.8 * np.std(changes)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (0.05, 0.02, flat.FLAT),
        (-0.05, 0.025, flat.FLAT),
        (0.05, 0.03, flat.UNDECIDED),
        (-0.15, 0.025, flat.UNDECIDED),
        (0.16, 0.025, flat.DRIFTING),
        (-0.101, 0.0, flat.DRIFTING),
        (math.nan, math.nan, ""),
    ],
)
def test_a_run_is_flat_where_its_whole_interval_is(change, error, said):
    assert flat.flatness(change, error, 0.1) == said
