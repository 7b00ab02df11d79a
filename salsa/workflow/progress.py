"""Where a study stands, from its plan and its results folder alone: what `salsa status` and the live screen show.

A run is finished when it has its manifest. It runs while a process holds the lock on its folder, on this machine or on
another one that shares the file system; a run that began and is neither has failed or was stopped. Nothing is written,
but for the record of the process that runs a plan's jobs (`Session`). Left out: how all this is drawn (screen.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from salsa.workflow import durations, jobs, runs, stages, studies
from salsa.workflow.messages import UserError

DONE, RUNNING, FAILED, STOPPED, WAITING = "done", "running", "failed", "stopped", "waiting"
TAIL = 2**16  # bytes of metrics.jsonl that are read for its last lines
RECENT = 20  # iterations whose mean duration says how long the others will take
COMMAND = "SALSA_COMMAND"  # the variable in which `salsa run` leaves the command that a person typed
# The last line of a log whose stage ended with an error, by its own words or by Python's.
ERROR = re.compile(r"(python -m )?salsa[\w.]*: |[\w.]*(Error|Exception|Interrupt|Exit)\b")


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands.

    Attributes:
        name: what people call it: arm, kl_coef, replicate and seed of a policy.
        state: DONE, RUNNING, FAILED, STOPPED or WAITING.
        seconds: how long it took, or has run by now; None where that is not known.
        left: about how many seconds it still takes; None where no earlier run says anything of it.
        iteration, iterations: how many iterations of training are done, and of how many; None of other stages.
        score, kl: of the last iteration: mean score, and KL to the reference in nats per response; or None.
        reason: of FAILED and STOPPED, the last line of its log.
    """

    path: str
    stage: str
    name: str
    state: str
    seconds: float | None = None
    left: float | None = None
    iteration: int | None = None
    iterations: int | None = None
    score: float | None = None
    kl: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Picture:
    """Where the runs of a plan stand.

    Attributes:
        runs: all that are wanted: of a study with looks, those up to the look that it has reached.
        left: about how many seconds are still to go; None where nothing is known of any run that is left.
        unknown: stages with runs to come of which nothing is known; `left` counts them as nothing.
    """

    runs: list[RunProgress]
    left: float | None
    unknown: list[str] = field(default_factory=list)

    def count(self, *states):
        """How many runs are in one of these states; in any, where none is given."""
        return sum(run.state in states or not states for run in self.runs)

    def of(self, *states):
        return [run for run in self.runs if run.state in states]

    def stages(self):
        """Stage -> Counter of states, in the pipeline's order."""
        counts = {name: Counter() for name in stages.ALL}
        for run in self.runs:
            counts[run.stage][run.state] += 1
        return {name: states for name, states in counts.items() if states}


class Watch:
    """Looks at the runs of a plan, again and again: what is finished is read once.

    Args:
        plan: plan.Plan.
        capacity: how many threads and GPUs its jobs share; by default, those of this machine.
        by_job: whether jobs are sent to a cluster: then `capacity` is how many at once, and 0.
    """

    def __init__(self, plan, capacity=None, by_job=False):
        self.plan, self.results, self.by_job = plan, Path(plan.results), by_job
        self.capacity = capacity or (os.cpu_count(), jobs.gpus_here(plan))
        self.durations = durations.Durations(plan.results)
        self.names = names(plan)
        self.finished = {}  # path -> seconds that it took, or None
        self.failed = {}  # path -> why, of jobs that failed while this object looked
        self.began = {}  # path -> when its job was started, by time.time, likewise
        self.since = None  # when this process began to run the jobs: what failed before then only waits

    def look(self):
        """The `Picture` of this moment."""
        wanted = self.plan.needed(self._targets()).runs
        shown = [self._run(path, run) for path, run in wanted.items()]
        unfinished = {run.path: run for run in shown if run.state != DONE}
        left = self._time_to_go(unfinished)
        unknown = dict.fromkeys(run.stage for run in unfinished.values() if run.left is None)
        return Picture(shown, left, list(unknown))

    def _targets(self):
        looks = [studies.reached(self.plan, study) for study in self.plan.studies]
        return [*looks, *([self.plan.comparison] if self.plan.comparison else [])]

    def _run(self, path, run):
        if path in self.finished or jobs.finished(self.plan, path):
            return RunProgress(path, run.stage, self.names[path], DONE, self._finish(path, run))
        folder, estimate = self.results / path, self.durations.of(run)
        place = path, run.stage, self.names[path]
        if locked(folder) or self._is_starting(path):
            return self._running(place, run, folder, estimate)
        if path in self.failed:
            return RunProgress(*place, FAILED, left=estimate, reason=self.failed[path])
        began = self.since is None and (folder / jobs.LOG).exists()
        lines = jobs.last_lines(folder / jobs.LOG, 1) if began else []
        if not lines:
            return RunProgress(*place, WAITING, left=estimate)
        state = FAILED if ERROR.match(lines[0]) else STOPPED
        return RunProgress(*place, state, left=estimate, reason=lines[0])

    def job_started(self, path):
        """Take note that this process starts a job, or sends it to a cluster."""
        self.began[path] = time.time()
        self.failed.pop(path, None)

    def job_finished(self, path):
        """Take note that a job has ended; returns how long it took, to the second at which this process knows."""
        seconds = time.time() - self.began.get(path, self.since or time.time())
        if not self.by_job:  # there, the time in the queue is no part of it
            self.finished[path] = seconds
            self.durations.add(self.plan.runs[path], seconds)
        return seconds

    def job_failed(self, path, reason):
        """Take note that a job has failed."""
        self.began.pop(path, None)
        self.failed[path] = reason

    def _is_starting(self, path):
        """Whether this process has started a job on this machine, which takes seconds until it holds its lock."""
        return path in self.began and not self.by_job

    def _finish(self, path, run):
        """How long a finished run took: read from its files once, unless this process waits for the end of its job."""
        if path in self.finished or (path in self.began and not self.by_job):
            return self.finished.get(path)
        manifest = runs.manifest_of(self.results / path) or {}
        seconds = self.finished[path] = durations.seconds_of(self.results / path, manifest)
        if seconds:
            self.durations.add(run, seconds)
        return seconds

    def _running(self, place, run, folder, estimate):
        seconds = time.time() - self._started(place[0], folder)
        training = stages.ALL[run.stage].trains_policy
        rows = last_rows(folder / "metrics.jsonl") if training else []
        last = rows[-1] if rows else {}
        left = None if estimate is None else max(0.0, estimate - seconds)
        iterations = durations.steps(run.stage, run.settings) if training else None
        done = last["iteration"] + 1 if "iteration" in last else None
        recent = [row["seconds"] for row in rows[-RECENT:] if "seconds" in row]
        if recent and done:
            left = (iterations - done) * sum(recent) / len(recent)
        score, kl = last.get("score"), last.get("kl_to_reference")
        return RunProgress(*place, RUNNING, seconds, left, done, iterations, score, kl)

    def _started(self, path, folder):
        """When a running job was started: as this process knows, or else by what each writes first, its checkpoints'
        address.
        """
        if self._is_starting(path):
            return self.began[path]
        with contextlib.suppress(OSError):
            return (folder / runs.CHECKPOINTS / "address").stat().st_mtime
        return time.time()

    def _time_to_go(self, unfinished):
        """Seconds until all is finished; None where nothing is known, of 0 where nothing is left."""
        if unfinished and all(run.left is None for run in unfinished.values()):
            return None
        running_first = sorted(unfinished, key=lambda path: unfinished[path].state != RUNNING)
        left = {path: unfinished[path].left or 0.0 for path in running_first}
        entries = {path: self.plan.runs[path] for path in left}
        parents = {path: [*run.parents.values(), *run.after] for path, run in entries.items()}
        needs = {path: self._needs(run) for path, run in entries.items()}
        return durations.time_to_go(left, parents, needs, self.capacity)

    def _needs(self, run):
        return (1, 0) if self.by_job else (jobs.resource(run, "threads"), jobs.resource(run, "gpus"))


def locked(folder):
    """Whether a process holds the lock on a run's folder: it is asked for a moment, shared, and given back.

    A stage that asks in that moment asks again at once. On a file system without locks nothing seems to run.
    """
    try:
        with open(folder / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def last_rows(path):
    """The last rows of a file of JSON lines that may be written now; none where it is not there yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the first line may be half of one
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def names(plan):
    """Path -> what people call a run: of what has a policy, its arm, kl_coef, replicate, and seed where several."""
    called = {path: _by_label(run) for path, run in plan.runs.items()}
    for run in plan.runs.values():
        for role, parent in run.parents.items():
            if plan.runs[parent].stage == "sft" and re.fullmatch(r"sft\d+", role):
                called[parent] = f"{role}, {_replicate(plan.runs[parent].replicate)}"
    policies = {}  # path -> arms and places that share it, in order
    for place, study in enumerate(plan.studies):
        report = plan.runs[study["path"]]
        several = any(policy.get("seed") for policy in report.settings["policies"])
        for policy in report.settings["policies"]:
            for role, parent in report.parents.items():
                if role.rpartition("/")[2] == str(policy["index"]) and plan.runs[parent].replicate is not None:
                    policies.setdefault(parent, []).append((place, policy, several, role))
    for path, members in policies.items():
        called[path] = _by_policies(plan, members)
    return called


def _by_label(run):
    """The name of a run that belongs to no policy: the rest of its label, and its replicate."""
    if run.replicate is None:
        return run.label
    rest = run.label.partition(f"-r{run.replicate}")[2].strip("-")
    return ", ".join([*[rest] * bool(rest), _replicate(run.replicate)])


def _by_policies(plan, members):
    """The name of a run by the policies of studies that it belongs to, which differ in their arm or their study."""
    arms = "/".join(dict.fromkeys(policy["arm"] for _, policy, _, _ in members))
    _, policy, several, role = members[0]
    parts = [arms, f"kl_coef {policy['kl_coef']:g}", _replicate(policy["replicate"])]
    parts += [f"seed {policy['seed']}"] * several
    judges = {name.split("/")[1] for name in plan.runs[plan.studies[0]["path"]].parents if name.startswith("judge/")}
    parts += [role.split("/")[1]] * (role.startswith("judge/") and len(judges) > 1)
    return ", ".join([*parts, *_point(plan, {place for place, _, _, _ in members})])


def _point(plan, places):
    """What a sweep varies, as far as the studies at these places of the plan share it; nothing where all do."""
    points = plan.runs[plan.comparison].settings["points"] if plan.comparison else []
    if len(places) == len(plan.studies) or len(points) != len(plan.studies):
        return []
    shared = set.intersection(*(set(points[place].items()) for place in places))
    return [f"{key.rpartition('.')[2]} {value}" for key, value in points[min(places)].items() if (key, value) in shared]


def _replicate(number):
    return f"replicate {number}"


@dataclass
class Session:
    """The process that runs a plan's jobs: what it was started by, when and where, and how many jobs it runs at once.

    It holds a lock on its record, which ends with it.
    """

    command: str
    host: str
    process: int
    started: float
    threads: int
    gpus: int = 0
    by_job: bool = False

    @property
    def capacity(self):
        return self.threads, self.gpus


def session_file(plan):
    """The record of what runs a plan's jobs: named by the runs, whatever command planned them."""
    digest = hashlib.sha256("\n".join(sorted(plan.runs)).encode()).hexdigest()
    return Path(plan.results) / "plans" / f"{digest[:12]}.session"


def hold_session(plan, command, threads, gpus=0, by_job=False):
    """Record that this process runs a plan's jobs, as long as it lives; not in a folder that can't be written."""
    session = Session(command, platform.node(), os.getpid(), time.time(), threads, gpus, by_job)
    with contextlib.suppress(OSError):
        file = open(session_file(plan), "a+b")  # noqa: SIM115 (open, and so locked, until the process ends)
        fcntl.flock(file, fcntl.LOCK_SH)  # with others that run the same plan: the last one's record stays
        file.truncate(0)
        file.write(json.dumps(asdict(session)).encode())
        file.flush()
        _held.append(file)
    return session


_held = []  # files that are locked until this process ends


def session_of(plan):
    """(The `Session` of a plan, whether it lives), or (None, False) where none was ever started."""
    path = session_file(plan)
    try:
        session = Session(**runs.read_json(path))
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return session, True
    except (OSError, TypeError, UserError):
        return None, False
    return session, False
