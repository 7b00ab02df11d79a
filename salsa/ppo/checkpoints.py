"""Interruptions of a PPO run: checkpoints that are whole or not there, and requests to stop.

A checkpoint is what Accelerate saves (networks, optimizer, random states) and a `Progress`, in a folder that gets its
name when everything in it is on the disk. The order of prompts, sampling noise and mini-batches follow from the seed
and the iteration, so nothing of them is kept. A run that goes on from a checkpoint computes what it would have
computed without the interruption; on a CPU bit for bit.
"""

import os
import shutil
import signal

from salsa import runs

ANCHOR = "reference.json"  # beside the checkpoints: what the run is anchored to
LAYOUT = "processes.json"  # likewise: how many processes wrote them, and how


class Stopped(Exception):
    """The run was asked to stop before it changed anything since its last whole iteration."""


class Progress:
    """Where a run stands, beside networks and optimizer. Accelerate saves and loads it."""

    def __init__(self, kl_coef, reference):
        self.iteration, self.steps, self.kl_coef = 0, 0, kl_coef
        self.reference = reference
        self.resumed_at = []
        self.saved = None  # the iteration of the last checkpoint

    def state_dict(self):
        moving = [model.state_dict() for model in self.reference.models] if self.reference.moves else None
        names = ("iteration", "steps", "kl_coef", "resumed_at")
        return {**{name: getattr(self, name) for name in names}, "reference": moving}

    def load_state_dict(self, state):
        state = dict(state)
        for model, weights in zip(self.reference.models, state.pop("reference") or (), strict=False):
            model.load_state_dict(weights)
        vars(self).update(state)


class StopRequest:
    """Notes a SIGTERM while it is entered, instead of ending the process."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_):
        self.asked = True


def layout(accelerator):
    """What the layout of a checkpoint's files follows from."""
    return {"processes": accelerator.num_processes, "distributed_type": str(accelerator.distributed_type.value)}


def check_layout(accelerator, before, saved):
    """UserError where the checkpoint in the folder `saved`, of the layout `before`, is not one of these processes."""
    now = layout(accelerator)
    if before != now:
        raise runs.UserError(
            f"{saved}: saved by {_said(before)}, and this is {_said(now)}; go on as it was started, or remove "
            f"{saved.parent}"
        )


def anchored_to(output):
    """The summary of the reference of the interrupted run in `output`, or None."""
    path = output / runs.CHECKPOINTS / ANCHOR
    return runs.read_json(path) if path.exists() else None


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
        sync(partial)
        older = _saved(output)
        os.replace(partial, root / f"{progress.iteration:06d}")
        _to_disk(root)
        for path in older:
            shutil.rmtree(path)
    progress.saved = progress.iteration


def load(accelerator, progress, output):
    """Go on from the last checkpoint of `output`, if there is one. Returns whether there was."""
    saved = _saved(output)
    if not saved:
        return False
    check_layout(accelerator, runs.read_json(output / runs.CHECKPOINTS / LAYOUT), saved[-1])
    accelerator.load_state(str(saved[-1]))
    progress.resumed_at.append(progress.iteration)
    progress.saved = progress.iteration
    return True


def _said(layout):
    return f"{layout['processes']} process(es) of {layout['distributed_type']}"


def _saved(output):
    return sorted((output / runs.CHECKPOINTS).glob("[0-9]*"))


def sync(folder):
    """Return when a folder and all that is in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _to_disk(path)


def _to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
