"""A lease of GPUs on one machine: `python -m salsa.workflow.gpus N COMMAND…` runs COMMAND with N GPUs of its own.

Snakemake counts the GPUs of a machine and says to no job which are its own. A lease is a kernel lock on a file for each
device. The command takes the place of this process and keeps the files open, so its end, however it comes, is the
lease's; the processes that it starts take a share of the lock (`keep`) and so outlive it without losing their GPU.
Nothing is imported but the standard library: this runs before every job on a GPU.
"""

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"
LEASED = "SALSA_LEASED"  # the files of the devices that a job holds, for the processes that it starts
DEVICE = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")  # an index, or what nvidia-smi -L names: GPU-<uuid>, MIG-GPU-<uuid>/1/0
PATIENCE = 1.0  # seconds between two looks at devices that others hold


def devices():
    """The devices that jobs here may use, as CUDA_VISIBLE_DEVICES names them: what it lists, else all there are."""
    listed = os.environ.get(VISIBLE)
    if listed is None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
            listed = ",".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    names = [name.strip() for name in (listed or "").split(",")]
    # As CUDA reads the list: what comes after a name that is none (-1, NoDevFiles, nothing) isn't there.
    none = next((place for place, name in enumerate(names) if not DEVICE.fullmatch(name)), len(names))
    return list(dict.fromkeys(names[:none]))


def folder():
    """Where the locks of this machine's devices lie. Each job of a scheduler numbers its devices itself."""
    job = os.environ.get("SLURM_JOB_ID", "")
    path = Path(tempfile.gettempdir()) / f"salsa-gpus-{os.getuid()}{'-' * bool(job)}{job}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def file_name(device):
    """A device's name as that of a file: MIG-GPU-<uuid>/1/0 has slashes."""
    return device.replace("/", "_")


def lease(count, among):
    """Wait for `count` of the devices `among` that nobody holds, and hold them. Returns their names.

    They are held until this process and all that `keep` the lease have ended. Whoever waits first is served first, so
    that a job of two GPUs is not passed over by jobs of one. ValueError where there are not so many devices.
    """
    if count > len(among):
        raise ValueError(f"{count} GPUs are wanted and {len(among)} are here ({', '.join(among) or 'none'})")
    place = folder()
    with open(place / "queue", "w") as queue:
        fcntl.flock(queue, fcntl.LOCK_EX)
        while True:
            held = {}
            for name in among:
                file = os.open(place / file_name(name), os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(file)
                    continue
                held[name] = file
                if len(held) == count:
                    break
            if len(held) == count:
                break
            for file in held.values():
                os.close(file)
            time.sleep(PATIENCE)
        for file in held.values():
            os.set_inheritable(file, True)
            fcntl.flock(file, fcntl.LOCK_SH)  # still in the queue's lock: nobody can come between
    os.environ[LEASED] = os.pathsep.join(str(place / file_name(name)) for name in held)
    return list(held)


def keep():
    """Hold the lease that this process was started under until it ends, even where the one that took it ends before."""
    for path in filter(None, os.environ.get(LEASED, "").split(os.pathsep)):
        file = os.open(path, os.O_RDWR)  # left open on purpose
        fcntl.flock(file, fcntl.LOCK_SH)


def main(arguments):
    """`N COMMAND…`: become COMMAND, with N GPUs leased and named in CUDA_VISIBLE_DEVICES."""
    if len(arguments) < 2 or not arguments[0].isdigit():
        sys.exit("usage: python -m salsa.workflow.gpus N COMMAND…")
    try:
        os.environ[VISIBLE] = ",".join(lease(int(arguments[0]), devices()))
    except ValueError as error:
        sys.exit(f"salsa: {error}; lower execution.gpus, or name more in CUDA_VISIBLE_DEVICES")
    except OSError as error:
        sys.exit(
            f"salsa: {error.filename}: {error.strerror}, and leases of GPUs lie there; set TMPDIR to another folder"
        )
    try:
        os.execvp(arguments[1], arguments[1:])
    except OSError as error:
        sys.exit(f"salsa: {arguments[1]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
