"""A user's name and places for caches, where the machine offers none: containers and clusters run without a home.

Snakemake, the hub's client, datasets, matplotlib and Triton each ask for a home, and Snakemake for a name; without,
each ends in its own traceback. What is there is used as it is; what isn't is said by environment variables, which the
jobs inherit. Only the standard library is imported: this comes before everything else.
"""

import os
import pwd
import tempfile
from pathlib import Path

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # in getpass's order


def use():
    """Set what is missing in the environment of this process."""
    if not any(map(os.environ.get, NAMES)):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["LOGNAME"] = f"uid{os.getuid()}"
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        if not os.path.isabs(os.environ.get(name, "/")):
            del os.environ[name]  # the standard says to ignore it; a library would make it in any folder it works in
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or not usable(home):
        if not os.path.isdir(home):
            os.environ["HOME"] = str(own_folder())
        _use_caches(home)
    elif not usable(os.environ.get("XDG_CACHE_HOME") or home):
        _use_caches(home)


def _use_caches(home):
    """Name a cache for each library that would write into `home`; a hub's cache that can be read there stays in use."""
    before = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")
    caches = {"XDG_CACHE_HOME": "", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
    if os.path.isdir(before / "huggingface"):
        caches["HF_DATASETS_CACHE"] = "datasets"
        os.environ.setdefault("HF_HOME", str(before / "huggingface"))
    for variable, name in caches.items():
        if not os.environ.get(variable) or not usable(os.environ[variable]):
            os.environ[variable] = str(own_folder() / name)


def usable(path):
    """Whether files can be written in a folder, which may have to be made first."""
    path = os.path.abspath(path)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def own_folder():
    """A folder of this user alone below the machine's temporary folder, the same for all processes."""
    path = Path(tempfile.gettempdir()) / f"salsa-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        if path.lstat().st_uid == os.getuid() and not path.is_symlink():
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"salsa-{os.getuid()}-"))  # another user's, or a file, stands in its place
