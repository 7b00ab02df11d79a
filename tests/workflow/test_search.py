"""A search with Optuna, without studies: what is tried after a kill is what would have been tried without one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

pytest.importorskip("optuna", reason="needs the extra optuna")

from hydra.core.plugins import Plugins
from hydra_plugins.hydra_optuna_sweeper import config as of_optuna

from salsa.workflow import multirun, search

SPACE = ["x=interval(0.0,1.0)", "k=choice(1,2,4)", "seed=5"]
GRID = ["x=range(0,5)", "k=choice(1,2,4)", "seed=5"]
SAMPLERS = {
    "tpe": of_optuna.TPESamplerConfig(n_startup_trials=4),
    "cmaes": of_optuna.CmaEsSamplerConfig(),
    "nsgaii": of_optuna.NSGAIISamplerConfig(population_size=4),
    "random": of_optuna.RandomSamplerConfig(),
    "grid": of_optuna.GridSamplerConfig(),
}


class Killed(BaseException):
    """Ends the process at once: no handler sees it."""


class Launcher:
    """Computes points in place of studies; is killed within the batch `killed_at`, and a point of `k=fails` fails."""

    def __init__(self, killed_at=None, fails=None):
        self.batches, self.first, self.killed_at, self.fails = [], [], killed_at, fails

    def launch(self, points, initial_job_idx):
        self.batches.append([list(point) for point in points])
        self.first.append(initial_job_idx)
        if len(self.batches) == self.killed_at:
            raise Killed
        return [self.job(dict(override.split("=") for override in point)) for point in points]

    def job(self, point):
        if point["k"] == self.fails:
            return SimpleNamespace(return_value=None)
        return SimpleNamespace(return_value=float(point["k"]) - (float(point["x"]) - 0.3) ** 2)


def run(folder, launcher, arguments=SPACE, sampler="tpe", seed=3, n_trials=12, n_jobs=3, **settings):
    """Run a search as Hydra does; returns its application."""
    folder.mkdir(exist_ok=True)
    described = OmegaConf.structured(SAMPLERS[sampler])
    if sampler != "grid":
        described.seed = seed
    values = {"direction": "maximize", "storage": None, "study_name": "a", "n_trials": n_trials, "n_jobs": n_jobs}
    values |= {"max_failure_rate": 0.9, "search_space": None, "custom_search_space": None, "params": None} | settings
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}, "sweeper": {"sampler": described}}})
    application = SimpleNamespace(batches=[])
    made = search.Search(sampler=search.instantiate(described), **values)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Plugins.instance(), "instantiate_launcher", lambda **_: launcher)
        made.setup(hydra_context=None, task_function=application, config=config)
    made.sweep(list(arguments))
    return application


def batches(folder, *options, killed_at=None, **more):
    launcher = Launcher(killed_at)
    if killed_at:
        with pytest.raises(Killed):
            run(folder, launcher, *options, **more)
    else:
        run(folder, launcher, *options, **more)
    return launcher.batches


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_goes_on_after_a_kill(tmp_path, sampler):
    options = {"arguments": GRID if sampler == "grid" else SPACE, "sampler": sampler}
    whole = batches(tmp_path / "whole", storage=f"sqlite:///{tmp_path}/whole.db", **options)
    assert [len(batch) for batch in whole] == [3, 3, 3, 3] and len({str(p) for batch in whole for p in batch}) > 8
    assert whole == batches(tmp_path / "memory", **options)
    options |= {"storage": f"sqlite:///{tmp_path}/a.db"}
    begun = batches(tmp_path / "begun", killed_at=3, **options)
    again = batches(tmp_path / "again", killed_at=1, **options)  # and once more before anything has ended
    launcher = Launcher()
    application = run(tmp_path / "ended", launcher, **options)
    assert begun == whole[:3] and again == whole[2:3] and launcher.batches == whole[2:] and launcher.first == [6, 9]
    assert [points for _, points in application.batches] == [[point] for batch in whole[:2] for point in batch]
    results = [(tmp_path / name / "optimization_results.yaml").read_text() for name in ("whole", "memory", "ended")]
    assert results[0] == results[1] == results[2]
    best = OmegaConf.create(results[0])
    values = [Launcher().job(dict(o.split("=") for o in point)).return_value for batch in whole for point in batch]
    assert best.best_value == max(values) and best.best_trial == values.index(max(values))


def killed_in(method, number, tmp_path, monkeypatch):
    """Run a search that is killed where this method comes to this trial. Returns its storage."""
    storage, plain = f"sqlite:///{tmp_path}/a.db", getattr(search.Search, method)

    def killed(self, trial, *arguments):
        if trial.number == number:
            raise Killed
        return plain(self, trial, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search.Search, method, killed)
        with pytest.raises(Killed):
            run(tmp_path / "begun", Launcher(), storage=storage)
    return storage


def test_what_ended_of_a_batch_is_not_run_again(tmp_path, monkeypatch):
    """Killed while the results of a batch were noted: the rest of it runs alone, before anything new is chosen."""
    whole = batches(tmp_path / "whole")
    storage = killed_in("_tell", 4, tmp_path, monkeypatch)
    assert batches(tmp_path / "ended", storage=storage) == [whole[1][1:], *whole[2:]]


def test_what_was_chosen_of_a_batch_is_completed(tmp_path, monkeypatch):
    """Killed while points were chosen: the batch is filled up, as if nothing had been."""
    whole = batches(tmp_path / "whole")
    storage = killed_in("_point", 5, tmp_path, monkeypatch)
    ended = batches(tmp_path / "ended", storage=storage)
    assert [len(batch) for batch in ended] == [3, 3, 3] and ended[0][:2] == whole[1][:2]


def test_trials_that_are_there_are_counted(tmp_path):
    storage = f"sqlite:///{tmp_path}/a.db"
    few, many = batches(tmp_path / "few", n_trials=6, storage=storage), batches(tmp_path / "many")
    assert few + batches(tmp_path / "more", storage=storage) == many
    assert batches(tmp_path / "none", storage=storage) == []


def test_a_trial_that_fails_counts_and_is_said(tmp_path, capsys):
    launcher = Launcher(fails="2")
    run(tmp_path / "a", launcher, n_jobs=12)
    lines = capsys.readouterr().out.splitlines()
    points = launcher.batches[0]
    assert len(points) == len(lines) == 12
    for number, (line, point) in enumerate(zip(lines, points, strict=True)):
        assert line.startswith(f"trial {number}: ") and f" at {point[0]} {point[1]}" in line and "seed=" not in line
        assert ("no objective" in line) == (point[1] == "k=2")
    assert 0 < sum("no objective" in line for line in lines) < 12


@pytest.mark.parametrize(
    ("arguments", "more", "says"),
    [
        (SPACE, {"study_name": None}, "give hydra.sweeper.study_name"),
        ([*SPACE, "y=7"], {}, "holds trials with y=left out, not 7; give the same overrides, or another study_name"),
        ([*SPACE[:2], "seed=6"], {}, "holds trials with seed=5, not 6"),
        (["x=interval(0.0,2.0)", *SPACE[1:]], {}, "holds trials with x=UniformDistribution"),
        (["x=0.5", *SPACE[1:]], {}, "holds trials with x=left out, not 0.5"),
        (SPACE, {"direction": "minimize"}, "Cannot overwrite study direction"),
        (SPACE, {"direction": ["minimize", "maximize"]}, "one objective; give maximize or minimize"),
        (SPACE, {"storage": "sqlite:////nowhere/a.db"}, "unable to open database file"),
        (SPACE, {"storage": "a.db"}, "Could not parse"),
    ],
)
def test_another_search_is_one_line_before_anything_runs(tmp_path, arguments, more, says):
    storage = {"storage": f"sqlite:///{tmp_path}/a.db"}
    run(tmp_path / "first", Launcher(), n_trials=1, **storage)
    launcher = Launcher()
    with pytest.raises(multirun.Refused, match=says.replace("(", r"\(")) as caught:
        run(tmp_path / "second", launcher, arguments, **storage | more)
    assert not launcher.batches and "\n" not in str(caught.value) and str(caught.value).startswith("salsa: ")


def test_without_any_objective_nothing_is_best(tmp_path):
    with pytest.raises(multirun.Refused, match="no trial has an objective"):
        run(tmp_path / "a", Launcher(fails="1"), ["x=interval(0.0,1.0)", "k=choice(1)"], max_failure_rate=1.0)
    assert not Path(tmp_path / "a" / "optimization_results.yaml").exists()
