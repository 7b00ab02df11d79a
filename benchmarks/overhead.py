#!/usr/bin/env python3
"""What a study costs beside its computation: starting processes, importing, planning, waiting.

    python benchmarks/overhead.py --cores 2
    python benchmarks/overhead.py --cores 2 replicates=[0] ppo.iterations=10

runs a study into a temporary folder with Snakemake, and splits the machine's time, cores × wall seconds: what stages
compute (their manifests), what their processes take beside that (Snakemake's benchmark files: interpreter, imports,
checking parents, writing manifests, exit), Snakemake itself before its first job starts, and what is left, in which a
core had no job. Model classes that a stage imports while it runs count as its computation: they are a second of it.

Ends with one JSON line. `--keep FOLDER` keeps the results; `--of STUDY` splits one that Snakemake has run there
already, with the wall seconds from its first job's start to its last one's end.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from salsa.workflow import runs

ROOT = Path(__file__).resolve().parent.parent


def jobs(study):
    """(stage, when its function started, its seconds, its process's seconds, threads) of a study and what it is of."""
    results, found, left = study.resolve().parent.parent, {}, [study.resolve()]
    folders = {folder.name: folder for stage in results.iterdir() if stage.is_dir() for folder in stage.iterdir()}
    while left:
        folder = left.pop()
        if folder in found:
            continue
        manifest = runs.manifest_of(folder)
        with open(folder / "benchmark.tsv", encoding="utf-8", newline="") as file:
            process = float(next(csv.DictReader(file, delimiter="\t"))["s"])
        started = datetime.fromisoformat(manifest["started"]).timestamp()
        threads = manifest["execution"]["threads"]
        found[folder] = (manifest["stage"], started, manifest["wall_seconds"], process, threads)
        left += [folders[parent["folder"]] for parent in manifest["parents"].values()]
    return list(found.values())


def split(found, cores, wall, before):
    """Seconds and shares of the machine's time; `before`: seconds until the first job's function started."""
    stages = defaultdict(lambda: [0, 0.0, 0.0])
    for stage, _, computing, process, threads in found:
        entry = stages[stage]
        entry[0] += 1
        entry[1] += threads * computing
        entry[2] += threads * (process - computing)
    whole = cores * wall
    computing, around = (sum(entry[place] for entry in stages.values()) for place in (1, 2))
    parts = {"computing": computing, "processes": around, "planning": cores * before}
    parts["waiting"] = whole - sum(parts.values())
    return {
        "cores": cores,
        "wall_seconds": round(wall, 1),
        "jobs": len(found),
        "core_seconds": {name: round(value, 1) for name, value in parts.items()},
        "shares": {name: round(value / whole, 4) for name, value in parts.items()},
        "overhead": round((parts["processes"] + parts["planning"]) / whole, 4),
        "stages": {
            stage: {"jobs": count, "computing": round(own, 1), "around": round(beside, 1)}
            for stage, (count, own, beside) in sorted(stages.items(), key=lambda item: -item[1][2])
        },
    }


def run(folder, cores, overrides):
    """Run a study into `folder`; returns its folder, when Snakemake was started and how long it took."""
    begun = time.time()
    text = " ".join([*overrides, f"results={folder}"])
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)]
    subprocess.run([*command, "--cores", str(cores), "--config", f"overrides={text}"], check=True, stdout=sys.stderr)
    wall = time.time() - begun
    studies = [path for path in (folder / "studies").iterdir() if not path.is_symlink()]
    if len(studies) != 1:
        sys.exit(f"{len(studies)} studies in {folder}; give overrides of one")
    return studies[0], begun, wall


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the study's configuration; none: the default study")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="a new folder for the results")
    parser.add_argument("--of", type=Path, metavar="STUDY", help="the folder of a finished study, to run nothing")
    arguments = parser.parse_args()
    if arguments.of:
        found = jobs(arguments.of)
        begun = min(started for _, started, *_ in found)
        wall = max(started + computing for _, started, computing, *_ in found) - begun
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=not arguments.keep)
            study, begun, wall = run(folder.resolve(), arguments.cores, arguments.overrides)
            found = jobs(study)
    # A manifest's time has whole seconds.
    before = max(0.0, min(started for _, started, *_ in found) - begun)
    print(json.dumps(split(found, arguments.cores, wall, before)))


if __name__ == "__main__":
    main()
