"""The workflow on SLURM: what jobs ask for, which share one, and that a lost job or node loses no finished work.

The SLURM is a real one, on this machine (`slurm_cluster`). Most stages are stand-ins that only write a manifest; the
last study is computed.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest
import slurm_cluster
from slurm_cluster import wait_for
from test_study import SMALL as SMALLEST
from test_workflow import ROOT, TINY, Place

from salsa.workflow import compose, config, plan, runs, schema, stages

PROFILE = ROOT / "workflow" / "profiles" / "slurm"
# Of jobs of seconds, on a disk that all nodes share for sure.
QUICK = ["--slurm-init-seconds-before-status-checks=1", "--seconds-between-status-checks=1", "--latency-wait=5"]
PARTITIONS = """
partitions:
  cpu: {max_runtime: 120, max_mem_mb: 500000, max_threads: 8, max_gpu: 0}
  gpu: {max_runtime: 10000, max_mem_mb: 500000, max_threads: 8, max_gpu: 2, available_gpu_models: []}
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = slurm_cluster.missing()
    if reason:
        pytest.skip(reason)
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def warned(slurm, tmp_path_factory):
    """A job that SLURM warns as long before its end as it looks at time limits, every half minute; and its file."""
    file = tmp_path_factory.mktemp("warned") / "signal.txt"
    step = f"bash -c 'trap \"echo TERM > {file}; kill %1; exit 143\" TERM; sleep 600 & wait'"
    return slurm.submit(f"srun {step}", "--time=60", "--signal=TERM@3580"), file


@pytest.fixture
def ended():
    """Processes that are no more when the test ends."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def finish(place, overrides, names):
    """Finish a place's runs of these stages, as its stand-ins would, without a workflow."""
    results = place.folder / "results"
    for path, run in plan.plan(compose.compose([*shlex.split(overrides), f"results={results}"])).runs.items():
        if run.stage in names:
            runs.execute(
                run.stage,
                stages.ALL[run.stage].version,
                lambda settings, parents, output, execution: None,
                schema.from_dict(stages.ALL[run.stage].settings, run.settings),
                {role: results / parent for role, parent in run.parents.items()},
                results / path,
                schema.from_dict(config.Execution, run.execution),
                expected=run.address,
            )


def by_stage(place):
    """{stage: [(SLURM's job, CUDA_VISIBLE_DEVICES) of each run]} of a place of stand-ins."""
    found = defaultdict(list)
    for line in (place.folder / "lent.txt").read_text().splitlines():
        stage, *lent = line.split()
        found[stage].append(tuple(lent))
    return found


def test_what_jobs_ask_for_and_what_becomes_of_lost_ones(slurm, warned, tmp_path, ended):
    place = Place(tmp_path / "place")
    partitions = tmp_path / "partitions.yaml"
    partitions.write_text(PARTITIONS)
    (place.folder / "hold_ppo").touch()
    overrides = f"{TINY} execution.gpus=1 execution.memory_mb=3000 execution.threads=2"
    finish(place, overrides, ["corpus", "prepare", "benchmark", "base", "sft", "reward_model", "landscape", "gates"])
    for stage in ("prepare", "benchmark"):
        shutil.rmtree(place.folder / "results" / stage)
    options = ["--profile", str(PROFILE), *QUICK, "--slurm-partition-config", str(partitions)]
    process = place.start(overrides, *options)
    ended.append(process)

    def held():
        assert process.poll() is None, process.communicate()[0]
        return len(by_stage(place)["ppo"]) == 2 if (place.folder / "lent.txt").exists() else False

    wait_for(held, "two PPO runs")
    first, second = slurm.running("ppo")
    for job in first, second:
        assert (job["gpus"], job["memory"], job["cpus"], job["partition"]) == ("gres:gpu:1", "3000M", "2", "gpu")
    assert {devices for _, devices in by_stage(place)["ppo"]} <= {"0", "1"}

    slurm.cancel(first, "--signal=TERM")  # as it comes before the time limit (below)
    wait_for(lambda: slurm.state(first) == "FAILED", "the end of a signalled job")
    assert (place.folder / "signalled.txt").read_text() == "ppo\n"  # the stage had the signal, and ended by itself
    slurm.node(second["node"], "down")
    others = {first["id"], second["id"]}
    again = wait_for(
        lambda: [j for j in slurm.running("ppo") if j["id"] not in others and j["node"] != second["node"]],
        "a second try",
    )
    assert [job["memory"] for job in again] == ["4500M"]
    slurm.node(second["node"], "resume")
    (place.folder / "hold_ppo").unlink()
    printed, _ = process.communicate(timeout=slurm_cluster.PATIENCE)
    assert process.returncode == 0, printed
    assert "report.md" in printed
    assert [slurm.state(job) for job in (first, second, *again)] == ["FAILED", "COMPLETED", "COMPLETED"]

    lent = by_stage(place)
    assert len(lent["judge"]) == 2 and len({job for job, _ in lent["judge"]}) == 1
    assert len({job for stage in ("prepare", "benchmark") for job, _ in lent[stage]}) == 1
    assert {devices for stage in ("prepare", "judge", "study") for _, devices in lent[stage]} == {"None"}
    rules = {job["id"]: job["partition"] for job in slurm.jobs()}
    assert rules[lent["study"][0][0]] == rules[lent["judge"][0][0]] == "cpu"


def test_a_computed_study_goes_on_from_a_checkpoint(slurm, tmp_path, ended):
    """What comes before PPO is computed here, to save time; from PPO to the report, SLURM runs it."""
    results = tmp_path / "results"
    changes = ["arm=[salsa]", "benchmark=[in_distribution]", "benchmarks.in_distribution.prompts=6"]
    changes += ["reward_model.pairs=64", "ppo.iterations=20", "execution.checkpoint_every=1"]
    changed = {override.split("=")[0] for override in changes}
    others = [override for override in SMALLEST if override.split("=")[0] not in changed]
    others = [override for override in others if not override.startswith("dpo.")]  # which no arm is trained by
    command = [sys.executable, "-m", "salsa", "run", f"results={results}", *others, *changes, "--"]
    command += ["--directory", str(tmp_path), "--cores", "4"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def snakemake(*options):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ended.append(subprocess.Popen([*command, *options], cwd=ROOT, env=environment, **pipes))
        return ended[-1]

    before = snakemake("--until", "gates")
    printed, _ = before.communicate(timeout=slurm_cluster.PATIENCE)
    assert before.returncode == 0, printed
    process = snakemake("--profile", str(PROFILE), *QUICK)

    def saved():
        assert process.poll() is None, process.communicate()[0]
        return list(results.glob("ppo/*/checkpoints/[0-9]*"))

    wait_for(saved, "a checkpoint")
    (job,) = slurm.running("ppo")
    slurm.cancel(job)
    printed, _ = process.communicate(timeout=slurm_cluster.PATIENCE)
    assert process.returncode == 0, printed
    (manifest,) = results.glob("ppo/*/manifest.json")
    (resumed,) = json.loads(manifest.read_text())["summary"]["resumed_at"]
    assert 1 <= resumed < 20
    lines = (manifest.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(20))
    verified = subprocess.run([sys.executable, "-m", "salsa", "verify", str(results)], cwd=ROOT, capture_output=True)
    assert verified.returncode == 0, verified.stdout
    (study,) = (path for path in (results / "studies").iterdir() if not path.is_symlink())
    assert (study / "report.md").is_file()


def test_the_signal_before_the_time_limit_reaches_the_step(slurm, warned):
    job, file = warned
    wait_for(lambda: slurm.state(job) == "FAILED", "the warned job's end")
    assert file.read_text() == "TERM\n"


def test_the_papers_experiment_is_planned_with_the_profile(tmp_path):
    """Without a network and without a cluster: a dry run, with the settings of both profiles."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    place = Place(tmp_path / "place")
    _, printed = place.run("experiment=paper", "--profile", str(PROFILE), "-n")
    jobs = printed.split("\nrule ")
    (sft, *_) = (job for job in jobs if job.startswith("sft:") and "run=llama2_7b" in job)
    for wanted in ("gpu=8", "mem_mb=400000", "runtime=2880", "slurm_extra=--signal=TERM@300"):
        assert wanted in sft
    (respond, *_) = (job for job in jobs if job.startswith("respond:"))
    assert "gpu=1" in respond  # which one process answers
    studies = [job for job in jobs if job.startswith("study:")]
    assert len(studies) == 3 and all("mem_mb=2000" in study and "gpu=" not in study for study in studies)
    assert not place.calls()
