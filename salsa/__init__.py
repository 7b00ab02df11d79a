"""SALSA: PPO anchored to a soup of SFT models, and the controls that tell a soup's effect from others."""

import gc
import itertools
import sys

__version__ = "0.1.0"

# A stage that the workflow starts imports thousands of modules, in which there is no garbage to be found: half a
# second of looking for it. `salsa.workflow.command` lets the collector work again.
if "--plan" in sys.orig_argv and any(argument.startswith("salsa.") for argument in sys.orig_argv):
    from salsa.workflow import failures

    gc.disable()
    sys.excepthook = failures.hook  # a limit of memory or files may end it while it imports

# `python -m salsa.STAGE`: libraries read the environment when they are imported, which a stage does in its first lines.
for option, name in itertools.pairwise(sys.orig_argv):
    if option == "-m" and name.startswith("salsa.") and name != "salsa.workflow.surroundings":
        from salsa.workflow import places, surroundings

        places.use()  # a node of a cluster may lack the home that the login node has
        surroundings.clean()
        break


def load(folder):
    """A finished study's frames: policies, responses, verdicts, trajectories, claims; see docs/frames.md.

    `folder` is one like results/studies/default, of a study or of a sweep.
    """
    from salsa.report.load import load as read  # which imports pandas and matplotlib, and no torch

    return read(folder)
