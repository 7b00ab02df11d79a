#!/usr/bin/env python3
"""Faults, many of them, against a small study: what docs/reliability.md says, measured.

    python benchmarks/soak.py kills --number 30     # SIGKILL at random moments, and while files get their names
    python benchmarks/soak.py disk                  # a disk that fills up, and gets room (root: it mounts a tmpfs)
    python benchmarks/soak.py damage                # every artefact removed, emptied, cut, flipped; bits of manifests
    python benchmarks/soak.py twice                 # the same study in two clones, with one core and with two
    python benchmarks/soak.py mutations --number 2000   # configurations, rows, model folders, judges' replies

Each ends with one JSON line, and with exit code 1 where something is not as it should be. The small study is the
default's data and stages at sizes that take a minute on two cores; a seed makes the moments.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from salsa.workflow import runs, stages

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    "replicates=[0]",
    "arm=[ppo,salsa,reset]",
    "arms.reset.reference.every=2",
    "benchmark=[in_distribution,two_turn]",
    "benchmarks.in_distribution.prompts=8",
    "benchmarks.two_turn.prompts=6",
    "data.task.demonstrations=128",
    "sft.epochs=2",
    "reward_model.pairs=64",
    "reward_model.held_out=16",
    "reward_model.epochs=1",
    "reward_model.normalisation_prompts=16",
    "ppo.iterations=6",
    "ppo.batch_size=8",
    "ppo.rollouts_every=2",
    "evaluate.alphas=[0,0.5,1]",
    "report.bootstrap=200",
    "execution.checkpoint_every=1",
]
# Ends a process before it gives a file or folder its name for the N-th time: once, in the first one of a stage.
AT_A_RENAME = """
import os, signal, sys
from pathlib import Path

marker = Path(os.environ["SOAK_MARKER"])
if os.environ["SOAK_STAGE"] in sys.orig_argv and marker.exists():
    replace, left = os.replace, [int(os.environ["SOAK_RENAME"])]

    def counted(source, target, **options):
        left[0] -= 1
        if left[0] == 0 and marker.exists():
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target, **options)

    os.replace = counted
"""


class Study:
    """The small study in a folder of its own, run by the real commands."""

    def __init__(self, folder, root=ROOT, cores=2):
        self.folder, self.root, self.cores = Path(folder), root, cores
        self.results = self.folder / "results"
        self.folder.mkdir(parents=True, exist_ok=True)

    def start(self, **variables):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
        environment["PYTHONPATH"] = os.pathsep.join(
            [*variables.get("PYTHONPATH", "").split(os.pathsep), str(self.root)]
        )
        command = [sys.executable, "-m", "salsa", "run", f"results={self.results}", *SMALL]
        command += ["--", "--cores", str(self.cores), "--directory", str(self.folder)]
        options = {"cwd": self.root, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
        with open(self.folder / "terminal.txt", "ab") as log:
            return subprocess.Popen(command, stdout=log, **options)

    def finish(self, **variables):
        """Run to the end; returns the exit code."""
        return self.start(**variables).wait(1800)

    @property
    def tables(self):
        """Name -> bytes of the study's tables and its claims."""
        (folder,) = (path for path in (self.results / "studies").iterdir() if not path.is_symlink())
        return {path.name: path.read_bytes() for path in [*folder.glob("tables/*.csv"), folder / "claims.md"]}


def processes(study):
    """The process ids of Snakemake and of the stages that work for a study, by what they are."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            if any(str(study.folder) in word for word in words) and "-m" in words:
                found[int(path.parent.name)] = words[words.index("-m") + 1]
    return found


def end(study, process):
    """Kill what is left of a study's processes, and wait for them."""
    for number in processes(study):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.wait()


def kills(arguments, place):
    """SIGKILL at random moments: of Snakemake alone, of one stage, of all at once, and before a rename."""
    undisturbed = Study(place / "undisturbed")
    assert undisturbed.finish() == 0, "the undisturbed run failed; see terminal.txt"
    study, generator = Study(place / "killed"), random.Random(arguments.seed)
    done, started = dict.fromkeys(("snakemake", "stage", "all", "rename"), 0), time.monotonic()
    while sum(done.values()) < arguments.number:
        kind = generator.choice(list(done))
        if kind == "rename":
            done[kind] += _kill_before_a_rename(study, generator)
            continue
        process = study.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(2, 20))
        alive = processes(study)
        chosen = (
            list(alive)
            if kind == "all"
            else [n for n, module in alive.items() if ("salsa." in module) == (kind == "stage")]
        )
        if process.poll() is None and chosen:
            for number in chosen if kind == "all" else chosen[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            done[kind] += 1
        if kind == "snakemake" and generator.random() < 0.5:
            continue  # its jobs live on beside those of the next one
        end(study, process)
        if process.returncode == 0:  # there was nothing left to kill
            shutil.rmtree(study.results / generator.choice(["ppo", "respond", "sft"]), ignore_errors=True)
    code = study.finish()
    wrong = [name for name, content in undisturbed.tables.items() if study.tables.get(name) != content]
    bad = [problem for _, problem in runs.survey(study.results) if problem]
    return {
        "kills": done,
        "exit": code,
        "tables": len(undisturbed.tables),
        "tables_that_differ": wrong,
        "damaged": bad,
        "seconds": round(time.monotonic() - started),
    }, code == 0 and not wrong and not bad


def _kill_before_a_rename(study, generator):
    """Let a stage, whose runs are removed, be killed before one of its renames; returns whether it came to that."""
    stage = generator.choice(
        ["prepare", "sft", "reward_model", "landscape", "gates", "ppo", "respond", "judge", "study"]
    )
    for removed in (stages.ALL[stage].folder, "studies"):
        shutil.rmtree(study.results / removed, ignore_errors=True)
    folder = study.folder / "at_a_rename"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(AT_A_RENAME)
    marker = study.folder / "marker"
    marker.touch()
    variables = {"SOAK_MARKER": str(marker), "SOAK_STAGE": stages.ALL[stage].module, "PYTHONPATH": str(folder)}
    process = study.start(SOAK_RENAME=str(generator.randint(1, 6)), **variables)
    process.wait(600)
    end(study, process)
    killed = not marker.exists()
    marker.unlink(missing_ok=True)
    return killed


def disk(arguments, place):
    """A tmpfs that is too small, and then is not."""
    undisturbed = Study(place / "undisturbed")
    assert undisturbed.finish() == 0, "the undisturbed run failed; see terminal.txt"
    small = place / "small"
    small.mkdir()
    lines = []
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        study = Study(place / "full")
        study.results = small / "results"
        for size in ("1m", "8m", "24m", "48m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(small)], check=True)
            before = len((study.folder / "terminal.txt").read_text().splitlines()) if lines else 0
            code = study.finish()
            said = (study.folder / "terminal.txt").read_text(errors="replace").splitlines()[before:]
            named = [line for line in said if "disk is full" in line]
            lines.append({"size": size, "exit": code, "lines": len(said), "named": len(named)})
            lines[-1]["tracebacks"] = sum(line.startswith("Traceback") for line in said)
            lines[-1]["damaged"] = sum(problem is not None for _, problem in runs.survey(study.results))
        subprocess.run(["mount", "-o", "remount,size=2g", str(small)], check=True)
        code = study.finish()
        wrong = [name for name, content in undisturbed.tables.items() if study.tables.get(name) != content]
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)
    good = code == 0 and not wrong and all(entry["named"] or entry["exit"] == 0 for entry in lines)
    good = good and not any(entry["tracebacks"] or entry["damaged"] for entry in lines)
    return {"full": lines, "exit": code, "tables_that_differ": wrong}, good


def damage(arguments, place):
    """Each artefact of each run removed, emptied, cut and with one bit flipped; bits of manifests."""
    study, generator = Study(place / "whole"), random.Random(arguments.seed)
    assert study.finish() == 0, "the run failed; see terminal.txt"
    refused, passed = 0, []
    folders = [folder for folder, _ in runs.survey(study.results)]
    for folder in folders:
        for name in runs.read_manifest(folder)["artefacts"]:
            path = folder / name
            whole = path.read_bytes()
            flipped = bytearray(whole)
            if whole:
                flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
            for content in (None, b"", whole[: len(whole) // 2], bytes(flipped)):
                if content == whole:
                    continue
                path.unlink(missing_ok=True)
                if content is not None:
                    path.write_bytes(content)
                refused, passed = _judge_damage(folder, name, refused, passed)
            path.write_bytes(whole)
    bits = 0
    for _ in range(arguments.number):
        folder = generator.choice(folders)
        path = folder / runs.MANIFEST
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        bits, passed = _judge_damage(folder, runs.MANIFEST, bits, passed)
        path.write_bytes(whole)
    return {"artefacts_refused": refused, "bits_refused": bits, "passed": passed[:10]}, not passed


def _judge_damage(folder, name, refused, passed):
    try:
        runs.verify(folder)
    except runs.UserError as error:
        if "\n" not in str(error) and folder.name in str(error):
            return refused + 1, passed
    return refused, [*passed, f"{folder.name}/{name}"]


def twice(arguments, place):
    """The same study in two clones, with one core and with two: the same bytes."""
    studies = []
    for cores in (1, 2):
        clone = place / f"clone of {cores}"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        studies.append(Study(place / f"with {cores}", clone, cores))
        assert studies[-1].finish() == 0, "a run failed; see terminal.txt"
    first, second = ({folder.name: runs.read_manifest(folder) for folder, _ in runs.survey(s.results)} for s in studies)
    timed = {
        "metrics.jsonl",
        "log_history.json",
        "report.html",
        "report.md",
        "runs.csv",
    }  # which say how long things took
    differ = [
        f"{name}/{artefact}"
        for name, manifest in first.items()
        for artefact, described in manifest["artefacts"].items()
        if artefact not in timed and second.get(name, {"artefacts": {}})["artefacts"].get(artefact) != described
    ]
    return {"runs": len(first), "same_runs": sorted(first) == sorted(second), "differ": differ[:10]}, not differ


def mutations(arguments, place):
    """The tests in tests/faults of mutated inputs, with more of them."""
    files = ["tests/faults/test_mutations.py", "tests/data/test_rows.py"]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", "mutated", "-p", "no:cacheprovider"]
    environment = os.environ | {"SALSA_MUTATIONS": str(arguments.number), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return {"mutations": arguments.number, "exit": done.returncode}, done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[function.__name__ for function in (kills, disk, damage, twice, mutations)])
    parser.add_argument("--number", type=int, default=30, help="kills, flipped bits of manifests, or mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for what is made; by default a temporary one")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="salsa-soak-")))
        place.mkdir(parents=True, exist_ok=True)
        result, good = globals()[arguments.what](arguments, place.resolve())
    print(json.dumps({"soak": arguments.what, "seed": arguments.seed, "good": good, **result}))
    sys.exit(not good)


if __name__ == "__main__":
    main()
