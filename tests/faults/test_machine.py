"""Faults of the machine, real ones: a small disk, a read-only one, limits of files, of memory and of size.

Each: one line that names it, nothing half-written taken for whole, and the same command again completes the run.
"""

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from salsa.data import prepare
from salsa.workflow import config, runs

ROOT = Path(__file__).parents[2]
TASK = config.Task("stories", 3, demonstrations=400, validation=16, preferences=96, prompts=48, evaluation=16)
SETTINGS = config.PrepareSettings(TASK)  # 130 kB of files, in less than a second


def command(folder, limit=None, start=("-m", "salsa.data.prepare")):
    """Run the stage prepare by hand into `folder`/run, under a limit: (exit code, lines on standard error)."""
    limits = (lambda: resource.setrlimit(*limit)) if limit else None
    runs.write_json(folder.parent / "settings.json", dataclasses.asdict(SETTINGS))
    words = [sys.executable, *start, "--settings", str(folder.parent / "settings.json")]
    words += ["--output", str(folder / "run")]
    options = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "preexec_fn": limits, "timeout": 120}
    done = subprocess.run(words, capture_output=True, text=True, **options)
    return done.returncode, done.stderr.splitlines()


def check_refused(outcome, says, folder):
    code, lines = outcome
    assert code == 1 and len(lines) == 1 and says in lines[0], lines
    assert runs.manifest_of(folder / "run") is None
    if (folder / "run").is_dir():
        left = {path.name for path in (folder / "run").rglob("*") if path.is_file()}
        hidden = {name for name in left if name.startswith(".")}
        assert hidden <= {".lock", ".started"}, left  # no half-written file


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    runs.execute("prepare", prepare.VERSION, prepare.prepare, SETTINGS, {}, folder / "run", config.Execution())
    return runs.verify(folder / "run")["artefacts"]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of some size, or mounts it again; skips where nothing can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        again = ["-o", f"remount,{options}"] if os.path.ismount(place) else ["-t", "tmpfs", "-o", options, "tmpfs"]
        done = subprocess.run(["mount", *again, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("a small disk needs mount, and root")
    yield mount
    subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.parametrize("size", ["16k", "64k", "120k"])  # the first file does not fit, a later one, the last
def test_a_disk_that_is_full(small_disk, undisturbed, size):
    disk = small_disk(f"size={size}")
    check_refused(command(disk), "the disk is full", disk)
    small_disk("size=8m")
    assert command(disk)[0] == 0 and runs.verify(disk / "run")["artefacts"] == undisturbed


def test_a_disk_that_is_read_only(small_disk, undisturbed):
    disk = small_disk("size=8m")
    assert command(disk)[0] == 0
    small_disk("ro")
    assert command(disk)[0] in (0, 1)
    assert runs.verify(disk / "run")["artefacts"] == undisturbed
    small_disk("rw")
    shutil.rmtree(disk / "run")
    small_disk("ro")
    check_refused(command(disk), "read-only", disk)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ((resource.RLIMIT_FSIZE, (20_000, 20_000)), "ulimit -f"),
        ((resource.RLIMIT_NOFILE, (5, 5)), "ulimit -n"),
    ],
    ids=["size", "files"],
)
def test_a_limit(tmp_path, undisturbed, limit, says):
    folder = tmp_path / "results"
    folder.mkdir()
    check_refused(command(folder, limit), says, folder)
    assert command(folder)[0] == 0 and runs.verify(folder / "run")["artefacts"] == undisturbed


LITTLE_MEMORY = """
import resource
from salsa.workflow import runs, stages
from salsa.data import prepare

def greedy(settings, parents, output, execution):
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    prepare.prepare(settings, parents, output, execution)
    bytearray(2**30)

stages.PREPARE.command(greedy, prepare.VERSION)
"""


def test_too_little_memory(tmp_path, undisturbed):
    folder = tmp_path / "results"
    folder.mkdir()
    check_refused(command(folder, start=["-c", LITTLE_MEMORY]), "not enough memory", folder)
    assert command(folder)[0] == 0 and runs.verify(folder / "run")["artefacts"] == undisturbed
