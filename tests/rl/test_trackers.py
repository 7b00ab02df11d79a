"""Trackers show the numbers of metrics.jsonl under the names that people gave, and a run that goes on no step twice."""

import dataclasses
import os
import sys
from types import SimpleNamespace

import pytest
from accelerate import PartialState
from conftest import EXECUTION

from salsa import sft
from salsa.rl import trackers, trainer
from salsa.workflow import command, compose, config, plan, runs

NAMED = "salsa, kl_coef 0.1, replicate 0"
TENSORBOARD = dataclasses.replace(EXECUTION, trackers=["tensorboard"], checkpoint_every=2)


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setenv(runs.RUN_NAME, NAMED)
    monkeypatch.setenv(runs.STUDY_NAME, "default")
    PartialState(cpu=True)  # as in every stage that trains


def scalars(folder):
    """Name -> (step, value) of each event in a TensorBoard run, in their order."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra trackers"
    )
    events = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


class Killed(BaseException):
    """Ends the process at once: no handler sees it."""


def kill_after(monkeypatch, step):
    log = trackers.Trackers.log

    def killed(self, metrics, at):
        log(self, metrics, at)
        if at == step:
            raise Killed

    monkeypatch.setattr(trackers.Trackers, "log", killed)


def settings_of_ppo():
    section = config.ALGORITHMS["ppo"](iterations=5, batch_size=8, epochs=1, mini_batches=1)
    reference = config.Reference("soup", ["1/2", "1/2"])
    return config.TRAINING["ppo"](3, 0.1, ["1"], reference, section, config.Lengths(64, 8))


def test_ppo_logs_its_metrics_once_though_it_was_killed(parents, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs the extra trackers")
    with monkeypatch.context() as patch:
        kill_after(patch, 3)  # the last checkpoint is that before iteration 2
        with pytest.raises(Killed):
            trainer.train(settings_of_ppo(), parents, tmp_path, TENSORBOARD)
    assert [row["iteration"] for row in runs.read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    summary = trainer.train(settings_of_ppo(), parents, tmp_path, TENSORBOARD)
    assert summary["resumed_at"] == [2]
    metrics, found = runs.read_jsonl(tmp_path / "metrics.jsonl"), scalars(tmp_path / runs.TRACKERS / NAMED)
    measured = [name for name in metrics[0] if not name.startswith("seconds") and name != "peak_memory_mib"]
    assert found.keys() == metrics[0].keys() and len(measured) > 15
    for name in measured:
        assert [step for step, _ in found[name]] == [0, 1, 2, 3, 4]
        assert [value for _, value in found[name]] == pytest.approx([row[name] for row in metrics], rel=1e-6), name
    assert not set(runs.artefacts(tmp_path)) & {path.name for path in (tmp_path / runs.TRACKERS).rglob("*")}


def test_sft_logs_what_its_history_says(prepare_run, base_run, tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra trackers")
    chosen = config.Sft(epochs=2, batch_size=16, learning_rate=5e-3)
    settings = config.SftSettings(1, chosen, config.Lengths(64, 44))
    sft.train(settings, {"prepare": prepare_run, "base": base_run}, tmp_path, TENSORBOARD)
    history, found = runs.read_json(tmp_path / "log_history.json"), scalars(tmp_path / runs.TRACKERS / NAMED)
    for name in ("eval_loss", "eval_entropy", "train_loss"):
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in history if name in row]
        assert expected and found[name] == expected


class Wandb(SimpleNamespace):
    """Stands for the package: keeps what runs were begun with, and what was logged, by the run's id."""

    def __init__(self):
        super().__init__(begun=[], logged={}, finished=0, config=SimpleNamespace(update=self._update), settings=[])

    def _update(self, values, allow_val_change):
        self.settings.append(values)

    def init(self, **options):
        self.begun.append(options)
        lines = self.logged.setdefault(options["id"], [])
        finish = lambda: setattr(self, "finished", self.finished + 1)  # noqa: E731
        return SimpleNamespace(log=lambda values, step: lines.append((step, values)), finish=finish)


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first, last in ((0, 6), (4, 9)):  # killed after step 6, and gone on with from step 4
        tracked = trackers.Trackers(["wandb"], tmp_path, {"ppo": {"epochs": 2}})
        for step in range(first, last + 1):
            tracked.log({"score": step / 2}, step)
    tracked.finish()
    tracked.log({"score": 0.0}, 99)  # nothing is open
    (name,) = fake.logged
    assert fake.logged[name] == [(step, {"score": step / 2}) for step in range(10)]
    options = {"name": NAMED, "id": name, "resume": "allow", "group": "default", "project": "salsa"}
    assert fake.begun == [options | {"dir": str(tmp_path / runs.TRACKERS)}] * 2
    assert fake.finished == 1 and fake.settings == [{"ppo": {"epochs": 2}}]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    trackers.Trackers(["wandb"], tmp_path / "another", {})
    assert len(fake.logged) == 2 and fake.begun[-1]["project"] == "mine"


def test_the_real_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 2):
        tracked = trackers.Trackers(["wandb"], tmp_path, {"seed": 1})
        for step in range(first, 4):
            tracked.log({"score": step / 2}, step)
        tracked.finish()
    name = (tmp_path / runs.TRACKERS / trackers.RUN_ID).read_text()
    assert len(list((tmp_path / runs.TRACKERS / "wandb").glob(f"offline-run-*-{name}"))) == 2


def test_only_the_first_process_logs_and_nothing_without_trackers(tmp_path):
    for names, writes in ((["tensorboard"], False), ([], True)):
        tracked = trackers.Trackers(names, tmp_path, {}, writes)
        tracked.log({"score": 1.0}, 0)
        tracked.finish()
    assert not list(tmp_path.iterdir())


def test_runs_have_the_names_of_people(tmp_path, monkeypatch):
    """In the environment of the stage, and in a folder that TensorBoard reads."""
    overrides = [f"results={tmp_path}", "kl_coefs=[0.1,0.3]", "arm=[ppo,salsa]", "execution.trackers=[tensorboard]"]
    planned, found = plan.plan(compose.compose(overrides)), {}
    for path, run in planned.runs.items():
        if run.stage in ("sft", "ppo") and run.replicate == 0:
            command._name(planned, path)
            command._name(planned, path)  # again, where it goes on
            found[os.environ[runs.RUN_NAME]] = path
            assert os.environ[runs.STUDY_NAME] == planned.studies[0]["name"]
    policies = {f"{arm}, kl_coef {k}, replicate 0" for arm in ("ppo", "salsa") for k in ("0.1", "0.3")}
    assert policies | {"sft0, replicate 0", "sft1, replicate 0"} <= found.keys()
    links = tmp_path / runs.TRACKERS / planned.studies[0]["name"]
    assert {link.name for link in links.iterdir()} == found.keys()
    for name, path in found.items():
        (tmp_path / path / runs.TRACKERS / name).mkdir(parents=True)
        assert (links / name).resolve() == (tmp_path / path / runs.TRACKERS / name).resolve()
