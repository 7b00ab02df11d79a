"""How a run's processes are started; publishing: what of a study is copied, under which name, what stays behind."""

import errno
import os
import shlex
import shutil
from typing import Any

import pytest
from conftest import EXECUTION

from salsa.workflow import config, jobs, plan, runs, stages, studies

PAGE = """<p>a study</p><script type="application/json" id="reader-data">{"benchmarks": [{"name": "openings", "prompts":
[{"id": "openings-1", "turns": ["a movie that"]}]}], "responses": ["is not bad"]}</script>"""
LAUNCHER = "env TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGHUP,SIGQUIT PET_STANDALONE=1"
STUDY = {"name": "mine", "path": "studies/mine-1", "looks": ["studies/mine-1"], "link": "studies/mine"}
SAMPLES = "# Samples\n\n**openings-1**: a movie that\n\n| sft0 | is **not**: bad |\n"


def study(results, kind, iterations=1):
    """A finished study's folder of three files, and the link of its name to it."""
    values: dict[str, Any] = {"name": "mine", "data": {"task": {"kind": kind}}, "ppo": {"iterations": iterations}}

    def write(settings, parents, output, execution):
        runs.write_atomically(output / "samples.md", SAMPLES)
        runs.write_atomically(output / "report.html", PAGE)
        runs.write_atomically(output / "figures" / "a.png", "png")

    folder = results / "studies" / f"mine-{iterations}"
    runs.execute("study", 1, write, config.StudySettings(values, []), {}, folder, EXECUTION)
    link = results / "studies" / "mine"
    if not link.is_symlink():
        link.symlink_to(folder.name)
    return folder


@pytest.mark.parametrize(
    ("execution", "threads", "launcher"),
    [
        ({}, 3, "python"),
        (
            {"processes": 2},
            6,
            f"python -m salsa.workflow.surroundings 2 {LAUNCHER} accelerate launch "
            f"--config_file {shlex.quote(str(jobs.PROCESSES))} --num_processes 2 --num_machines 1 "
            "--main_process_port 0 "
            "--mixed_precision bf16 --dynamo_backend no",
        ),
        (
            {"accelerate_config": "my fsdp.yaml"},
            3,
            f"python -m salsa.workflow.surroundings 1 {LAUNCHER} accelerate launch "
            "--config_file 'my fsdp.yaml' --num_processes 1 --num_machines 1 "
            "--main_process_port 0 "
            "--mixed_precision bf16 --dynamo_backend no",
        ),
    ],
)
def test_how_processes_are_started(execution, threads, launcher):
    execution = {"threads": 3, "processes": 1, "accelerate_config": "", "gpus": 0} | execution
    run = plan.Run("ppo", "label", "address", {"mixed_precision": "bf16"}, {}, execution)
    assert (jobs.resource(run, "threads"), jobs.launcher(run)) == (threads, launcher)


def test_runs_on_gpus_have_a_lease():
    execution = {"threads": 3, "processes": 2, "accelerate_config": "", "gpus": 2, "memory_mb": 9000}
    ppo, sft, judge, scorer = (
        plan.Run(stage, "label", "address", {"mixed_precision": "no", "judge": {"kind": kind}}, {}, execution)
        for stage, kind in (("ppo", ""), ("sft", ""), ("judge", "gold"), ("judge", "reward_model"))
    )
    launched = "python -m salsa.workflow.gpus 2 python -m salsa.workflow.surroundings 2 "
    launched += f"{LAUNCHER} accelerate launch "
    assert jobs.launcher(ppo).startswith(launched) and jobs.launcher(sft).startswith(launched)
    assert jobs.launcher(scorer) == "python -m salsa.workflow.gpus 1 python"  # which computes on one
    assert jobs.launcher(judge) == "python"
    for name, values in (("threads", (6, 6, 1, 3)), ("memory_mb", (9000, 9000, 2000, 9000)), ("gpus", (2, 2, 0, 1))):
        assert tuple(jobs.resource(run, name) for run in (ppo, sft, judge, scorer)) == values


def test_small_runs_ask_for_little_whatever_the_model(monkeypatch):
    execution = {"threads": 8, "processes": 2, "gpus": 1, "memory_mb": 160000}
    made = {
        (stage, kind): plan.Run(stage, "label", "address", {"judge": {"kind": kind}}, {}, execution)
        for stage, kind in (("prepare", ""), ("study", ""), ("judge", "gold"), ("judge", "openai"), ("ppo", ""))
    }
    asked = [tuple(jobs.resource(run, name) for name in ("threads", "memory_mb", "gpus")) for run in made.values()]
    assert asked == [(1, 4000, 0), (1, 2000, 0), (1, 2000, 0), (1, 2000, 0), (16, 160000, 1)]
    groups = [stages.JUDGE.group(made["judge", kind].settings) for kind in ("gold", "openai")]
    assert groups == ["verdicts", None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    counts = [jobs.gpus_here(plan.Plan("results", {"run": run}, [])) for run in made.values()]
    assert counts == [0, 0, 0, 0, 2]


def test_a_study_is_published_under_its_name(tmp_path):
    study(tmp_path, "stories")
    target = studies.publish(tmp_path / "studies" / "mine")
    assert target == tmp_path / "published" / "mine"
    found = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert found == ["figures/a.png", "manifest.json", "report.html", "samples.md"]
    assert (target / "samples.md").read_text() == SAMPLES
    manifest = runs.read_json(target / "manifest.json")
    assert "host" not in manifest and "command" not in manifest and manifest["settings"]["config"]["name"] == "mine"


def test_an_overridden_study_replaces_none(tmp_path):
    study(tmp_path, "stories")
    first = studies.publish(tmp_path / "studies" / "mine")
    assert studies.publish(study(tmp_path, "stories", iterations=2)) == tmp_path / "published" / "mine-2"
    assert (first / "manifest.json").is_file()


def test_other_peoples_reviews_stay_behind(tmp_path):
    published = studies.publish(study(tmp_path, "reviews"))
    samples = (published / "samples.md").read_text()
    assert "a movie that" not in samples and "**openings-1**" in samples and "is **not**: bad" in samples
    page = (published / "report.html").read_text()
    assert "a movie that" not in page and "openings-1" in page and "is not bad" in page and "<p>a study</p>" in page
    assert {"samples.md", "report.html"} <= set(runs.verify(published)["artefacts"])  # as they are here


def test_an_unfinished_or_altered_study_is_not_published(tmp_path):
    with pytest.raises(runs.UserError, match="no finished study"):
        studies.publish(tmp_path)
    folder = study(tmp_path, "stories")
    (folder / "samples.md").write_text("other")
    with pytest.raises(runs.UserError, match=r"samples\.md"):
        studies.publish(folder)


@pytest.mark.parametrize(("free", "said"), [(100 * 1024, ["the disk is full (100 KiB are free)"]), (2**30, [])])
def test_a_full_disk_is_named_though_the_log_had_no_room(tmp_path, monkeypatch, free, said):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda _: usage._replace(free=free))
    lines = list(jobs.failures(plan.Plan(str(tmp_path))))
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_a_finished_study_is_shown_where_no_link_can_be_made(tmp_path, monkeypatch):
    made = plan.Plan(str(tmp_path), studies=[STUDY])
    runs.write_json(tmp_path / "studies" / "mine-1" / runs.MANIFEST, {})

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(studies.Path, "symlink_to", refuse)
    (line,) = studies.conclude(made)
    assert "studies/mine-1 (not linked as" in line and "Read-only" in line
    monkeypatch.undo()
    (line,) = studies.conclude(made)
    assert line.endswith("studies/mine -> mine-1")
