"""The table of manipulation strength, against loops over the runs' own files, and what the page says of it."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import Tree

from salsa.evaluate import flat, gates
from salsa.report import selection, study
from salsa.report.sections import manipulation
from salsa.workflow import config, runs

ARMS = {"ppo": "0", "salsa": "0.5", "other": "1", "alpha_0.30": "0.3"}
ARMS |= dict.fromkeys(("noise", "ema", "soup_start", "smaller_beta", "decaying_beta"))
KL_COEFS = (0.1, 0.05, 0.2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    made = Tree(tmp_path_factory.mktemp("manipulation"), arms=ARMS, kl_coefs=KL_COEFS, iterations=20, prompts=4,
                judges=(), only={"other": (0.1,)})  # fmt: skip
    made.settings.config["alphas"] = ["0.3"]
    return made


@pytest.fixture
def result(tree, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    return study.read(tree.settings, tree.parents)


def test_every_row_is_that_of_a_loop(tree, result):
    frame = manipulation.table(result).set_index(["arm", "kl_coef", "replicate"])
    assert len(frame) == len(tree.policies)
    for policy in tree.policies:
        row = frame.loc[(policy["arm"], policy["kl_coef"], policy["replicate"])]
        metrics = runs.read_jsonl(tree.parents[f"policy/{policy['index']}"] / "metrics.jsonl")
        end, start = metrics[15:], metrics[0]
        penalty = sum(line["kl_coef"] * line["kl_to_reference"] for line in end) / 5
        gain = sum(line["score"] for line in end) / 5 - start["score"]
        assert row["penalty"] == pytest.approx(penalty) and row["reward_gain"] == pytest.approx(gain)
        assert row["penalty_share"] == pytest.approx(penalty / gain)
        slope = np.polyfit(range(15, 20), [line["score"] for line in end], 1)[0]
        assert row["reward_slope"] == pytest.approx(4 * slope)
        low, high = (4 * slope + 2 * sign * row["reward_slope_se"] for sign in (-1, 1))
        outside = low > 0.1 or high < -0.1
        assert row["flat"] == ("yes" if max(high, -low) <= 0.1 else "no" if outside else "not known")


def test_the_kl_of_references(result):
    """On the line it is the landscape's, elsewhere that of the first iteration; of what moves it is not known."""
    frame = manipulation.table(result)
    kls = frame.groupby("arm")["kl_sft0_reference"].agg(["min", "max"])
    expected = {"ppo": 0, "salsa": 0.4, "soup_start": 0.4, "other": 0.8, "smaller_beta": 0, "decaying_beta": 0}
    for arm, kl in (expected | {"noise": 0.5, "alpha_0.30": 0.5}).items():
        assert kls.loc[arm].tolist() == [kl, kl]
    assert kls.loc["ema"].isna().all()
    known = frame[frame["arm"] != "ema"]
    assert known["manipulation"].tolist() == pytest.approx((known["kl_sft0_reference"] * known["kl_coef"]).tolist())


def test_without_a_landscape_a_soup_is_known_from_the_first_iteration(result):
    result.landscapes.clear()
    frame = manipulation.table(result).groupby("arm")["kl_sft0_reference"].max()
    assert frame["salsa"] == 0.5 and frame["ppo"] == 0 and math.isnan(frame["soup_start"])  # which starts elsewhere


def test_the_place_in_the_grid_and_the_claims_kl_coef(result):
    frame = manipulation.table(result).set_index(["arm", "kl_coef", "replicate"]).sort_index()
    at = frame.loc["salsa", :, 0]
    assert at["place_in_grid"].to_dict() == {0.05: gates.LOWEST, 0.1: gates.INSIDE, 0.2: gates.LARGEST}
    assert at["chosen"].to_dict() == {0.05: "no", 0.1: "no", 0.2: "yes"}  # all do as well: the largest
    assert frame.loc[("other", 0.1, 0), "place_in_grid"] == gates.ONLY
    result.config.claim_kl_coef = 0.05
    frame = manipulation.table(result)
    chosen = frame[frame["chosen"] == "yes"].set_index("arm")["kl_coef"].to_dict()
    assert chosen == {arm: 0.1 if arm == "other" else 0.05 for arm in ARMS}
    assert manipulation.places(frame) == {arm: gates.ONLY if arm == "other" else gates.LOWEST for arm in ARMS}


def test_means_over_replicates(result):
    frame = manipulation.table(result)
    penalties = frame[(frame["arm"] == "salsa") & (frame["kl_coef"] == 0.2)]["penalty"]
    assert manipulation.by_arm(frame, "penalty")["salsa"] == pytest.approx(penalties.sum() / 2)
    assert manipulation.strengths(result, frame) == pytest.approx(
        {"salsa": 0.08, "other": 0.08, "alpha_0.30": 0.1, "noise": 0.1, "soup_start": 0.08}
    )


def test_of_several_training_seeds_the_mean_is_taken_first():
    rows = [("salsa", 0, 1.0), ("salsa", 0, 2.0), ("salsa", 1, 5.0), ("ppo", 0, math.nan), ("ppo", 1, 3.0)]
    frame = pd.DataFrame(rows, columns=["arm", "replicate", "penalty"]).assign(chosen="yes")
    assert manipulation.by_arm(frame, "penalty") == {"salsa": 3.25, "ppo": 3.0}
    assert manipulation.by_arm(frame.assign(chosen="no"), "penalty") == {}


def drifting(*rows):
    """Rows (replicate, change, error) of one arm."""
    frame = pd.DataFrame(rows, columns=["replicate", "reward_slope", "reward_slope_se"]).assign(arm="salsa")
    words = [flat.flatness(change, error, 0.1) for _, change, error in rows]
    return frame.assign(chosen="yes", flat=words)


def test_drift_is_read_from_intervals():
    """Signed changes that cancel do not make a mean flat, and a drifting replicate is counted."""
    frame = drifting((0, 0.3, 0.01), (1, -0.3, 0.01), (2, 0.0, 0.01), (3, 0.0, 0.01))
    assert manipulation.settled(frame) == {"salsa": 0.5}
    half = stats.t.ppf(0.975, 3) * np.std([0.3, -0.3, 0, 0], ddof=1) / 2
    assert manipulation.drifts(frame)["salsa"] == pytest.approx(half)
    single = drifting((0, -0.04, 0.02))
    assert manipulation.drifts(single)["salsa"] == pytest.approx(0.08) and manipulation.settled(single) == {"salsa": 1}
    seeds = drifting((0, 0.3, 0.01), (0, 0.1, 0.01), (1, 0.0, 0.0), (1, 0.0, 0.0), (2, math.nan, math.nan))
    assert manipulation.settled(seeds) == {"salsa": 0.75}
    assert manipulation.drifts(seeds)["salsa"] == pytest.approx(
        0.1 + stats.t.ppf(0.975, 1) * 0.2 / math.sqrt(2) / math.sqrt(2)
    )


def test_the_kl_coef_of_claims_is_that_of_the_first_claim(result):
    """other is run at 0.1 alone: a claim on it alone takes salsa there too."""
    assert selection.of_claims(result, "salsa") == 0.2
    claims = {name: claim for name, claim in result.config.claims.items() if claim.baseline == "other"}
    result.config.claims = claims
    assert selection.of_claims(result, "salsa") == selection.of_claims(result, "other") == 0.1
    assert selection.of_claims(result, "ema") == 0.2  # which no claim compares
    result.config.claim_kl_coef = 0.05
    assert selection.of_claims(result, "salsa") == 0.05 and selection.of_claims(result, "other") == 0.1


def test_the_sentence_of_a_study(result):
    frame = manipulation.table(result)
    text = manipulation.sentence(result, frame)
    assert text.startswith("Manipulation: kl_coef · KL(sft0 ‖ reference) = 0.08 to 0.1 standard deviations of reward; ")
    count = sum(frame["flat"] == "yes")
    assert f"reward is flat in {count} of {len(frame)} runs" in text and "the only one run (other)" in text
    assert text == manipulation.caption(result, {"manipulation": frame})
    assert "over the last 25% of training" in manipulation.reading(result, {"manipulation": frame})


def test_algorithms_whose_penalty_is_in_another_unit(result):
    result.config.ppo.kl_in, result.config.ppo.kl_estimator = "loss", "k2"
    frame = manipulation.table(result)
    assert frame[["manipulation", "penalty", "penalty_share"]].isna().all(axis=None) and frame["flat"].ne("").all()
    assert "standard deviations" not in manipulation.sentence(result, frame)


def test_runs_without_rollouts(result):
    for policy in result.policies:
        policy.metrics = []
    frame = manipulation.table(result)
    assert frame[["penalty", "reward_gain", "reward_slope"]].isna().all(axis=None) and set(frame["flat"]) == {""}
    assert "flat" not in manipulation.sentence(result, frame)


def test_a_change_of_nothing_has_no_share():
    assert math.isnan(manipulation.share(0.2, 0.0)) and manipulation.share(0.2, -0.4) == 0.5


def test_the_page_says_it_first(tmp_path, monkeypatch):
    tree = Tree(tmp_path, replicates=(0,), arms={"ppo": "0", "salsa": "0.5"}, iterations=12, prompts=3)
    output = tree.build(monkeypatch)
    report = (output / "report.md").read_text()
    start = report.split("## Arms")[0]
    assert "Manipulation: kl&#95;coef" in start or "Manipulation: kl_coef" in start
    assert "= 0.02 (salsa) standard deviations of reward, and under 0.05 a reference can hardly matter" in start
    assert "= 0.02 (salsa) standard deviations" in (output / "report.html").read_text().split('id="checks"')[0]
    assert (output / "tables" / "manipulation.md").read_text().split("\n")[0].endswith("kl_coef is the only one run.")
    frame = pd.read_csv(output / "tables" / "manipulation.csv")
    assert frame["arm"].tolist() == ["ppo", "salsa"] and frame["manipulation"].tolist() == pytest.approx([0, 0.02])


def test_the_setting_has_bounds():
    for values in ({"smallest_manipulation": -1.0}, {"largest_drift": math.inf}):
        with pytest.raises(ValueError, match="at least 0"):
            config.Gates(**values)
