"""What a person reads of a study: tables, figures, claims.

Matplotlib is imported here, before any module of this package can, and without the user's matplotlibrc: matplotlib
reads one from the working folder, from $MATPLOTLIBRC and from the home folder while it is imported, and one that it
can't read would end the report. No figure depends on it (`style.own_style`).
"""

import contextlib
import importlib
import importlib.util
import os
from pathlib import Path


def _import_matplotlib():
    data = Path(importlib.util.find_spec("matplotlib").origin).parent / "mpl-data"
    before = {name: os.environ.pop(name, None) for name in ("MATPLOTLIBRC", "MPLBACKEND")}
    os.environ["MATPLOTLIBRC"] = str(data / "matplotlibrc")
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a working folder that is gone has no matplotlibrc either
                stack.enter_context(contextlib.chdir(data))
            matplotlib = importlib.import_module("matplotlib")
    finally:
        del os.environ["MATPLOTLIBRC"]
        os.environ.update({name: value for name, value in before.items() if value is not None})
    if before["MPLBACKEND"]:  # which figures of a reader's own are shown by, as in a notebook, and none of a report's
        with contextlib.suppress(ValueError):  # none that matplotlib knows
            matplotlib.rcParams["backend"] = before["MPLBACKEND"]


_import_matplotlib()
