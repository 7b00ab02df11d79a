"""Leases of GPUs, with fake lists of devices: the locks are real, and so are the processes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from salsa.workflow import gpus

JOB = """
import os, sys, time
log, seconds = sys.argv[1], float(sys.argv[2])
held = os.environ["CUDA_VISIBLE_DEVICES"]
def note(what):
    with open(log, "a") as file:
        file.write(f"{what} {os.getpid()} {held}\\n")
note("begin")
time.sleep(seconds)
note("end")
"""
CHILD = """
import subprocess, sys
from salsa.workflow import gpus
gpus.keep()
child = "from salsa.workflow import gpus; import time; gpus.keep(); print(1, flush=True); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", child], stdout=sys.stdout).pid, flush=True)
import time; time.sleep(60)
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of its own: where its locks lie. Devices are what CUDA_VISIBLE_DEVICES lists."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(gpus.tempfile, "tempdir", None)
    return tmp_path


def start(count, *command, devices="0,1,2,3", **options):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices}
    return subprocess.Popen(
        [sys.executable, "-m", "salsa.workflow.gpus", str(count), *map(str, command)],
        env=environment,
        text=True,
        **options,
    )


def free(devices="0,1,2,3"):
    """How many devices a lease could have at this moment."""
    found = 0
    for name in devices.split(","):
        with open(gpus.folder() / name, "w") as file:
            try:
                gpus.fcntl.flock(file, gpus.fcntl.LOCK_EX | gpus.fcntl.LOCK_NB)
                found += 1
            except BlockingIOError:
                pass
    return found


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_many_jobs_never_share_a_device(machine):
    log, generator = machine / "log", random.Random(0)
    wanted = [generator.choice((1, 1, 2, 3)) for _ in range(12)]
    jobs = [start(count, sys.executable, "-c", JOB, log, 0.1) for count in wanted]
    assert [job.wait(60) for job in jobs] == [0] * len(jobs)
    holding, counts, together = {}, [], 0
    for line in log.read_text().splitlines():
        what, process, devices = line.split()
        if what == "begin":
            own = devices.split(",")
            assert not set(own) & {name for others in holding.values() for name in others}
            holding[process] = own
            counts.append(len(own))
            together = max(together, len(holding))
        else:
            del holding[process]
    assert sorted(counts) == sorted(wanted) and not holding and together > 1


def test_a_killed_job_frees_its_own(machine):
    log = machine / "log"
    job = start(3, sys.executable, "-c", JOB, log, 60)
    wait_for(lambda: log.exists() and log.read_text())
    assert free() == 1
    job.send_signal(signal.SIGKILL)
    job.wait()
    wait_for(lambda: free() == 4)
    assert start(4, sys.executable, "-c", JOB, log, 0).wait(30) == 0


def test_what_a_job_started_keeps_its_devices(machine):
    job = start(2, sys.executable, "-c", CHILD, stdout=subprocess.PIPE)
    pids = [int(job.stdout.readline()) for _ in range(2)]  # the child's process id, and that it holds its share
    child = max(pids)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert free() == 2
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: free() == 4)


def test_a_large_job_is_not_passed_over(machine, monkeypatch):
    log = machine / "log"
    first = start(1, sys.executable, "-c", JOB, log, 1.5, devices="0,1")
    wait_for(lambda: log.exists() and log.read_text())
    large = start(2, sys.executable, "-c", JOB, log, 0, devices="0,1")
    time.sleep(0.5)  # until it stands in the queue
    later = start(1, sys.executable, "-c", JOB, log, 0, devices="0,1")
    assert [job.wait(30) for job in (first, large, later)] == [0, 0, 0]
    begun = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("begin")]
    assert begun == [str(job.pid) for job in (first, large, later)]


def test_jobs_of_a_scheduler_number_their_own_devices(machine, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    log = machine / "log"
    job = start(1, sys.executable, "-c", JOB, log, 60, devices="0")
    try:
        wait_for(lambda: log.exists() and log.read_text())
        assert free("0") == 0
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        assert free("0") == 1
    finally:
        job.kill()
        job.wait()


@pytest.mark.parametrize("devices", ["0", ""])
def test_too_few_devices_are_one_line(machine, devices):
    job = start(2, "true", devices=devices, stderr=subprocess.PIPE)
    _, error = job.communicate(timeout=30)
    assert job.returncode == 1 and error.count("\n") == 1 and "2 GPUs are wanted" in error


def test_the_exit_code_is_the_commands(machine):
    assert start(1, sys.executable, "-c", "raise SystemExit(143)").wait(30) == 143


def test_devices_are_listed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8f,")
    assert gpus.devices() == ["3", "GPU-8f"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.devices() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus.devices() == ["0", "1"]
