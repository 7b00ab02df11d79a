"""Variance components and what follows from them, beside naive loops, simulated tables and a search of every design."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from salsa.evaluate import variance
from salsa.evaluate.variance import Cost, Design

TRUE = {
    "replicate": 0.04,
    "seed": 0.09,
    "prompt_replicate": 0.5,
    "prompt_seed": 0.3,
    "response": 1.0,
    "prompt": 0.7,
}
COST = Cost(replicate=3.0, seed=2.0, before=0.001, response=0.004)
ANY = {"replicates": (2, 12), "seeds": (1, 3), "prompts": (1, 40), "responses": (1, 3)}


def simulated(generator, replicates, seeds, prompts, responses, true=TRUE):
    """A table whose components are known; a component that `true` lacks is 0."""
    shapes = {
        "replicate": (replicates, 1, 1, 1),
        "seed": (replicates, seeds, 1, 1),
        "prompt_replicate": (replicates, 1, prompts, 1),
        "prompt_seed": (replicates, seeds, prompts, 1),
        "response": (replicates, seeds, prompts, responses),
        "prompt": (1, 1, prompts, 1),
    }
    return sum(generator.normal(0, math.sqrt(true.get(name, 0)), shape) for name, shape in shapes.items()) + 0.2


def moments(tables):
    """component -> its estimate as it is, below zero too."""
    design = variance.design_of(tables)
    squares = variance.mean_squares(tables)
    factors = variance._factors(design, [table.shape[2] for table in tables], squares)
    return {
        name: sum(factor * squares[key].value for key, factor in factors[name].items())
        for name in variance.separable(design)
    }


def naive(table):
    """The components of one benchmark's table, by loops over its cells and the textbook's sums of squares."""
    R, S, P, J = table.shape

    def mean(r=slice(None), s=slice(None), p=slice(None)):
        return np.mean(table[r, s, p])

    sums = dict.fromkeys(("r", "s", "p", "pr", "ps", "e"), 0.0)
    for r, s, p, j in np.ndindex(R, S, P, J):
        sums["r"] += (mean(r) - mean()) ** 2
        sums["s"] += (mean(r, s) - mean(r)) ** 2
        sums["p"] += (mean(p=p) - mean()) ** 2
        sums["pr"] += (mean(r, p=p) - mean(r) - mean(p=p) + mean()) ** 2
        sums["ps"] += (mean(r, s, p) - mean(r, p=p) - mean(r, s) + mean(r)) ** 2
        sums["e"] += (table[r, s, p, j] - mean(r, s, p)) ** 2
    r, s, p = sums["r"] / (R - 1), sums["s"] / (R * (S - 1)), sums["p"] / (P - 1)
    pr, ps = sums["pr"] / ((P - 1) * (R - 1)), sums["ps"] / (R * (S - 1) * (P - 1))
    e = sums["e"] / (R * S * P * (J - 1))
    return {
        "replicate": (r - s - pr + ps) / (S * P * J),
        "seed": (s - ps) / (P * J),
        "prompt_replicate": (pr - ps) / (S * J),
        "prompt_seed": (ps - e) / J,
        "response": e,
        "prompt": (p - pr) / (R * S * J),
    }


def test_components_are_those_of_naive_loops():
    table = simulated(np.random.default_rng(0), 3, 2, 5, 2)
    expected = naive(table)
    assert moments([table]) == pytest.approx(expected, rel=1e-10)
    estimated = variance.components([table])
    assert {name: c.variance for name, c in estimated.items()} == pytest.approx(
        {name: max(value, 0) for name, value in expected.items()}, rel=1e-10
    )
    assert {name: c.below_zero for name, c in estimated.items()} == {name: x < 0 for name, x in expected.items()}


@pytest.mark.parametrize(
    "shape",
    [
        (6, 3, 20, 2),
        (6, 1, 20, 2),
        (6, 3, 20, 1),
        (6, 1, 20, 1),
        (1, 3, 20, 2),
        (6, 3, 1, 1),
        (6, 3, 1, 2),
        (6, 1, 1, 1),
    ],
)
def test_estimates_are_without_bias_and_hold_what_they_say(shape):
    generator = np.random.default_rng(1)
    tables = [moments([simulated(generator, *shape)]) for _ in range(400)]
    holds = variance.separable(Design(*shape))
    for name, parts in holds.items():
        values = [table[name] for table in tables]
        error = np.std(values) / math.sqrt(len(values))
        assert abs(np.mean(values) - sum(TRUE[part] for part in parts)) < 4 * error


def test_one_of_a_factor_pools_its_component_with_what_it_cannot_be_told_from():
    assert variance.separable(Design(4, 1, 20, 1)) == {
        "replicate": ("replicate", "seed"),
        "prompt_replicate": ("prompt_replicate", "prompt_seed", "response"),
        "prompt": ("prompt",),
    }
    assert variance.separable(Design(1, 1, 20, 2)) == {
        "response": ("response",),
        "prompt": ("prompt_replicate", "prompt_seed", "prompt"),
    }
    assert variance.separable(Design(3, 2, 1, 1)) == {
        "replicate": ("replicate", "prompt_replicate"),
        "seed": ("seed", "prompt_seed", "response"),
    }
    assert variance.separable(Design(1, 1, 1, 1)) == {}
    assert variance.components([np.zeros((1, 1, 1, 1))]) == {}


def test_parts_of_a_replicates_variance_add_up_to_what_replicates_show():
    """At the design that was measured, the components give back the variance over replicates, whatever it is."""
    generator = np.random.default_rng(2)
    tables = [simulated(generator, 5, 2, prompts, 2) for prompts in (7, 12)]
    estimates, design = moments(tables), variance.design_of(tables)
    means = np.mean([table.mean(axis=(1, 2, 3)) for table in tables], axis=0)
    assert variance.replicate_variance(estimates, design) == pytest.approx(means.var(ddof=1), rel=1e-10)


def test_of_several_benchmarks_a_component_is_their_weighted_mean():
    generator = np.random.default_rng(3)
    tables = [simulated(generator, 4, 2, prompts, 2) for prompts in (6, 18)]
    single, together = [moments([table]) for table in tables], moments(tables)
    for name in ("response", "prompt_seed", "prompt_replicate", "prompt"):
        weighted = sum(24 / (4 * p) * values[name] for p, values in zip((6, 18), single, strict=True))
        assert together[name] == pytest.approx(weighted, rel=1e-10)


def test_a_benchmark_of_one_prompt_leaves_policies_means_alone():
    generator = np.random.default_rng(4)
    tables = [simulated(generator, 4, 2, prompts, 1) for prompts in (1, 9)]
    means = np.mean([table.mean(axis=2) for table in tables], axis=0)[:, :, None]
    assert variance.components(tables) == variance.components([means])


def test_intervals_of_components_contain_the_truth_about_as_often_as_they_say():
    generator, inside = np.random.default_rng(5), dict.fromkeys(TRUE, 0)
    for _ in range(300):
        for name, component in variance.components([simulated(generator, 6, 2, 15, 2)]).items():
            inside[name] += component.low <= TRUE[name] <= component.high
    assert all(0.915 * 300 < count < 0.985 * 300 for count in inside.values())  # 95 %, and three standard errors


def test_shares_add_up_and_their_intervals_contain_the_truth_about_as_often_as_they_say():
    shape, names = (8, 2, 15, 2), [name for name in TRUE if name != "prompt"]
    of_mean = variance.parts(TRUE, Design(*shape))
    true = {name: of_mean[name] / sum(of_mean.values()) for name in names}
    generator, covered = np.random.default_rng(4), dict.fromkeys(names, 0)
    for _ in range(200):
        shares = variance.shares([simulated(generator, *shape)])
        assert sum(share for share, _, _ in shares.values()) == pytest.approx(1) and list(shares) == names
        for name, (share, low, high) in shares.items():
            assert 0 <= low <= high <= 1 and 0 <= share <= 1
            covered[name] += low <= true[name] <= high
    assert all(count / 200 > 0.9 for count in covered.values())


def test_shares_are_of_what_is_not_below_zero():
    table = simulated(np.random.default_rng(9), 4, 2, 6, 2, {"response": 1.0})
    estimates = {name: component.variance for name, component in variance.components([table]).items()}
    of_mean = variance.parts(estimates, Design(4, 2, 6, 2))
    shares = variance.shares([table])
    for name, part in of_mean.items():
        assert shares[name][0] == pytest.approx(part / sum(of_mean.values()))
    assert variance.shares([table[:1]]) == {}
    assert all(math.isnan(value) for values in variance.shares([np.ones((3, 1, 4, 1))]).values() for value in values)


def test_the_deviation_is_that_of_replicates_means():
    generator = np.random.default_rng(3)
    tables = [simulated(generator, 5, 2, prompts, 2) for prompts in (4, 9)]
    means = [np.mean([table[r].mean() for table in tables]) for r in range(5)]
    assert variance.deviation(tables) == pytest.approx(np.std(means, ddof=1))
    unclipped = variance.replicate_variance(moments(tables[:1]), Design(5, 2, 4, 2))
    assert variance.deviation(tables[:1]) ** 2 == pytest.approx(unclipped)
    assert math.isnan(variance.deviation([tables[0][:1]]))


def test_an_interval_of_one_mean_square_is_the_chi_square_one():
    low, high = variance.interval([(1.0, variance.MeanSquare(2.0, 7))])
    assert low == pytest.approx(14 / stats.chi2.ppf(0.975, 7), rel=0.03)
    assert high == pytest.approx(14 / stats.chi2.ppf(0.025, 7), rel=0.03)


def test_a_constant_table_has_no_variance():
    components = variance.components([np.full((3, 2, 4, 2), 0.7)])
    assert {c.variance for c in components.values()} == {0.0}
    assert not any(c.below_zero for c in components.values())
    assert {c.high for c in components.values()} == {0.0}


@pytest.mark.parametrize(
    "tables",
    [
        [np.full((2, 2, 2, 2), math.nan)],
        [np.zeros((2, 2, 2, 2)), np.zeros((3, 2, 2, 2))],
        [np.zeros((0, 2, 2, 2))],
        [],
    ],
)
def test_a_table_that_is_none_is_refused(tables):
    with pytest.raises(ValueError, match="finite numbers"):
        variance.components(tables)


def test_the_expected_half_width_is_that_of_simulated_intervals():
    generator, design, widths = np.random.default_rng(6), Design(5, 2, 10, 2), []
    for _ in range(2000):
        means = simulated(generator, 5, 2, 10, 2).mean(axis=(1, 2, 3))
        widths.append(stats.t.ppf(0.975, 4) * means.std(ddof=1) / math.sqrt(5))
    expected = variance.half_width(TRUE, design)
    assert np.mean(widths) == pytest.approx(expected, rel=0.025)
    assert variance.half_width(TRUE, design, new_prompts=True) > expected
    assert variance.half_width(TRUE, Design(1, 2, 10, 2)) == math.inf


def test_a_cost_counts_replicates_seeds_and_answers():
    assert COST.of(Design(4, 2, 100, 3)) == pytest.approx(4 * (3 + 300 * 0.001 + 2 * (2 + 300 * 0.004)))


@pytest.mark.parametrize("budget", [11, 40, 77.7, 10_000])
def test_the_best_design_is_that_of_a_search_through_all(budget):
    everything = (Design(*numbers) for numbers in itertools.product(*(range(a, b + 1) for a, b in ANY.values())))
    widths = {d: variance.half_width(TRUE, d) for d in everything if COST.of(d) <= budget}
    best = variance.best(TRUE, COST, budget, ANY)
    assert best == min(widths, key=lambda design: (widths[design], COST.of(design)))


def test_what_is_not_told_apart_stays_as_it_was_measured():
    ranges = ANY | {"seeds": (1, 1), "responses": (1, 1)}
    best = variance.best({"replicate": 0.1, "prompt_replicate": 0.5}, COST, 60, ranges)
    assert (best.seeds, best.responses) == (1, 1)


def test_a_budget_that_buys_nothing_has_no_design():
    assert variance.best(TRUE, COST, 5, ANY) is None


def test_seeds_pay_where_the_training_seed_is_the_noise_and_a_replicate_is_dear():
    true, dear = {"replicate": 0.001, "seed": 1.0}, Cost(replicate=50.0, seed=1.0, before=0.0, response=0.0)
    best = variance.best(true, dear, 400, ANY)
    assert best.seeds == 3
    gains = {name: gain for name, (_, gain) in variance.an_hour_more(true, dear, Design(5, 1, 10, 1), ANY).items()}
    assert max(gains, key=gains.get) == "seeds"


def test_an_hour_more_buys_whole_steps_of_one_factor():
    design, cost = Design(5, 3, 10, 2), Cost(replicate=3.0, seed=2.0, before=0.001, response=0.01)
    further = variance.an_hour_more(TRUE, cost, design, ANY | {"replicates": (2, 200), "prompts": (1, 10_000)})
    assert set(further) == {"replicates", "prompts", "responses"}  # seeds are at their most
    for factor, (more, gain) in further.items():
        hours = (cost.of(more) - cost.of(design)) / 60
        bigger = dataclasses.replace(more, **{factor: getattr(more, factor) + 1})
        assert hours <= 1 < (cost.of(bigger) - cost.of(design)) / 60 or getattr(more, factor) == ANY[factor][1]
        widths = [variance.half_width(TRUE, d) for d in (design, more)]
        assert gain == pytest.approx(widths[0] - widths[1])
        assert gain > 0


def test_a_step_that_takes_more_than_an_hour_is_one_step():
    design, dear = Design(5, 1, 10, 1), Cost(replicate=90.0, seed=50.0, before=0.0, response=0.0)
    further = variance.an_hour_more(TRUE, dear, design, ANY)
    assert further["replicates"][0] == dataclasses.replace(design, replicates=6)
    assert further["seeds"][0] == dataclasses.replace(design, seeds=2)
    assert further["prompts"][0] == dataclasses.replace(design, prompts=40)  # they cost nothing here
    widths = [variance.half_width(TRUE, d) for d in (design, further["seeds"][0])]
    assert further["seeds"][1] == pytest.approx((widths[0] - widths[1]) / (5 * 50 / 60))


def test_choices_leave_alone_what_the_table_has_one_of():
    assert variance.choices(Design(4, 1, 300, 2), benchmarks=3) == {
        "replicates": (2, 200),
        "seeds": (1, 1),
        "prompts": (300, 6000),
        "responses": (1, 8),
    }
    assert variance.choices(Design(4, 1, 900, 2), benchmarks=3)["prompts"] == (300, 6000)
    assert variance.choices(Design(4, 1, 80, 2), benchmarks=1)["prompts"] == (80, 2000)


def test_a_cost_of_fixed_answers_is_that_of_so_many():
    assert COST.fixed(200).of(Design(4, 2, 7, 3)) == pytest.approx(COST.of(Design(4, 2, 100, 2)))
