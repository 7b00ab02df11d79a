"""Critical values of looks against simulation, published values and quantiles; the mixture-t against its integral."""

import functools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from salsa.evaluate import sequential

LOOKS = (8, 16, 24, 32, 40, 48)


def t_statistics(values, looks):
    """The t statistic (S, K) of the first n values of each study (S, R), for each n of the looks."""
    counts = np.array(looks)
    totals, squares = (np.cumsum(each, axis=1)[:, counts - 1] for each in (values, values**2))
    variances = (squares - totals**2 / counts) / (counts - 1)
    return totals / counts / np.sqrt(variances / counts)


def test_the_error_is_spent_as_lan_and_demets_say():
    normal = NormalDist()
    expected = [2 - 2 * normal.cdf(normal.inv_cdf(0.975) / math.sqrt(share)) for share in (0.5, 0.75, 1.0)]
    assert sequential.spent(np.array([0.5, 0.75, 1.0])) == pytest.approx(expected, rel=1e-10)
    assert sequential.spent(1.0, 0.01) == pytest.approx(0.01)


def test_the_first_look_and_a_single_one_are_quantiles():
    critical = sequential.critical_values(LOOKS)
    assert stats.t.sf(critical[0], 7) == pytest.approx(sequential.spent(8 / 48) / 2, rel=1e-9)
    assert sequential.critical_values([20], 0.99) == pytest.approx([stats.t.ppf(0.995, 19)])


def test_the_planned_looks():
    assert sequential.critical_values(LOOKS) == pytest.approx([14.745, 4.260, 3.088, 2.608, 2.334, 2.153], abs=5e-4)


@pytest.fixture
def spent_on_each_side(monkeypatch):
    """The error of each side spent by itself, as tables of group-sequential designs have it."""
    of_both = sequential.spent
    monkeypatch.setattr(sequential, "spent", lambda share, alpha: 2 * of_both(share, alpha / 2))
    sequential._critical_values.cache_clear()
    yield
    sequential._critical_values.cache_clear()


@pytest.mark.parametrize(
    "count, published",  # two-sided 5 %, a known deviation: gsDesign's sfLDOF
    [(5, [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]), (2, [2.9626, 1.9686])],
)
def test_with_many_replicates_they_are_the_published_ones(count, published, spent_on_each_side):
    looks = [200 * (place + 1) for place in range(count)]
    scores = stats.norm.isf(stats.t.sf(sequential.critical_values(looks), np.array(looks) - 1))
    assert scores == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(
    "looks, level",
    [
        (LOOKS, 0.95),
        (LOOKS, 1 - 0.05 / 6),
        ((3, 4, 5, 6), 0.9),
        ((2, 3, 4), 0.8),
        ((5, 12, 13, 30), 0.95),
        ((4, 6, 8, 10, 12), 0.95),
    ],
)
def test_simulated_studies_are_stopped_as_often_as_was_spent(looks, level):
    studies, generator = 200_000, np.random.default_rng(3)
    critical, spent = sequential.critical_values(looks, level), sequential.spent(np.array(looks) / looks[-1], 1 - level)
    hits = np.zeros(len(looks))
    for _ in range(10):
        passed = np.abs(t_statistics(generator.normal(size=(studies // 10, looks[-1])), looks)) >= critical
        first = np.where(passed.any(axis=1), passed.argmax(axis=1), len(looks))
        hits += np.bincount(first, minlength=len(looks) + 1)[:-1]
    expected = np.diff(spent, prepend=0.0)
    assert np.all(np.abs(hits / studies - expected) < 4 * np.sqrt(expected / studies) + 2 / studies)


@pytest.mark.parametrize("before, after", [(5, 6), (4, 6), (8, 16), (16, 19), (3, 20)])
@pytest.mark.parametrize("state", [0.2, 1.5, 4.0])
def test_the_next_t_given_this_one(before, after, state):
    """A vector of any length and of this t, from a random direction, and standard normal values after it."""
    generator, draws = np.random.default_rng(before + after), 100_000
    length = np.sqrt(generator.chisquare(before, draws))
    along = state / math.sqrt(before - 1 + state**2)  # the cosine between the vector and the one of ones
    total, squares = math.sqrt(before) * along * length, length**2
    new = generator.normal(size=(draws, after - before))
    total, squares = total + new.sum(axis=1), squares + (new**2).sum(axis=1)
    t = total / math.sqrt(after) / np.sqrt((squares - total**2 / after) / (after - 1))
    edges = np.array([0.0, 0.3, 1.2, 2.5, 5.0])
    computed = sequential._exceeds(np.array([state]), edges, before, after)[0]
    simulated = (np.abs(t)[:, None] >= edges).mean(axis=0)
    assert computed == pytest.approx(simulated, abs=4 * math.sqrt(0.25 / draws))


@pytest.mark.parametrize(
    "looks, level, cells, tolerance",
    [
        (LOOKS, 0.95, 160, 2e-4),
        (LOOKS[:4], 1 - 0.05 / 13, 160, 2e-4),
        ((10, 15, 20, 30), 0.95, 160, 2e-4),
        ((3, 4, 5), 0.95, 480, 3e-3),
        ((4, 5, 6), 1 - 0.05 / 13, 240, 3e-3),
    ],
)
def test_more_cells_change_nothing(looks, level, cells, tolerance):
    fine = sequential._critical_values(looks, level, cells)
    assert sequential.critical_values(looks, level) == pytest.approx(fine, rel=tolerance)


@settings(max_examples=5, deadline=None)
@given(st.sets(st.integers(2, 30), min_size=2, max_size=3), st.sampled_from([0.8, 0.95, 0.996]))
def test_critical_values_lie_between_quantiles(looks, level):
    """Above the one that would be right if nothing had been spent before, below the one if all were disjoint."""
    looks = tuple(sorted(2 * look for look in looks))
    spent = sequential.spent(np.array(looks) / looks[-1], 1 - level)
    freedom = np.array(looks) - 1
    least = stats.t.isf(spent / 2, freedom)
    most = stats.t.isf(np.diff(spent, prepend=0.0) / 2, freedom)
    critical = np.array(sequential.critical_values(looks, level))
    assert np.all(critical >= least * 0.995) and np.all(critical <= most * 1.005)


def test_a_look_that_may_spend_next_to_nothing_hardly_ever_stops():
    first, second, last = sequential.critical_values([2, 3, 1000], 0.999)
    assert first > 1e20 and second > 1e10 and last == pytest.approx(stats.t.ppf(0.9995, 999))


@pytest.mark.parametrize("looks", [[], [1, 4], [8, 8], [16, 8], [8.5, 16], [8, math.nan], [500, 1001]])
def test_looks_that_are_no_plan(looks):
    with pytest.raises(ValueError, match="ascending whole numbers"):
        sequential.critical_values(looks)
    with pytest.raises(ValueError, match="ascending whole numbers"):
        sequential.Look(tuple(looks), 0)


def test_levels_and_places_that_are_none():
    with pytest.raises(ValueError, match="level"):
        sequential.critical_values(LOOKS, 1.0)
    for place in (-1, 6):
        with pytest.raises(ValueError, match="6 looks"):
            sequential.Look(LOOKS, place)


def test_the_latest_look():
    reached = [sequential.latest([8, 16, 24], replicates) for replicates in (7, 8, 15, 16, 30)]
    assert [look and (look.place, look.replicates) for look in reached] == [None, (0, 8), (0, 8), (1, 16), (2, 24)]


def bayes_factor(t, n, scale):
    """Of an effect N(0, scale²) in deviations against none, from t alone: a mixture of noncentral t densities."""
    prior = functools.partial(stats.norm.pdf, scale=scale)
    density = integrate.quad(
        lambda effect: stats.nct.pdf(t, n - 1, math.sqrt(n) * effect) * prior(effect),
        -8 * scale,
        8 * scale,
        points=[0, t / math.sqrt(n)],
        limit=200,
    )[0]
    return density / stats.t.pdf(t, n - 1)


@pytest.mark.parametrize("n, level, scale", [(8, 0.95, 1.0), (20, 0.95, 0.5), (48, 0.99, 0.3), (100, 0.5, 1.0)])
def test_the_mixture_t_ends_where_its_bayes_factor_is_one_over_alpha(n, level, scale):
    critical = sequential.mixture_t_critical(n, level, scale)
    assert bayes_factor(critical, n, scale) == pytest.approx(1 / (1 - level), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=0, max_size=40), st.floats(0.1, 3), st.floats(-50, 50))
def test_the_mixture_t_interval(values, scale, shift):
    low, high = sequential.mixture_t_interval(values, scale=scale)
    if len(values) < 3 or np.ptp(values) < 1e-6:
        assert (low, high) == (-math.inf, math.inf) or len(values) > 2
        return
    mean, error = np.mean(values), np.std(values, ddof=1) / math.sqrt(len(values))
    half = sequential.mixture_t_critical(len(values), 0.95, scale) * error
    assert (low, high) == pytest.approx((mean - half, mean + half))
    assert sequential.mixture_t_critical(len(values), 0.95, scale) > stats.t.ppf(0.975, len(values) - 1)
    moved = sequential.mixture_t_interval(np.append(np.array(values) + shift, math.nan), scale=scale)
    assert moved == pytest.approx((low + shift, high + shift), abs=1e-6)


def test_the_mixture_t_of_few_or_equal_values_is_no_interval():
    assert sequential.mixture_t_interval([]) == sequential.mixture_t_interval([1.0]) == (-math.inf, math.inf)
    assert sequential.mixture_t_interval([0.1 + 0.2, 0.3] * 20) == (-math.inf, math.inf)
    assert sequential.mixture_t_critical(3) == math.inf
    for arguments in ((0,), (5, 1.0), (5, 0.95, 0.0), (5, 0.95, math.inf)):
        with pytest.raises(ValueError, match="scale"):
            sequential.mixture_t_critical(*arguments)
