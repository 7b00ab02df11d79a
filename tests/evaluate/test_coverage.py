"""Intervals cover what they promise where the truth is known: the simulation of benchmarks/coverage.py, in small."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

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
    monkeypatch.setattr(simulation, "table", lambda studies, seed: [("80 prompts", 0.5, 0.5, 0.95, 0.875)])
    simulation.main(["--studies", "7"])
    assert "| 80 prompts | 0.5 | 0.50 | 95.0 | 87.5 |" in capsys.readouterr().out
