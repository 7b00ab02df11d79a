"""A study of two training seeds and two responses a prompt, from nothing: every stage in this process."""

import csv

import in_process
import pytest
from test_study import SMALL

from salsa.report import style
from salsa.workflow import compose, plan, runs

CHANGES = ["benchmark=[in_distribution]", "benchmarks.in_distribution.prompts=5", "data.task.evaluation=6",
           "data.task.demonstrations=100", "data.task.validation=8", "reward_model.pairs=64", "evaluate.samples=2",
           "ppo.seeds=2", "execution.keep_value_models=false"]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(plan, results) of the study, every run of which has been executed; no figure is rendered."""
    root = tmp_path_factory.mktemp("study")
    small = [override for override in SMALL if not override.startswith("dpo.")]
    made = plan.plan(compose.compose([f"results={root / 'results'}", *small, *CHANGES]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(style, "save", in_process.without_pictures)
        return made, in_process.execute_all(made)


def study_of(made):
    (study,) = (run for run in made.runs.values() if run.stage == "study")
    return study


def members(finished, arm):
    """(training seed, the study's parents of that policy by their stage) of an arm's policies."""
    made, results = finished
    study = study_of(made)
    for member in study.settings["policies"]:
        if member["arm"] == arm:
            roles = {"policy": "policy", "respond": "respond", "judge": "judge/gold"}
            folders = {
                name: results / study.parents[f"{role}/{member['index']}"]
                for name, role in roles.items()
                if f"{role}/{member['index']}" in study.parents
            }
            yield member, folders


def test_each_seed_is_trained_from_the_same_models_with_other_noise(finished):
    made, _ = finished
    assert sum(run.stage == "ppo" for run in made.runs.values()) == 4
    assert sum(run.stage in ("sft", "reward_model", "landscape") for run in made.runs.values()) == 4
    for arm in ("ppo", "salsa"):
        (first, ours), (second, theirs) = members(finished, arm)
        assert (first["seed"], second["seed"]) == (0, 1) and first["name"] == second["name"]
        responses = [[row["response"] for row in runs.read_jsonl(folders["policy"] / "rollouts.jsonl")]
                     for folders in (ours, theirs)]  # fmt: skip
        assert len(responses[0]) == len(responses[1]) and responses[0] != responses[1]


def test_every_model_answers_each_prompt_twice(finished):
    made, results = finished
    (landscape,) = (results / path for path, run in made.runs.items() if run.stage == "landscape")
    files = [landscape, *(folders["respond"] for arm in ("ppo", "salsa") for _, folders in members(finished, arm))]
    for folder in files:
        by_model = {}
        for row in runs.read_jsonl(folder / "responses.jsonl"):
            by_model.setdefault(row["model"], []).append((row["prompt_id"], row["sample"]))
        for places in by_model.values():
            assert len(set(places)) == len(places) == 10 and {sample for _, sample in places} == {0, 1}
    for folder in files[1:]:
        rows = runs.read_jsonl(folder / "evaluation.jsonl")
        summary = runs.read_json(folder / "evaluation.json")
        assert len(rows) == 12 and summary["prompts"] == 6
        for name, column in (("reward", "reward"), ("gold_reward", "gold"), ("kl_to_sft0", "kl_to_sft0")):
            assert summary[name] == pytest.approx(sum(row[column] for row in rows) / 12, rel=1e-9, abs=1e-12)


def test_the_win_rate_of_the_study_is_that_of_a_loop(finished):
    _, results = finished
    (folder,) = (path for path in (results / "studies").iterdir() if not path.is_symlink())
    with open(folder / "tables" / "win_rates.csv", newline="", encoding="utf-8") as file:
        rows = {(row["candidate"], row["baseline"]): row for row in csv.DictReader(file)}
    scores = {}
    for member, folders in members(finished, "salsa"):
        for line in runs.read_jsonl(folders["judge"] / "verdicts.jsonl"):
            if line["model_b"] == member["baselines"]["ppo"]:
                assert line.get("seed", 0) == member["seed"]
                value = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[line["winner"]]
                scores.setdefault(line["prompt_id"], []).append(value)
    assert len(scores) == 5 and {len(values) for values in scores.values()} == {2 * 2 * 2}  # seeds, samples, orders
    rate = sum(sum(values) / len(values) for values in scores.values()) / len(scores)
    assert float(rows["salsa", "ppo"]["adjusted_win_rate"]) == pytest.approx(rate, rel=1e-12)
    assert rows["salsa", "ppo"]["prompts"] == "5" and rows["salsa", "ppo"]["replicates"] == "1"


def test_a_verdict_is_on_responses_of_one_seed_and_sample(finished):
    """Gold decides by the scores that stand in the files of the two policies of that seed."""
    answers = {}
    for arm in ("ppo", "salsa"):
        for member, folders in members(finished, arm):
            for row in runs.read_jsonl(folders["respond"] / "responses.jsonl"):
                answers[member["name"], member["seed"], row["prompt_id"], row["sample"]] = row["gold"]
    for member, folders in members(finished, "salsa"):
        for line in runs.read_jsonl(folders["judge"] / "verdicts.jsonl"):
            if line["model_b"] != "sft0":
                place = member["seed"], line["prompt_id"], line["sample"]
                ours, theirs = answers[line["model_a"], *place], answers[line["model_b"], *place]
                winner = "tie" if abs(ours - theirs) <= 1e-9 else "model_a" if ours > theirs else "model_b"
                assert line["winner"] == winner
