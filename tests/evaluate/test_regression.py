"""The regression of effects with known variances: metafor's published numbers, a naive likelihood, simulated truth."""

import math

import numpy as np
import pytest
from scipy import stats

from salsa.evaluate import regression

# Konstantopoulos (Research Synthesis Methods 2, 2011), table 2: district, effect and variance of 56 schools.
SCHOOLS = """
11 -.18 .118 11 -.22 .118 11 .23 .144 11 -.30 .144 12 .13 .014 12 -.26 .014 12 .19 .015 12 .32 .024 18 .45 .023
18 .38 .043 18 .29 .012 27 .16 .020 27 .65 .004 27 .36 .004 27 .60 .007 56 .08 .019 56 .04 .007 56 .19 .005
56 -.06 .004 58 -.18 .020 58 .00 .018 58 .00 .019 58 -.28 .022 58 -.04 .020 58 -.30 .021 58 .07 .006 58 .00 .007
58 .05 .007 58 -.08 .007 58 -.09 .007 71 .30 .015 71 .98 .011 71 1.19 .010 86 -.07 .001 86 -.05 .001 86 -.01 .001
86 .02 .001 86 -.03 .001 86 .00 .001 86 .01 .001 86 -.10 .001 91 .50 .010 91 .66 .011 91 .20 .010 91 .00 .009
91 .05 .013 91 .07 .013 108 -.52 .031 108 .70 .031 108 -.03 .030 108 .27 .030 108 -.34 .030 644 .12 .087
644 .61 .082 644 .04 .067 644 -.05 .067
"""
DISTRICTS, EFFECTS, VARIANCES = np.array(SCHOOLS.split(), float).reshape(-1, 3).T


def test_it_gives_what_metafor_gives():
    """`rma.mv(yi, vi, random = ~ 1 | district/study)`, and `rma(yi, vi)`, as metafor's own tests hold them."""
    ones = {"mean": np.ones(56)}
    made = regression.fit(EFFECTS, ones, VARIANCES, DISTRICTS)
    assert made.coefficients[0] == pytest.approx(0.1847, abs=5e-5)
    assert math.sqrt(made.covariance[0, 0]) == pytest.approx(0.0846, abs=5e-5)
    assert (made.between, made.within) == pytest.approx((0.0651, 0.0327), abs=5e-5)
    assert made.log_likelihood == pytest.approx(-7.9587, abs=5e-5)
    assert (made.effects, made.groups, list(made.degrees_of_freedom)) == (56, 11, [10])
    alone = regression.fit(EFFECTS, ones, VARIANCES, np.arange(56))
    assert alone.coefficients[0] == pytest.approx(0.1279, abs=5e-5)
    assert math.sqrt(alone.covariance[0, 0]) == pytest.approx(0.0439, abs=5e-5)
    assert (alone.between, alone.within) == (pytest.approx(0.0884, abs=5e-5), 0)


def simulated(generator, pairs=24, between=0.2, within=0.1, sampling=0.1, slope=0.5):
    """Effects of pairs at two kl_coefs: (effects, columns, variances, groups)."""
    group = np.repeat(np.arange(pairs), 2)
    distance, kl_coef = np.repeat(generator.uniform(0, 1.5, pairs), 2), np.tile([-0.1, 0.1], pairs)
    variances = sampling**2 * generator.uniform(0.5, 2, 2 * pairs)
    effects = 0.1 + slope * distance + kl_coef + generator.normal(0, between, pairs)[group]
    effects += generator.normal(0, np.sqrt(within**2 + variances))
    return effects, {"intercept": np.ones(2 * pairs), "distance": distance, "kl_coef": kl_coef}, variances, group


def naive_log_likelihood(between, within, y, columns, v, group):
    """The restricted likelihood of y: that of its contrasts A y, for any basis A of what the columns don't explain."""
    x = np.stack(list(columns.values()), axis=1)
    variance = np.zeros((len(y), len(y)))
    for i in range(len(y)):
        for j in range(len(y)):
            variance[i, j] = between * (group[i] == group[j]) + (within + v[i]) * (i == j)
    left, _, _ = np.linalg.svd(x)
    contrasts = left[:, x.shape[1] :].T
    return stats.multivariate_normal.logpdf(contrasts @ y, cov=contrasts @ variance @ contrasts.T)


def test_its_likelihood_is_that_of_the_contrasts_and_nowhere_higher():
    y, columns, v, group = simulated(np.random.default_rng(3))
    made = regression.fit(y, columns, v, group)
    best = naive_log_likelihood(made.between, made.within, y, columns, v, group)
    assert made.log_likelihood == pytest.approx(best, abs=1e-9)
    for between in made.between * np.array([0.25, 0.9, 1, 1.1, 4]):
        for within in made.within * np.array([0.25, 0.9, 1, 1.1, 4]) + 1e-9:
            assert naive_log_likelihood(between, within, y, columns, v, group) <= best + 1e-9


def test_its_coefficients_are_generalised_least_squares_at_its_components():
    y, columns, v, group = simulated(np.random.default_rng(4), pairs=9)
    made = regression.fit(y, columns, v, group)
    total, moment = np.zeros((3, 3)), np.zeros(3)
    for g in range(9):  # pair by pair, with the inverse of a 2 × 2 matrix by hand
        (i, j) = np.flatnonzero(group == g)
        a, d, b = made.between + made.within + v[i], made.between + made.within + v[j], made.between
        weights = np.array([[d, -b], [-b, a]]) / (a * d - b * b)
        rows = np.array([[columns[name][k] for name in columns] for k in (i, j)])
        total += rows.T @ weights @ rows
        moment += rows.T @ weights @ y[[i, j]]
    assert made.coefficients == pytest.approx(np.linalg.solve(total, moment), rel=1e-9)
    assert made.covariance == pytest.approx(np.linalg.inv(total), rel=1e-9)


def test_a_balanced_design_without_known_variances_is_the_split_plot():
    """Pairs' means decide on what differs between pairs, differences within pairs on what differs within them."""
    y, columns, _, group = simulated(np.random.default_rng(5), pairs=12)
    made = regression.fit(y, columns, np.zeros(24), group)
    means, distance = y.reshape(12, 2).mean(axis=1), columns["distance"].reshape(12, 2)[:, 0]
    line = stats.linregress(distance, means)
    half = stats.t.ppf(0.975, 10) * line.stderr
    assert made.interval("distance") == pytest.approx((line.slope, line.slope - half, line.slope + half), rel=1e-6)
    differences = (y[1::2] - y[::2]) / 0.2
    half = stats.t.ppf(0.975, 11) * differences.std(ddof=1) / math.sqrt(12)
    mean = differences.mean()
    assert made.interval("kl_coef") == pytest.approx((mean, mean - half, mean + half), rel=1e-6)
    assert list(made.degrees_of_freedom) == [10, 10, 11]


def test_known_variances_are_a_floor():
    """Effects that agree by chance better than their sampling allows give no narrow interval."""
    columns = {"mean": np.ones(8)}
    made = regression.fit(np.full(8, 0.3) + 1e-3 * np.arange(8), columns, np.full(8, 0.04), np.arange(8) // 2)
    assert (made.between, made.within) == (0, 0)
    assert made.covariance[0, 0] == pytest.approx(0.04 / 8)


@pytest.mark.parametrize("slope", [0.0, 3.0])
def test_effects_that_the_columns_explain_wholly(slope):
    """Their known variances alone say how sure the line is; without these, nothing does."""
    line = np.arange(6.0)
    columns = {"intercept": np.ones(6), "x": line}
    made = regression.fit(slope * (2 + line), columns, np.ones(6), np.arange(6) // 2)
    assert made.interval("x")[0] == pytest.approx(slope) and made.covariance[1, 1] == pytest.approx(1 / 17.5)
    with pytest.raises(ValueError, match="the columns explain every effect"):
        regression.fit(slope * (2 + line), columns, np.zeros(6), np.arange(6) // 2)


def test_a_combination_is_a_sum_of_coefficients():
    y, columns, v, group = simulated(np.random.default_rng(6))
    made = regression.fit(y, columns, v, group)
    weights = {"intercept": 1, "distance": 0.7}
    row = np.array([1, 0.7, 0])
    value, low, high = made.combination(weights)
    assert value == pytest.approx(row @ made.coefficients)
    half = stats.t.ppf(0.975, 22) * math.sqrt(row @ made.covariance @ row)
    assert (high - value, value - low) == pytest.approx((half, half))
    band = made.line(weights, ["intercept", "distance"])
    assert band[2] - band[0] == pytest.approx(half * math.sqrt(2 * stats.f.ppf(0.95, 2, 22)) / stats.t.ppf(0.975, 22))
    assert made.line({"distance": 1}, ["distance"]) == pytest.approx(made.interval("distance"))


@pytest.mark.parametrize(
    ("columns", "number"),
    [({"a": [1, 1, 1], "b": [2, 2, 2]}, 3), ({"a": [1, 2]}, 1), ({"a": [1, 1], "b": [0, 1]}, 2), ({"a": [0, 0, 0]}, 3)],
)
def test_what_is_not_determined_is_refused(columns, number):
    columns = {name: values[:number] for name, values in columns.items()}
    with pytest.raises(ValueError, match="don't determine the coefficients"):
        regression.fit(np.arange(number), columns, np.ones(number), np.arange(number))


def test_no_degree_of_freedom_is_no_interval():
    made = regression.fit([0.1, 0.3], {"mean": [1, 1]}, [1, 1], [0, 0])
    value, low, high = made.interval("mean")
    assert value == pytest.approx(0.2) and math.isnan(low) and math.isnan(high)


@pytest.mark.parametrize(("between", "within", "sampling"), [(0.2, 0.1, 0.1), (0.0, 0.0, 0.2), (0.3, 0.0, 0.02)])
def test_intervals_cover_the_truth(between, within, sampling):
    generator, hits, band_hits, fits = np.random.default_rng(7), 0, 0, 150
    points = np.linspace(0, 1.5, 7)
    for _ in range(fits):
        made = regression.fit(*simulated(generator, between=between, within=within, sampling=sampling))
        _, low, high = made.interval("distance")
        hits += low <= 0.5 <= high
        bands = [made.line({"intercept": 1, "distance": x}, ["intercept", "distance"]) for x in points]
        band_hits += all(low <= 0.1 + 0.5 * x <= high for x, (_, low, high) in zip(points, bands, strict=True))
    least = stats.binom.ppf(0.001, fits, 0.95)
    assert hits >= least and band_hits >= least
