"""Studies that stop when they are decided: the real command at the smallest sizes, and what kills and dry runs do."""

import signal
import subprocess
import time

import in_process
import pytest
import yaml
from test_study import ROOT, SMALL, run, start
from test_workflow import TINY, Place

from salsa.workflow import compose, plan, runs

LOOKS = TINY.replace("replicates=[0]", "replicates=[0,1,2] looks=[2,3]")
A_REPLICATE = {"sft": 2, "reward_model": 1, "landscape": 1, "gates": 1, "ppo": 2, "respond": 2, "judge": 2}
SHARED = {"corpus": 1, "prepare": 1, "benchmark": 1, "base": 1}
TINIER = {
    "replicates": "[0,1,2]",
    "looks": "[2,3]",
    "benchmark": "[in_distribution]",
    "benchmarks.in_distribution.prompts": "6",
    "reward_model.pairs": "64",
    "ppo.iterations": "1",
    "data.task.evaluation": "8",
    "data.task.demonstrations": "100",
    "data.task.validation": "8",
}
REAL = [override for override in SMALL if override.split("=")[0] not in TINIER and not override.startswith("dpo.")]
REAL += [f"{key}={value}" for key, value in TINIER.items()]
EVERYTHING_IS_EXCLUDED, NOTHING_IS_DECIDED = 1e6, 1e-9  # smallest effects


def times(results):
    """When each run was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in results.glob("*/*/manifest.json")}


def wait_for(process, happened):
    while not happened():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def claim(smallest_effect):
    """Overrides that leave the study one claim, with this smallest effect."""
    names = yaml.safe_load((ROOT / "conf" / "claims.yaml").read_text())["claims"]
    mine = f"+claims.mine={{text: more, measure: kl_to_sft0, smallest_effect: {smallest_effect}}}"
    return [*(f"~claims.{name}" for name in names), mine]


def decisions(results, smallest_effect):
    """What the looks of a study wrote, in their order."""
    studies = [path for path in results.glob("studies/default-*") if (path / "decision.json").exists()]
    studies = [path for path in studies if claimed(path) == smallest_effect]
    return sorted((runs.read_json(path / "decision.json") for path in studies), key=lambda value: value["look"])


def claimed(study):
    return runs.read_manifest(study)["settings"]["config"]["claims"]["mine"]["smallest_effect"]


def make_replicates(results):
    """All that the study reads at its first look, and of the third replicate all before PPO, made in this process."""
    made = plan.plan(compose.compose([f"results={results}", *REAL, *claim(EVERYTHING_IS_EXCLUDED)]))
    trained = ("ppo", "respond", "judge")
    in_process.execute_all(made, lambda path, run: run.stage not in ("study", *(trained if "-r2-" in path else ())))


def test_a_study_of_real_stages_ends_where_it_is_decided_and_goes_on_where_it_was_killed(tmp_path):
    results, decided = tmp_path / "results", {"look": 1, "replicates": 2, "decided": ["mine"], "undecided": []}
    make_replicates(results)
    replicates = times(results)
    done = run(results, *claim(EVERYTHING_IS_EXCLUDED), small=REAL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert decisions(results, EVERYTHING_IS_EXCLUDED) == [decided | {"goes_on": False}]
    first = times(results)
    assert len(list((results / "ppo").iterdir())) == 4 and len(first) == len(replicates) + 1
    assert replicates.items() <= first.items()

    process = start(results, *claim(NOTHING_IS_DECIDED), small=REAL, output=subprocess.DEVNULL)  # no pipe to fill up
    wait_for(process, lambda: len(list((results / "ppo").iterdir())) > 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (look,) = decisions(results, NOTHING_IS_DECIDED)  # of runs that were there
    assert (look["undecided"], look["goes_on"]) == (["mine"], True)
    before = times(results)
    done = run(results, *claim(NOTHING_IS_DECIDED), small=REAL)
    assert done.returncode == 0, done.stdout + done.stderr
    _, last = decisions(results, NOTHING_IS_DECIDED)
    assert (last["look"], last["replicates"], last["goes_on"]) == (2, 3, False)
    assert "look 2, at 3 replicates" in done.stderr
    assert first.items() <= before.items() <= times(results).items()
    assert len(list((results / "ppo").iterdir())) == 6


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """A study that its first look decides."""
    place = Place(tmp_path_factory.mktemp("decided"))
    (place.folder / "decided_at").write_text("2")
    place.counts, place.printed = place.run(LOOKS)
    return place


def test_a_decided_study_ends_at_its_first_look(decided):
    assert decided.counts == SHARED | {stage: 2 * count for stage, count in A_REPLICATE.items()} | {"studies": 1}
    assert "look 1, at 2 replicates" in decided.printed and "the study ends here" in decided.printed
    counts, printed = decided.run(LOOKS)
    assert not counts and "the study ends here" in printed


def test_other_commands_of_snakemake_know_where_a_study_ends(decided, tmp_path):
    _, printed = decided.run(LOOKS, "--dry-run")
    assert "Nothing to be done" in printed
    _, printed = decided.run(LOOKS, "--summary")
    assert "-2replicates-" in printed and "-3replicates-" not in printed
    decided.run(LOOKS, "--report", str(tmp_path / "report.html"))
    assert "-2replicates-" in (tmp_path / "report.html").read_text()
    place = Place(tmp_path / "empty")
    counts, printed = place.run(LOOKS, "--dry-run")
    assert not counts and "-2replicates-" in printed and "-3replicates-" not in printed
    assert "involves checkpoint jobs" in printed
    _, printed = place.run(TINY, "--dry-run")
    assert "involves checkpoint jobs" not in printed  # nothing may follow


def test_an_undecided_study_goes_on_and_a_killed_one_at_its_look(decided, tmp_path):
    place = decided.copy(tmp_path / "undecided")
    (place.folder / "decided_at").write_text("3")
    for study in place.folder.glob("results/studies/*"):
        (study / "manifest.json").unlink()
    (place.folder / "hold_ppo").touch()
    before, process = len(place.calls()), place.start(LOOKS)
    wait_for(process, lambda: sum(call.startswith("ppo/") for call in place.calls()) > 4)
    finished = times(place.folder / "results")
    process.send_signal(signal.SIGKILL)
    process.wait()
    (place.folder / "hold_ppo").unlink()
    place.run(LOOKS)
    calls = place.calls()[before:]
    assert len(calls) == len(set(calls)) and sum(call.startswith("studies/") for call in calls) == 2
    assert finished.items() <= times(place.folder / "results").items()
