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
    variables = {"MATPLOTLIBRC": str(data / "matplotlibrc"), "MPLBACKEND": "agg"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a working folder that is gone has no matplotlibrc either
                stack.enter_context(contextlib.chdir(data))
            importlib.import_module("matplotlib")
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_import_matplotlib()
