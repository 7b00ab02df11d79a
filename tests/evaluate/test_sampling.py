"""How much prompts alone make replicates differ: against loops, and against numbers whose variance is known."""

import math

import numpy as np
import pytest

from salsa.evaluate import sampling


def naive_residual_variance(table):
    """The same by loops over cells, means computed anew for each."""
    replicates, prompts, total = len(table), len(table[0]), 0.0
    for r in range(replicates):
        for p in range(prompts):
            row = sum(table[r]) / prompts
            column = sum(table[k][p] for k in range(replicates)) / replicates
            grand = sum(sum(values) for values in table) / (replicates * prompts)
            total += (table[r][p] - row - column + grand) ** 2
    return total / ((replicates - 1) * (prompts - 1))


@pytest.mark.parametrize("shape", [(2, 2), (3, 7), (8, 40)])
def test_residual_variance_equals_loops(shape):
    table = np.random.default_rng(0).normal(size=shape)
    assert sampling.residual_variance(table) == pytest.approx(naive_residual_variance(table.tolist()), rel=1e-12)


def test_replicates_and_prompts_have_no_part_in_it():
    generator = np.random.default_rng(1)
    table = generator.normal(size=(4, 1)) + generator.normal(size=9)
    assert sampling.residual_variance(table) == pytest.approx(0, abs=1e-28)


def test_it_is_the_variance_of_a_replicates_mean():
    """Replicates that differ by sampling alone: the variance of their means is the one that is estimated."""
    generator = np.random.default_rng(2)
    prompts = generator.normal(0, 2, 50)
    tables = [prompts + generator.normal(0, 0.7, (6, 50)) for _ in range(400)]
    means = [table.mean(axis=1).var(ddof=1) for table in tables]
    estimates = [sampling.sampling_variance([table]) for table in tables]
    assert np.mean(estimates) == pytest.approx(0.49 / 50, rel=0.02)
    assert np.mean(means) == pytest.approx(0.49 / 50, rel=0.06)


def test_of_several_benchmarks_it_is_that_of_the_mean_of_their_means():
    generator = np.random.default_rng(3)
    tables = [generator.normal(0, deviation, (5, prompts)) for deviation, prompts in ((1.0, 20), (2.0, 30))]
    one, other = (naive_residual_variance(table.tolist()) / table.shape[1] for table in tables)
    assert sampling.sampling_variance(tables) == pytest.approx((one + other) / 4)


def test_prompts_that_a_replicate_lacks_are_left_out():
    table = np.random.default_rng(4).normal(size=(3, 6))
    holed = table.copy()
    holed[1, 2] = math.nan
    expected = naive_residual_variance(np.delete(table, 2, axis=1).tolist())
    assert sampling.residual_variance(holed) == pytest.approx(expected)
    assert sampling.sampling_variance([holed]) == pytest.approx(expected / (17 / 3))


@pytest.mark.parametrize("table", [np.zeros((1, 5)), np.zeros((3, 1)), np.full((3, 3), math.nan), np.zeros((3, 0))])
def test_what_is_not_known_is_nan(table):
    assert math.isnan(sampling.sampling_variance([table]))


def test_no_table_no_variance():
    assert math.isnan(sampling.sampling_variance([]))


def test_variances_of_single_replicates_are_right_on_average_and_have_the_mean_of_all():
    generator = np.random.default_rng(0)
    tables = generator.normal(0, 2, (400, 5, 20)) + generator.normal(0, 3, (400, 1, 20)) + np.arange(5)[:, None]
    variances = [sampling.residual_variances(table) for table in tables]
    assert np.mean(variances, axis=0) == pytest.approx(np.full(5, 4), rel=0.1)
    assert np.mean(variances[0]) == pytest.approx(naive_residual_variance(tables[0].tolist()), rel=1e-12)
    assert sampling.residual_variances([[0.1, 0.3, 0.5]]) == pytest.approx([0.04])  # one replicate: prompts are in it
    assert np.isnan(sampling.residual_variances([[0.1], [0.2]])).all()
