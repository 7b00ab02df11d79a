"""A study that stops when it is decided, with the real Snakemake and stages that only write a manifest."""

import signal
import time

import pytest
from test_workflow import TINY, Place

LOOKS = TINY.replace("replicates=[0]", "replicates=[0,1,2] looks=[2,3]")
A_REPLICATE = {"sft": 2, "reward_model": 1, "landscape": 1, "ppo": 2, "respond": 2, "judge": 2}
SHARED = {"corpus": 1, "prepare": 1, "benchmark": 1, "base": 1}


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """A study that its first look decides."""
    place = Place(tmp_path_factory.mktemp("decided"))
    (place.folder / "decided_at").write_text("2")
    place.counts, place.printed = place.run(LOOKS)
    return place


def times(place):
    return {path: path.stat().st_mtime_ns for path in place.folder.glob("results/*/*/manifest.json")}


def test_a_decided_study_ends_at_its_first_look(decided):
    assert decided.counts == SHARED | {stage: 2 * count for stage, count in A_REPLICATE.items()} | {"studies": 1}
    print(decided.printed)
    assert "look 1, at 2 replicates" in decided.printed and "the study ends here" in decided.printed
    counts, printed = decided.run(LOOKS)
    assert not counts and "the study ends here" in printed


def test_an_undecided_study_goes_on_and_a_killed_one_at_its_look(tmp_path):
    place = Place(tmp_path / "undecided")
    (place.folder / "decided_at").write_text("3")
    (place.folder / "hold_ppo").touch()
    (place.folder / "hold_ppo").unlink()
    process = place.start(LOOKS)
    while sum(call.startswith("studies/") for call in place.calls()) < 1:
        assert process.poll() is None
        time.sleep(0.1)
    (place.folder / "hold_ppo").touch()  # of the third replicate
    while sum(call.startswith("ppo/") for call in place.calls()) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    before = times(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (place.folder / "hold_ppo").unlink()
    _, printed = place.run(LOOKS)
    print(printed)
    calls = place.calls()
    assert len(calls) == len(set(calls)) and sum(call.startswith("studies/") for call in calls) == 2
    assert before.items() <= times(place).items()
