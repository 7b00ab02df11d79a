"""Interruptions of a run: checkpoints that are whole or absent, and requests to stop.

A checkpoint is what Accelerate saves (networks, optimizer, random states) and a `Progress`, in a folder that gets its
name when everything in it is on the disk. The order of prompts, the sampling noise and the mini-batches follow from the
seed and the iteration, so they are not kept. A run that goes on from a checkpoint computes what it would have computed
without the interruption; on a CPU, bit for bit.

Files are checked against what was written, and read as data: those of Accelerate and transformers are pickles, and one
that names anything but tensors and numbers is refused before it runs. DeepSpeed reads its own files without this check.
"""

import contextlib
import os
import pickle
import re
import shutil
import signal

import torch
from accelerate.utils import DistributedType, patch_environment
from accelerate.utils.other import load as load_as_data

from salsa.workflow import failures, interrupts, runs, surroundings
from salsa.workflow.messages import UserError

ANCHOR = "reference.json"  # beside the checkpoints: the summary of the reference that the run is anchored to
LAYOUT = "processes.json"  # beside the checkpoints: how many processes wrote them, and how
FILES = "files.json"  # in a checkpoint: the sizes of its files, and digests unless they are large
DIGESTED = 2**31  # bytes; above, digests would take longer than the seconds that a process has to stop
DCP = "torch.distributed.checkpoint"
METADATA = {  # the classes that the index of sharded weights is made of
    *((f"{DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    *((f"{DCP}.filesystem", "_StorageInfo"), (f"{DCP}.filesystem", "_StoragePrefix")),
    *((f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"), ("torch.serialization", "_get_layout")),
    *(("torch", "Size"), ("collections", "OrderedDict"), ("pathlib", "PosixPath")),
}


class Stopped(Exception):
    """The run was asked to stop, and has changed nothing since its last whole iteration."""


class Progress:
    """The state of a run beside networks and optimizer. Accelerate saves and loads it."""

    def __init__(self, kl_coef, reference):
        self.iteration, self.steps, self.kl_coef = 0, 0, kl_coef
        self.reference = reference
        self.resumed_at = []
        self.saved = None  # the iteration of the last checkpoint

    def state_dict(self):
        # A reference that stays is built again from its ingredients; one that moves is only here.
        moving = [model.state_dict() for model in self.reference.models] if self.reference.moves else None
        names = ("iteration", "steps", "kl_coef", "resumed_at")
        return {**{name: getattr(self, name) for name in names}, "reference": moving}

    def load_state_dict(self, state):
        state = dict(state)
        for model, weights in zip(self.reference.models, state.pop("reference") or (), strict=False):
            model.load_state_dict(weights)
        vars(self).update(state)


class StopRequest:
    """A context in which SIGTERM and SIGINT are noted in `asked`, and do not end the process.

    A second SIGINT ends it at once, unless a launcher started it, which hands on what the terminal sends as well.

    Attributes:
        exit_code: with which to exit when asked to stop.
    """

    def __init__(self):
        self.asked, self.exit_code = False, interrupts.exit_code(signal.SIGTERM)

    def __enter__(self):
        self.before = interrupts.handle(self._note)
        return self

    def __exit__(self, *_):
        interrupts.restore(self.before)

    def _note(self, number, _):
        if self.asked and number == signal.SIGINT and surroundings.world()[0] == 1:
            os._exit(interrupts.exit_code(number))
        self.asked, self.exit_code = True, interrupts.exit_code(number)


def layout(accelerator):
    """What decides how the weights of a checkpoint are cut into files."""
    return {"processes": accelerator.num_processes, "distributed_type": str(accelerator.distributed_type.value)}


def check_layout(accelerator, before, saved):
    """Raise UserError where the folder `saved` has a checkpoint with another layout, `before`, than these processes."""
    now, words = layout(accelerator), "{processes} process(es) of {distributed_type}".format
    if before != now:
        raise UserError(
            f"{saved}: saved by {words(**before)}, and this is {words(**now)}; go on as it was started, or remove "
            f"{saved.parent}"
        )


def anchored_to(output):
    """The summary of the reference of the interrupted run in `output`, or None. Raises UserError if it is damaged."""
    return read_object(output / runs.CHECKPOINTS / ANCHOR, "sha256") if _saved(output) else None


def save(accelerator, progress, output):
    """Save a checkpoint of a whole iteration, then remove the one before it. Called by every process."""
    if progress.saved == progress.iteration:
        return
    root = output / runs.CHECKPOINTS
    partial = root / ".partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        runs.write_json(root / ANCHOR, progress.reference.summary)
        runs.write_json(root / LAYOUT, layout(accelerator))
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        describe_files(partial)
        sync(partial)
        older = _saved(output)
        os.replace(partial, root / f"{progress.iteration:06d}")
        _to_disk(root)
        for path in older:
            shutil.rmtree(path)
    progress.saved = progress.iteration


def load(accelerator, progress, output):
    """Go on from the last checkpoint in `output`. Returns whether there was one.

    Raises UserError where it is damaged, or where a file holds more than data.
    """
    saved = _saved(output)
    if not saved:
        return False
    check_layout(accelerator, read_object(output / runs.CHECKPOINTS / LAYOUT, *layout(accelerator)), saved[-1])
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    check_files(saved[-1])
    with contextlib.nullcontext() if deepspeed else reading(saved[-1]):
        for states in saved[-1].glob("random_states_*.pkl"):
            load_as_data(states)  # Accelerate itself would go on without random states that it can't read
        accelerator.load_state(str(saved[-1]))
    progress.resumed_at.append(progress.iteration)
    progress.saved = progress.iteration
    return True


def describe_files(folder):
    """Write the sizes, and up to DIGESTED bytes the digests, of a checkpoint that is complete."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / FILES]
    files = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size} for path in paths}
    if sum(file["bytes"] for file in files.values()) <= DIGESTED:
        for name, file in files.items():
            file["sha256"] = runs.file_sha256(folder / name)
    runs.write_json(folder / FILES, files)


def check_files(folder):
    """Raise UserError where a checkpoint is not as it was written."""
    for name, file in read_object(folder / FILES).items():
        path = folder / name
        if not path.is_file() or not isinstance(file, dict):
            raise _unusable(folder, f"{name} is missing")
        if path.stat().st_size != file.get("bytes"):
            raise _unusable(folder, f"{name} has {path.stat().st_size} bytes instead of {file.get('bytes')}")
        if "sha256" in file and runs.file_sha256(path) != file["sha256"]:
            raise _unusable(folder, f"{name} was altered since it was written")


def read_object(path, *keys):
    """The object of a JSON file of checkpoints. Raises UserError where the file, or one of the keys, is missing."""
    try:
        content = runs.read_json(path)
    except (OSError, runs.Unreadable):
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise _unusable(path, "missing, or altered since it was written")
    return content


def _unusable(place, reason):
    root = next((folder for folder in place.parents if folder.name == runs.CHECKPOINTS), place.parent)
    return UserError(f"{place}: {reason}; remove {root} and run again: training begins anew")


@contextlib.contextmanager
def reading(folder):
    """A context in which libraries read a checkpoint's files as data. Raises UserError where one is more than that."""
    try:
        for path in folder.rglob(".metadata"):
            with open(path, "rb") as file:
                _InertUnpickler(file).load()
        with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or failures.describe(error):
            raise
        match = re.search(r"Unsupported (?:global|class|operand)[^,\n]*?(?= was not| is not|[,.\n]|$)", str(error))
        reason = match[0] if match else str(error).strip().partition("\n")[0] or type(error).__name__
        raise _unusable(folder, f"can't be read as a checkpoint ({reason[:200]})") from error


class _InertUnpickler(pickle.Unpickler):
    """Reads a pickle without making its objects. Raises UnpicklingError where it names a class not in METADATA."""

    def find_class(self, module, name):
        if (module, name) in METADATA or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return _Placeholder
        raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}")


class _Placeholder(dict):
    """Stands for an object of any class."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass

    __hash__ = object.__hash__


def _saved(output):
    return sorted((output / runs.CHECKPOINTS).glob("[0-9]*"))


def sync(folder):
    """Return when a folder, and everything in it, is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _to_disk(path)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
