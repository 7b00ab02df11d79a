"""The project's files that are no modules: presets, the workflow's rules, profiles; and what git says of them.

A checkout has them beside the package. A wheel has them within it, where setup.py copies them, and knows no history.
"""

import contextlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = (PACKAGE / "repository").is_dir()
ROOT = PACKAGE / "repository" if INSTALLED else PACKAGE.parent


def git(*arguments):
    """What git says of the project's files; nothing where git or the history is missing.

    An installed package isn't asked: the environment it lies in may itself lie in a repository, of something else.
    """
    if INSTALLED:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10)
        return result.stdout.strip() if result.returncode == 0 else ""
    return ""
