"""`salsa run` as a Hydra application, with a Snakemake that only writes each study's tables; once with the real one."""

import csv
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from salsa.__main__ import main
from salsa.workflow import compose, interrupts, multirun, objectives, overriding, plan, runs
from salsa.workflow.runs import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = ["replicates=[0]", "benchmark=[in_distribution]", "arm=[ppo,salsa]", "kl_coefs=[0.1]"]
FOLDER = "hydra.sweep.dir=sweep"


class Snakemake:
    """Takes the place of `multirun.wait`: plans the points of the command and writes what their studies would hold.

    A study's gold reward is what `gold` makes of its configuration; where that is None, the study fails.
    """

    def __init__(self):
        self.commands, self.points, self.plans = [], [], []
        self.gold = lambda composed: 1e3 * composed.config.ppo.learning_rate

    def __call__(self, command, folder, log=None):
        self.commands.append(command)
        file = json.loads(command[-1].split("=", 1)[1])
        self.points.append(runs.read_json(file))
        composed = compose.compose_points(overriding.read_points(file))
        self.plans.append(plan.plan(composed))
        made = [self.make(plan.plan([values]), values) for values in composed]
        return 0 if all(made) else 1

    def make(self, planned, values):
        gold = self.gold(values)
        if gold is not None:
            folder = Path(planned.results) / planned.studies[0]["path"]
            write_tables(folder, [("sft0", "", 0.25, 0.0), ("ppo", 0.1, 0.5, 2.0), ("salsa", 0.1, 0.25 + gold, 3.0)])
            runs.write_json(folder / runs.MANIFEST, {})
        return gold is not None


def write_tables(folder, rewards, win_rates=()):
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for name, header, rows in (
        ("rewards", ["arm", "kl_coef", "gold_reward", "kl_to_sft0"], rewards),
        ("win_rates", ["benchmark", "judge", "candidate", "baseline", "kl_coef", "adjusted_win_rate"], win_rates),
    ):
        with open(folder / "tables" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Hydra sets the root logger up, on streams that a test captures."""
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]


@pytest.fixture
def snakemake(monkeypatch, tmp_path):
    fake = Snakemake()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multirun, "wait", fake)
    return fake


def objective(folder):
    return runs.read_json(Path(folder) / "objective.json")


def test_a_profile_of_the_projects_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = "workflow/profiles/slurm"
    assert multirun.command(["--profile", profile])[-2:] == ["--profile", str(ROOT / profile)]
    assert multirun.command([f"--profile={profile}"])[-1] == f"--profile={ROOT / profile}"
    (tmp_path / profile).mkdir(parents=True)  # one's own
    assert multirun.command(["--profile", profile, "--quiet"])[-3:] == ["--profile", profile, "--quiet"]


def test_a_sweep_is_one_dag_and_a_folder_for_each_point(snakemake):
    assert main(["run", "-m", *TINY, "ppo.learning_rate=1e-4,2e-4", FOLDER, "--", "--cores", "2"]) == 0
    (command,) = snakemake.commands
    assert command[command.index("--snakefile") + 1] == str(ROOT / "Snakefile")
    assert command[command.index("--cores") + 1] == "2" and "all" not in command
    points = [[*TINY, f"ppo.learning_rate={value}"] for value in ("0.0001", "0.0002")]
    assert snakemake.points == [points]
    for number, value in enumerate((1e-4, 2e-4)):
        own = Path("sweep") / str(number) / ".hydra"
        assert OmegaConf.load(own / "config.yaml").ppo.learning_rate == value
        assert OmegaConf.load(own / "overrides.yaml") == points[number]
        assert OmegaConf.load(own / "hydra.yaml").hydra.job.num == number
        found = objective(f"sweep/{number}")
        assert found["objective"] == pytest.approx(1e3 * value) and found["arm"] == "salsa"
        assert found["study"] == str(Path("results").absolute() / snakemake.plans[0].studies[number]["path"])
    assert Path("sweep/multirun.yaml").is_file()


def test_what_points_share_runs_once(snakemake):
    sweep = ["ppo.learning_rate=1e-4,2e-4", "sft.epochs=range(1,3)"]
    assert main(["run", "hydra.mode=MULTIRUN", *TINY, *sweep, FOLDER]) == 0
    stages = Counter(run.stage for run in snakemake.plans[0].runs.values())
    shared = {"corpus": 1, "prepare": 1, "base": 1, "benchmark": 1}
    epochs = {"sft": 4, "reward_model": 2, "landscape": 2, "gates": 2}
    assert stages == shared | epochs | {"ppo": 8, "respond": 8, "judge": 8, "study": 4, "comparison": 1}
    without = plan.plan(compose.compose([*TINY, *sweep]))  # as `salsa run` and Snakemake's overrides= plan it
    assert without == snakemake.plans[0]
    settings = without.runs[without.comparison].settings
    assert settings["points"][1] == {"ppo.learning_rate": "0.0001", "sft.epochs": "2"}


def test_a_point_that_fails_fails_alone(snakemake, capsys):
    snakemake.gold = lambda composed: None if composed.config.ppo.learning_rate == 1e-4 else 0.5
    assert main(["run", "-m", *TINY, "ppo.learning_rate=1e-4,2e-4", FOLDER]) == 1
    failed = objective("sweep/0")
    assert failed["objective"] is None and "before it" in failed["reason"] and "studies" in failed["study"]
    assert objective("sweep/1")["objective"] == 0.5
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and "salsa: Snakemake ended with 1" in printed


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["ppo.lerning_rate=1e-4,2e-4"], "did you mean ppo.learning_rate"),
        (["model=tiny,foo"], "model=foo: no such preset"),
        (["ppo.mini_batches=1,3"], "ppo.mini_batches=3"),  # the second point's mistake, which Hydra cannot see
        (["+arms.x.foo=1,2"], "arms.x.foo: no such setting"),
        (["objective.arm=other", "seed=0,1"], "objective.arm=other: no arm of this study"),
    ],
)
def test_a_mistake_is_one_line_before_anything_runs(snakemake, capfd, overrides, says):
    assert main(["run", "-m", *TINY, *overrides, FOLDER]) == 1
    assert not snakemake.commands
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "HYDRA_FULL_ERROR" not in line]
    assert len(lines) == 1 and lines[0].startswith("salsa: ") and says in lines[0]


@pytest.mark.parametrize("sweep", [["seed=0,1"], ["hydra/sweeper=optuna", "seed=choice(0,1)"]])
def test_studies_that_end_where_they_are_decided_are_not_swept(snakemake, capfd, sweep):
    if "hydra/sweeper=optuna" in sweep:
        pytest.importorskip("optuna")
    assert main(["run", "-m", *TINY[1:], "replicates=[0,1,2]", "looks=[2,3]", *sweep, FOLDER]) == 1
    assert not snakemake.commands and plan.NOT_COMPARED in capfd.readouterr().err


def test_entries_added_to_typed_dictionaries_are_swept(snakemake):
    assert main(["run", "-m", *TINY, "+arms.x.kl_scale=0.5,0.25", "+arms.x.start=[1/2,1/2]", FOLDER]) == 0
    for number, scale in enumerate((0.5, 0.25)):
        assert OmegaConf.load(f"sweep/{number}/.hydra/config.yaml").arms.x.kl_scale == scale
        overrides = OmegaConf.load(f"sweep/{number}/.hydra/overrides.yaml")
        assert list(overrides) == [*TINY, f"+arms.x.kl_scale={scale}", "+arms.x.start=[1/2,1/2]"]
        settings = OmegaConf.load(f"sweep/{number}/.hydra/hydra.yaml").hydra
        assert f"+arms.x.kl_scale={scale}" in settings.job.override_dirname
    assert len(snakemake.plans[0].studies) == 2


def test_several_batches_are_compared_at_the_end(snakemake):
    assert main(["run", "-m", *TINY, "seed=1,2,3", "hydra.sweeper.max_batch_size=2", FOLDER]) == 0
    assert [len(points) for points in snakemake.points] == [2, 1, 3]
    assert snakemake.plans[2].comparison and runs.read_json("sweep/points.json") == snakemake.points[2]


def test_hydras_basic_launcher_computes_point_by_point(snakemake):
    assert main(["run", "-m", *TINY, "seed=1,2", "hydra/launcher=basic", FOLDER]) == 0
    assert [len(points) for points in snakemake.points] == [1, 1, 2]
    assert objective("sweep/1")["objective"] == pytest.approx(0.2)


def test_one_point_with_a_setting_of_hydra(snakemake):
    assert main(["run", *TINY, "ppo.learning_rate=3e-4", "hydra.run.dir=here"]) == 0
    assert objective("here")["objective"] == pytest.approx(0.3) and len(snakemake.commands) == 1
    assert OmegaConf.load("here/.hydra/config.yaml").ppo.learning_rate == 3e-4


def test_a_dry_run_is_no_failure(snakemake, monkeypatch):
    monkeypatch.setattr(multirun, "wait", lambda command, folder: 0)
    assert main(["run", "-m", *TINY, "seed=1,2", FOLDER, "--", "-n"]) == 0
    assert objective("sweep/0")["reason"] == "Snakemake was not asked to compute it"


def test_results_are_where_snakemake_was_told_to_work(snakemake, monkeypatch):
    Path("there").mkdir()
    seen = []
    monkeypatch.setattr(multirun, "wait", lambda command, folder: seen.append(folder) or snakemake(command, folder))
    here = Path.cwd()
    assert main(["run", "-m", *TINY, "seed=1,2", FOLDER, "--", "--directory", "there"]) == 0
    assert seen == [here] and Path.cwd() == here
    assert Path(objective("sweep/0")["study"]).parts[-4:-2] == ("there", "results")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cfg", "job", "ppo.iterations=7", "+arms.x.kl_scale=0.5"], ["iterations: 7", "  x:\n"]),
        (["--cfg", "job", "--package", "ppo", "ppo.iterations=7"], ["# @package ppo", "iterations: 7"]),
        (["--cfg", "job", "--resolve", "--package", "sft"], ["# @package sft"]),
        (["--cfg", "hydra"], ["hydra_plugins.salsa_launcher.SalsaLauncher", "name: salsa"]),
        (["--cfg", "all", "seed=5"], ["seed: 5", "SalsaLauncher"]),
        (["--help"], ["salsa run: a study", "experiment: algorithms, decisive, default", "ppo:"]),
        (["--hydra-help"], ["hydra/launcher"]),
        (["--info", "plugins"], ["SalsaLauncher", "BasicSweeper"]),
    ],
)
def test_flags_are_hydras(arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "placed"),
    [
        (["seed=1,2", "-m", "~data"], ["seed=1,2", "~data", "hydra/launcher=salsa", "-m"]),
        (["--cfg", "job", "seed=1"], ["seed=1", "hydra/launcher=salsa", "--cfg", "job"]),
        (["--info"], ["hydra/launcher=salsa", "--info"]),
        (["-m", "hydra/launcher=basic"], ["hydra/launcher=basic", "-m"]),
        (
            ["hydra/sweeper=optuna", "hydra.sweeper.direction=minimize", "-m"],
            ["hydra/sweeper=optuna", "hydra.sweeper.direction=minimize", "hydra/launcher=salsa",
             f"hydra.sweeper._target_={multirun.SEARCH}", "hydra.sweeper.max_failure_rate=0.9",
             "hydra.sweeper.sampler.seed=0", "-m"],
        ),
        (
            ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.direction=minimize"],
            ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.direction=minimize",
             "hydra/launcher=salsa", f"hydra.sweeper._target_={multirun.SEARCH}", "hydra.sweeper.max_failure_rate=0.9"],
        ),
    ],
)  # fmt: skip
def test_settings_that_salsa_adds_stand_beside_the_overrides(arguments, placed):
    assert multirun.with_defaults(arguments) == placed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--help", "ppo.foo=1"], "ppo.foo: no such setting"), (["-m", "--cfg", "job"], "Only one of"),
     (["--resolve", "seed=1"], "--resolve")],
)  # fmt: skip
def test_a_mistake_in_flags_is_one_line(arguments, says, capsys):
    assert main(["run", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("salsa: ") and says in line


def test_without_hydras_flags_it_becomes_snakemake(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((program, command)))
    main(["run", "ppo.learning_rate=1e-4,2e-4", "model=tiny", "--", "-n"])
    ((program, command),) = started
    assert program == sys.executable and "-n" in command
    assert json.loads(command[-1].removeprefix("overrides=")) == "ppo.learning_rate=1e-4,2e-4 model=tiny"


OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=3", "ppo.learning_rate=interval(1e-4,1e-3)"]


def test_optuna_maximises_the_objective(snakemake):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    snakemake.gold = lambda composed: -abs(composed.config.ppo.learning_rate - 5e-4)
    assert main(["run", "-m", *TINY, *OPTUNA, "hydra.sweeper.n_trials=4", FOLDER]) == 0
    assert [len(points) for points in snakemake.points] == [2, 2, 4]
    found = [objective(f"sweep/{number}")["objective"] for number in range(4)]
    results = OmegaConf.load("sweep/optimization_results.yaml")
    assert results.best_value == max(found) and len(set(found)) == 4
    best = OmegaConf.load(f"sweep/{found.index(max(found))}/.hydra/config.yaml")
    assert best.ppo.learning_rate == results.best_params["ppo.learning_rate"]


def test_optuna_goes_on_after_a_point_that_fails(snakemake, capsys):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    first = []
    snakemake.gold = lambda composed: (
        None if first == [] and not first.append(composed.config.ppo.learning_rate) else 0.5
    )
    assert main(["run", "-m", *TINY, *OPTUNA, "hydra.sweeper.n_trials=4", FOLDER]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " starts: " in line]
    assert len(lines) == 4 and all(
        re.fullmatch(rf"trial {n} starts: ppo\.learning_rate=[\d.e-]+ \(log: sweep/points-[02]\.log\)", line)
        for n, line in enumerate(lines)
    )
    assert [objective(f"sweep/{number}")["objective"] for number in range(4)] == [None, 0.5, 0.5, 0.5]


SEARCHED = ["ppo.learning_rate=interval(1e-4,1e-3)", "ppo.epochs=choice(1,2,4)"]


def searched(points, snakemake, monkeypatch, folder, *more, killed_at=None):
    """Run a search, until a batch at which it is killed; the points that were tried, in their order."""
    batches = []

    def wait(command, place, log):
        assert log.name.startswith("points") and log.suffix == ".log"
        batches.append(command)
        if len(batches) == killed_at:
            raise Killed
        return snakemake(command, place, log)

    monkeypatch.setattr(multirun, "wait", wait)
    trials, place = f"hydra.sweeper.n_trials={points}", f"hydra.sweep.dir={folder}"
    started = len(snakemake.points)
    arguments = ["run", "-m", *TINY, "hydra/sweeper=optuna", *SEARCHED, trials, place, *more]
    if killed_at:
        with pytest.raises(Killed):
            main(arguments)
    else:
        assert main(arguments) == 0
    return snakemake.points[started:]


class Killed(BaseException):
    """Ends the process at once: no handler sees it."""


def stored(name="a"):
    return ["hydra.sweeper.storage=sqlite:///search.db", f"hydra.sweeper.study_name={name}"]


def test_a_killed_search_goes_on_as_it_would_have_without(snakemake, monkeypatch):
    """The same trials, in the same batches, each in the folder of its number."""
    pytest.importorskip("optuna", reason="needs the extra optuna")
    snakemake.gold = lambda composed: composed.config.ppo.epochs - abs(1e3 * composed.config.ppo.learning_rate - 0.5)
    whole = searched(4, snakemake, monkeypatch, "whole", *stored("whole"))
    assert [len(batch) for batch in whole] == [2, 2, 4]
    begun = searched(4, snakemake, monkeypatch, "begun", *stored(), killed_at=2)
    ended = searched(4, snakemake, monkeypatch, "ended", *stored())
    assert begun + ended == whole
    assert not (Path("begun") / "2").exists() and (Path("ended") / "3" / "objective.json").exists()
    results = [OmegaConf.load(f"{name}/optimization_results.yaml") for name in ("whole", "ended")]
    assert results[0] == results[1] and results[0].best_value == max(
        objective(f"whole/{number}")["objective"] for number in range(4)
    )


def test_a_search_is_seeded_and_says_what_each_trial_came_to(snakemake, monkeypatch, capsys):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    snakemake.gold = lambda composed: (
        1e3 * composed.config.ppo.learning_rate if composed.config.ppo.epochs > 1 else None
    )
    one, other = (searched_points(snakemake, monkeypatch, folder) for folder in ("one", "other"))
    assert one == other != searched_points(snakemake, monkeypatch, "third", "hydra.sweeper.sampler.seed=1")
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"trial \d+: ", line)][:4]
    best = None
    for number, line in enumerate(lines):
        value = objective(f"one/{number}")["objective"]
        values = OmegaConf.load(f"one/{number}/.hydra/config.yaml").ppo
        tried = f"at ppo.learning_rate={values.learning_rate} ppo.epochs={values.epochs}"
        best = max([(value, -number), *([best] if best else [])]) if value is not None else best
        so_far = f"; the best so far: {best[0]:.6g}, of trial {-best[1]}" if best else ""
        came = (
            f"objective {value:.6g}" if value is not None else "no objective (salsa: Snakemake ended with 1 before it)"
        )
        assert line == f"trial {number}: {came} {tried}{so_far}"
    assert any("no objective" in line for line in lines) and any("; the best" in line for line in lines)


def searched_points(snakemake, monkeypatch, folder, *more):
    monkeypatch.setattr(multirun, "wait", snakemake)
    started = len(snakemake.points)
    settings = ["hydra.sweeper.n_trials=4", "hydra.sweeper.max_failure_rate=1", f"hydra.sweep.dir={folder}"]
    main(["run", "-m", *TINY, "hydra/sweeper=optuna", *SEARCHED, *settings, *more])
    return snakemake.points[started:]


def test_optuna_is_told_before_anything_runs_that_there_is_no_objective(snakemake, capsys):
    pytest.importorskip("optuna", reason="needs the extra optuna")
    assert main(["run", "-m", *TINY, *OPTUNA, "objective.measure=win_rate", "judge=[]", FOLDER]) == 1
    assert not snakemake.commands


def test_optuna_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(multirun.importlib.util, "find_spec", lambda name: None)
    assert main(["run", "-m", *OPTUNA]) == 1
    assert capsys.readouterr().err.strip().endswith("pip install -e '.[optuna]'")


def chosen(**changes):
    values = compose.compose([*TINY, *(f"objective.{name}={value}" for name, value in changes.items())])[0]
    return objectives.resolve(values)


def test_default_objective_is_gold_of_salsa():
    found = chosen()
    assert (found["arm"], found["kl_coef"], found["measure"], found["judge"]) == ("salsa", 0.1, "gold_reward", "gold")


def test_objective_of_other_data_and_arms():
    (values,) = compose.compose(["arm=[ppo,other]", "alphas=[0]", "kl_coefs=[0.1,0.05]", "arms.other.kl_coefs=[0.05]"])
    found = objectives.resolve(values)
    assert (found["arm"], found["kl_coef"]) == ("other", 0.05)  # alpha 0 is ppo, and no arm
    values.config.data.task.kind = "ultra"
    assert objectives.resolve(values)["measure"] == "win_rate"
    values.config.judges = {}
    with pytest.raises(UserError, match="no judge"):
        objectives.resolve(values)
    values.config.objective.measure = "gold_reward"
    with pytest.raises(UserError, match="no gold"):
        objectives.resolve(values)
    values.config.objective.measure, values.config.objective.kl_coef = "reward", 0.1
    with pytest.raises(UserError, match="not run at it"):
        objectives.resolve(values)
    values.config.objective.kl_coef = None
    values.config.sft.models = 1
    with pytest.raises(UserError, match="sft1"):
        objectives.resolve(values)


def test_objective_by_hand(tmp_path):
    write_tables(
        tmp_path,
        [("sft0", "", 0.25, 0.0), ("salsa", 0.05, 0.75, 6.0), ("salsa", 0.1, 0.5, 3.0), ("bare", 0.1, 0.5, "")],
        [("a", "gold", "salsa", "sft0", 0.1, 0.75), ("b", "gold", "salsa", "sft0", 0.1, 0.5),
         ("b", "gold", "salsa", "ppo", 0.1, 0.0), ("b", "vader", "salsa", "sft0", 0.1, 0.0),
         ("b", "gold", "salsa", "sft0", 0.05, 0.0)],
    )  # fmt: skip
    wanted = {"arm": "salsa", "kl_coef": 0.05, "measure": "gold_reward", "judge": "gold"}
    wanted |= {"kl_budget": 4.0, "kl_penalty": 0.1}
    found = objectives.read(tmp_path, wanted)
    assert found["objective"] == pytest.approx(0.75 - 0.25 - 0.1 * 2) and found["value"] == 0.5
    assert objectives.read(tmp_path, wanted | {"kl_budget": None})["objective"] == 0.5
    assert objectives.read(tmp_path, wanted | {"kl_coef": 0.1})["penalty"] == 0
    rate = objectives.read(tmp_path, wanted | {"kl_coef": 0.1, "measure": "win_rate"})
    assert rate["objective"] == pytest.approx((0.75 + 0.5) / 2)
    with pytest.raises(UserError, match="no gold_reward of ppo"):
        objectives.read(tmp_path, wanted | {"arm": "ppo"})
    with pytest.raises(UserError, match="no KL"):
        objectives.read(tmp_path, wanted | {"arm": "bare", "kl_coef": 0.1})


def test_the_objective_is_part_of_no_address():
    plain, other = (plan.plan(compose.compose(more)) for more in ([], ["objective.kl_budget=3"]))
    assert list(plain.runs) == list(other.runs) and other.studies[0]["link"] == "studies/default"


@pytest.mark.parametrize(
    ("text", "says"),
    [('{"a": 1}', "not a list"), ("[]", "not a list"), ('["seed=0"]', "not a list"), ("[[1]]", "not a list"),
     ('[["seed=0"', "points.json: not JSON")],
)  # fmt: skip
def test_points_that_are_no_list_of_lists_are_refused(tmp_path, text, says):
    file = tmp_path / "points.json"
    file.write_text(text)
    with pytest.raises(UserError, match=says):
        overriding.read_points(file)


def test_what_sets_points_apart():
    points = [["seed=0", "model=tiny", "+arms.x.kl_scale=1"], ["seed=1", "model=tiny"]]
    assert overriding.labels(points) == [{"seed": "0", "arms.x.kl_scale": "1"}, {"seed": "1"}]
    assert overriding.labels(points[:1]) == [{}]


def test_waiting_returns_the_exit_code(tmp_path):
    assert multirun.wait(["sh", "-c", "exit 3"], tmp_path) == 3
    assert multirun.wait(["sh", "-c", "kill -9 $$"], tmp_path) == 128 + signal.SIGKILL


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["the process", "its group"])
def test_a_signal_ends_the_command_first(tmp_path, number, whom):
    """Both are handed on as SIGTERM; the command itself ignores SIGINT, which a terminal sends to the whole group."""
    ended = tmp_path / "ended"
    child = f"import signal, time, pathlib; signal.signal({signal.SIGTERM:d}, lambda *_: exit(0))\n"
    child += f"import atexit; atexit.register(pathlib.Path({str(ended)!r}).touch)\n"
    child += "pathlib.Path('up').touch()\nwhile True: time.sleep(0.05)"
    process = waiting(tmp_path, child, heed_interrupts)
    send = process.send_signal if whom == "the process" or number == signal.SIGTERM else partial(os.killpg, process.pid)
    send(number)
    assert process.wait(timeout=60) == 128 + number and ended.exists()


def waiting(folder, child, before):
    """A process that waits for a child, which is up, in a group of its own."""
    script = f"from salsa.workflow import multirun; multirun.wait([{sys.executable!r}, '-c', {child!r}], '.')"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=before)
    while not (folder / "up").exists():
        assert process.poll() is None
        time.sleep(0.05)
    return process


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path):
    """As SIGINT is under `nohup … &` in a script."""
    child = "import pathlib, time; pathlib.Path('up').touch()\n"
    child += "while not pathlib.Path('enough').exists(): time.sleep(0.05)"
    process = waiting(tmp_path, child, interrupts.ignore_interrupts)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    (tmp_path / "enough").touch()
    assert process.wait(timeout=60) == 0
