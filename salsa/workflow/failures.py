"""Failures of the machine, in one line each: a full disk, a limit, no memory, a folder that is gone.

They are no mistakes of a configuration and no bugs: a traceback would say less than where, what, and what to do. They
come as OSError or MemoryError, or wrapped by a library in a class of its own, with the system's words in the text.
Only the standard library is imported: `hook` also speaks for a process that fails while it imports PyTorch.
"""

import errno
import os
import re
import shutil
import sys
from typing import NamedTuple

KEPT = "what is finished is kept, and the same command goes on"


class Failure(NamedTuple):
    """What to look for in an error, and what to say."""

    codes: tuple
    words: str
    says: str


FAILURES = (
    Failure(
        (errno.ENOSPC, errno.EDQUOT),
        r"no space left on device|disk quota exceeded|os error (28|122)\b|not enough disk space",
        f"the disk is full; free some of it and run again: {KEPT}",
    ),
    Failure(
        (errno.EROFS,),
        r"read-only file system|os error 30\b",
        "the file system is read-only; choose another place (results=…, or --output)",
    ),
    Failure(
        (errno.EACCES, errno.EPERM),
        r"permission denied|operation not permitted|os error (1|13)\b",
        "permission denied; change the permissions, or choose another place (results=…, or --output)",
    ),
    Failure(
        (errno.EMFILE, errno.ENFILE),
        r"too many open files|os error (23|24)\b",
        f"too many open files; raise the limit (ulimit -n) and run again: {KEPT}",
    ),
    Failure(
        (errno.EFBIG,),
        r"file too large|file size limit exceeded|os error 27\b",
        f"a file may not become that large here; raise the limit (ulimit -f) and run again: {KEPT}",
    ),
    Failure(
        (errno.EIO, errno.ESTALE, errno.ENXIO, errno.EREMOTEIO),
        r"input/output error|stale file handle|os error (5|116)\b",
        f"the disk or network file system fails (input/output error); look after it and run again: {KEPT}",
    ),
    Failure(
        (errno.ENOMEM,),
        r"cannot allocate memory|can't allocate memory|not enough memory|out of memory|bad_alloc|failed to map segment"
        r"|os error 12\b",
        "not enough memory; lower execution.micro_batch and execution.rollout_batch, run fewer jobs at once (--cores), "
        f"or raise the limit: {KEPT}",
    ),
    Failure(
        (),
        r"can't start new thread|resource temporarily unavailable",
        f"no further thread or process may be started; raise the limit (ulimit -u) and run again: {KEPT}",
    ),
)
HALF_WRITTEN = re.compile(r"PytorchStreamWriter|unexpected pos|error while serializing", re.IGNORECASE)


def describe(error, folder=None):
    """One line on an error that the machine is to blame for, or None.

    Args:
        error: an exception; what it was raised from counts as well.
        folder: where the process writes, to tell a folder that was removed meanwhile from a file that never was.
    """
    for cause in _causes(error):
        place = f"{cause.filename}: " if getattr(cause, "filename", None) else ""
        for failure in FAILURES:
            if _fits(cause, failure):
                return (place or (f"{folder}: " if folder else "")) + failure.says
        if isinstance(cause, FileNotFoundError) and folder is not None and not os.path.isdir(folder):
            return f"{folder}: removed while it was written; run again"
        if HALF_WRITTEN.search(str(cause)) and folder is not None:
            free = shutil.disk_usage(folder).free / 2**20
            return f"{folder}: a file could not be written ({free:.0f} MiB are free); make room and run again: {KEPT}"
    return None


def _causes(error):
    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    return seen


def _fits(error, failure):
    if isinstance(error, OSError) and error.errno in failure.codes:
        return True
    if isinstance(error, MemoryError):
        return errno.ENOMEM in failure.codes
    # What a library says itself, without the texts of ordinary mistakes, which may quote anything.
    wrapped = isinstance(error, (OSError, RuntimeError, ImportError)) or type(error).__name__.endswith("Error")
    return (
        wrapped
        and not isinstance(error, (ValueError, KeyError))
        and bool(re.search(failure.words, str(error), re.IGNORECASE))
    )


def hook(kind, error, traceback):
    """`sys.excepthook` of a process: one line for what `describe` knows and for Ctrl-C, else the traceback."""
    line = f"interrupted; {KEPT}" if kind is KeyboardInterrupt else describe(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"salsa: {line}", file=sys.stderr)
