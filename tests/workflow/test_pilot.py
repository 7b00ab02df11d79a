"""What a pilot says of a planned study: needed replicates, their cost, the best design; and of what is no pilot."""

import dataclasses
import json
import math

import pandas as pd
import pytest

from salsa.__main__ import main
from salsa.evaluate import decisions, power, variance
from salsa.report import noise, selection
from salsa.report.sections import allocation
from salsa.report.sections import variance as section
from salsa.workflow import compose, families, pilot, runs
from salsa.workflow.messages import UserError

VARIANCES = {"replicate": 0.0004, "seed": 0.0003, "prompt_replicate": 0.01, "prompt_seed": 0.02, "response": 0.06}
COST = variance.Cost(replicate=3.0, seed=2.0, before=0.0005, response=0.001)


def written(folder, replicates=2, candidate="salsa"):
    """A pilot's folder as far as a plan reads it, whose variances of gold are known, and its first claim's arms."""
    row = {"candidate": candidate, "baseline": "ppo", "of": noise.DIFFERENCE, "measure": "gold_reward"}
    row |= {"benchmark": noise.MEAN, "replicates": replicates, "seeds": 2, "prompts": 600, "responses": 2}
    rows = [row | {"component": name, "variance": value, "benchmarks": 3} for name, value in VARIANCES.items()]
    rows += [each | {"benchmark": "out_of_distribution", "prompts": 200, "benchmarks": 1} for each in rows]
    rows += [each | {"of": "ppo", "variance": 9.9} for each in rows]
    costs = {allocation.COSTS[name]: getattr(COST, name) for name in allocation.COSTS} if replicates > 1 else {}
    runs.write_atomically(folder / "manifest.json", json.dumps({"stage": "study"}))
    for name, frame in (
        ("variance", pd.DataFrame(rows, columns=section.COLUMNS)),
        ("allocation", pd.DataFrame([costs] if costs else [], columns=allocation.COLUMNS)),
    ):
        runs.write_atomically(folder / "tables" / f"{name}.csv", frame.to_csv(index=False))
    return folder


def planned(*overrides):
    return compose.compose(list(overrides))[0]


@pytest.fixture
def folder(tmp_path):
    return written(tmp_path / "pilot")


def test_needed_replicates_are_those_of_the_deviation_at_the_planned_design(folder):
    composed = planned("ppo.seeds=3", "evaluate.samples=4")
    needs = pilot.forecast(folder, composed).needs.set_index("claim")
    prompts = sum(benchmark.prompts for benchmark in composed.config.benchmarks.values())
    v = VARIANCES
    expected = v["replicate"] + v["seed"] / 3 + v["prompt_replicate"] / prompts
    expected += v["prompt_seed"] / (3 * prompts) + v["response"] / (3 * 4 * prompts)
    row = needs.loc["higher_gold"]
    assert row["deviation"] == pytest.approx(math.sqrt(expected))
    arms = composed.arms.keys()
    family = [c for c in composed.config.claims.values() if {c.candidate, c.baseline} <= arms]
    family = [c for c in family if c.measure != "matched_gold"]  # which takes two kl_coefs
    assert row["level"] == decisions.family_level(len(family)) and row["degrees_of_freedom"] == 1
    needed = power.needed(math.sqrt(expected), 1, row["smallest_effect"], row["level"], 0.9)
    assert tuple(row[["replicates_90", "replicates_90_low", "replicates_90_high"]]) == needed
    answers = prompts * 4
    minutes = needed.replicates * (3 + answers * 0.0005 + 3 * (2 + answers * 0.001))
    assert row["core_hours_90"] == pytest.approx(minutes / 60)


def test_the_best_design_is_that_of_the_budget(folder):
    composed = planned()
    (_, line) = pilot.forecast(folder, composed, budget=300).lines
    ranges = variance.choices(variance.Design(2, 2, 600, 2), benchmarks=3)
    level = decisions.family_level(len(families.planned(composed)))
    best = variance.best(VARIANCES, COST, 300, ranges, level)
    half = selection.number(variance.half_width(VARIANCES, best, level))
    assert f"{allocation.in_words(dataclasses.asdict(best))}: ±{half}" in line and line.startswith("For gold reward, ")
    assert "the budget buys no two replicates" in pilot.forecast(folder, composed, budget=5).lines[-1]


def test_a_claim_that_the_pilot_does_not_measure_is_named(folder):
    line = pilot.forecast(folder, planned()).lines[0]
    assert line.startswith("the pilot says nothing of ") and "larger_kl" in line and "higher_gold" not in line


def test_data_without_gold_are_forecast_by_win_rates(folder):
    path = folder / "tables" / "variance.csv"
    path.write_text(path.read_text().replace("gold_reward", "win_rate"))
    composed = planned()
    claims = composed.config.claims
    claims["higher_gold"].win_rate_without_gold = 0.04
    needs = pilot.forecast(folder, composed).needs.set_index("claim")
    assert needs.loc["higher_gold", ["of", "smallest_effect"]].tolist() == ["win_rate", 0.04]


def test_what_has_no_spread_needs_no_number(folder):
    path = folder / "tables" / "variance.csv"
    frame = pd.read_csv(path)
    frame["variance"] = 0.0
    path.write_text(frame.to_csv(index=False))
    forecast = pilot.forecast(folder, planned())
    assert forecast.needs["replicates_80"].isna().all()
    assert forecast.as_dict()["needs"][0]["replicates_80"] is None


def test_what_no_planned_look_decides_is_said_with_what_would(folder):
    composed = planned("replicates=[0,1]", "looks=[2]")
    forecast = pilot.forecast(folder, composed)
    row = forecast.needs.set_index("claim").loc["higher_gold"]
    assert row["replicates_80"] == math.inf
    once = [power.needed(row["deviation"], 1, 0.01, row["level"], share).replicates for share in (0.8, 0.9)]
    assert row[["replicates_80_once", "replicates_90_once"]].tolist() == once
    hours = once[0] * row["core_hours_90_once"] / once[1]
    assert row["core_hours_80_once"] == pytest.approx(hours)
    (said,) = [line for line in forecast.lines if line.startswith("higher_gold: ")]
    assert f"no planned look has 80 % power; a study that is looked at once takes {once[0]} for 80 % (" in said
    assert f" core-hours) and {once[1]} for 90 % (" in said
    cells = [list(column.cells) for column in forecast.table().columns]
    assert any(cell.startswith("> 2") for cell in cells[4]) and "?" in cells[6][0]
    assert forecast.as_dict()["needs"][0]["replicates_80"] is None


def test_arms_of_the_first_replicates_have_their_last_look_there():
    composed = planned("replicates=[0,1,2,3]", "looks=[2,4]", "arm=[ppo,salsa,other]", "arms.other.replicates=2")
    claims = composed.config.claims
    assert pilot._looks(composed, claims["soup_not_other"]) == [2]
    assert pilot._looks(composed, claims["higher_gold"]) == [2, 4]
    composed.config.looks = []
    assert pilot._looks(composed, claims["soup_not_other"]) is None


def test_the_command_says_it(folder, capsys):
    assert main(["plan", "--pilot", str(folder), "--budget", "300"]) == 0
    said = capsys.readouterr().out
    assert "higher_gold" in said and "For gold reward, the next hour of a core buys most as" in said
    assert main(["plan", "--pilot", str(folder), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["pilot"]
    assert told["study"] == "default" and told["needs"][0]["replicates_80"] > 1


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda path: path, "no finished study; give a pilot's folder"),
        (lambda path: written(path, replicates=1), "a pilot needs two replicates"),
        (lambda path: written(path, candidate="nobody"), "measured none of the study's claims"),
    ],
)
def test_what_is_no_pilot_is_refused_in_one_line(tmp_path, make, said):
    with pytest.raises(UserError) as caught:
        pilot.forecast(make(tmp_path / "pilot"), planned())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_budget_alone_is_refused(capsys):
    assert main(["plan", "--budget", "300"]) == 1
    assert "--budget: is what the best design may cost" in capsys.readouterr().err
