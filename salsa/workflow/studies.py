"""What is made of finished studies: readable names, and what is published or exported of them."""

import os
import re
import shutil
from pathlib import Path

from salsa import data
from salsa.workflow import answers, runs, stages
from salsa.workflow.bounds import printable
from salsa.workflow.jobs import finished
from salsa.workflow.messages import UserError
from salsa.workflow.plan import LABEL, has_looks

PAGES = ("report.html", "report.md", "claims.md")  # of a study: what a person reads, the first of them first
REPORTS = tuple(name for name, stage in stages.ALL.items() if stage.page)
# Bytes of a published file: the page of a large study, which its folder can make again, stays behind. Compressed scores
# go along at any size, because every verdict can be computed again from them.
LARGEST = 2**21


def reached(plan, study):
    """The path of the look that a study has reached: the first that isn't finished, or the one at which it ends.

    A study without looks has one, with all of its replicates.
    """
    *earlier, last = study["looks"]
    return next((path for path in earlier if not (finished(plan, path) and decision(plan, path)["goes_on"])), last)


def latest(plan, study):
    """The path of a study's last finished look, or None."""
    done = study["looks"][: study["looks"].index(reached(plan, study)) + 1]
    return next((path for path in reversed(done) if finished(plan, path)), None)


def decision(plan, path):
    """What a finished look has decided, as a dictionary (`salsa.report.looks`). UserError where its file is damaged."""
    file = Path(plan.results) / path / stages.DECISION
    try:
        value = runs.read_json(file)
        kinds = [type(value[key]) for key in ("look", "replicates", "decided", "undecided", "goes_on")]
        if kinds == [int, int, list, list, bool]:
            return value
    except (runs.Unreadable, OSError, KeyError, TypeError):
        pass
    raise UserError(f"{file}: does not say whether the study goes on; remove {file.parent} and run again")


def look_words(plan, path):
    """What a finished look has found, in a line."""
    decided = decision(plan, path)
    undecided = ", ".join(map(str, decided["undecided"])) or "none"
    then = "goes on" if decided["goes_on"] else "ends here"
    return printable(
        f"look {decided['look']}, at {decided['replicates']} replicates: claims of the abstract decided: "
        f"{len(decided['decided'])}, undecided: {undecided}; the study {then}"
    )


def conclude(plan):
    """Link the readable names of the finished studies to their folders; yields the lines to show.

    What a study has found comes first, then where to read on; of the points of a sweep, a line or two each.
    """
    finished_studies = [study for study in plan.studies if latest(plan, study)]
    for study in finished_studies:
        yield f"study {study['name']}: {link(plan, study)}"
        if has_looks(study):
            yield f"  {look_words(plan, latest(plan, study))}"
        folder = Path(plan.results) / latest(plan, study)
        if len(finished_studies) > 1:
            answer = answers.short(folder)
            yield from [f"  {answer}"] if answer else []
        else:
            yield from (f"  {line}" for line in answers.lines(folder, answers.WIDTH - 2))
            yield from _places(_shown_folder(plan, study, folder))
    if plan.comparison and finished(plan, plan.comparison):
        yield f"comparison of the sweep: {Path(plan.results) / plan.comparison / stages.COMPARISON.page}"


def _shown_folder(plan, study, folder):
    """The folder of a study by its readable name, where that leads there."""
    name = Path(plan.results) / study["link"] if study["link"] else folder
    return name if name.is_symlink() and name.resolve() == folder.resolve() else folder


def _places(folder):
    """Where to read on: the page, and what lies beside it."""
    pages = [name for name in PAGES if (folder / name).exists()]
    figures = len(list(folder.glob("figures/*.png")))
    beside = [*pages[1:], *(["tables/"] if (folder / "tables").is_dir() else [])]
    beside += [f"figures/ ({figures})"] if figures else []
    yield from [printable(f"  {folder / pages[0]}")] if pages else []
    yield from [f"  beside it: {', '.join(beside)}"] if beside and pages else []


def link(plan, study):
    """Link a study's name to its last finished look (relatively, replaced at once); returns what to show of it."""
    folder = Path(plan.results) / latest(plan, study)
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
    manifest = _report(study, *REPORTS)
    settings, folder = manifest["settings"].get("config"), study.resolve()  # a comparison has no configuration
    link = folder.parent / settings["name"] if settings else folder
    name = settings["name"] if link.is_symlink() and link.resolve() == folder else folder.name
    if not LABEL.fullmatch(name):
        raise UserError(f"{study}: {name!r} can be no folder's name; run the study again")
    target = folder.parent.parent / "published" / name
    if target == folder:
        raise UserError(f"{study}: is the published copy itself; give the study's own folder, results/studies/…")
    if os.path.lexists(target) and (
        target.is_symlink() or (runs.manifest_of(target) or {}).get("stage") not in REPORTS
    ):
        raise UserError(f"{target}: in the way, and no published study; move it elsewhere")
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
        if described["bytes"] <= LARGEST or artefact.endswith(".csv.gz"):
            (copy / artefact).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / artefact, copy / artefact)
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
        raise UserError(f"{folder}: no finished study; give a study's folder, results/studies/…")
    manifest = runs.verify(folder)
    if manifest["stage"] not in stages:
        raise UserError(f"{folder}: a run of {manifest['stage']}; give a study's folder, results/studies/…")
    outside = [name for name in manifest["artefacts"] if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside:
        raise UserError(f"{folder}: its manifest names {outside[0]}, outside of it; remove it and run again")
    return manifest


def export(study, arm, output, kl_coef=None, replicate=None, seed=None):
    """Copy a trained policy's model folder, with its card as README.md, to the new folder `output`.

    The copies are files of their own, so that what is done to them leaves the run as it is. UserError where the study
    or the run is unfinished or altered, where not exactly one policy is meant, or where `output` is there already.
    """
    from salsa.report import cards  # which Snakemake, that imports this module, has no need of

    output = Path(output)
    if os.path.lexists(output):
        raise UserError(f"{output}: is there already; choose another --output")
    manifest = _report(study, "study")
    policy = _policy(manifest["settings"]["policies"], arm, kl_coef, replicate, seed)
    parent = manifest.get("parents", {}).get(runs.published_role(f"policy/{policy['index']}"))
    if parent is None:
        raise UserError(f"{study}: a copy beside no models; give the study's own folder, results/studies/…")
    results = study.resolve().parent.parent
    trained = (results / stage.folder / parent["folder"] for stage in stages.ALL.values() if stage.trains_policy)
    folder = next((path for path in trained if path.is_dir()), results / parent["folder"])
    if runs.verify(folder)["address"] != parent["address"]:
        raise UserError(f"{folder}: another run than the study was made from; build the study again")
    place = (policy[name] for name in ("arm", "kl_coef", "replicate"))
    card = study / "cards" / cards.file_name(*place, policy.get("seed", 0))
    if not card.is_file():
        raise UserError(f"{study}: has no card of this policy; run the study again with this version")
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        runs.copy_files(folder / "model", temporary)
        shutil.copyfile(card, temporary / "README.md")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half a copy
    return output


def _policy(policies, arm, kl_coef, replicate, seed):
    """The one policy that is meant; UserError, with those there are, where it is none or several."""
    policies = [{"seed": 0} | policy for policy in policies]  # which studies of earlier versions do not name
    several = any(policy["seed"] for policy in policies)
    wanted = {"arm": arm, "kl_coef": kl_coef, "replicate": replicate, "seed": seed}
    fitting = [p for p in policies if all(value in (None, p[name]) for name, value in wanted.items())]
    if len(fitting) == 1:
        return fitting[0]
    names = [
        f"{p['arm']} --kl-coef {p['kl_coef']:g} --replicate {p['replicate']}" + f" --seed {p['seed']}" * several
        for p in fitting or policies
    ]
    problem = "several policies fit" if fitting else "no such policy"
    raise UserError(f"{arm}: {problem}; choose one of: {'; '.join(names)}")
