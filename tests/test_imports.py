"""What may be imported where: numerics run on a machine with torch and transformers alone, planning without torch."""

import subprocess
import sys

BLOCK = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # an import of it fails
"""


def imports(statement, blocked):
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + statement], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


# One process for all of a kind: most of its time goes into importing torch.
NUMERICS = [
    *("salsa.soup", "salsa.rl.objective", "salsa.rl.trainer"),
    *("salsa.evaluate.landscape", "salsa.evaluate.respond", "salsa.evaluate.statistics"),
]
JUDGING_AND_REPORTING = [
    *("salsa.evaluate.judge", "salsa.tools.published", "salsa.evaluate.statistics", "salsa.evaluate.tournament"),
    "salsa.report.study",
]


def test_numerics_need_no_workflow():
    statements = [f"import {module}" for module in NUMERICS]
    imports("\n".join(statements), ["trl", "datasets", "hydra", "omegaconf", "snakemake"])


def test_judging_and_reporting_need_no_torch():
    # Not blocked but looked for: scipy itself asks whether torch is there.
    statements = [f"import {module}\nassert 'torch' not in sys.modules, {module!r}" for module in JUDGING_AND_REPORTING]
    imports("\n".join(statements), ["transformers", "trl", "datasets", "snakemake"])
