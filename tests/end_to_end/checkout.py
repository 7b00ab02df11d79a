"""The checkout that the tests run from, for tests that work on a copy of it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tracked():
    """The files that git does not ignore; without git, those that a source distribution names."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sources = ROOT / "salsa.egg-info" / "SOURCES.txt"
    names = listed.stdout.split("\0") if listed.returncode == 0 else sources.read_text().splitlines()
    return [name for name in names if name and (ROOT / name).is_file()]
