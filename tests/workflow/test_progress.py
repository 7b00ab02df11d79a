"""Where runs stand, by results folders made for it: finished, running, failed, stopped, waiting; and what is left."""

import json
import random
import re

import pytest
from filelock import FileLock

from salsa.workflow import compose, durations, plan, progress, runs
from salsa.workflow.progress import DONE, FAILED, RUNNING, STOPPED, WAITING

TINY = ["replicates=[0,1]", "benchmark=[in_distribution]", "arm=[ppo,salsa]"]


def planned(folder, *overrides):
    given = {override.split("=")[0] for override in overrides}
    usual = [override for override in TINY if override.split("=")[0] not in given]
    return plan.plan(compose.compose([f"results={folder}", *usual, *overrides]))


@pytest.fixture
def study(tmp_path):
    return planned(tmp_path / "results")


def finish(study, path, seconds=10.0, job=None, **more):
    """Let a run look finished."""
    folder, run = progress.Path(study.results) / path, study.runs[path]
    runs.write_json(
        folder / runs.MANIFEST, {"stage": run.stage, "settings": run.settings, "wall_seconds": seconds, **more}
    )
    if job is not None:
        (folder / "benchmark.tsv").write_text(f"s\th:m:s\tmax_rss\n{job}\t0:00:10\t100\n")


def begin(study, path, log, rows=()):
    """Let a run look begun; returns its folder."""
    folder = progress.Path(study.results) / path
    runs.write_atomically(folder / "log.txt", log)
    runs.write_atomically(folder / "checkpoints" / "address", study.runs[path].address)
    if rows:
        runs.write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def of(study, stage):
    return [path for path, run in study.runs.items() if run.stage == stage]


def test_a_new_study_waits_and_nothing_is_known_of_its_duration(study):
    picture = progress.Watch(study).look()
    assert picture.count() == picture.count(WAITING) == len(study.runs)
    assert picture.left is None and "ppo" in picture.unknown
    assert not progress.Path(study.results).exists()  # nothing was written


def test_each_state_is_told_from_the_others(study):
    finish(study, of(study, "corpus")[0])
    running, failed, stopped, other = of(study, "sft")
    for path, log in (
        (failed, "Loading\nTraceback …\nsft was told\nUserError: sft was told to fail\n"),
        (stopped, "sft:   0%|  | 0/50\rsft:  14%|█▍ | 7/50 [00:05<00:33]"),
    ):
        begin(study, path, log)
    with FileLock(begin(study, running, "Loading\n") / ".lock"):
        picture = progress.Watch(study).look()
    states = {run.path: run for run in picture.runs}
    assert [states[path].state for path in (running, failed, stopped, other)] == [RUNNING, FAILED, STOPPED, WAITING]
    assert states[failed].reason == "UserError: sft was told to fail"
    assert picture.stages()["sft"] == {RUNNING: 1, FAILED: 1, STOPPED: 1, WAITING: 1}
    assert picture.count(DONE) == 1 and 0 <= states[running].seconds < 60
    assert {run.path: run for run in progress.Watch(study).look().runs}[running].state == STOPPED  # the lock is gone


@pytest.mark.parametrize(
    "line",
    [
        "python -m salsa.sft: results/sft: the disk is full; free some of it and run again",
        "salsa: no further thread or process may be started",
        "RuntimeError: shapes differ",
        "torch.OutOfMemoryError: CUDA out of memory",
        "KeyError: 'x'",
    ],
)
def test_the_last_line_of_an_error_is_one(line):
    assert progress.ERROR.match(line)
    assert not progress.ERROR.match("sft:  14%|█▍ | 7/50 [00:05<00:33]")


def test_what_failed_before_only_waits_when_its_jobs_are_run_again(study):
    path = of(study, "sft")[0]
    begin(study, path, "UserError: no\n")
    watch = progress.Watch(study)
    watch.since = 0.0
    assert watch.look().count(FAILED) == 0
    watch.job_started(path)
    assert [run.path for run in watch.look().of(RUNNING)] == [path]  # though it holds no lock yet
    watch.job_failed(path, "UserError: no")
    assert [run.path for run in watch.look().of(FAILED)] == [path]
    watch.job_started(path)
    assert watch.look().count(FAILED) == 0
    finish(study, path, 1.0)
    assert 0 <= watch.job_finished(path) < 60 and watch.look().count(DONE) == 1


def test_a_job_that_waits_in_a_cluster_s_queue_only_waits(study):
    path = of(study, "sft")[0]
    watch = progress.Watch(study, (10, 0), by_job=True)
    watch.since = 0.0
    watch.job_started(path)
    assert watch.look().count(RUNNING) == 0
    watch.job_finished(path)
    finish(study, path, 7.0)
    assert watch.look().count(DONE) == 1 and watch.durations.of(study.runs[path]) == 7.0  # not what it waited


def test_a_running_policy_says_its_iteration_score_and_kl(study):
    path = of(study, "ppo")[0]
    rows = [
        {"iteration": i, "score": 0.1 * i, "kl_to_reference": 0.5 * i, "kl_to_sft0": 9.0, "seconds": 2.0}
        for i in range(7)
    ]
    folder = begin(study, path, "", rows)
    with FileLock(folder / ".lock"):
        (run,) = progress.Watch(study).look().of(RUNNING)
    assert (run.iteration, run.iterations, run.kl) == (7, 50, 3.0) and run.score == pytest.approx(0.6)
    assert run.left == pytest.approx(43 * 2.0)


def test_of_a_file_that_is_long_or_cut_the_last_whole_rows_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert progress.last_rows(path) == []
    rows = [{"iteration": i, "text": "x" * 1000} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 2')
    found = progress.last_rows(path)
    assert found[-1] == rows[-1] and 50 < len(found) < 70 and found == rows[-len(found) :]


def test_runs_have_the_names_that_people_gave(study):
    names = progress.names(study)
    assert names[of(study, "ppo")[0]] == "ppo, kl_coef 0.3, replicate 0"
    for stage in ("ppo", "respond", "judge"):
        expected = {f"{arm}, kl_coef 0.3, replicate {number}" for arm in ("ppo", "salsa") for number in (0, 1)}
        assert {names[path] for path in of(study, stage)} == expected
    assert {names[path] for path in of(study, "sft")} == {f"sft{i}, replicate {r}" for i in (0, 1) for r in (0, 1)}
    assert {names[path] for path in of(study, "landscape")} == {"replicate 0", "replicate 1"}
    assert names.keys() == study.runs.keys() and not any(re.search("[0-9a-f]{12}", name) for name in names.values())


def test_training_seeds_and_points_of_a_sweep_are_named_where_they_differ(tmp_path):
    sweep = planned(tmp_path, "ppo.seeds=2", "ppo.learning_rate=1e-4,2e-4")
    names = progress.names(sweep)
    policies = {names[path] for path in of(sweep, "ppo")}
    assert len(policies) == len(of(sweep, "ppo")) == 16
    assert "salsa, kl_coef 0.3, replicate 1, seed 1, learning_rate 0.0002" in policies
    assert len({names[path] for path in of(sweep, "judge")}) == 16


def test_a_run_takes_what_the_nearest_finished_run_took(study):
    first, other, third, fourth = of(study, "ppo")
    finish(study, first, 20.0)
    watch = progress.Watch(study)
    left = {run.path: run.left for run in watch.look().runs}
    assert left[third] == left[other] == 20.0  # the only one that is known
    finish(study, other, 40.0)  # of the other arm
    left = {run.path: run.left for run in watch.look().runs}
    assert (left[third], left[fourth]) == (20.0, 40.0)


def test_more_iterations_take_longer_and_a_resumed_run_says_nothing(study):
    watch = durations.Durations(study.results)
    run = study.runs[of(study, "ppo")[0]]
    watch.add(run, 20.0)
    longer = plan.replace(
        run, address="other", settings=run.settings | {"ppo": run.settings["ppo"] | {"iterations": 150}}
    )
    assert watch.of(longer) == pytest.approx(60.0)
    finish(study, of(study, "sft")[0], 1.0, summary={"resumed_at": [20]})
    assert "sft" in progress.Watch(study).look().unknown


def test_other_plans_are_asked_and_then_what_is_published(tmp_path, study):
    other = planned(tmp_path / "results", "ppo.learning_rate=1e-5")
    for path in of(other, "ppo"):
        finish(other, path, 7.0, job=12.5)  # with its imports
    published = tmp_path / "results" / "published" / "some"
    published.mkdir(parents=True)
    settings = json.dumps(study.runs[of(study, "sft")[0]].settings).replace('"', '""')
    published.joinpath("runs.csv").write_text(f'stage,wall_seconds,settings\nsft,5.5,"{settings}"\nppo,99,"{{}}"\n')
    picture = progress.Watch(study).look()
    assert {run.left for run in picture.runs if run.stage == "ppo"} == {12.5}
    assert {run.left for run in picture.runs if run.stage == "sft"} == {5.5}
    assert {"ppo", "sft"}.isdisjoint(picture.unknown) and picture.left > 0


def naive_time_to_go(left, parents, threads, capacity):
    """Second by second: each run starts as soon as it can."""
    waiting, running, done, now = dict(left), {}, set(), 0
    while waiting or running:
        for path in list(waiting):
            ready = all(parent in done or parent not in left for parent in parents[path])
            busy = sum(min(threads[other], capacity) for other in running)
            if ready and busy + min(threads[path], capacity) <= capacity:
                running[path] = now + waiting.pop(path)
        now += 1
        for path in [path for path, end in running.items() if end <= now]:
            del running[path]
            done.add(path)
    return now


@pytest.mark.parametrize("seed", range(20))
def test_time_to_go_equals_that_of_a_simulation_second_by_second(seed):
    draw = random.Random(seed)
    paths = [f"run{i}" for i in range(12)]
    left = {path: draw.randint(1, 9) for path in paths}
    parents = {path: draw.sample([*paths[:i], "finished"], min(i, 2)) for i, path in enumerate(paths)}
    threads = {path: draw.randint(1, 3) for path in paths}
    needs = {path: (number, 0) for path, number in threads.items()}
    for capacity in (1, 2, 5, 100):
        found = durations.time_to_go(left, parents, needs, (capacity, 0))
        expected = naive_time_to_go(left, parents, threads, capacity)
        # Of runs that could start at once either may be first, which changes little; alone or together it can't.
        assert found == expected if capacity in (1, 100) else abs(found - expected) <= max(left.values())


def test_runs_on_the_only_gpu_wait_for_each_other():
    left = dict.fromkeys("abc", 10.0)
    parents = dict.fromkeys("abc", ())
    assert durations.time_to_go(left, parents, dict.fromkeys("abc", (1, 1)), (16, 1)) == 30
    assert durations.time_to_go(left, parents, dict.fromkeys("abc", (1, 0)), (16, 1)) == 10
    assert durations.time_to_go({}, {}, {}, (16, 1)) == 0


def test_the_process_that_runs_a_plan_is_known_while_it_lives(study):
    study.save()  # which makes the folder
    assert progress.session_of(study) == (None, False)
    session = progress.hold_session(study, "salsa run", 4)
    assert progress.session_of(study) == (session, True)
    again = progress.hold_session(study, "salsa run -- --cores 2", 2)
    assert progress.session_of(study) == (again, True)
    while progress._held:
        progress._held.pop().close()
    assert progress.session_of(study) == (again, False)
    progress.session_file(study).write_text("{}")
    assert progress.session_of(study) == (None, False)


def test_of_a_study_with_looks_the_runs_up_to_the_next_look_count(tmp_path):
    looking = planned(tmp_path, "replicates=[0,1,2,3]", "looks=[2,4]")
    assert progress.Watch(looking).look().count() < len(looking.runs)
    assert {run.path for run in progress.Watch(looking).look().runs if run.stage == "study"} == {
        looking.studies[0]["looks"][0]
    }
