"""What a study stands on: every run (the rows of runs.csv), and the files in which it was registered before.

A registered file (`config.registered`) fixes what a study does: its claims, or, as an experiment, everything. It was
fixed before the study if the last commit that changed it is older than the first landscape and the first run of a
policy, and nothing was changed after that commit. Commits carry their own dates, so that this convinces only with a
repository that others hold too. The verdicts are also decided by code, which may be younger than the runs: the report
says so.
"""

import functools
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import salsa
from salsa.report import words
from salsa.workflow import config, policies, repository, runs, schema, stages
from salsa.workflow.messages import UserError

ARMS = "conf/arm/"
CLAIMED = ("claims", "kl_coefs", "claim_kl_coef", "looks")  # what is compared where no experiment is registered
UNCOMPARED = {  # settings that change neither a number nor a verdict
    *("name", "title", "results", "execution", "objective", "companions", "registered"),
    *("report.samples", "report.reader"),
}
DECIDING = ("salsa/report", "salsa/evaluate")  # the code that verdicts are read by
FEW = 6  # names that a sentence lists
UNKNOWN = "its commit is not known"
TIME = "%Y-%m-%dT%H:%M:%SZ"  # as manifests have it


def all_runs(policies, parents):
    """Every run that the study stands on, ancestors included, once: what runs.csv says of each."""
    rows, folders = {}, {}
    entries = {entry["index"]: entry for entry in policies}
    for role, folder in parents.items():
        _collect(folder, _labels(role, entries), rows, folders)
    return sorted(rows.values(), key=lambda row: (row["started"] or "", row["folder"]))


def _labels(role, entries):
    """The replicate, training seed, arm and kl_coef of the run in a role of the study, where it has them."""
    kind, *rest = role.split("/")
    if kind in ("landscape", "gates", "reward_model"):
        return {"replicate": int(rest[0][1:])}
    if kind in ("policy", "respond", "judge", "plane"):
        entry = entries[int(rest[-1])]
        own = {name: entry[name] for name in ("replicate", "arm", "kl_coef")}
        return own | {"training_seed": entry["seed"]}
    return {}


def _collect(folder, labels, rows, folders):
    """Add the run in `folder` and, through its manifest, its parents: they lie in folders beside it, under results."""
    manifest = runs.manifest_of(folder)
    if manifest is None:
        return
    address = manifest["address"]
    if address in rows:
        rows[address].update({name: value for name, value in labels.items() if rows[address][name] is None})
        return
    rows[address] = _run_row(manifest, folder, labels)
    results = folder.parent.parent
    inherited = {"replicate": labels.get("replicate")}
    for parent in manifest["parents"].values():
        name = parent["folder"]
        if name not in folders:
            folders[name] = next((path for path in sorted(results.glob(f"*/{name}")) if path.is_dir()), None)
        if folders[name] is not None:
            stage = folders[name].parent.name
            _collect(folders[name], inherited if stage in ("sft", "reward_model") else {}, rows, folders)


def _run_row(manifest, folder, labels):
    return {
        "stage": manifest["stage"],
        "folder": f"{folder.parent.name}/{folder.name}",
        "address": manifest["address"],
        "replicate": labels.get("replicate"),
        "training_seed": labels.get("training_seed"),
        "arm": labels.get("arm"),
        "kl_coef": labels.get("kl_coef"),
        "seed": manifest["settings"].get("seed"),
        "wall_seconds": manifest.get("wall_seconds"),
        "cores": cores(manifest),
        "gpus": gpus(manifest),
        "peak_memory_mib": manifest.get("peak_memory_mib"),
        "git_commit": runs.code_of(manifest),
        "started": manifest.get("started"),
        "settings": runs.canonical_json(_without_paths(words.cleaned(manifest["settings"]))),
    }


def cores(manifest):
    """The cores that a run was given, for all its processes."""
    execution, stage = manifest.get("execution", {}), stages.ALL.get(manifest["stage"])
    return execution.get("threads", 1) * (execution.get("processes", 1) if stage and stage.processes else 1)


def gpus(manifest):
    """The GPUs that a run was given: none where its stage computes on none."""
    stage, count = stages.ALL.get(manifest["stage"]), manifest.get("execution", {}).get("gpus", 0)
    return 0 if count and stage and stage.light(manifest["settings"]) else count


def _without_paths(settings):
    """Settings for readers: a local file or folder goes by its name, as its content is what counts."""
    if isinstance(settings, dict):
        return {name: _without_paths(value) for name, value in settings.items()}
    if isinstance(settings, str) and Path(settings).is_absolute():
        return Path(settings).name
    return settings


# Registration.


@dataclass(frozen=True)
class Registered:
    """A file in which a study was registered.

    Attributes:
        sha256: of its content as the report found it; "" where there is no such file.
        commit: the last one that changed it; "" where git knows none.
        committed: its time, as manifests have theirs.
        changed: whether the file is other than in that commit.
    """

    file: str
    sha256: str
    commit: str = ""
    committed: str = ""
    changed: bool = False

    def before(self, first):
        """Whether it was committed before that time, and not changed since."""
        return bool(self.commit) and not self.changed and self.committed < first


@dataclass(frozen=True)
class Registration:
    """In which files a study was registered, and whether it is what they say.

    Attributes:
        files: a `Registered` each.
        first: when the study's first run started, as manifests have it; "" where none says so.
        first_commit: of the code that made this run; "" where it is not known.
        differing: the settings that the study has otherwise than its files say; None where that is not known.
        fault: why it is not known.
    """

    files: list[Registered]
    first: str
    first_commit: str
    differing: list[str] | None
    fault: str = ""

    @property
    def in_advance(self):
        """Whether all that the study claims was committed before its first run."""
        return bool(self.files) and self.differing == [] and all(file.before(self.first) for file in self.files)

    @property
    def sentences(self):
        """What a reader has to know of it; nothing where the study names no files."""
        if not self.files:
            return []
        started = f"the first run started {self.first}" if self.first else "when the first run started is not known"
        opening = f"Registered in {len(self.files)} file" + "s" * (len(self.files) > 1) + f"; {started}."
        return [opening, *(_sentence(file, self.first) for file in self.files), _difference(self), _code(self)]


def registration(study):
    """The `Registration` of a study."""
    files = [_registered(name) for name in study.config.registered]
    first = first_run(study)
    known = files, first.get("started") or "", first.get("git_commit") or ""
    try:
        return Registration(*known, differing(study.config) if files else [])
    except (ImportError, UserError) as error:
        return Registration(*known, None, str(error))


def _registered(name):
    path = repository.ROOT / name
    if not path.is_file():
        return Registered(name, "")
    commit, _, seconds = repository.git("log", "-1", "--format=%H %ct", "--", name).partition(" ")
    committed = datetime.fromtimestamp(int(seconds), UTC).strftime(TIME) if seconds else ""
    changed = bool(repository.git("status", "--porcelain", "--", name))
    return Registered(name, runs.file_sha256(path), commit, committed, changed)


def first_run(study):
    """The row of the first landscape or run of a policy, by when it started; {} where no manifest says when."""
    rows = [row for row in study.runs if row["arm"] is not None or row["stage"] in (*config.ALGORITHMS, "landscape")]
    return min((row for row in rows if row["started"]), key=lambda row: row["started"], default={})


def _sentence(file, first):
    if not file.sha256:
        return f"{file.file}: there is no such file any more."
    known = f"{file.file} (sha256 {file.sha256[:12]})"
    if not file.commit:
        return f"{known}: {UNKNOWN}, for git or the repository is missing, or nothing was committed."
    committed = f"commit {file.commit[:12]} of {file.committed}"
    if file.changed:
        return f"{known}: NOT committed before the first run, for it was changed after {committed}."
    if not first:
        return f"{known}: {committed}; whether that was before the first run is not known."
    when = "committed before" if file.before(first) else "NOT committed before"
    return f"{known}: {when} the first run ({committed})."


def _difference(registration):
    if registration.differing is None:
        return f"The registered files can't be composed ({registration.fault}): whether the study differs is not known."
    if not registration.differing:
        return "The study's settings are those of these files."
    names = registration.differing[:FEW]
    more = len(registration.differing) - len(names)
    return f"The study differs from these files in {', '.join(names)}" + (f" and {more} more." if more else ".")


def _code(registration):
    """Which code decides the verdicts, and whether it has changed since the first run."""
    now, first = runs.git_commit() or "", registration.first_commit
    if repository.INSTALLED:
        return f"The verdicts are decided by version {salsa.__version__} of the code, installed without its history."
    if not now:
        return "By which commit of the code the verdicts are decided is not known."
    opening = f"The verdicts are decided by the code of commit {_short(now)}"
    count = _commits_between(first, now)
    if count is None:
        return f"{opening}; whether {' or '.join(DECIDING)} has changed since the first run is not known."
    if count:
        commits = f"{count} commit" + "s" * (count > 1)
        return f"{opening}; since that of the first run ({_short(first)}), {commits} changed {' or '.join(DECIDING)}."
    return f"{opening}; since that of the first run ({_short(first)}), neither {' nor '.join(DECIDING)} has changed."


def _short(commit):
    """A commit as `git describe --dirty` has it, in words."""
    digits, _, dirty = commit.partition("-")
    return digits[:12] + " with uncommitted changes" * bool(dirty)


def _commits_between(first, last):
    """How many commits between two changed the code that decides; None where git does not know."""
    first, last = (commit.partition("-")[0] for commit in (first, last))
    count = repository.git("rev-list", "--count", f"{first}..{last}", "--", *DECIDING) if first else ""
    return int(count) if count else None


# What the registered files say, beside what the study does.


def differing(study_config):
    """The settings, by their dotted names, that a study has otherwise than its registered files say.

    Compared is the whole configuration, if an experiment is among the files, but for what changes no number; otherwise
    what claims say (CLAIMED), which is held to the default study's, with those arms alone whose files are registered.
    """
    experiments = [Path(name).stem for name in study_config.registered if name.startswith(config.EXPERIMENTS)]
    arms = sorted({"ppo", *(Path(name).stem for name in study_config.registered if name.startswith(ARMS))})
    chosen = f"experiment={experiments[0]}" if experiments else f"arm=[{','.join(arms)}]"
    registered = _composed(chosen)
    own, other = (words.cleaned(schema.dump(each)) for each in (study_config, registered))
    if not experiments:
        return [name for name in CLAIMED if own.get(name) != other.get(name)]
    if _is_look(own, other):
        other["replicates"] = own["replicates"]
    # A section that no arm reads is no part of a study, and its settings are not kept.
    unread = {*config.ALGORITHMS} - _algorithms(study_config) - _algorithms(registered)
    return [name for name in _differing(own, other) if not _left_out(name, UNCOMPARED | unread)]


@functools.cache
def _composed(chosen):
    from salsa.workflow import compose  # which needs Hydra, and the report does not

    return compose.compose([chosen])[0].config


def _algorithms(study_config):
    arms = policies.Composed(study_config, policies.expanded_arms(study_config)).arms.values()
    return {policies.algorithm_of(arm) for arm in arms}


def _is_look(own, other):
    """Whether a study has the first replicates of another, as many as one of its looks."""
    count = len(own["replicates"])
    return count in other.get("looks", ()) and own["replicates"] == other["replicates"][:count]


def _left_out(name, names):
    return any(name == each or name.startswith(f"{each}.") for each in names)


def _differing(own, other, place=""):
    """The dotted names of what differs in two configurations; a local file may be named by its path or alone."""
    if isinstance(own, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*own, *other]):
            yield from _differing(own.get(key), other.get(key), f"{place}.{key}" if place else key)
    elif own != other and not (isinstance(own, str) and isinstance(other, str) and own == Path(other).name):
        yield place
