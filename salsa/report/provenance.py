"""Every run that a study stands on, found through the manifests of its parents: the rows of runs.csv."""

from pathlib import Path

from salsa.report import words
from salsa.workflow import runs


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
