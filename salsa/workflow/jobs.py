"""The jobs of a plan's runs: their environment, what they ask for, how they are started, and how they failed."""

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from salsa import judges
from salsa.workflow import config, gpus, places, repository, runs, schema, stages
from salsa.workflow.bounds import printable
from salsa.workflow.failures import KEPT

LOG = "log.txt"
KEPT_LOG = ".log.txt"  # its second name: no part of a run's result, for it begins with a point
SHOWN = 12  # lines of a failed run's log on the terminal
TAIL = 2**16  # bytes of it that are read for them
LITTLE = 2**20  # bytes: a disk with less room is called full
LONGEST_LINE = 500  # characters of each
SHARDED = ("FSDP", "DEEPSPEED")  # Accelerate's distributed_type: no process holds all of a trained model
PROCESSES = repository.ROOT / "conf" / "accelerate" / "processes.yaml"  # of several, unless others are given


def use_environment():
    """Let the jobs of this process run its own python, and find the package of a checkout: an installed one is found.

    A python that stands before it on the PATH is left in charge, if this one's folder is there at all.
    """
    places.use()
    paths = os.environ.get("PATH", "").split(os.pathsep)
    folder = str(Path(sys.executable).parent)
    if folder not in paths:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])
    packages = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if not repository.INSTALLED and str(repository.ROOT) not in packages:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(repository.ROOT), *packages])


def snakemake_text(text):
    """A value of Snakemake's --config that it reads as this text: it strips quotes, and then reads YAML."""
    return f" {json.dumps(text, ensure_ascii=False)} "


def snakemake_argument(key, text):
    """`key=text` as an argument that Snakemake hands on to a shell: it quotes by Python's rules what isn't quoted."""
    return "'" + f"{key}={snakemake_text(text)}".replace("'", "'\\''") + "'"


def resource(run, name):
    """What a job of a run asks for: threads (of all its processes), memory_mb, gpus, runtime, …"""
    stage = stages.ALL[run.stage]
    if stage.light(run.settings) and name in ("threads", "memory_mb", "gpus"):
        return {"threads": 1, "memory_mb": stage.light_mb, "gpus": 0}[name]
    if name == "runtime" and stage.minutes:
        return stage.minutes
    value = run.execution[name]
    if name == "gpus" and not stage.processes:
        return min(value, 1)
    return value * run.execution["processes"] if name == "threads" and stage.processes else value


def gpus_here(plan):
    """How many GPUs of this machine a plan's jobs may use; asked only where one of them wants any."""
    return len(gpus.devices()) if any(resource(run, "gpus") for run in plan.runs.values()) else 0


def launcher(run):
    """The command that starts a run's process or processes, as shell text: what `-m <module>` follows.

    A run on GPUs is started with a lease of as many. `accelerate launch` is always given a configuration file, or it
    would read the user's own.
    """
    devices, processes, path = (resource(run, name) for name in ("gpus", "processes", "accelerate_config"))
    leased = ["python", "-m", "salsa.workflow.gpus", str(devices)] if devices else []
    if not stages.ALL[run.stage].processes or (processes == 1 and not path):
        return shlex.join([*leased, "python"])
    arguments = ["--config_file", path or str(PROCESSES)]
    # A run is on one machine, beside others: port 0 is any that is free. But Accelerate only looks for one, and another
    # process may take it before it is used; torchrun, told by this variable, opens its own. The rest would be warned
    # about.
    options = {
        "num_processes": processes,
        "num_machines": 1,
        "main_process_port": 0,
        "mixed_precision": run.settings["mixed_precision"],
        "dynamo_backend": "no",
    }
    arguments += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    # Torch's launcher would heed SIGINT, too, which jobs are started to ignore: they are told by SIGTERM.
    told_by = "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGHUP,SIGQUIT"
    marked = ["python", "-m", "salsa.workflow.surroundings", str(processes), "env", told_by, "PET_STANDALONE=1"]
    return shlex.join([*leased, *marked, "accelerate", "launch", *arguments])


def distributed_type(path):
    """What a configuration file of Accelerate says that it is for: MULTI_GPU, FSDP, …; "missing" where nothing."""
    match = re.search(r"(?m)^\W*distributed_type\W+(\w+)", Path(path).read_text(encoding="utf-8"))
    return match[1] if match else "missing"


def finished(plan, path):
    """Whether the run at a path of the plan has its manifest."""
    return (Path(plan.results) / path / runs.MANIFEST).exists()


def check_sections():
    """UserError where a section of the report lacks its caption or has another fault: before the first job."""
    from salsa.report.sections import sections  # which jobs that read a plan have no need of

    sections()


def check_judges(plan, paths):
    """UserError where a judge could not be asked that one of the runs at `paths` wants; each is asked one question."""
    asked = {}  # settings -> how the judge is asked, or None where nothing is to be sent
    for path in paths:
        run = plan.runs[path]
        if run.stage == "judge" and not finished(plan, path):
            execution = schema.from_dict(config.Execution, run.execution)
            checked = run.execution.get("judge_check", False)
            asked[runs.canonical_json(run.settings["judge"])] = execution if checked else None
    for settings, execution in asked.items():
        judge = schema.from_dict(config.Judge, json.loads(settings))
        judges.find(judge.kind).check_access(judge, execution)


def failures(plan):
    """Lines that name the logs of runs that began and did not finish, with the end of each, and a disk that is full."""
    for path in plan.runs:
        log = Path(plan.results) / path / LOG
        if finished(plan, path) or not log.exists():
            continue
        lines = last_lines(log)
        if lines:
            yield f"not finished: {log}: {lines[-1]}"
            yield from (f"  | {line}" for line in lines[:-1])
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(plan.results).free
        if free < LITTLE:  # in which a stage's own words may have had no room
            yield f"{plan.results}: the disk is full ({free >> 10} KiB are free); make room and run again: {KEPT}"


def last_lines(log, count=SHOWN):
    """The last lines of a log that say something, as a terminal may show them; a log may hold any bytes.

    Of a log that can't be read, one line that says so.
    """
    if not os.path.isfile(log):
        return ["is no file"]  # a pipe would keep its reader for ever
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError as error:
        return [f"can't be read ({error.strerror})"]
    # A progress bar goes back to the line's begin each time; what stood there last is what was seen.
    lines = [line.rstrip().rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [printable(line)[:LONGEST_LINE] for line in lines if line][-count:]
