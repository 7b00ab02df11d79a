"""Studies that look at their claims as they go, and arms on a part of the replicates: plans, refusals, decisions."""

import re

import pandas as pd
import pytest

from salsa.report import looks as deciding
from salsa.workflow import command, compose, config, estimate, plan, runs, studies
from salsa.workflow.messages import UserError

WRONG = '{"look": 1, "replicates": 2, "decided": [], "undecided": [], "goes_on": "no"}'


def planned(*overrides):
    arms = [] if any(override.startswith("arm=") for override in overrides) else ["arm=[ppo,salsa,other]"]
    return plan.plan(compose.compose([*arms, *overrides]))


@pytest.fixture(scope="module")
def looked():
    return planned("replicates=[3,0,1,7]", "looks=[2,3,4]")


def settings(result, path):
    return result.runs[path].settings


def test_each_look_is_a_study_of_the_first_replicates(looked):
    (study,) = looked.studies
    assert study["path"] == study["looks"][-1] and len(study["looks"]) == 3
    for path, numbers in zip(study["looks"], ([3, 0], [3, 0, 1], [3, 0, 1, 7]), strict=True):
        described = settings(looked, path)["config"]
        assert (described["replicates"], described["looks"]) == (numbers, [2, 3, 4])
        assert [p["replicate"] for p in settings(looked, path)["policies"]] == [k for k in numbers for _ in range(3)]
        roles = looked.runs[path].parents
        assert {role for role in roles if role.startswith("landscape/")} == {f"landscape/r{k}" for k in numbers}
        assert sum(role.startswith("policy/") for role in roles) == 3 * len(numbers)
        assert path.startswith(f"studies/default-{len(numbers)}replicates-")


def test_looks_share_all_training_with_a_study_without(looked):
    plain = planned("replicates=[3,0,1,7]")
    other = {path for path, run in looked.runs.items() if run.stage != "study"}
    assert other == {path for path, run in plain.runs.items() if run.stage != "study"}
    fewer = planned("replicates=[3,0]")
    assert {path for path, run in fewer.runs.items() if run.stage != "study"} < other


def test_what_the_first_look_needs(looked):
    (study,) = looked.studies
    part = looked.needed(study["looks"][:1])
    replicates = {run.replicate for run in part.runs.values()}
    assert replicates == {None, 3, 0} and [path for path in part.runs if path in study["looks"]] == study["looks"][:1]
    assert list(part.runs) == [path for path in looked.runs if path in part.runs]


def test_a_plan_says_what_each_look_takes(looked):
    (study,) = looked.studies
    done = looked.needed(study["looks"][:1]).runs
    lines = list(estimate.looks(looked, study, done.__contains__))
    needed = [len(looked.needed([path]).runs) for path in study["looks"]]
    assert lines[0] == f"up to the look at 2 replicates: {needed[0]} runs, 0 to run, finished"
    assert lines[1] == f"up to the look at 3 replicates: {needed[1]} runs, {needed[1] - needed[0] + 1} to run"
    assert all(" hours of jobs" in line for line in estimate.looks(looked, study, lambda path: False, tflops=0.01))
    assert not list(estimate.looks(looked, study | {"looks": study["looks"][-1:]}, lambda path: False))


def test_a_plan_file_holds_all_looks(looked, tmp_path):
    looked.results = str(tmp_path)
    assert plan.load(looked.save()).studies == looked.studies
    looked.studies[0]["looks"].reverse()
    try:
        with pytest.raises(UserError, match="is not the last of its looks"):
            plan.load(looked.save())
    finally:
        looked.studies[0]["looks"].reverse()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["looks=[2]"],
            r"looks=\[2\]: the last has to be the number of replicates, 3; give looks=\[2, 3\], or looks=\[\]",
        ),
        (["looks=[4]", "replicates=[0]"], "number of replicates, 1; give looks=\\[\\] to decide once"),
        (["looks=[2,3]", "arm=[ppo,other]"], "no claim of the abstract has both of its arms in this study .larger_kl"),
        (["looks=[2,3]", "kl_coefs=[0.1,0.3]", "+arms.salsa.kl_coefs=[0.3]", "+arms.ppo.kl_coefs=[0.1]"], "has both"),
        (["looks=[3,2]"], "has to rise"),
        (["looks=[2,2,3]"], "has to rise"),
        (["looks=[1,3]"], r"looks.*1.*2"),
        (["looks=[2,3]", "claims=null"], "claims"),
        (["looks=[2,3]", "+arms.salsa.replicates=2"], "arms.salsa.replicates=2: .* is to be decided"),
        (["looks=[3]", "+arms.other.replicates=2"], "arms.other.replicates=2: 2 of them are among the first 3, and"),
        (["looks=[2,3]", "+arms.other.replicates=[1,2]"], "1 of them are among the first 2"),
        (["looks=[2,3]", "seed=1,2"], "can't be compared"),
    ],
)
def test_a_mistake_is_said_while_planning(overrides, says):
    with pytest.raises(UserError, match=says) as refused:
        planned(*([] if "replicates=[0]" in overrides else ["replicates=[0,1,2]"]), *overrides)
    assert "\n" not in str(refused.value)


def test_an_arm_on_a_part_of_the_replicates():
    result = planned("replicates=[5,6,7]", "+arms.other.replicates=2", "looks=[2,3]")
    first, last = (settings(result, path)["policies"] for path in result.studies[0]["looks"])
    assert [p["replicate"] for p in last if p["arm"] == "other"] == [5, 6]
    assert [p["replicate"] for p in last if p["arm"] == "salsa"] == [5, 6, 7]
    assert last[: len(first)] == first and [p["index"] for p in last] == list(range(8))
    everywhere = planned("replicates=[5,6,7]")
    trained = {path for path, run in result.runs.items() if run.stage != "study"}
    left_out = {path for path, run in everywhere.runs.items() if run.stage != "study"} - trained
    assert sorted(path.split("/")[0] for path in left_out) == [
        "judge",
        "judge",
        "ppo",
        "respond",
    ]  # salsa's too, with it
    assert all("-r7-" in path for path in left_out)


class Looked:
    """A study of so many replicates, of those at which it looks."""

    def __init__(self, count, looks=(2, 3)):
        self.config = config.Sections.__new__(config.Sections)
        self.config.replicates, self.config.looks = list(range(count)), list(looks)


def claims(**verdicts):
    rows = [
        {"claim": name, "origin": "control" if name.startswith("control") else "abstract", "claim_verdict": verdict}
        for name, verdict in verdicts.items()
        for _ in range(2)  # of two benchmarks
    ]
    columns = ["claim", "origin", "claim_verdict"]
    return pd.DataFrame(rows, columns=columns).assign(outcome="primary", lost=0, contradictory=False)


@pytest.mark.parametrize(
    ("verdicts", "count", "decided", "undecided", "goes_on"),
    [
        ({"a": "supported", "b": "undecided"}, 2, ["a"], ["b"], True),
        ({"a": "supported", "b": "undecided"}, 3, ["a"], ["b"], False),
        ({"a": "supported", "b": "refuted"}, 2, ["a", "b"], [], False),
        ({"a": "supported", "control": "undecided"}, 2, ["a"], [], False),
        ({"a": "not tested", "b": "supported"}, 2, ["b"], [], False),
        ({"a": "not tested"}, 2, [], [], False),
        ({}, 2, [], [], False),
    ],
)
def test_a_look_goes_on_while_a_claim_of_the_abstract_is_undecided(verdicts, count, decided, undecided, goes_on):
    assert deciding.decision(Looked(count), claims(**verdicts)) == {
        "look": count - 1,
        "replicates": count,
        "decided": decided,
        "undecided": undecided,
        "goes_on": goes_on,
    }


def finish(results, path, **decision):
    runs.write_json(results / path / "decision.json", {"look": 1, "replicates": 2, "decided": ["a"]} | decision)
    runs.write_json(results / path / runs.MANIFEST, {})


def test_a_name_points_to_the_last_finished_look(tmp_path):
    paths = [f"studies/mine-{count}" for count in (2, 3, 4)]
    made = {"name": "mine", "path": paths[-1], "looks": paths, "link": "studies/mine"}
    result = plan.Plan(str(tmp_path), studies=[made])
    assert (studies.reached(result, made), studies.latest(result, made)) == (paths[0], None)
    assert list(studies.conclude(result)) == []
    finish(tmp_path, paths[0], undecided=["b"], goes_on=True)
    assert (studies.reached(result, made), studies.latest(result, made)) == (paths[1], paths[0])
    lines = list(studies.conclude(result))
    assert lines == list(studies.conclude(result))
    assert lines[0].endswith("studies/mine -> mine-2") and "undecided: b; the study goes on" in lines[1]
    finish(tmp_path, paths[1], undecided=[], goes_on=False)
    assert (studies.reached(result, made), studies.latest(result, made)) == (paths[1], paths[1])
    assert (tmp_path / "studies" / "mine").readlink().name == "mine-2"  # until it is concluded
    lines = list(studies.conclude(result))
    assert lines[0].endswith("studies/mine -> mine-3") and lines[1].endswith("the study ends here")


def test_the_job_of_a_look_links_the_name(tmp_path):
    paths = ["studies/mine-2", "studies/mine-3"]
    made = {"name": "mine", "path": paths[-1], "looks": paths, "link": "studies/mine"}
    result = plan.Plan(str(tmp_path), studies=[made])
    command._link(result, "sft/another")
    assert not (tmp_path / "studies").exists()
    finish(tmp_path, paths[0], undecided=["b"], goes_on=True)
    command._link(result, paths[0])
    assert (tmp_path / "studies" / "mine").readlink().name == "mine-2"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"goes_on', '{"goes_on": true}', WRONG])
def test_a_damaged_decision_is_said(tmp_path, text):
    paths = ["studies/mine-2", "studies/mine-3"]
    made = {"name": "mine", "path": paths[-1], "looks": paths, "link": None}
    finish(tmp_path, paths[0], undecided=[], goes_on=True)
    (tmp_path / paths[0] / "decision.json").write_text(text)
    with pytest.raises(UserError, match=r"mine-2/decision\.json: .* remove .*mine-2 and run again"):
        studies.reached(plan.Plan(str(tmp_path), studies=[made]), made)


def test_other_kl_coefs_are_run_on_the_first_replicates_alone():
    overrides = ["replicates=[4,5,6]", "kl_coefs=[0.05,0.1]", "arm=[ppo,salsa]", "claim_kl_coef=0.1"]

    def trained(*more):
        runs = plan.plan(compose.compose([*overrides, *more])).runs.values()
        return sorted((run.replicate, run.settings["kl_coef"]) for run in runs if run.stage == "ppo")

    everywhere = [(replicate, kl_coef) for replicate in (4, 5, 6) for kl_coef in (0.05, 0.1) for _ in range(2)]
    assert trained() == everywhere
    assert trained("grid_replicates=4") == everywhere
    assert trained("grid_replicates=1") == [one for one in everywhere if one[1] == 0.1 or one[0] == 4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["grid_replicates=1"], "grid_replicates=1: all others need a kl_coef to be run at; set claim_kl_coef"),
        (
            ["replicates=[0,1,2,3]", "looks=[2,4]", "grid_replicates=3", "claim_kl_coef=0.3"],
            "grid_replicates=3: is none of looks=[2, 4]; give one of them",
        ),
    ],
)
def test_a_grid_that_ends_nowhere_is_refused(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        compose.compose(overrides)
