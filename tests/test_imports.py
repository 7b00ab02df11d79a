"""What may be imported where: numerics run on a machine with torch and transformers alone, planning without torch."""

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    "module",
    [
        "salsa.soup",
        "salsa.rl.objective",
        "salsa.rl.trainer",
        "salsa.evaluate.landscape",
        "salsa.evaluate.respond",
        "salsa.evaluate.statistics",
    ],
)
def test_numerics_need_no_workflow(module):
    imports(f"import {module}", ["trl", "datasets", "hydra", "omegaconf", "snakemake"])


@pytest.mark.parametrize(
    "module",
    [
        "salsa.evaluate.judge",
        "salsa.tools.published",
        "salsa.evaluate.statistics",
        "salsa.evaluate.tournament",
        "salsa.report.study",
    ],
)
def test_judging_and_reporting_need_no_torch(module):
    # Not blocked but looked for: scipy itself asks whether torch is there.
    imports(f"import {module}; assert 'torch' not in sys.modules", ["transformers", "trl", "datasets", "snakemake"])
