"""Whole studies with the real commands, at the smallest sizes: the default's data, and real preferences."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import in_process
import pytest

from salsa.workflow import compose, plan

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SALSA_TEST_DATA", ROOT.parent / "shared" / "data"))
SMALL = [
    "replicates=[0]",
    "arm=[ppo,salsa]",
    "sft.epochs=1",
    "reward_model.held_out=16",
    "reward_model.epochs=1",
    "reward_model.normalisation_prompts=16",
    "ppo.iterations=2",
    "ppo.batch_size=8",
    "ppo.rollouts_every=1",
    "dpo.pairs=16",
    "dpo.batch_size=8",
    "evaluate.alphas=[0,0.5,1]",
    "report.bootstrap=200",
]


def start(results, *overrides, small=SMALL, output=subprocess.PIPE):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "salsa", "run", f"results={results}", *small, *overrides]
    command += ["--", "--cores", "2", "--directory", str(results.parent)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, text=True)


def run(results, *overrides, small=SMALL):
    process = start(results, *overrides, small=small)
    stdout, stderr = process.communicate(timeout=900)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def study_of(results):
    (folder,) = (path for path in (results / "studies").iterdir() if not path.is_symlink())
    return folder


def test_default_data_from_nothing_to_the_comparison_of_a_sweep(tmp_path):
    results, points = tmp_path / "results", tmp_path / "sweep"
    changes = [f"benchmarks.{name}.prompts=6" for name in ("in_distribution", "out_of_distribution", "two_turn")]
    changes += ["reward_model.pairs=64", "objective.kl_budget=0", "execution.keep_value_models=false"]
    changes += ["+arms.dpo={algorithm: dpo, reference: {kind: ema, rate: 0.3}}"]
    changes += ["+regimes.apart={replicates: [0], disjoint: true, reward_model: {epochs: 1}}"]
    sweep = ["-m", "ppo.learning_rate=1e-4,2e-4", f"hydra.sweep.dir={points}"]
    done = run(results, *sweep, *changes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "gates of tiny-stories-r0" in done.stderr  # on the terminal, not in a log alone
    assert "kl_coef · KL(sft0 ‖ soup) is at most" in done.stderr and "the soup itself, minus sft0" in done.stderr
    found = Counter(path.parent.parent.name for path in results.glob("*/*/manifest.json"))
    assert found["ppo"] == 4 and found["sft"] == 2 and found["reward_model"] == 1 and found["base"] == 1
    for ppo in (results / "ppo").iterdir():
        first = json.loads((ppo / "metrics.jsonl").read_text().splitlines()[0])
        assert (abs(first["kl_to_reference"]) < 1e-3) == ("ref_sft0" in ppo.name)
        assert (ppo / "model").is_dir() and not (ppo / "value_model").exists()
    (dpo,) = (results / "dpo").iterdir()  # of both points
    assert len((dpo / "metrics.jsonl").read_text().splitlines()) == 2 and (dpo / "reference" / "config.json").exists()

    (comparison,) = (path for path in (results / "studies").iterdir() if "-sweep-" in path.name)
    table = rows(comparison / "tables" / "comparison.csv")
    for number, rate in enumerate((1e-4, 2e-4)):
        objective = json.loads((points / str(number) / "objective.json").read_text())
        study = results / "studies" / Path(objective["study"]).name
        check_tables(study)
        (salsa,) = (row for row in table if row["arm"] == "salsa" and float(row["ppo.learning_rate"]) == rate)
        (start,) = (row for row in table if row["arm"] == "sft0" and row["point"] == salsa["point"])
        gained = float(salsa["gold_reward"]) - float(start["gold_reward"])
        assert objective["objective"] == pytest.approx(gained - 0.1 * float(salsa["kl_to_sft0"]), abs=1e-9)
        assert objective["study"].endswith(salsa["study"])

    before = {path: path.stat().st_mtime_ns for path in results.glob("*/*/manifest.json")}
    again = run(results, "ppo.learning_rate=1e-4,2e-4", *changes)  # without Hydra's folders, the same DAG
    assert again.returncode == 0 and "comparison of the sweep" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("*/*/manifest.json")}
    verified = subprocess.run([sys.executable, "-m", "salsa", "verify", str(results)], cwd=ROOT, capture_output=True)
    assert verified.returncode == 0, verified.stdout


def check_tables(study):
    win_rates = rows(study / "tables" / "win_rates.csv")
    pairs = {(row["candidate"], row["baseline"]) for row in win_rates}
    assert pairs == {("ppo", "sft0"), ("salsa", "sft0"), ("salsa", "ppo"), ("dpo", "sft0")}
    assert all(0 <= float(row["adjusted_win_rate"]) <= 1 and row["prompts"] == "6" for row in win_rates)
    manipulation = {row["arm"]: row for row in rows(study / "tables" / "manipulation.csv")}
    assert float(manipulation["ppo"]["manipulation"]) == 0 < float(manipulation["salsa"]["manipulation"])
    assert manipulation["dpo"]["manipulation"] == manipulation["dpo"]["flat"] == ""
    final = [row for row in rows(study / "tables" / "frontier.csv") if row["iteration"] == "2"]
    assert {row["arm"] for row in final} == {"ppo", "salsa", "dpo"}
    assert all(float(row["kl_to_sft0"]) >= 0 for row in final)
    report = (study / "report.md").read_text()
    assert "sample nothing while they are trained have no curve: dpo" in report
    (pair,) = rows(study / "tables" / "pairs.csv")
    assert (pair["regime"], pair["disjoint"], pair["candidate"], pair["baseline"]) == ("apart", "True", "salsa", "ppo")
    assert abs(float(pair["gold_reward"])) < 1 and float(pair["gold_reward_variance"]) >= 0
    assert "1 SFT pair: KL(sft0" in report
    assert not (study / "figures" / "regimes.png").exists()  # one pair makes no map


def preference_files(folder):
    """The files of real preferences where they are, else as many made ones: (training, evaluation)."""
    if (DATA / "ultrafeedback").is_dir():
        return DATA / "ultrafeedback" / "train_1000.jsonl.gz", DATA / "ultrafeedback" / "eval_200.jsonl.gz"
    files = folder / "train.jsonl", folder / "eval.jsonl"
    for file in files:
        with open(file, "w", encoding="utf-8") as out:
            for i in range(400):
                row = {"prompt": f"Tell me about number {i} of the {file.stem} list, please. " * (1 + i % 3)}
                row |= {"chosen": f"Number {i} comes after {i - 1}. " * (1 + i % 4), "rejected": f"I do not know {i}."}
                out.write(json.dumps(row) + "\n")
    return files


def test_given_preferences_with_a_local_model(tmp_path, tiny_chat_model):
    """experiment=smollm2_ultra on a local model: a chat template of its own, long prompts, given pairs, no gold."""
    training, evaluation = preference_files(tmp_path)
    overrides = [
        f"results={tmp_path / 'results'}",
        *SMALL,
        "experiment=smollm2_ultra",
        "model.source=hub",
        f"model.path={tiny_chat_model}",
        "data.task.sft_file=",
        f"data.task.preference_file={training}",
        f"benchmarks.ultrafeedback.file={evaluation}",
        "benchmarks.ultrafeedback.prompts=8",
        "data.task.demonstrations=40",
        "data.task.validation=8",
        "data.task.evaluation=8",
        "lengths.prompt=400",
        "lengths.response=400",
        "reward_model.pairs=24",
        "reward_model.batch_size=8",
        *("sft.batch_size=2", "sft.learning_rate=1e-3", "sft.stop=epochs"),  # or both models may be the base model
        "execution.threads=1",
        "+arms.dpo={algorithm: dpo, reference: {weights: [1/2, 1/2]}}",
        "+arms.best={algorithm: best_of_n}",
        "best_of_n.n=3",
        "+arms.itself={algorithm: none, start: [1/2, 1/2]}",
    ]
    study = study_of(in_process.execute_all(plan.plan(compose.compose(overrides))))
    manipulation = {row["arm"]: row for row in rows(study / "tables" / "manipulation.csv")}
    assert float(manipulation["ppo"]["manipulation"]) == 0 < float(manipulation["salsa"]["manipulation"])
    assert manipulation["dpo"]["manipulation"] == manipulation["dpo"]["flat"] == ""
    final = [row for row in rows(study / "tables" / "frontier.csv") if row["iteration"] == "2"]
    assert {row["arm"] for row in final} == {"ppo", "salsa", "dpo"}
    untrained = [row for row in rows(study / "tables" / "frontier.csv") if row["arm"] in ("best", "itself")]
    assert {(row["arm"], row["iteration"]) for row in untrained} == {("best", "0"), ("itself", "0")}
    assert all(row["gold_reward"] == "" and row["reward"] for row in final + untrained)
    assert [row["n"] for row in rows(study / "tables" / "best_of_n.csv")] == ["2", "4", "8", "16", "32"]
