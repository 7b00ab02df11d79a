"""How long the runs of a plan will take, from what finished runs of the same stage took.

The nearest of those is asked: that whose settings differ in the fewest places, first among the plan's own runs, then
among others in the results folder and its published studies. Nothing is measured here, and nothing assumed of a stage
that was never run: its runs have no duration.
"""

import csv
import heapq
import json
from pathlib import Path

from salsa.workflow import runs, stages

MOST_OTHERS = 24  # finished runs of other plans that are read of a stage, the newest


class Durations:
    """Seconds that runs took, by stage.

    Args:
        results: the results folder.
    """

    def __init__(self, results):
        self.results = Path(results)
        self.known = {}  # stage -> [(set of its settings by place, seconds of a step)], of the plan's own runs
        self.estimated = {}  # stage and settings -> seconds of a step, until another run of the stage is finished
        self.elsewhere = {}  # stage -> what `others` returns
        self.places = {}  # address -> the set of the run's settings by place

    def add(self, run, seconds):
        """Take in what a finished run of the plan took."""
        step = seconds / steps(run.stage, run.settings)
        self.known.setdefault(run.stage, []).append((frozenset(places(run.settings).items()), step))
        self.estimated = {key: value for key, value in self.estimated.items() if key[0] != run.stage}

    def of(self, run):
        """Seconds that a run of the plan will take; None where no finished run says anything of its stage."""
        if run.address not in self.places:
            self.places[run.address] = frozenset(places(run.settings).items())
        key = run.stage, self.places[run.address]
        if key not in self.estimated:
            candidates = self.known.get(run.stage) or self.others(run.stage)
            self.estimated[key] = nearest(self.places[run.address], candidates)
        step = self.estimated[key]
        return None if step is None else step * steps(run.stage, run.settings)

    def others(self, stage):
        """[(settings by place, seconds of a step)] of runs of other plans: finished here, or else published."""
        if stage not in self.elsewhere:
            self.elsewhere[stage] = self._read_others(stage)
        return self.elsewhere[stage]

    def _read_others(self, stage):
        folders = (self.results / stages.ALL[stage].folder).glob(f"*/{runs.MANIFEST}")
        newest = sorted(folders, key=lambda path: path.stat().st_mtime)[-MOST_OTHERS:]
        finished = [(path.parent, runs.manifest_of(path.parent) or {}) for path in newest]
        rows = [
            (manifest["settings"], seconds_of(folder, manifest))
            for folder, manifest in finished
            if manifest.get("stage") == stage
        ]
        return [
            (frozenset(places(settings).items()), seconds / steps(stage, settings))
            for settings, seconds in rows or self._published(stage)
            if seconds
        ]

    def _published(self, stage):
        """[(settings, seconds)] of the tables `runs.csv` of published studies: what the stage took on their machine."""
        rows = []
        for path in sorted((self.results / "published").glob("*/runs.csv")):
            with open(path, newline="", encoding="utf-8") as file:
                rows += [row for row in csv.DictReader(file) if row["stage"] == stage and row.get("settings")]
        return [(json.loads(row["settings"]), float(row.get("wall_seconds") or 0)) for row in rows]


def seconds_of(folder, manifest):
    """How long the job of a finished run took, or else its stage, which leaves out what comes before it: imports.

    None where the manifest says nothing, or counts the last of several processes alone. Of a job that merely found the
    run finished, it is the stage's.
    """
    stage = manifest.get("wall_seconds")
    if manifest.get("summary", {}).get("resumed_at"):
        return None
    try:
        with open(Path(folder) / "benchmark.tsv", newline="", encoding="utf-8") as file:
            job = float(next(csv.DictReader(file, delimiter="\t"))["s"])
    except (OSError, StopIteration, KeyError, ValueError, TypeError):
        return stage
    return max(job, stage or 0.0)


def steps(stage, settings):
    """By what the duration of a run grows: the iterations of a policy, whose arms may differ in them; else 1."""
    section = settings.get(stage)
    return (section.get("iterations") if isinstance(section, dict) else None) or 1


def places(settings, place=""):
    """Settings by their place in the dictionaries that hold them; without seeds, which change no duration."""
    items = settings.items() if isinstance(settings, dict) else enumerate(settings)
    values = {}
    for key, value in items:
        if isinstance(value, dict | list):
            values |= places(value, f"{place}{key}.")
        elif key != "seed":
            values[f"{place}{key}"] = value
    return values


def nearest(wanted, candidates):
    """The mean seconds of those candidates whose settings differ from the wanted ones in the fewest places; or None."""
    differences = [len(wanted ^ settings) for settings, _ in candidates]
    closest = [candidates[i][1] for i, number in enumerate(differences) if number == min(differences)]
    return sum(closest) / len(closest) if closest else None


def time_to_go(left, parents, needs, capacity):
    """Seconds until all unfinished runs are finished, if each starts as soon as its parents are and there is room.

    Args:
        left: path -> seconds that an unfinished run still takes, in the order in which they are started where several
            could be: those that run now come first.
        parents: path -> paths of what has to be finished before; those that are not in `left` are finished.
        needs: path -> what it occupies, a tuple of amounts such as (threads, GPUs).
        capacity: as many amounts: what there is of each. A run that needs more is given what there is.
    """
    needs = {path: tuple(map(min, needs[path], capacity)) for path in left}
    missing = {path: len({parent for parent in parents[path] if parent in left}) for path in left}
    children = {path: [] for path in left}
    for path in left:
        for parent in set(parents[path]) & left.keys():
            children[parent].append(path)
    ready = [path for path in left if not missing[path]]
    free, now, running = list(capacity), 0.0, []  # the last is a heap of (when it ends, path)
    while ready or running:
        for path in list(ready):
            if all(need <= amount for need, amount in zip(needs[path], free, strict=True)):
                free = [amount - need for amount, need in zip(free, needs[path], strict=True)]
                heapq.heappush(running, (now + left[path], path))
                ready.remove(path)
        now, path = heapq.heappop(running)
        free = [amount + need for amount, need in zip(free, needs[path], strict=True)]
        for child in children[path]:
            missing[child] -= 1
            if not missing[child]:
                ready.append(child)
    return now
