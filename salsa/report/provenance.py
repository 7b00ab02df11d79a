"""What a study stands on: every run (the rows of runs.csv), and the files in which it was registered before.

A registered file (`config.registered`) fixes claims, kl_coefs and looks. It was fixed before the study if the last
commit that changed it is older than the first training run, and nothing was changed after that commit. Commits carry
their own dates, so that this convinces only with a repository that others hold too.
"""

import contextlib
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from salsa.report import words
from salsa.workflow import config, runs, schema, stages
from salsa.workflow.messages import UserError

FIXED = ("claims", "kl_coefs", "claim_kl_coef", "looks")  # what registered files say in advance
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
    if kind in ("landscape", "reward_model"):
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
        "peak_memory_mib": manifest.get("peak_memory_mib"),
        "git_commit": manifest.get("git_commit"),
        "started": manifest.get("started"),
        "settings": runs.canonical_json(_without_paths(words.cleaned(manifest["settings"]))),
    }


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


def registered(study):
    """A `Registered` for each file that the study names."""
    return [_registered(name) for name in study.config.registered]


def _registered(name):
    path = stages.ROOT / name
    if not path.is_file():
        return Registered(name, "")
    commit, _, seconds = _git(path, "log", "-1", "--format=%H %ct", "--", path.name).partition(" ")
    committed = datetime.fromtimestamp(int(seconds), UTC).strftime(TIME) if seconds else ""
    changed = bool(_git(path, "status", "--porcelain", "--", path.name))
    return Registered(name, runs.file_sha256(path), commit, committed, changed)


def _git(path, *arguments):
    """What git says in a file's folder; nothing where git or a repository is missing."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", *arguments]
        result = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, timeout=10)
        return result.stdout.strip() if result.returncode == 0 else ""
    return ""


def first_run(study):
    """When the first training run of the study's policies started, as its manifest says; "" where none says so."""
    started = [row["started"] for row in study.runs if row["stage"] in config.ALGORITHMS and row["started"]]
    return min(started, default="")


def sentences(study):
    """What a reader has to know of the study's registration; nothing where it names no files."""
    files, first = registered(study), first_run(study)
    if not files:
        return []
    opening = f"Registered in {len(files)} file" + "s" * (len(files) > 1) + f"; the first run started {first}."
    return [opening, *(_sentence(file, first) for file in files), *_differences(study)]


def _sentence(file, first):
    if not file.sha256:
        return f"{file.file}: there is no such file any more."
    known = f"{file.file} (sha256 {file.sha256[:12]})"
    if not file.commit:
        return f"{known}: {UNKNOWN}, for git or the repository is missing, or nothing was committed."
    committed = f"commit {file.commit[:12]} of {file.committed}"
    if file.changed:
        return f"{known}: NOT committed before the first run, for it was changed after {committed}."
    when = "committed before" if file.committed < first else "NOT committed before"
    return f"{known}: {when} the first run ({committed})."


def _differences(study):
    """Sentences on what the study has otherwise than its registered files say, when they are composed alone."""
    try:
        composed = words.cleaned(_composed(study.config.registered))
    except (ImportError, UserError) as error:
        return [f"The registered files can't be composed here ({error}): whether the study differs is not known."]
    own = {key: schema.dump(getattr(study.config, key)) for key in FIXED}
    differing = [key for key in FIXED if own[key] != composed[key]]
    if not differing:
        return ["The study's claims, kl_coefs and looks are those of these files."]
    return [f"The study differs from these files in {', '.join(differing)}: overrides have changed what they say."]


def _composed(files):
    """What the registered files say, alone: of the experiment among them, or else of the default study."""
    from salsa.workflow import compose  # which needs Hydra, and the report does not

    experiments = [Path(name).stem for name in files if name.startswith(config.EXPERIMENTS)]
    study = compose.compose([f"experiment={name}" for name in experiments[:1]])[0].config
    return {key: schema.dump(getattr(study, key)) for key in FIXED}
