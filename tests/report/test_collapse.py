"""Policies that collapsed or diverged are marked wherever they are shown; numbers that are none end no report."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from tree import Tree, table_of

from salsa.report import claims, conclusions, outcomes, sections, selection, study
from salsa.workflow import config


class Collapsed(Tree):
    """salsa collapsed in both replicates at 0.05; other wrote a number that is none in the second, at 0.05."""

    def respond(self, replicate, arm, kl_coef):
        files = super().respond(replicate, arm, kl_coef)
        evaluation = json.loads(files["evaluation.json"])
        if arm == "salsa" and kl_coef == 0.05:
            evaluation |= {"kl_to_sft0": 450.0, "eos_rate": 0.0, "response_length": 40.0}
        if arm == "other" and (kl_coef, replicate) == (0.05, 1):
            evaluation |= {"kl_to_sft0": math.inf, "reward": math.nan, "gold_reward": math.nan}
            files["metrics.jsonl"] = files.get("metrics.jsonl", "")
        return files | {"evaluation.json": json.dumps(evaluation)}

    def ppo(self, replicate, arm, kl_coef):
        files = super().ppo(replicate, arm, kl_coef)
        if arm == "other" and replicate == 1:  # as a version wrote it that did not refuse them
            rows = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
            rows[-1] |= {"score": math.nan, "kl_to_sft0": math.inf}
            files["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
        return files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Collapsed(tmp_path_factory.mktemp("collapsed"), kl_coefs=(0.05, 0.1), prompts=8, planes=("salsa",))
        tree.settings.config["report"] |= {"bootstrap": 40}
        return tree, tree.build(monkeypatch)


def reread(tree):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
        return study.read(tree.settings, tree.parents)


def test_it_is_marked_in_every_text(built):
    _, output = built
    for name in ("report.md", "claims.md"):
        text = (output / name).read_text(encoding="utf-8")
        assert "**Warning**: salsa at kl&#95;coef" not in text
        assert (
            "**Warning**: salsa at kl_coef 0.05 collapsed in 2 of 2 replicates: a share of 0 of its responses" in text
        )
        assert "its KL to sft0 is 450 nats a response, 11.2 a token" in text
        assert "other at kl_coef 0.05 collapsed in 1 of 2 replicates: its proxy reward is no finite number" in text
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "salsa at kl_coef 0.05 collapsed in 2 of 2 replicates" in page and "salsa, kl_coef 0.05 (collapsed)" in page
    assert "NaN" not in page.split('id="reader-data">')[1].split("</script>")[0]
    assert "| salsa, kl_coef 0.05 (collapsed) |" in (output / "samples.md").read_text(encoding="utf-8")
    card = (output / "cards" / "salsa-kl0.05-r0.md").read_text(encoding="utf-8")
    assert "**This policy has collapsed**: a share of 0 of its responses end by themselves" in card
    assert "collapsed" not in (output / "cards" / "ppo-kl0.05-r0.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rewards", "frontier", "win_rates", "geometry", "plane", "bradley_terry", "arms"])
def test_it_is_marked_in_every_table(built, name):
    _, output = built
    frame = pd.read_csv(output / "tables" / f"{name}.csv")
    if name in ("rewards", "frontier", "win_rates", "geometry"):
        arm, kl_coef = ("candidate" if name == "win_rates" else "arm"), frame["kl_coef"]
        marked = frame[(frame[arm] == "salsa") & (kl_coef == 0.05)]
        assert len(marked) and marked["collapsed"].str.contains("salsa (collapsed)", regex=False).all()
        assert frame[(frame[arm] == "ppo") & (kl_coef == 0.1)]["collapsed"].isna().all()
    text = (output / "tables" / f"{name}.md").read_text(encoding="utf-8")
    assert "| collapsed |" in text and "collapsed" in (output / "tables" / f"{name}.tex").read_text(encoding="utf-8")


def test_it_is_counted_and_not_stable(built):
    _, output = built
    frame = pd.read_csv(output / "tables" / "stability.csv").set_index(["arm", "kl_coef"])
    assert frame["collapsed"].to_dict() == {("ppo", 0.05): 0, ("ppo", 0.1): 0, ("salsa", 0.05): 2, ("salsa", 0.1): 0,
                                            ("other", 0.05): 1, ("other", 0.1): 0}  # fmt: skip
    assert frame.loc[("salsa", 0.05), "stable"] == 0 and frame.loc[("other", 0.05), "stable"] == 1
    assert frame.loc[("ppo", 0.05), "stable"] == 2


def test_it_is_marked_in_every_figure(built):
    tree, _ = built
    for name, figure in tree.figures.items():
        assert "Collapsed policies: salsa at kl_coef 0.05; other at kl_coef 0.05 (1 of 2)" in (
            figure.get_suptitle().replace("\n", " ")
        ), name
    legend = {text.get_text() for text in tree.figures["frontier"].legends[0].get_texts()}
    assert {"ppo", "salsa (2 of 4 collapsed)", "other (1 of 4 collapsed)"} <= legend


def test_claims_say_so(built):
    tree, output = built
    frame = pd.read_csv(output / "tables" / "claims.csv", keep_default_na=False)
    own = frame[(frame["claim"] == "larger_kl")].iloc[0]
    if float(own["candidate_kl_coef"]) == 0.05:
        assert "salsa has collapsed in 2 of its 2 policies compared here" in own["why"]
    found = reread(tree)
    claim = config.Claim("t", "reward", 0.1, candidate="salsa", baseline="other")
    pair = selection.Pair("salsa", "other", (0.05,), 0.05, 0.05)
    notes = claims._collapsed(found, claims.Test(claim, pair, [], None))
    assert notes[0].startswith("salsa has collapsed in 2 of its 2 policies compared here: a share of 0")
    assert notes[1] == "other has collapsed in 1 of its 2 policies compared here: its proxy reward is no finite number"
    pair = selection.Pair("ppo", "salsa", (0.1,), 0.1, 0.1)
    assert claims._collapsed(found, claims.Test(replace(claim, measure="stable"), pair, [], None)) == []


def test_a_diverged_replicate_leaves_nothing_decided_and_is_said(built):
    tree, output = built
    assert selection.choose(reread(tree), "other", (0.05, 0.1)) == 0.1
    values = pd.DataFrame({"effect": [0.1, math.nan]})
    test = claims.Test(config.Claim("t", "reward", 0.1), selection.Pair("ppo", "salsa", (0.1,), 0.1, 0.1),
                       [outcomes.Outcome("primary", "reward", "", "", values)], None)  # fmt: skip
    found = reread(tree)
    decision = claims.decision(test, test.outcomes[0], 0.95)
    notes = claims._notes(found, test, decision)
    assert notes[0] == "1 of 2 replicates have no finite number, so nothing is decided"
    assert decision.verdict == "undecided" and math.isnan(decision.low)
    for path in output.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # called where there is a NaN


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, ""),
        ({"eos_rate": 0.4}, "a share of 0.4 of its responses end by themselves (0.98 sft0's)"),
        ({"eos_rate": 0.5}, ""),
        ({"response_length": 2.0, "kl_to_sft0": 1.0}, "its responses have 2 tokens (25 sft0's)"),
        ({"response_length": 0.0}, "its responses have 0 tokens (25 sft0's)"),
        ({"kl_to_sft0": 111.0}, "its KL to sft0 is 111 nats a response, 5.05 a token"),
        ({"kl_to_sft0": 109.0}, ""),
        ({"kl_to_sft0": math.nan}, "its KL to sft0 is no finite number"),
        ({"gold_reward": None, "kl_to_sft0": None}, ""),
    ],
)
def test_collapse_by_hand(built, changes, reason):
    tree, _ = built
    found = reread(tree)
    policy = found.of(arm="ppo", kl_coef=0.05)[0]
    policy.evaluation |= changes
    assert selection.collapse(found, policy) == reason
    if "eos_rate" in changes:  # sft0 was not measured: as the policy began
        del found.landscapes[policy.replicate]
        assert selection.collapse(found, policy) == reason.replace("0.98 sft0's", "0.9 before training")


def test_a_study_without_collapse_has_no_mark(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    tree = Tree(tmp_path, replicates=(0,), prompts=2, arms={"ppo": "0"}, planes=())
    found = study.read(tree.settings, tree.parents)
    tables = {"rewards": table_of(found, "rewards")}
    assert sections.marked(found, tables) is tables and conclusions.collapses(found) == []
    assert sections.sections()["loss_line"].draw(found, {}).get_suptitle() == ""
