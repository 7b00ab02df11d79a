"""The trackers of a training run (`execution.trackers`), which are Accelerate's: TensorBoard, W&B and others.

A run has the name that people gave it: arm, kl_coef and replicate. One that goes on after it was stopped goes on in the
same run of a tracker, and logs no step twice: a step that was logged before is not logged again, for the steps after a
checkpoint are taken anew. Left out: what is logged, which the trainers say.
"""

import json
import os
import uuid

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import TrainerCallback

from salsa.workflow import runs

PROJECT = "salsa"
LAST_STEP, RUN_ID = "last_step", "run_id"  # files beside what the trackers write
# Tracker -> the option that names a run, where Accelerate's own name is the project's.
NAMES = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "clearml": "task_name",
    "swanlab": "experiment_name",
}


class Trackers:
    """The trackers of one run; nothing of all this where `names` is empty.

    Args:
        names: execution.trackers.
        output: the run's folder.
        settings: what the trackers show beside the metrics, a dictionary of any depth.
        writes: whether this process is the one that logs.
    """

    def __init__(self, names, output, settings, writes=True):
        self.folder, self.started = output / runs.TRACKERS, []
        if not names or not writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LAST_STEP
        self.logged_before = int(path.read_text()) if path.exists() else -1
        name = os.environ.get(runs.RUN_NAME) or output.name
        for kind in names:
            tracker = self._start(kind, name)
            if self.logged_before < 0:
                _describe(kind, tracker, settings)
            self.started.append(tracker)

    def _start(self, kind, name):
        """A tracker of Accelerate's that has begun, or goes on."""
        tracker_class = LOGGER_TYPE_TO_CLASS[kind]
        options = {NAMES[kind]: name} if kind in NAMES else {}
        if kind == "wandb":
            options |= {"id": self._run_id(), "resume": "allow", "dir": str(self.folder)}
            options |= {"group": os.environ.get(runs.STUDY_NAME)}
        project = os.environ.get("WANDB_PROJECT", PROJECT) if kind == "wandb" else PROJECT
        if kind == "tensorboard":  # whose runs are folders
            project = name.replace("/", "+")
        places = (str(self.folder),) if tracker_class.requires_logging_directory else ()
        tracker = tracker_class(project, *places, **options)
        if hasattr(tracker, "start"):
            tracker.start()
        return tracker

    def _run_id(self):
        """What W&B knows the run by, also when it goes on; another where the run's folder was removed."""
        path = self.folder / RUN_ID
        if not path.exists():
            runs.write_atomically(path, uuid.uuid4().hex[:16])
        return path.read_text()

    def log(self, metrics, step):
        """Log numbers by name, of a step that was not logged before this process began."""
        if not self.started or step <= self.logged_before:
            return
        for tracker in self.started:
            tracker.log(metrics, step=step)
        runs.write_atomically(self.folder / LAST_STEP, str(step))

    def finish(self):
        """Let the trackers write what they still hold."""
        for tracker in self.started:
            tracker.finish()
        self.started = []


def _describe(kind, tracker, settings):
    """Show a run's settings beside its metrics."""
    if kind == "tensorboard":  # where Accelerate would make a second run of them, named by the time
        tracker.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1, default=str)}\n```")
    else:
        tracker.store_init_configuration(settings)


class TrackerCallback(TrainerCallback):
    """Logs what a trainer of transformers logs."""

    def __init__(self, names, output):
        self.names, self.output, self.trackers = names, output, None

    def on_train_begin(self, args, state, control, **_):
        self.trackers = Trackers(self.names, self.output, args.to_sanitized_dict(), state.is_world_process_zero)

    def on_log(self, args, state, control, logs=None, **_):
        if self.trackers:  # an evaluation may come before the training
            numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
            self.trackers.log(numbers, state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.trackers.finish()
