"""Reports of arms that are run on a part of the replicates, and what a study with looks writes beside its claims."""

import numpy as np
import pandas as pd
import pytest
from tree import Tree, table_of

from salsa.report import looks, words
from salsa.report import study as reports
from salsa.workflow import runs

PART = 2  # replicates of the arm `other`, of three


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A study of three replicates, the last without one arm."""
    tree = Tree(tmp_path_factory.mktemp("part"), replicates=(0, 1, 2))
    left_out = [p for p in tree.policies if p["arm"] == "other" and p["replicate"] >= PART]
    tree.settings.policies = [policy for policy in tree.policies if policy not in left_out]
    for policy in left_out:
        for role in [role for role in tree.parents if role.endswith(f"/{policy['index']}")]:
            del tree.parents[role]
    tree.settings.config["looks"] = [2, 3, 5]
    return tree


@pytest.fixture(scope="module")
def folder(tree):
    with pytest.MonkeyPatch.context() as patch:
        yield tree.build(patch)


@pytest.fixture(scope="module")
def study(tree, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "gold_judge", lambda prepare: None)
        return reports.read(tree.settings, tree.parents)


@pytest.mark.parametrize("name", ["rewards", "win_rates", "stability", "geometry"])
def test_tables_say_how_many_replicates_an_arm_has(study, name):
    table = table_of(study, name)
    by_arm = table.groupby("arm" if "arm" in table else "candidate")["replicates"].unique()
    counts = {arm: list(numbers) for arm, numbers in by_arm.items() if arm in study.arms}
    assert set(counts) >= {"salsa", "other"}
    assert all(numbers == [PART if arm == "other" else 3] for arm, numbers in counts.items())


def test_claims_pair_the_replicates_that_both_arms_have(study):
    claims = study.frames and reports.sections.tables_of(study)["claims"]
    rows = claims[claims["claim_verdict"] != "not tested"]
    of_other = (rows["candidate"] == "other") | (rows["baseline"] == "other")
    assert of_other.any() and set(rows[of_other]["replicates"]) == {PART}
    assert set(rows[~of_other]["replicates"]) == {3}
    gold = {(p.arm, p.replicate): p.evaluation["gold_reward"] for p in study.policies}
    (row,) = table_of(study, "rewards").query("arm == 'other'").to_dict("records")
    assert row["gold_reward"] == pytest.approx(np.mean([gold["other", k] for k in range(PART)]), abs=1e-12)


def test_captions_name_the_arms_of_fewer_replicates(study, folder):
    assert words.replicates_by_arm(study) == "3 replicates (other: 2)"
    assert words.look(study) == "look 2 of 3, at 3 of up to 5 replicates"
    report = (folder / "report.md").read_text()
    assert "3 replicates (other: 2)" in report and words.look(study) in report


def test_a_look_writes_its_decision_beside_its_claims(tree, folder):
    decision = runs.read_json(folder / "decision.json")
    claims = runs.manifest_of(folder)["artefacts"]
    assert "decision.json" in claims and (decision["look"], decision["replicates"]) == (2, 3)
    assert not decision["goes_on"] or decision["undecided"]
    assert set(decision["decided"] + decision["undecided"]) <= set(tree.settings.config["claims"])


@pytest.mark.parametrize(
    "changes, goes_on",
    [({}, True), ({"lost": 1}, False), ({"contradictory": True}, False), ({"claim_verdict": "excluded"}, False),
     ({"origin": "control"}, False)],
)  # fmt: skip
def test_a_study_goes_on_for_what_further_replicates_can_decide(study, changes, goes_on):
    row = {"claim": "it", "origin": "abstract", "outcome": "primary", "claim_verdict": "undecided", "lost": 0}
    row |= {"contradictory": False} | changes
    beside = {"claim": "it", "origin": row["origin"], "outcome": "secondary", "claim_verdict": row["claim_verdict"]}
    decision = looks.decision(study, pd.DataFrame([row, beside | {"lost": 0, "contradictory": False}]))
    assert decision["goes_on"] == goes_on
