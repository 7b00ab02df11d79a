"""`salsa forget RUN…`: move finished runs aside, so that the command that made them computes them again.

A finished run is final: no option of Snakemake computes it again. What is forgotten is moved to `<results>/forgotten`,
where no command looks, and nothing is deleted: moved back, a run is as finished as it was. A run on which other
finished runs rest is kept unless these are moved, too, and so is one that a process computes, or computes with.
"""

import contextlib
import os
from pathlib import Path

from filelock import FileLock, Timeout

from salsa.workflow import plan as planning
from salsa.workflow import progress, runs, stages
from salsa.workflow.messages import UserError

ASIDE = "forgotten"
NAMED = 3  # runs that a refusal names; of others, how many
KEPT = "finished runs are kept, whatever Snakemake is told to force"


def forget(folders, dependents=False):
    """Move finished runs to `<results>/forgotten/<stage>/<name>`. Returns (folder before, folder now) of each.

    Args:
        folders: of runs of one results folder, such as results/ppo/…, or the readable name of a study.
        dependents: whether finished runs that rest on them are moved, too.

    Raises UserError, with nothing moved, where a folder is no finished run's, where others rest on it, or where a
    process works on it or with it.
    """
    found = [_run(Path(folder)) for folder in folders]
    results = found[0][0]
    if any(other != results for other, _ in found):
        raise UserError(f"{folders[0]}: of other results than the rest; forget them one after the other")
    children = _children(results)
    wanted = list(dict.fromkeys(path for _, path in found))
    order = _with_dependents(wanted, children)
    others = [path for path in order if path not in wanted]
    if others and not dependents:
        raise UserError(
            f"{results / wanted[0]}: {len(others)} finished runs rest on what is to be forgotten ({_few(others)}); "
            "add --dependents to move them, too"
        )
    _check_in_progress(results, set(order))
    with contextlib.ExitStack() as locks:
        for path in order:
            locks.enter_context(_alone(results / path))
        return [(results / path, _move_aside(results, path)) for path in order]


def refusal(results, paths):
    """What to say where Snakemake is told to force runs that are finished: at these paths, in the plan's order."""
    runs_ = "1 run is" if len(paths) == 1 else f"{len(paths)} runs are"
    return f"{KEPT}: {runs_} finished here; `salsa forget {results}/{paths[0]}` moves one aside, to be computed again"


def _run(folder):
    """(results folder, path below it) of a finished run."""
    real = folder.resolve()
    stage = next((stage for stage in stages.ALL.values() if stage.folder == real.parent.name), None)
    if stage is None or not real.is_dir() or (folder.is_symlink() and folder.parent.resolve() != real.parent):
        raise UserError(f"{folder}: no run's folder below results; give one, such as results/ppo/…")
    if not (real / runs.MANIFEST).exists():
        raise UserError(f"{folder}: not finished, and nothing to forget: the command that began it goes on")
    return _as_given(folder, real), f"{real.parent.name}/{real.name}"


def _as_given(folder, real):
    """The results folder, as a person wrote it where that can be said."""
    written = folder.parent.parent
    return written if written.resolve() == real.parent.parent else real.parent.parent


def _finished(results):
    """Path below the results -> manifest, of every finished run whose manifest can be read."""
    folders = dict.fromkeys(stage.folder for stage in stages.ALL.values())
    places = (path for name in folders if (results / name).is_dir() for path in sorted((results / name).iterdir()))
    manifests = {f"{path.parent.name}/{path.name}": runs.manifest_of(path) for path in places if not path.is_symlink()}
    return {path: manifest for path, manifest in manifests.items() if manifest}


def _children(results):
    """Name of a run's folder, which ends with its address -> paths of the finished runs that read it."""
    children = {}
    for path, manifest in _finished(results).items():
        for parent in manifest.get("parents", {}).values():
            children.setdefault(parent["folder"], []).append(path)
    return children


def _with_dependents(paths, children):
    """The paths and all that rest on them, each after what rests on it: where a move fails, no run lacks a parent."""
    order = {}

    def visit(path):
        if path not in order:
            for child in children.get(path.rpartition("/")[2], ()):
                visit(child)
            order[path] = None

    for path in paths:
        visit(path)
    return list(order)


def _check_in_progress(results, paths):
    """UserError where a process runs a plan that has one of the paths, or computes a run that rests on one of them."""
    active = {path for path in _unfinished(results) if progress.locked(results / path)}
    for planned in _plans(results):
        session, lives = progress.session_of(planned)
        wanted = paths & planned.runs.keys()
        if lives and wanted:
            who = f"process {session.process} on {session.host}"
            raise UserError(f"{results / min(wanted)}: a study with it runs now ({who}); wait for its end, or stop it")
        for path in active & planned.runs.keys():
            used = _ancestors(planned.runs, path) & paths
            if used:
                raise UserError(f"{results / path}: is computed now, from {min(used)}; wait for its end, or stop it")


def _plans(results):
    """The plans that were run here; of a run, what its file says of it."""
    for file in sorted((results / "plans").glob("*.json")):
        with contextlib.suppress(runs.Unreadable, KeyError):
            yield planning.Plan(str(results), runs.read_json(file)["runs"])


def _ancestors(planned, path):
    ancestors, waiting = set(), [path]
    while waiting:
        new = set(planned[waiting.pop()]["parents"].values()) - ancestors
        ancestors |= new
        waiting += new
    return ancestors


def _unfinished(results):
    folders = dict.fromkeys(stage.folder for stage in stages.ALL.values())
    locks = (lock for name in folders for lock in (results / name).glob("*/.lock"))
    return [f"{lock.parent.parent.name}/{lock.parent.name}" for lock in locks if not _has_manifest(lock.parent)]


def _has_manifest(folder):
    return (folder / runs.MANIFEST).exists()


@contextlib.contextmanager
def _alone(folder):
    """The lock on a run's folder; UserError where a process holds it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{folder}: a process works on it; wait for its end, or stop it") from None


def _move_aside(results, path):
    """Move a run's folder to where it is forgotten, under a name that is free; returns that place."""
    target = results / ASIDE / path
    number = 1
    while os.path.lexists(target):
        number += 1
        target = results / ASIDE / f"{path}.{number}"
    target.parent.mkdir(parents=True, exist_ok=True)
    (results / path).rename(target)
    return target


def _few(paths):
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more
