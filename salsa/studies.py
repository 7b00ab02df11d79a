"""What the workflow does around the runs of a plan: their environment, readable names, where the results are."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from salsa import runs

MAIN_TABLE = "tables/win_rates.md"
LOG = "log.txt"
SMALL = {"threads": 1, "memory_mb": 2000, "gpus": 0}


def use_environment(root):
    """Let the jobs of this process run its own python, and find the package in the folder `root`.

    A python that stands before it on the PATH is left in charge, if this one's folder is there at all.
    """
    paths = os.environ.get("PATH", "").split(os.pathsep)
    folder = str(Path(sys.executable).parent)
    if folder not in paths:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])
    packages = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if str(root) not in packages:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *packages])


def needs(run, name):
    """What a run's execution settings say of it: threads (of all its processes), memory_mb, gpus, …

    A judge is a small process, but where it is a model of ours.
    """
    if run.stage == "judge" and run.settings["judge"]["kind"] != "reward_model" and name in SMALL:
        return SMALL[name]
    value = run.execution[name]
    return value * run.execution["processes"] if name == "threads" and run.stage == "ppo" else value


def launcher(run):
    """The command that starts a run's process or processes, as shell text: what `-m <module>` follows.

    A run on GPUs is started with a lease of as many. `accelerate launch` sets as many processes going as are asked for
    only where it is told of several GPUs, or by its configuration file; on a CPU, `--multi_gpu` does it just so.
    """
    gpus, processes, path = (needs(run, name) for name in ("gpus", "processes", "accelerate_config"))
    leased = ["python", "-m", "salsa.gpus", str(gpus)] if gpus else []
    if run.stage != "ppo" or (processes == 1 and not path):
        return shlex.join([*leased, "python"])
    chosen = ["--config_file", path] if path else ["--multi_gpu"]
    # A run is on one machine, beside others: port 0 is any that is free. The rest would be warned about.
    options = {
        "num_processes": processes,
        "num_machines": 1,
        "main_process_port": 0,
        "mixed_precision": run.settings["mixed_precision"],
        "dynamo_backend": "no",
    }
    chosen += [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return shlex.join([*leased, "accelerate", "launch", *chosen])


def finished(plan, path):
    return (Path(plan.results) / path / runs.MANIFEST).exists()


def conclude(plan):
    """Link the readable names of the finished studies to their folders; yields the lines to show."""
    for study in plan.studies:
        if not finished(plan, study["path"]):
            continue
        folder = Path(plan.results) / study["path"]
        yield f"study {study['name']}: {link(plan, study)}"
        for name in ("report.md", MAIN_TABLE, "figures"):
            if (folder / name).exists():
                figures = sorted(path.name for path in folder.glob("figures/*.png")) if name == "figures" else []
                yield f"  {folder / name}{': ' if figures else ''}{', '.join(figures)}"
        if (folder / MAIN_TABLE).exists():
            yield (folder / MAIN_TABLE).read_text(encoding="utf-8").rstrip()


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
        temporary.symlink_to(target, target_is_directory=True)
        os.replace(temporary, name)
    return f"{name} -> {target}"


def publish(study):
    """Copy a study's files, which are small, to `<results>/published/<name>` and return that folder.

    An overridden study keeps its address in the name. Of the manifest, host and command line stay behind; of samples
    from other people's reviews, the prompts. UserError where the study isn't finished.
    """
    manifest = runs.verify(study)
    settings, folder = manifest["settings"]["config"], study.resolve()
    link = folder.parent / settings["name"]
    name = settings["name"] if link.is_symlink() and link.resolve() == folder else folder.name
    target = folder.parent.parent / "published" / name
    shutil.rmtree(target, ignore_errors=True)
    for artefact in manifest["artefacts"]:
        (target / artefact).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / artefact, target / artefact)
    if settings["data"]["task"]["kind"] == "reviews":
        samples = (target / "samples.md").read_text(encoding="utf-8")
        (target / "samples.md").write_text(re.sub(r"(?m)^(\*\*.+?\*\*): .*$", r"\1", samples), encoding="utf-8")
    kept = ("stage", "address", "settings", "packages", "git_commit", "started", "wall_seconds")
    artefacts = runs.artefacts(target)  # with the samples as they are here
    runs.write_json(target / runs.MANIFEST, {**{key: manifest[key] for key in kept}, "artefacts": artefacts})
    return target


def failures(plan):
    """Lines that name the logs of runs which began and did not finish."""
    logs = [Path(plan.results) / path / LOG for path in plan.runs if not finished(plan, path)]
    for log in logs:
        if log.exists() and log.stat().st_size:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            yield f"not finished: {log}" + (f": {lines[-1]}" if lines else "")
