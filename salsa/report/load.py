"""A finished study as pandas frames, from its folder: what `salsa.load` returns.

What a study was made from is found through its manifest: the runs lie under the same results folder. A published copy
comes without those runs, and so has its claims and its other tables alone. Nothing is computed here.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from salsa.report import formats, study
from salsa.report.comparison import label
from salsa.workflow import config, runs
from salsa.workflow.messages import UserError


def load(folder):
    """The frames of a finished study (`LoadedStudy`), or of all studies of a sweep (`LoadedSweep`).

    Raises `UserError` (one line) where the folder is neither.
    """
    folder = Path(folder).resolve()
    manifest = runs.manifest_of(folder)
    if manifest is None or manifest["stage"] not in ("study", "comparison"):
        raise UserError(f"{folder}: no finished study; give a folder like results/studies/default")
    if manifest["stage"] == "study":
        return LoadedStudy(folder, manifest)
    studies = _parents(folder, manifest)
    points = manifest["settings"]["points"]
    return LoadedSweep({label(point): load(studies[f"study/{i}"]) for i, point in enumerate(points)})


class LoadedStudy:
    """A study as frames; docs/frames.md says what their columns are. Each is read when it is first asked for.

    `tables` has the report's tables by name, as they were written: of a published copy, too.

    Raises `UserError` (one line) where a run that a frame is read from isn't there.
    """

    def __init__(self, folder, manifest):
        self._folder, self._manifest = folder, manifest
        self.tables = Tables(folder / "tables")

    policies = property(lambda self: self._frames.policies, doc="One row per policy.")
    responses = property(lambda self: self._frames.responses, doc="One row per response to a prompt of a benchmark.")
    verdicts = property(lambda self: self._frames.verdicts, doc="One row per verdict.")
    trajectories = property(lambda self: self._frames.trajectories, doc="One row per policy and iteration.")

    @functools.cached_property
    def claims(self):
        """One row per claim and benchmark: the table of claims as it was written."""
        return self.tables["claims"]

    @functools.cached_property
    def _frames(self):
        settings = config.StudySettings(**self._manifest["settings"])
        return study.read(settings, _parents(self._folder, self._manifest)).frames


class Tables(Mapping):
    """The tables of a study's report: name -> frame, each read when it is first asked for.

    Raises `UserError` (one line) where the study has no table of that name.
    """

    def __init__(self, folder):
        self._paths = {path.name.partition(".csv")[0]: path for path in sorted(folder.glob("*.csv*"))}
        self._frames = {}

    def __getitem__(self, name):
        if name not in self._paths:
            raise UserError(f"no table {name!r}; choose among {', '.join(self._paths) or 'none'}")
        if name not in self._frames:
            self._frames[name] = formats.read_csv(self._paths[name])
        return self._frames[name].copy()

    def __iter__(self):
        return iter(self._paths)

    def __len__(self):
        return len(self._paths)

    def __contains__(self, name):
        return name in self._paths


class LoadedSweep:
    """The frames of a sweep's studies, one below the other, with a column `point` before the others."""

    def __init__(self, studies):
        self.studies = studies  # point -> LoadedStudy

    policies = functools.cached_property(lambda self: self._joined("policies"))
    responses = functools.cached_property(lambda self: self._joined("responses"))
    verdicts = functools.cached_property(lambda self: self._joined("verdicts"))
    trajectories = functools.cached_property(lambda self: self._joined("trajectories"))
    claims = functools.cached_property(lambda self: self._joined("claims"))

    def _joined(self, name):
        frames = {point: getattr(loaded, name) for point, loaded in self.studies.items()}
        return pd.concat(frames, names=["point"]).reset_index("point").reset_index(drop=True)


def _parents(folder, manifest):
    """role -> the folder of the run that plays it, under the results folder that `folder` lies in."""
    if "parents" not in manifest:
        raise UserError(f"{folder}: a published copy has no runs; `claims` and all other `tables` can be read")
    results = folder.parent.parent
    return {runs.role_of(role): _run(results, **parent) for role, parent in manifest["parents"].items()}


def _run(results, folder, address):
    for path in results.glob(f"*/{folder}"):
        if (runs.manifest_of(path) or {}).get("address") == address:
            return path
    raise UserError(f"{results}: no finished run {folder}, from which the study was made; run it again")
