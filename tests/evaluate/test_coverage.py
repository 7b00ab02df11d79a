"""Intervals cover what they promise where the truth is known: the simulations of benchmarks/coverage.py, in small."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from salsa.evaluate import decisions, power, sequential

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "coverage.py"
STUDIES = 400
ERROR = math.sqrt(0.95 * 0.05 / STUDIES)


@pytest.fixture(scope="module")
def simulation():
    specification = importlib.util.spec_from_file_location("coverage_simulation", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("prompts", [80, 200, 500])
@pytest.mark.parametrize("correlation", [0.0, 1.0])
def test_prompts_are_to_be_resampled_not_battles(simulation, prompts, correlation):
    covered, of_battles = simulation.prompt_coverage(prompts, correlation, 0.5, STUDIES, seed=1, resamples=300)
    assert 0.93 - 3 * ERROR < covered < 0.97 + 3 * ERROR
    assert of_battles < covered
    assert correlation == 0 or of_battles < 0.9  # two orders that always agree: the interval is √2 too narrow


@pytest.mark.parametrize("replicates", [3, 5, 10])
def test_replicates_have_a_t_interval(simulation, replicates):
    covered, of_prompts = simulation.replicate_coverage(replicates, 0.5, STUDIES, seed=1, resamples=300)
    assert 0.93 - 3 * ERROR < covered < 0.97 + 3 * ERROR
    assert of_prompts < 0.93


def test_verdicts_have_the_expected_mean_and_agreement(simulation):
    generator = np.random.default_rng(0)
    values = simulation.verdicts(0.4, generator.normal(size=40_000), 1.0, generator)
    assert set(np.unique(values)) == {0, 0.5, 1} and (values[:, 0] == values[:, 1]).all()
    apart = simulation.verdicts(0.4, generator.normal(size=40_000), 0.0, generator)
    assert 0.3 < np.corrcoef(apart.T)[0, 1] < 0.6  # the prompt's effect is half of the variance
    for found in (values, apart):
        assert found.mean() == pytest.approx(simulation.expected(0.4, 2.0), abs=0.01)


def test_the_command_prints_a_table(simulation, capsys, monkeypatch):
    monkeypatch.setattr(simulation, "prompts_table", lambda studies, seed: [("80 prompts", 0.5, 0.5, 0.95, 0.875)])
    simulation.main(["--studies", "7"])
    assert "| 80 prompts | 0.5 | 0.50 | 95.0 | 87.5 |" in capsys.readouterr().out


def test_looks_decide_as_decisions_do(simulation):
    differences = np.random.default_rng(0).normal(0.3, 1, (40, 48))
    looks, critical = simulation.rules()["repeated intervals at 8, 16, …, 48"]
    low, high = simulation.intervals(differences, looks, critical)
    counts = np.zeros(3)
    for study, values in enumerate(differences):
        for place, replicates in enumerate(looks):
            look = sequential.Look(simulation.LOOKS, place)
            decision = decisions.decide(values[:replicates], simulation.DELTA, look=look)
            assert (low[place, study], high[place, study]) == pytest.approx((decision.low, decision.high))
            if decision.verdict != decisions.UNDECIDED or replicates == 48:
                counts += [decision.verdict != decisions.UNDECIDED, decision.low <= 0.1 <= decision.high, replicates]
                break
    _, decided, covered, _, replicates = simulation.looked_at(differences - 0.1, 0.1, looks, critical)
    assert (decided, covered, replicates) == tuple(counts)


@pytest.mark.parametrize("effect", [0.0, 0.25, 0.5])
def test_looking_keeps_its_promise_and_looking_too_often_does_not(simulation, effect):
    studies = 4000
    differences = np.random.default_rng(1).normal(size=(studies, 48))
    shares = {
        name: simulation.looked_at(differences, effect, *rule)[:4] / studies
        for name, rule in simulation.rules().items()
    }
    often, once, repeated, mixture = shares.values()
    error = 3 * math.sqrt(0.95 * 0.05 / studies)
    assert once[3] == pytest.approx(0.95, abs=error) == repeated[3]
    assert mixture[3] > 0.95 and often[3] < 0.8
    assert max(rule[0] for rule in (once, repeated, mixture)) < 0.05 + error
    assert effect == 0.25 or often[0] > 0.09


def test_a_verdict_is_wrong_where_it_says_what_is_not_so(simulation):
    low, high = np.array([0.1, -0.2, -0.2, -0.2]), np.array([0.8, 0.8, 0.3, -0.1])
    assert simulation.wrong(low, high, 0.0, 0.5).tolist() == [True, False, False, True]
    assert simulation.wrong(low, high, 0.25, 0.5).tolist() == [False, False, False, True]
    assert simulation.wrong(low, high, 0.5, 0.5).tolist() == [False, False, True, True]


def test_a_study_s_claims_are_decided_look_by_look_until_all_are(simulation):
    """Against a study at a time: `decisions.decide` at each look, and what all intervals until then have in common."""
    differences = simulation.correlated(simulation.DRAWS["normal"], np.random.default_rng(5), 12) + 0.7
    low, high = simulation.study_intervals(differences)
    ends, level = [], 1 - 0.05 / 6
    for study in range(12):
        bounds = np.array([[-math.inf, math.inf]] * 6)
        end = None
        for place, replicates in enumerate(simulation.LOOKS):
            look = sequential.Look(simulation.LOOKS, place)
            for claim in range(6):
                decision = decisions.decide(differences[claim, study, :replicates], 0.5, level, look)
                bounds[claim] = max(bounds[claim, 0], decision.low), min(bounds[claim, 1], decision.high)
                expected = bounds[claim] if bounds[claim, 0] <= bounds[claim, 1] else [math.nan, math.nan]
                assert [low[place, claim, study], high[place, claim, study]] == pytest.approx(expected, nan_ok=True)
            if end is None and all(decisions.verdict(*each, 0.5) != decisions.UNDECIDED for each in bounds):
                end = place
        ends.append(len(simulation.LOOKS) - 1 if end is None else end)
    assert simulation.stopped(low, high, True).tolist() == ends and len(set(ends)) > 1
    assert set(simulation.stopped(low, high, False)) == {5}


def test_a_study_of_several_claims_keeps_its_promise(simulation):
    studies, shares = 3000, {}
    generator = np.random.default_rng(2)
    differences = simulation.correlated(simulation.DRAWS["normal"], generator, studies)
    assert np.corrcoef(differences[:2].reshape(2, -1))[0, 1] == pytest.approx(0.5, abs=0.01)
    error = 3 * math.sqrt(0.95 * 0.05 / studies)
    for words, effects in simulation.EFFECTS.items():
        for stops in (True, False):
            share = simulation.whole_studies(differences, np.array(effects), stops) / studies
            mistaken, mistaken_claims, covered, *_, replicates = share
            assert mistaken < 0.05 + error and covered > 0.95 - error and mistaken_claims <= mistaken
            assert replicates <= 48 if stops else replicates == 48
            shares[words, stops] = share
    assert shares["2δ", True][-1] < 40  # several claims stop together, later than one alone
    alone = power.power(48, 1.0, 0.5, 0.5, 1 - 0.05 / 6, simulation.LOOKS)
    assert shares["δ", False][3] == pytest.approx(alone.supported, abs=0.02)
    assert shares["0", False][4] == pytest.approx(alone.supported, abs=0.02)


def test_a_floor_never_covers_less(simulation):
    for replicates, share, covered, wrong, with_floor, wrong_with_floor, wider in simulation.floor_table(2000, 0):
        assert with_floor >= covered >= 0.93 and wrong_with_floor <= wrong <= 0.035
        assert wider >= 0 if share else (with_floor, wider) == (covered, 0)
        assert replicates < 16 or wider < 0.15


@pytest.mark.parametrize(
    "part, cell",
    [
        ("looks", "| skewed | t after 48 replicates |"),
        ("claims", "| normal | 0 and 2δ, three each | stops |"),
        ("floor", "| 16 | 0.8 |"),
    ],
)
def test_the_other_tables(simulation, part, cell, capsys):
    simulation.main(["--part", part, "--studies", "50"])
    assert cell in capsys.readouterr().out
