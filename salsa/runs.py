"""A run: one stage, executed once, in a folder named by its content.

A run's address is the sha256 of its stage, the stage's VERSION, its settings and its parents' addresses, as canonical
JSON. Its folder holds whatever the stage writes and, last of all, `manifest.json`: written atomically, it says that
the run is finished and what it consists of. This module also turns a stage's function into a command, so that each
stage runs alone (`python -m salsa.sft --help`) exactly as the workflow runs it. It knows nothing of any stage.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from salsa import config, gpus

MANIFEST = "manifest.json"
UNDECLARED = {MANIFEST, "log.txt", "benchmark.tsv", ".lock"}  # in a run's folder, and no part of its result
CHECKPOINTS = "checkpoints"  # removed when the run is finished
TRACKERS = "trackers"  # what TensorBoard and its like write; no part of the result


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback."""


def canonical_json(value):
    """One text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def address(stage, version, settings, parents):
    """The sha256 (hex) of a run. `parents` maps a role to the address of the run that plays it."""
    content = {"stage": stage, "version": version, "settings": _by_content(settings), "parents": parents}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _by_content(settings):
    """Settings without the paths whose content their `files` describe: a moved file is the same file."""
    described = settings.get("files")
    if not described:
        return settings
    return {
        key: {name: "" if name in described else item for name, item in value.items()}
        if isinstance(value, dict) and key != "files"
        else value
        for key, value in settings.items()
    }


def derive_seed(root, stage, replicate, index=0):
    """A seed from the root seed, the stage and the replicate; never from an arm, an alpha or a kl_coef."""
    digest = hashlib.sha256(f"{root}/{stage}/{replicate}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path):
    """`<bytes>:<sha256>`: how local data enter an address, by content and not by path."""
    return f"{Path(path).stat().st_size}:{file_sha256(path)}"


def write_atomically(path, text):
    """Write a text file so that a reader sees all of it or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path):
    """Rows of a JSONL file; a malformed line is a UserError that names the file and the line."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg}); mend or remove the line") from None
    return rows


def manifest_of(folder):
    """The manifest of a finished run's folder, or None."""
    try:
        return read_json(Path(folder) / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def verify(folder):
    """Check a finished run's artefacts against its manifest and return the manifest.

    Raises UserError, naming the file, when the manifest or an artefact is missing, truncated or altered.
    """
    folder = Path(folder)
    manifest = manifest_of(folder)
    if manifest is None:
        raise UserError(f"{folder}: no readable {MANIFEST}; the run is not finished: remove the folder and run again")
    for name, recorded in manifest["artefacts"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; remove {folder} and run again")
        if path.stat().st_size != recorded["bytes"]:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes instead of {recorded['bytes']}; remove {folder} and run again"
            )
        if file_sha256(path) != recorded["sha256"]:
            raise UserError(f"{path}: altered since it was written; remove {folder} and run again")
    return manifest


def artefacts(folder):
    """Size and sha256 of every file in a run's folder that is part of its result, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
        if path.relative_to(folder).parts[0] not in UNDECLARED | {CHECKPOINTS, TRACKERS}
    }


def _packages():
    names = "torch transformers trl accelerate datasets safetensors numpy scipy scikit-learn pandas"
    versions = {"python": platform.python_version()}
    for name in names.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_commit():
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return found.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def execute(stage, version, function, settings, parents, output, execution, expected=None):
    """Run `function(settings, parents, output, execution)` once, and write the run's manifest last.

    Args:
        stage: the stage's name.
        version: the stage's VERSION.
        function: returns what the manifest shall say beside the artefacts (`summary`), or None.
        settings: the stage's settings dataclass.
        parents: role -> folder of a finished run, or of a plain model folder that no run wrote.
        output: the folder to write.
        execution: config.Execution.
        expected: the address that the plan gave; a difference is a bug of the plan, and refused.

    A second process on the same output waits for the first one's lock and then finds the result. Processes that
    `accelerate launch` started together are one: all of them compute, and the first holds the lock and writes.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with _only_one(output, execution) as writes:
        addresses = {}
        for role, folder in parents.items():
            addresses[role] = _parent_address(role, Path(folder))
        slice_ = dataclasses.asdict(settings)
        digest = address(stage, version, slice_, addresses)
        if expected and digest != expected:
            raise UserError(f"{output}: the plan expected another content of its parents; plan again")
        finished = manifest_of(output)
        if finished:
            if finished["address"] != digest:
                raise UserError(
                    f"{output}: holds another finished run ({finished['address'][:12]}); choose another --output"
                )
            if writes:
                shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)  # of a process that was killed while removing
                print(f"{output}: already finished", flush=True)
            return finished
        _claim_checkpoints(output, digest, writes)
        started = time.time()
        summary = function(settings, {role: Path(folder) for role, folder in parents.items()}, output, execution)
        if not writes:
            return None
        with _undisturbed():
            manifest = {
                "stage": stage,
                "version": version,
                "address": digest,
                "settings": slice_,
                "parents": {role: {"folder": Path(parents[role]).name, "address": addresses[role]} for role in parents},
                "summary": summary or {},
                "artefacts": artefacts(output),
                "execution": dataclasses.asdict(execution),
                "packages": _packages(),
                "git_commit": _git_commit(),
                "host": platform.node(),
                "command": sys.argv,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
                "wall_seconds": round(time.time() - started, 3),
                "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            }
            write_json(output / MANIFEST, manifest)
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return manifest


@contextlib.contextmanager
def _only_one(output, execution):
    """The lock on a run's folder. Yields whether this process writes for those that were launched with it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        with FileLock(output / ".lock"):
            yield True
        return
    import torch
    from accelerate import PartialState

    # Long enough to wait for another run's lock, or for the first process to write large models.
    patience = datetime.timedelta(days=1)
    together = PartialState(cpu=execution.device == "cpu" or not torch.cuda.is_available(), timeout=patience)
    with FileLock(output / ".lock") if together.is_main_process else contextlib.nullcontext():
        together.wait_for_everyone()
        yield together.is_main_process
        together.wait_for_everyone()
    together.destroy_process_group()


@contextlib.contextmanager
def _undisturbed():
    """Here a SIGTERM changes nothing: what was computed is complete, and only its manifest is missing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _claim_checkpoints(output, digest, writes):
    """UserError, in every process, where `output` has checkpoints of an unfinished run with another address."""
    path = output / CHECKPOINTS / "address"
    if path.exists() and path.read_text() != digest and len(list(path.parent.glob("[!.]*"))) > 1:
        raise UserError(
            f"{output}: holds checkpoints of another run ({path.read_text()[:12]}); remove {output}, or choose another "
            "--output"
        )
    if writes:
        write_atomically(path, digest)


def _parent_address(role, folder):
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (parent {role!r})")
    if (folder / MANIFEST).exists():
        return verify(folder)["address"]
    if (folder / "config.json").exists():  # a model folder from elsewhere
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return hashlib.sha256(canonical_json({p.name: describe_file(p) for p in files}).encode()).hexdigest()
    raise UserError(f"{folder}: no {MANIFEST}; the run is not finished (parent {role!r})")


def _module(function):
    """The name of a function's module, of the one that was started with `python -m` too."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    return main.name if function.__module__ == "__main__" and main else function.__module__


def command(stage, version, function, settings_class, roles=(), description=None, argv=None):
    """The command line of a stage: by the plan that the driver wrote, or by hand.

    `--plan FILE --run STAGE/NAME` runs one run of a plan. By hand, `--settings FILE` (JSON of the stage's settings),
    `--parent ROLE=FOLDER` and `--output FOLDER` say the same without a workflow.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {_module(function)}",
        description=description,
        epilog=f"settings: {settings_class.__name__} of salsa/config.py; parents: {', '.join(roles) or 'none'}",
    )
    parser.add_argument("--plan", help="a plan file that `salsa plan` or the workflow wrote")
    parser.add_argument("--run", help="with --plan: the run's folder below the plan's results, STAGE/NAME")
    parser.add_argument("--settings", help="JSON file of the stage's settings (- for standard input)")
    parser.add_argument("--execution", help="JSON file of execution settings", default=None)
    parser.add_argument("--parent", action="append", default=[], metavar="ROLE=FOLDER")
    parser.add_argument("--output", help="the folder to write")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    gpus.keep()
    gc.freeze()  # what is imported stays: it need not be looked at again, nor at the end, for a second
    gc.enable()
    try:
        if arguments.plan:
            if not arguments.run:
                parser.error("--plan needs --run")
            plan = read_json(arguments.plan)
            run = plan["runs"].get(arguments.run)
            if run is None:
                raise UserError(f"{arguments.plan}: no run {arguments.run!r}")
            results = Path(plan["results"])
            execute(
                stage,
                version,
                function,
                config.from_dict(settings_class, run["settings"]),
                {role: results / path for role, path in run["parents"].items()},
                results / arguments.run,
                config.from_dict(config.Execution, run["execution"]),
                expected=run["address"],
            )
            return
        if not (arguments.settings and arguments.output):
            parser.error("give --plan and --run, or --settings and --output")
        settings = json.load(sys.stdin) if arguments.settings == "-" else read_json(arguments.settings)
        execution = read_json(arguments.execution) if arguments.execution else {}
        parents = dict(item.split("=", 1) for item in arguments.parent)
        execute(
            stage,
            version,
            function,
            config.from_dict(settings_class, settings),
            parents,
            arguments.output,
            config.from_dict(config.Execution, execution),
        )
    except (UserError, ValueError, FileNotFoundError) as error:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # within which the launcher ends this process, where the first one says the same
        if isinstance(error, UserError) or not arguments.plan:
            sys.exit(f"{parser.prog}: {error}")
        raise
