"""What the workflow does around the runs of a plan: their environment, readable names, where the results are."""

import contextlib
import csv
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from salsa import data, judges
from salsa.workflow import config, gpus, places, runs
from salsa.workflow.failures import KEPT
from salsa.workflow.plan import LABEL

MAIN_TABLE = "tables/win_rates.md"
COMPARISON = "comparison.md"
LOG = "log.txt"
KEPT_LOG = ".log.txt"  # its second name: no part of a run's result, for it begins with a point
SHOWN = 12  # lines of a failed run's log on the terminal
TAIL = 2**16  # bytes of it that are read for them
LITTLE = 2**20  # bytes: a disk with less room is called full
LONGEST_LINE = 500  # characters of each
LARGEST = 2**21  # bytes of a published file: the page of a large study, which its folder can make again, stays behind
SMALL = {"threads": 1, "memory_mb": 2000, "gpus": 0}
DATA = ("corpus", "prepare", "benchmark")  # stages that hold whole data sets in memory
TRAINED = ("sft", "reward_model", "ppo")  # stages that several processes may train in
SHARDED = ("FSDP", "DEEPSPEED")  # Accelerate's distributed_type: no process holds all of a trained model
REPORT = ("study", "comparison")
PROCESSES = (
    Path(__file__).resolve().parents[2] / "conf" / "accelerate" / "processes.yaml"
)  # of several, unless others are given


def use_environment(root):
    """Let the jobs of this process run its own python, and find the package in the folder `root`.

    A python that stands before it on the PATH is left in charge, if this one's folder is there at all.
    """
    places.use()
    paths = os.environ.get("PATH", "").split(os.pathsep)
    folder = str(Path(sys.executable).parent)
    if folder not in paths:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])
    packages = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(root) not in packages:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *packages])


def snakemake_text(text):
    """A value of Snakemake's --config that it reads as this text: it strips quotes, and then reads YAML."""
    return f" {json.dumps(text, ensure_ascii=False)} "


def snakemake_argument(key, text):
    """`key=text` as an argument that Snakemake hands on to a shell: it quotes by Python's rules what isn't quoted."""
    return "'" + f"{key}={snakemake_text(text)}".replace("'", "'\\''") + "'"


def small(run):
    """Whether a run is a small process, whatever the model: data, reports, and judges that are no model of ours."""
    judged = run.stage == "judge" and not judges.find(run.settings["judge"]["kind"]).loads_model
    return judged or run.stage in DATA + REPORT


def needs(run, name):
    """What a run's execution settings say of it: threads (of all its processes), memory_mb, gpus, …"""
    if small(run) and name in SMALL:
        return SMALL[name] * (2 if name == "memory_mb" and run.stage in DATA else 1)
    value = run.execution[name]
    if name == "gpus" and run.stage not in TRAINED:
        return min(value, 1)
    return value * run.execution["processes"] if name == "threads" and run.stage in TRAINED else value


def brief(run):
    """Whether a judge's run takes seconds."""
    return small(run) and not judges.find(run.settings["judge"]["kind"]).takes_long


def gpus_here(plan):
    """How many GPUs of this machine a plan's jobs may use; asked only where one of them wants any."""
    return len(gpus.devices()) if any(needs(run, "gpus") for run in plan.runs.values()) else 0


def launcher(run):
    """The command that starts a run's process or processes, as shell text: what `-m <module>` follows.

    A run on GPUs is started with a lease of as many. `accelerate launch` is always given a configuration file, or it
    would read the user's own.
    """
    devices, processes, path = (needs(run, name) for name in ("gpus", "processes", "accelerate_config"))
    leased = ["python", "-m", "salsa.workflow.gpus", str(devices)] if devices else []
    if run.stage not in TRAINED or (processes == 1 and not path):
        return shlex.join([*leased, "python"])
    chosen = ["--config_file", path or str(PROCESSES)]
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
    chosen += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    marked = ["python", "-m", "salsa.workflow.surroundings", str(processes), "env", "PET_STANDALONE=1"]
    return shlex.join([*leased, *marked, "accelerate", "launch", *chosen])


def distributed_type(path):
    """What a configuration file of Accelerate says that it is for: MULTI_GPU, FSDP, …; "missing" where nothing."""
    found = re.search(r"(?m)^\W*distributed_type\W+(\w+)", Path(path).read_text(encoding="utf-8"))
    return found[1] if found else "missing"


def finished(plan, path):
    return (Path(plan.results) / path / runs.MANIFEST).exists()


def check_sections():
    """UserError where a section of the report lacks its caption or has another fault: before the first job."""
    from salsa.report.sections import sections  # which jobs that read a plan have no need of

    sections()


def check_judges(plan, paths):
    """UserError where a judge could not be asked that one of the runs at `paths` wants."""
    asked = {}  # settings -> whether to try to reach what the judge is asked over
    for path in paths:
        run = plan.runs[path]
        if run.stage == "judge" and not finished(plan, path):
            asked[runs.canonical_json(run.settings["judge"])] = run.execution.get("judge_check", False)
    for settings, connect in asked.items():
        judge = config.from_dict(config.Judge, json.loads(settings))
        judges.find(judge.kind).check_access(judge, connect)


def conclude(plan):
    """Link the readable names of the finished studies to their folders; yields the lines to show."""
    for study in plan.studies:
        if not finished(plan, study["path"]):
            continue
        folder = Path(plan.results) / study["path"]
        yield f"study {study['name']}: {link(plan, study)}"
        for name in ("report.html", "report.md", MAIN_TABLE, "figures"):
            if (folder / name).exists():
                figures = sorted(path.name for path in folder.glob("figures/*.png")) if name == "figures" else []
                yield runs.printable(f"  {folder / name}{': ' if figures else ''}{', '.join(figures)}")
        if (folder / MAIN_TABLE).exists():
            table = (folder / MAIN_TABLE).read_text(encoding="utf-8", errors="replace")
            yield from map(runs.printable, table.rstrip().split("\n"))
    if plan.comparison and finished(plan, plan.comparison):
        yield f"comparison of the sweep: {Path(plan.results) / plan.comparison / COMPARISON}"


def link(plan, study):
    """Make the study's link (a relative one, replaced at once) and return what to show of it."""
    folder = Path(plan.results) / study["path"]
    if not study["link"]:
        return str(folder)
    name = Path(plan.results) / study["link"]
    if name.exists() and not name.is_symlink():
        return f"{folder} ({name} is a folder of its own, and left alone)"
    target = os.path.relpath(folder, name.parent)
    if not name.is_symlink() or os.readlink(name) != target:
        temporary = name.with_name(f".{name.name}.{os.getpid()}")
        try:
            temporary.symlink_to(target, target_is_directory=True)
            os.replace(temporary, name)
        except OSError as error:  # read-only results, or a file system without links
            return f"{folder} (not linked as {name}: {error.strerror})"
    return f"{name} -> {target}"


def publish(study):
    """Copy a study's or a comparison's files, which are small, to `<results>/published/<name>`; returns that folder.

    An overridden study keeps its address in the name. Of the manifest, host and command line stay behind; of samples
    and the page, from other people's reviews, the prompts. UserError where the study isn't finished, where its manifest
    names files outside it, or where something that was not published is in the way.
    """
    manifest = _report(study, *REPORT)
    settings, folder = manifest["settings"].get("config"), study.resolve()  # a comparison has no configuration
    link = folder.parent / settings["name"] if settings else folder
    name = settings["name"] if link.is_symlink() and link.resolve() == folder else folder.name
    if not LABEL.fullmatch(name):
        raise runs.UserError(f"{study}: {name!r} can be no folder's name; run the study again")
    target = folder.parent.parent / "published" / name
    if target == folder:
        raise runs.UserError(f"{study}: is the published copy itself; give the study's own folder, results/studies/…")
    if os.path.lexists(target) and (target.is_symlink() or (runs.manifest_of(target) or {}).get("stage") not in REPORT):
        raise runs.UserError(f"{target}: in the way, and no published study; move it elsewhere")
    copy = target.with_name(f".{name}.{os.getpid()}")
    try:
        _copy_small(folder, copy, manifest)
        shutil.rmtree(target, ignore_errors=True)
        copy.rename(target)
    finally:
        shutil.rmtree(copy, ignore_errors=True)  # half a copy
    return target


def _copy_small(folder, copy, manifest):
    """Copy what is published of a study's folder, with a manifest of what is there."""
    from salsa.report import reader  # which Snakemake, that imports this module, has no need of

    for artefact, described in manifest["artefacts"].items():
        if described["bytes"] <= LARGEST:
            (copy / artefact).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / artefact, copy / artefact)
    settings = manifest["settings"].get("config")
    if settings and not data.world_kinds()[settings["data"]["task"]["kind"]].published:
        samples, page = copy / "samples.md", copy / "report.html"
        if samples.exists():
            text = re.sub(r"(?m)^(\*\*.+?\*\*): .*$", r"\1", samples.read_text(encoding="utf-8"))
            samples.write_text(text, encoding="utf-8")
        if page.exists():
            page.write_text(reader.without_prompts(page.read_text(encoding="utf-8")), encoding="utf-8")
    kept = ("stage", "address", "settings", "packages", "git_commit", "started", "wall_seconds")
    artefacts = runs.artefacts(copy)  # with the samples as they are here
    runs.write_manifest(copy, {**{key: manifest[key] for key in kept}, "artefacts": artefacts})


def _report(folder, *stages):
    """The checked manifest of a finished run of one of the report's stages, whose files all lie in its folder."""
    if not (folder / runs.MANIFEST).is_file():  # of which `verify` would say: remove the folder and run again
        raise runs.UserError(f"{folder}: no finished study; give a study's folder, results/studies/…")
    manifest = runs.verify(folder)
    if manifest["stage"] not in stages:
        raise runs.UserError(f"{folder}: a run of {manifest['stage']}; give a study's folder, results/studies/…")
    outside = [name for name in manifest["artefacts"] if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise runs.UserError(f"{folder}: its manifest names {outside[0]}, outside of it; remove it and run again")
    return manifest


def read_objective(folder, objective):
    """A finished study's objective, and what it is made of, as a dictionary.

    objective = value - kl_penalty * max(0, kl_to_sft0 - kl_budget), where value is the arm's mean reward minus sft0's
    (gold_reward, reward), or its adjusted win rate against sft0 by the first judge, mean over benchmarks (win_rate).

    Args:
        folder: the study's.
        objective: what `compose.resolve_objective` returned.

    Raises:
        UserError: the study's tables lack the number.
    """
    arm, kl_coef, measure = objective["arm"], objective["kl_coef"], objective["measure"]
    rewards = _rows(folder / "tables" / "rewards.csv")
    own = [row for row in rewards if row["arm"] == arm and row["kl_coef"] and float(row["kl_coef"]) == kl_coef]
    kl = _mean(own, "kl_to_sft0")
    if measure == "win_rate":
        key = {"judge": objective["judge"], "candidate": arm, "baseline": "sft0"}
        lines = [
            row
            for row in _rows(folder / MAIN_TABLE.replace(".md", ".csv"))
            if all(row[name] == wanted for name, wanted in key.items()) and float(row["kl_coef"]) == kl_coef
        ]
        value = _mean(lines, "adjusted_win_rate")
    else:
        value = _mean(own, measure) - _mean([row for row in rewards if row["arm"] == "sft0"], measure)
    if math.isnan(value):
        raise runs.UserError(f"{folder}: its tables have no {measure} of {arm} at kl_coef {kl_coef:g}; see objective")
    penalty = 0.0
    if objective["kl_budget"] is not None:
        if math.isnan(kl):
            raise runs.UserError(f"{folder}: its tables have no KL to sft0 of {arm}; leave out objective.kl_budget")
        penalty = objective["kl_penalty"] * max(0.0, kl - objective["kl_budget"])
    parts = {"value": value, "kl_to_sft0": None if math.isnan(kl) else kl, "penalty": penalty}
    return {"objective": value - penalty} | parts | objective


def _rows(path):
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise runs.UserError(f"{path}: missing; remove {path.parent.parent} and run again") from None


def _mean(rows, column):
    """The mean of a column; nan where there is no row, or a row without a number."""
    values = [float(row[column] or "nan") for row in rows]
    return sum(values) / len(values) if values else math.nan


def export(study, arm, output, kl_coef=None, replicate=None):
    """Copy a trained policy's model folder, with its card as README.md, to the new folder `output`.

    The copies are files of their own, so that what is done to them leaves the run as it is. UserError where the study
    or the run is unfinished or altered, where not exactly one policy is meant, or where `output` is there already.
    """
    from salsa.report import cards  # which Snakemake, that imports this module, has no need of

    output = Path(output)
    if os.path.lexists(output):
        raise runs.UserError(f"{output}: is there already; choose another --output")
    manifest = _report(study, "study")
    policy = _policy(manifest["settings"]["policies"], arm, kl_coef, replicate)
    parent = manifest.get("parents", {}).get(runs.published_role(f"policy/{policy['index']}"))
    if parent is None:
        raise runs.UserError(f"{study}: a copy beside no models; give the study's own folder, results/studies/…")
    folder = study.resolve().parent.parent / "ppo" / parent["folder"]
    if runs.verify(folder)["address"] != parent["address"]:
        raise runs.UserError(f"{folder}: another run than the study was made from; build the study again")
    card = study / "cards" / cards.file_name(policy["arm"], policy["kl_coef"], policy["replicate"])
    if not card.is_file():
        raise runs.UserError(f"{study}: has no card of this policy; run the study again with this version")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        shutil.copytree(folder / "model", temporary, copy_function=shutil.copyfile)
        shutil.copyfile(card, temporary / "README.md")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half a copy
    return output


def _policy(policies, arm, kl_coef, replicate):
    """The one policy that is meant; UserError, with those there are, where it is none or several."""
    wanted = {"arm": arm, "kl_coef": kl_coef, "replicate": replicate}
    fitting = [p for p in policies if all(value in (None, p[name]) for name, value in wanted.items())]
    if len(fitting) == 1:
        return fitting[0]
    known = [f"{p['arm']} --kl-coef {p['kl_coef']:g} --replicate {p['replicate']}" for p in fitting or policies]
    problem = "several policies fit" if fitting else "no such policy"
    raise runs.UserError(f"{arm}: {problem}; choose one of: {'; '.join(known)}")


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
    return [runs.printable(line)[:LONGEST_LINE] for line in lines if line][-count:]
