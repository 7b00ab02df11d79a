"""SALSA: PPO anchored to a soup of SFT models, and the controls that tell a soup's effect from others."""

import gc
import itertools
import sys

__version__ = "0.1.0"

# A stage that the workflow starts imports thousands of modules, in which there is no garbage to be found: half a
# second of looking for it. `salsa.workflow.command` lets the collector work again.
if "--plan" in sys.orig_argv and any(argument.startswith("salsa.") for argument in sys.orig_argv):
    gc.disable()

# `python -m salsa.STAGE`, `python -m salsa` and `salsa`.
_module = next((name for option, name in itertools.pairwise(sys.orig_argv) if option == "-m"), "")
if _module.partition(".")[0] == "salsa" or "".join(sys.orig_argv[1:2]).endswith("/salsa"):
    from salsa.workflow import failures

    sys.excepthook = failures.hook  # a limit of memory or files, or Ctrl-C, may end it while it imports

# Libraries read the environment when they are imported, which a stage does in its first lines. Two modules become or
# call another program, whose environment is its own.
if _module.startswith("salsa.") and _module not in ("salsa.workflow.surroundings", "salsa.workflow.snakemake"):
    from salsa.workflow import places, surroundings

    places.use()  # a node of a cluster may lack the home that the login node has
    surroundings.clean()


def load(folder):
    """A finished study's frames: policies, responses, verdicts, trajectories, claims; see docs/frames.md.

    `folder` is one like results/studies/default, of a study or of a sweep.
    """
    from salsa.report.load import load as read  # which imports pandas and matplotlib, and no torch

    return read(folder)
