"""Failures of the machine, in one line: as the system says them, and as libraries wrap them."""

import dataclasses
import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

from salsa.workflow import config, failures, plan, runs, stages


def system(code):
    return OSError(code, os.strerror(code), "/place/file")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (system(errno.ENOSPC), "/place/file: the disk is full"),
        (system(errno.EDQUOT), "/place/file: the disk is full"),
        (system(errno.EROFS), "read-only"),
        (system(errno.EACCES), "permission denied"),
        (system(errno.EMFILE), "ulimit -n"),
        (system(errno.EFBIG), "ulimit -f"),
        (system(errno.EIO), "input/output error"),
        (system(errno.ENOMEM), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "execution.micro_batch"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            "not enough memory",
        ),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "not enough memory"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (
            RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file"),
            "MiB are",
        ),
    ],
)
def test_one_line(error, says, tmp_path):
    line = failures.describe(error, tmp_path)
    assert says in line and "\n" not in line
    wrapped = KeyError("it")
    wrapped.__cause__ = error
    assert failures.describe(wrapped, tmp_path) == line


@pytest.mark.parametrize(
    "error",
    [ValueError("no space left on device"), KeyError("os error 28"), AssertionError(), FileNotFoundError(2, "")],
)
def test_what_is_no_failure_of_the_machine(error, tmp_path):
    assert failures.describe(error, tmp_path) is None


def test_a_folder_that_is_gone(tmp_path):
    assert "removed while it was written" in failures.describe(FileNotFoundError(2, "No such file"), tmp_path / "gone")


@pytest.mark.parametrize("by_plan", [False, True])
def test_a_stage_ends_with_the_line(tmp_path, by_plan):
    def fail(settings, parents, output, execution):
        raise system(errno.ENOSPC)

    settings = {"corpus": {"kind": "stories", "seed": 0, "documents": 1}, "sha256": ""}
    arguments = ["--settings", "settings.json", "--output", str(tmp_path / "stage" / "run")]
    runs.write_json(tmp_path / "settings.json", settings)
    arguments[1] = str(tmp_path / "settings.json")
    if by_plan:
        made = plan.Plan(str(tmp_path))
        path = plan.add_run(made, "corpus", "stories", settings, {}, dataclasses.asdict(config.Execution()))
        arguments = ["--plan", str(made.save()), "--run", path]
    with pytest.raises(SystemExit, match="/place/file: the disk is full") as caught:
        stages.CORPUS.command(fail, stages.CORPUS.version, argv=arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*/*/manifest.json"))


def test_a_process_that_has_no_memory_to_import_with_says_so():
    script = "import sys; sys.orig_argv = ['-m', 'salsa.sft', '--plan']; import salsa; raise MemoryError"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("salsa: not enough memory") and done.stderr.count("\n") == 1
