"""Claims of synthetic studies, each verdict by numbers that can be computed by hand."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import ARMS, Tree, table_of

from salsa.evaluate import statistics
from salsa.report import claims, formats, selection, study
from salsa.workflow import config

KLS = {"ppo": {0.05: 3.0, 0.1: 1.0}, "salsa": {0.05: 6.0, 0.1: 2.0}, "other": {0.1: 9.0}}
GOLD = {"ppo": {0.05: 0.4, 0.1: 0.5}, "salsa": {0.05: 0.7, 0.1: 0.6}, "other": {0.1: 0.5}}
NOISE = (0.0, 0.01, -0.01, 0.02)  # by replicate, of the effects


class Chosen(Tree):
    """A study whose numbers are the tables above; salsa's gold also has NOISE, and its last replicate is short."""

    def respond(self, replicate, arm, kl_coef):
        files = super().respond(replicate, arm, kl_coef)
        noise = NOISE[replicate] if arm == "salsa" else 0.0
        gold = GOLD[arm][kl_coef] + noise
        evaluation = json.loads(files["evaluation.json"])
        evaluation |= {"kl_to_sft0": KLS[arm][kl_coef], "gold_reward": gold}
        evaluation |= {"response_length": 5.0 if noise == 0.02 else 25.0}
        rows = [
            row | {"gold": gold, "reward": 1 + noise} for row in map(json.loads, files["responses.jsonl"].splitlines())
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        return files | {"evaluation.json": json.dumps(evaluation), "responses.jsonl": lines}

    def rows(self, model, reward, gold, text):
        return super().rows(model, reward, gold, "text")


def tree(folder, **options):
    own = {"replicates": (0, 1, 2, 3), "kl_coefs": (0.05, 0.1), "only": {"other": (0.1,)}, "prompts": 4}
    return Chosen(folder, **(own | options))


def read(made, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
    return study.read(made.settings, made.parents)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield read(tree(tmp_path_factory.mktemp("claims")), monkeypatch)


def one(found, **changes):
    """The rows of a single claim about salsa and ppo."""
    claim = {"text": "t", "measure": "gold_reward", "smallest_effect": 0.01, "origin": "control", "candidate": "salsa",
             "baseline": "ppo", "benchmarks": [], "meaning": "so"} | changes  # fmt: skip
    own = replace(found, config=replace(found.config, claims={"it": config.Claim(**claim)}))
    frame = claims.frame(own)
    return frame, claims.text(own, frame, table_of(own, "win_rates"))


def test_each_arm_is_taken_at_its_best_development_gold(found):
    pair = selection.pair(found, "salsa", "ppo")
    assert (pair.grid, pair.candidate_kl_coef, pair.baseline_kl_coef) == ((0.05, 0.1), 0.05, 0.1)
    frame = table_of(found, "chosen").set_index(["candidate", "baseline"])
    assert frame.loc[("salsa", "ppo"), "candidate_value"] == pytest.approx(0.7 + 0.005)


def test_grids_are_of_equal_size(found):
    """other was run at 0.1 alone, so salsa is compared with it there, although it does better at 0.05."""
    pair = selection.pair(found, "salsa", "other")
    assert (pair.grid, pair.candidate_kl_coef) == ((0.1,), 0.1)
    row = table_of(found, "chosen").set_index(["candidate", "baseline"]).loc[("salsa", "other")]
    assert (row["grid"], row["candidate_kl_coef"], row["baseline_kl_coef"]) == ("0.1", 0.1, 0.1)


def test_of_equals_the_larger_kl_coef_is_chosen(found, monkeypatch):
    monkeypatch.setattr(selection, "development", lambda study, arm, kl_coef: 1.0)
    assert selection.choose(found, "ppo", (0.05, 0.1, 0.02)) == 0.1


def test_a_claim_that_is_supported(found):
    """0.7 - 0.5 and the noise on each benchmark, paired over four replicates."""
    frame, text = one(found)
    effects = 0.2 + np.array(NOISE)
    half = stats.t.ppf(0.975, 3) * effects.std(ddof=1) / 2
    assert frame["benchmark"].tolist() == ["in_distribution", "out_of_distribution"]
    assert frame["effect"].tolist() == pytest.approx([0.205] * 2)
    assert frame["effect_low"].tolist() == pytest.approx([0.205 - half] * 2)
    assert frame["p"].tolist() == pytest.approx([stats.ttest_1samp(effects, 0, alternative="greater").pvalue] * 2)
    assert frame["holm_p"].tolist() == pytest.approx(frame["p"].tolist())  # one claim, nothing to correct
    assert set(frame["claim_verdict"]) == {"supported"} and "1 supported (it)" in text
    assert (frame["candidate_kl_coef"][0], frame["baseline_kl_coef"][0]) == (0.05, 0.1)


def test_a_claim_that_is_refuted_says_what_it_means(found):
    frame, text = one(found, measure="reward", smallest_effect=0.5)  # 0.005 and the noise: below ½ with certainty
    assert set(frame["claim_verdict"]) == {"refuted"}
    assert "**Refuted**: so." in text


def test_a_claim_that_is_undecided_says_how_many_replicates_would_decide(found):
    frame, text = one(found, measure="reward", smallest_effect=0.01)
    expected = statistics.decide(NOISE, 0.01)["replicates_needed"]
    assert frame["replicates_needed"].tolist() == [expected] * 2
    assert f"**Undecided** with 4 replicates; about {expected} would decide" in text


def test_kl_is_measured_on_the_development_prompts(found):
    frame, _ = one(found, measure="kl_to_sft0")
    assert len(frame) == 1 and frame["benchmark"].tolist() == [""]
    assert frame["effect"].tolist() == [6.0 - 1.0]


def test_of_several_benchmarks_all_must_pass(found):
    def verdict(*verdicts):
        tests = [claims.Test("", "", {}, "", {"verdict": verdict}, verdict == "refuted") for verdict in verdicts]
        return claims.combined(tests)

    assert verdict("supported", "supported") == "supported"
    assert verdict("supported", "undecided") == "undecided"
    assert verdict("undecided", "refuted") == verdict("supported", "refuted") == "refuted"


def test_one_of_several_benchmarks_refutes_by_a_wider_interval():
    effects = {0: 0.0, 1: 0.02, 2: 0.04, 3: 0.06}  # mean 0.03, standard error sqrt(1/6000)
    alone, of_three = (0.03 + stats.t.ppf(1 - 0.025 / tests, 3) * math.sqrt(1 / 6000) for tests in (1, 3))
    for smallest, refutes_alone, refutes_of_three in (
        (alone - 1e-6, False, False),
        (alone + 1e-6, True, False),
        (of_three - 1e-6, True, False),
        (of_three + 1e-6, True, True),
    ):
        claim = config.Claim("t", "reward", smallest)
        assert claims._decided(claim, effects, 1)[1] == refutes_alone
        decision, refutes = claims._decided(claim, effects, 3)
        assert (decision["verdict"] == "refuted", refutes) == (refutes_alone, refutes_of_three)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"baseline": "noise"}, "this study has no arm noise"),
        ({"candidate": "reset", "baseline": "noise"}, "this study has no arm reset and no arm noise"),
        ({"measure": "stable", "baseline": "salsa"}, "salsa and salsa are one arm in this study"),
        ({"benchmarks": ["two_turn"]}, "this study has no benchmark two_turn"),
        ({"measure": "matched_gold", "baseline": "other"}, "a comparison at equal KL needs two kl_coefs of each arm"),
    ],
)
def test_a_claim_that_is_not_tested_says_why(found, changes, why):
    frame, text = one(found, **changes)
    assert frame[["claim_verdict", "why"]].to_numpy().tolist() == [["not tested", why]]
    assert f"**Not tested** here: {why}." in text and "No claim can be tested here" in text
    assert math.isnan(frame["holm_p"][0])


def test_models_that_were_not_judged_against_each_other(found):
    """Against sft0 all win 2 of 4 prompts; at 0.1 salsa and other both met ppo, which salsa beat on 1 of 4, 3 ties."""
    frame, _ = one(found, measure="win_rate")  # salsa at 0.05, ppo at 0.1: they met sft0 alone
    assert set(frame["how"]) == {"win rates against sft0 compared"} and frame["effect"].tolist() == [0.0, 0.0]
    frame, text = one(found, measure="win_rate", baseline="other")
    assert set(frame["how"]) == {"win rates against ppo compared"} and "against ppo compared" in text
    assert frame["effect"].tolist() == pytest.approx([(1 + 3 / 2) / 4 - 1 / 2] * 2)


def test_a_tournament_judges_directly(tmp_path, monkeypatch):
    made = tree(tmp_path, replicates=(0, 1), tournament=True)
    other = read(made, monkeypatch)
    frame, _ = one(other, measure="win_rate", candidate="other", baseline="salsa")
    assert set(frame["how"]) == {selection.DIRECT} and frame["effect"].tolist() == [0.0, 0.0]
    back, _ = one(other, measure="win_rate", candidate="salsa", baseline="other")  # judged the other way round
    assert set(back["how"]) == {selection.DIRECT}


def test_equal_kl(found):
    """ppo falls from 0.5 at KL 1 to 0.4 at 3, salsa rises from 0.6 at 2 to 0.7 at 6: shared is KL 2 to 3.

    There ppo is 0.45 to 0.4, salsa 0.6 to 0.625: differences 0.15 and 0.225, on average 0.1875.
    """
    frame, _ = one(found, measure="matched_gold")
    assert frame["effect"].tolist() == pytest.approx([0.1875 + 0.005])
    row = table_of(found, "matched_kl").set_index(["arm", "measure"])
    assert row.loc[("salsa", "gold_reward"), "difference"] == pytest.approx(0.1925)
    assert row.loc[("salsa", "win_rate_vs_sft0"), "difference"] == pytest.approx(0)
    assert set(row.index.get_level_values("arm")) == {"salsa"}  # other has one kl_coef
    assert math.isnan(frame["candidate_kl_coef"][0])


def test_stable_in_every_replicate_but_one_is_undecided(found):
    frame, text = one(found, measure="stable")
    assert (frame["effect"][0], frame["claim_verdict"][0]) == (0.75, "undecided")
    assert "stable in 3 of 4 replicates" in text and frame["p"].isna().all()


@pytest.mark.parametrize(
    "stable, verdict",
    [((1, 1, 1), "supported"), ((1, 0, 0), "refuted"), ((1, 0), "undecided"), ((1,), "undecided"), ((0,), "undecided")],
)
def test_stable_verdicts(stable, verdict):
    assert claims._stable(dict(enumerate(map(bool, stable))))["verdict"] == verdict


def test_holm_is_over_claims_by_their_largest_p(found, monkeypatch):
    p = {("a", "x"): 0.01, ("a", "y"): 0.03, ("b", "x"): 0.02, ("c", "x"): math.nan}
    monkeypatch.setattr(claims, "_rows", lambda study, name, claim: [
        {"claim": name, "benchmark": b, "p": value} for (n, b), value in p.items() if n == name
    ])  # fmt: skip
    monkeypatch.setattr(claims, "ordered", lambda given: dict.fromkeys("abc"))
    frame = claims.frame(found)
    assert frame["holm_p"].tolist()[:3] == pytest.approx([0.04, 0.04, 0.04]) and math.isnan(frame["holm_p"][3])


def test_claims_are_ordered_by_origin_then_measure(found):
    ordered = claims.ordered(found.config.claims)
    assert list(ordered)[:2] == ["larger_kl", "stable"]
    origins = [claim.origin for claim in ordered.values()]
    assert origins == sorted(origins)  # abstract, then control


def test_paper_table(found):
    """salsa at 0.05 and ppo at 0.1 never met: ½ plus the difference of their rates against sft0, 2/4 each."""
    frame = table_of(found, "paper_table").set_index("benchmark")
    row = frame.loc["in_distribution"]
    assert (row["model"], row["salsa_kl_coef"], row["ppo_kl_coef"]) == ("tiny", 0.05, 0.1)
    assert (row["salsa_vs_ppo"], row["salsa_vs_sft0"], row["ppo_vs_sft0"]) == (0.5, 0.5, 0.5)
    assert row["how"] == "win rates against sft0 compared" and len(frame) == 2
    other = table_of(found, "ablations").set_index(["arm", "benchmark"]).loc[("other", "in_distribution")]
    assert (other["kl_coef"], other["ppo_kl_coef"], other["how"]) == (0.1, 0.1, selection.DIRECT)


def test_an_arm_goes_by_its_shown_name(found):
    assert selection.arm_of(found, "ppo") == "ppo" and selection.arm_of(found, "noise") is None
    twin = found.config.arms | {"twin": found.config.arms["salsa"]}
    same = replace(found, config=replace(found.config, arms=twin))
    assert selection.arm_of(same, "twin") == "salsa"


@pytest.mark.parametrize(
    "eos_rate, length, loss, holds",
    [
        (1.0, 1.0, 0.0, True),
        (0.89, 1.0, 0.0, False),
        (1.0, 0.49, 0.0, False),
        (1.0, 1.0, 0.03, False),
        (math.nan, math.nan, 0.0, True),
        (0.9, 0.5, 0.02, True),
    ],
)
def test_steadiness(eos_rate, length, loss, holds):
    assert selection.Steadiness(eos_rate, length, loss).holds(config.Stability()) is holds


def test_missing_whole_numbers_are_empty_cells():
    frame = pd.DataFrame({"replicates_needed": pd.array([3, None], dtype="Int64")})
    assert formats.readable(frame).rows == [["3"], [""]]


def test_arms_of_the_tree_are_those_of_the_tables():
    assert set(ARMS) == set(KLS) == set(GOLD)
