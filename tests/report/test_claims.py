"""Claims of synthetic studies, each verdict by numbers that can be computed by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import ARMS, Tree, table_of

from salsa.evaluate import decisions, power, sequential
from salsa.report import claims, conclusions, formats, outcomes, selection, study
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
    return frame, conclusions.text(own, frame, table_of(own, "win_rates"))


def replaced(found, claim_kl_coef=None, **changes):
    """The study with a single claim of the abstract about salsa and ppo."""
    claim = replace(config.Claim("t", "gold_reward", 0.01), **changes)
    return replace(found, config=replace(found.config, claims={"it": claim}, claim_kl_coef=claim_kl_coef))


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


def half_width(effects, level=0.95):
    return stats.t.ppf((1 + level) / 2, len(effects) - 1) * np.std(effects, ddof=1) / math.sqrt(len(effects))


def test_a_claim_that_is_supported(found):
    """0.7 - 0.5 and the noise on each benchmark, paired over four replicates: the mean of both decides."""
    frame, text = one(found)
    effects = 0.2 + np.array(NOISE)
    half = half_width(effects)
    assert frame["benchmark"].tolist()[:3] == ["mean of 2 benchmarks", "in_distribution", "out_of_distribution"]
    assert frame["verdict"].tolist()[:3] == ["supported", "", ""]
    assert frame["outcome"].tolist()[:3] == ["primary", "secondary", "secondary"]
    assert frame["effect"].tolist()[:3] == pytest.approx([0.205] * 3)
    assert frame["effect_low"].tolist()[:3] == pytest.approx([0.205 - half] * 3)
    assert frame["p"].tolist()[:3] == pytest.approx([stats.ttest_1samp(effects, 0).pvalue] * 3)
    assert set(frame["claim_verdict"]) == {"supported"} and "1 supported (it)" in text
    assert (frame["candidate_kl_coef"][0], frame["baseline_kl_coef"][0]) == (0.05, 0.1)


def test_the_win_rate_stands_beside_gold_scores(tmp_path, monkeypatch):
    made = read(tree(tmp_path, replicates=(0, 1), tournament=True), monkeypatch)
    frame, _ = one(made, candidate="other", baseline="salsa")
    assert frame["measure"].tolist() == ["gold_reward"] * 3 + ["win_rate"] and frame["verdict"][3] == ""
    assert math.isnan(frame["smallest_effect"][3]) and frame["effect"][3] == 0.0


def test_every_claim_has_its_share_of_the_error(found):
    """All origins are one family, of what is planned: the judge of `preferred` gives no verdict, and it counts too."""
    made = {name: found.config.claims["higher_gold"] for name in "abc"}
    made["control"] = replace(made["a"], origin="control")
    made["unarmed"] = replace(made["a"], baseline="noise")
    made["preferred"] = found.config.claims["preferred"]
    own = replace(found, config=replace(found.config, claims=made), verdicts={})
    frame = claims.primary_rows(claims.frame(own)).set_index("claim")
    assert frame["level"][["a", "b", "c", "control"]].tolist() == pytest.approx([1 - 0.05 / 5] * 4)
    assert frame["level"][["unarmed", "preferred"]].isna().all()
    row = frame.loc["a"]
    assert row["effect_high"] - row["effect"] == pytest.approx(half_width(NOISE, 1 - 0.05 / 5))
    assert "The 5 claims that this study plans to test are one family" in conclusions.families(own)
    assert "1 − 0.05/5 = 99 %" in conclusions.families(own)


@pytest.mark.parametrize(
    "smallest, verdict, said",
    [(0.5, "excluded", "**Excluded**: 0.005 (-0.0155 to 0.0255) standard deviations on sft0's responses over 4 "
      "replicates; so; equivalent: a difference of 0.5 is excluded either way."),
     (0.0256, "excluded", "; so; equivalent: a difference of 0.0256 is excluded either way."),
     (0.01, "undecided", "**Undecided**: 0.005")],
)  # fmt: skip
def test_verdicts_in_words(found, smallest, verdict, said):
    frame, text = one(found, measure="reward", smallest_effect=smallest)  # 0.005 and the noise
    assert set(frame["claim_verdict"]) == {verdict} and said in text


def test_an_effect_that_is_too_small_and_one_in_the_other_direction(found):
    assert set(one(found, smallest_effect=1.0)[0]["claim_verdict"]) == {"too small"}
    frame, text = one(found, candidate="ppo", baseline="salsa")
    assert set(frame["claim_verdict"]) == {"reversed"} and "**Reversed**: -0.205" in text


def test_a_claim_that_is_undecided_says_what_power_takes(found):
    frame, text = one(found, measure="reward", smallest_effect=0.01)
    expected = power.needed(np.std(NOISE, ddof=1), 3, 0.01)
    row = frame.iloc[0]
    assert (row["needed_80"], row["needed_80_low"], row["needed_80_high"]) == expected
    assert f"takes {expected.replicates} ({expected.low} to {expected.high}) replicates" in text


def test_where_the_planned_looks_cannot_decide_the_fixed_number_is_given(found):
    own = replaced(found, measure="reward", smallest_effect=0.001)
    own.config.looks = [2, 4]
    row = claims.frame(own).iloc[0]
    assert math.isinf(row["needed_80"]) and row["verdict"] == "undecided"
    said, once = conclusions.needed(own, row)
    assert "takes more than the 4 planned replicates, and 90 % more than the 4 planned" in said
    expected = [power.needed(row["deviation"], 3, 0.001, row["level"], wanted).replicates for wanted in (0.8, 0.9)]
    hours = [conclusions.core_hours(own, row, number) for number in expected]
    assert hours[1] / hours[0] == pytest.approx(expected[1] / expected[0])
    assert once == (
        f"a study that is looked at once takes {expected[0]} for 80% ({hours[0]:.3g} core-hours of the two arms) and "
        f"{expected[1]} for 90% ({hours[1]:.3g} core-hours of the two arms)"
    )


@pytest.mark.parametrize(
    "looks, planned, said",
    [([8, 48], None, "takes 8 (8 to more than the 48 planned) replicates"),
     ([8, 48], 2, "takes 8 (8 to more than the 2 planned) replicates"),
     ([], None, "takes 8 (8 to more than 100,000) replicates")],
)  # fmt: skip
def test_a_range_of_needed_replicates_may_end_beyond_the_plan(found, looks, planned, said):
    arms = found.config.arms | {"salsa": replace(found.config.arms["salsa"], replicates=planned)}
    own = replace(found, config=replace(found.config, looks=looks, arms=arms))
    row = {"claim": "higher_reward"} | dict.fromkeys(("smallest_effect", "smallest_effect_shown"), 0.1)
    row |= dict.fromkeys(("needed_80", "needed_90"), 8.0)
    row |= dict.fromkeys(("needed_80_low", "needed_90_low"), 8.0)
    row |= dict.fromkeys(("needed_80_high", "needed_90_high"), math.inf)
    assert said in conclusions.needed(own, row)[0]


def test_what_power_takes_is_never_read_from_the_observed_mean(found):
    test = claims.tests(found)["higher_gold"]
    shifted = replace(test.outcomes[0], values=test.outcomes[0].values + 7)
    numbers = [claims.needed(test, claims.decision(test, outcome, 0.95)) for outcome in (shifted, test.outcomes[0])]
    assert numbers[0] == pytest.approx(numbers[1])


def test_kl_is_measured_on_the_development_prompts(found):
    frame, _ = one(found, measure="kl_to_sft0")
    assert len(frame) == 1 and frame["benchmark"].tolist() == [""]
    assert frame["effect"].tolist() == [6.0 - 1.0]


def test_measures_over_the_flat_part_of_training(found):
    frame, _ = one(found, measure="training_kl_to_sft0")
    flat = found.frames.policies.set_index(["arm", "kl_coef", "replicate"])["flat_kl_to_sft0"]
    expected = [flat["salsa", 0.05, k] - flat["ppo", 0.1, k] for k in range(4)]
    assert frame["effect"].tolist() == pytest.approx([np.mean(expected)]) and frame["effect"][0] > 1
    assert len(one(found, measure="training_reward")[0]) == 1


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"baseline": "noise"}, "this study has no arm noise"),
        ({"candidate": "reset", "baseline": "noise"}, "this study has no arm reset and no arm noise"),
        ({"benchmarks": ["two_turn"]}, "this study has no benchmark two_turn"),
        ({"measure": "matched_gold", "baseline": "other"}, "a comparison at equal KL needs two kl_coefs of each arm"),
    ],
)
def test_a_claim_that_is_not_tested_says_why(found, changes, why):
    frame, text = one(found, **changes)
    assert frame[["claim_verdict", "why"]].to_numpy().tolist() == [["not tested", why]]
    assert f"**Not tested**: {why}." in text and "No claim can be tested here" in text
    assert math.isnan(frame["level"][0])


def test_models_that_were_not_judged_against_each_other(found):
    """Against sft0 all win 2 of 4 prompts; at 0.1 salsa and other both met ppo, which salsa beat on 1 of 4, 3 ties."""
    claim = {"measure": "win_rate", "origin": "abstract"}
    frame, _ = one(found, **claim)  # salsa at 0.05, ppo at 0.1: they met sft0 alone
    assert set(frame["how"]) == {"win rates against sft0 compared"} and frame["effect"].tolist() == [0.0] * 3
    frame, text = one(found, **claim, baseline="other")
    assert set(frame["how"]) == {"win rates against ppo compared"} and "against ppo compared" in text
    assert frame["effect"].tolist() == pytest.approx([(1 + 3 / 2) / 4 - 1 / 2] * 3)
    frame, _ = one(found, measure="win_rate", baseline="other")  # a control is compared directly, or not at all
    assert frame["why"].tolist() == ["no verdict on in_distribution compares salsa and other"]


def test_a_tournament_judges_directly(tmp_path, monkeypatch):
    made = tree(tmp_path, replicates=(0, 1), tournament=True)
    other = read(made, monkeypatch)
    frame, _ = one(other, measure="win_rate", candidate="other", baseline="salsa")
    assert set(frame["how"]) == {selection.DIRECT} and frame["effect"].tolist() == [0.0] * 3
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


def test_stability_is_the_worst_of_three_losses_in_margins(found):
    """The last replicate of salsa has 5 tokens where ppo has 25, by sft0's 25: 0.8 of a margin of 0.1 are 8 margins."""
    frame, text = one(found, measure="stable", smallest_effect=0.5)
    assert frame["measure"].tolist() == ["stable", "end_rate_relative", "length_relative"]
    values = claims.tests(replaced(found, measure="stable"))["it"].outcomes[0].values
    assert values["effect"].tolist() == pytest.approx([1.0, 1.0, 1.0, 1 - 8])
    assert frame["effect"].tolist() == pytest.approx([-1.0, 1.0, -1.0]) and frame["verdict"][0] == "undecided"
    assert "in 1 of 4 replicates more than a margin is lost; not measured: fall of gold from its peak" in text


def test_what_one_replicate_gains_makes_up_for_nothing_that_another_loses(found):
    """By the mean of all changes of length (+0.8 once, −0.8 once) nothing would be lost."""
    lengths = {0: 25.0, 1: 25.0, 2: 45.0, 3: 5.0}
    policies = [
        replace(p, evaluation=p.evaluation | {"response_length": lengths[p.replicate]}) if p.arm == "salsa" else p
        for p in found.policies
    ]
    own = replace(replaced(found, measure="stable"), policies=policies)
    assert claims.tests(own)["it"].outcomes[0].values["effect"].tolist() == pytest.approx([1.0, 1.0, 1.0, -7.0])


@pytest.mark.parametrize(
    "effects, verdict",
    [([0.10, 0.11, 0.09], "supported"), ([-0.10, -0.11, -0.09], "reversed"), ([-0.10, 0.11, 0.09], "undecided")],
)
def test_stability_is_never_too_small_nor_excluded_nor_equivalent(effects, verdict):
    """A tenth of a margin is left: well within it, and no small matter."""
    values = pd.DataFrame({"candidate_value": math.nan, "baseline_value": math.nan, "effect": effects})
    outcome = outcomes.Outcome("primary", "stable", "", "", values)
    test = claims.Test(config.Claim("t", "stable", 0.5), None, [outcome], None)
    decision = claims.decision(test, outcome, 0.95)
    assert decision.verdict == verdict and not decision.equivalent
    columns = claims._columns(test, outcome, decision)
    assert (columns["smallest_effect"], columns["smallest_effect_shown"]) == (0.5, 0.0)


@pytest.mark.parametrize("measure", ["stable", "gold_reward", "training_reward", "win_rate", "matched_gold"])
def test_no_claim_is_decided_where_a_replicate_was_lost(measure):
    values = pd.DataFrame({"effect": [0.9, 0.91, 0.89, math.nan]})
    outcome = outcomes.Outcome("primary", measure, "", "", values)
    test = claims.Test(config.Claim("t", measure, 0.5), None, [outcome], None)
    assert claims.decision(test, outcome, 0.95).verdict == "undecided"
    assert claims.decision(test, replace(outcome, values=values.dropna()), 0.95).verdict == "supported"


def changed(found, replicate, arm="salsa", **evaluation):
    """The study with other numbers of the evaluation of an arm's policies in one replicate."""
    policies = [
        replace(p, evaluation=p.evaluation | evaluation) if (p.arm, p.replicate) == (arm, replicate) else p
        for p in found.policies
    ]
    return replace(found, policies=policies)


def test_a_gold_score_that_is_missing_loses_its_replicate_alone(found):
    """It is no reason to read the claim from win rates, and a benchmark that is not compared needs no gold."""
    policies = [replace(p, responses=[row.copy() for row in p.responses]) for p in found.policies]
    of_salsa = next(p for p in policies if (p.arm, p.replicate, p.kl_coef) == ("salsa", 2, 0.05))
    of_salsa.responses[0]["gold"] = None
    own = replace(replaced(found, win_rate_without_gold=0.03), policies=policies)
    row = claims.frame(own).iloc[0]
    assert (row["measure"], row["verdict"], row["replicates"], row["lost"]) == ("gold_reward", "undecided", 3, 1)
    assert "1 of 4 replicates have no finite number, so nothing is decided" in row["why"]
    rows = claims.replicates(own).query("outcome == 'primary'")
    assert rows["replicate"].tolist() == [0, 1, 2, 3] and rows["effect"].isna().tolist() == [False, False, True, False]


def test_replicates_without_a_common_kl_are_left_out_and_counted(found):
    own = replaced(changed(found, 1, kl_to_sft0=50.0), measure="matched_gold")
    row = claims.frame(own).iloc[0]
    assert (row["replicates"], row["lost"]) == (3, 0) and not math.isnan(row["effect_low"])
    assert "in 1 of 4 replicates the two reach no common KL, and are left out" in row["why"]
    assert "no floor of the deviation is known" in row["why"]
    assert claims.replicates(own)["replicate"].tolist() == [0, 2, 3]


@pytest.mark.parametrize("evaluation", [{"kl_to_sft0": math.nan}, {"gold_reward": math.inf}])
def test_a_policy_that_diverged_is_no_want_of_a_common_kl(found, evaluation):
    row = claims.frame(replaced(changed(found, 1, **evaluation), measure="matched_gold")).iloc[0]
    assert (row["verdict"], row["replicates"], row["lost"]) == ("undecided", 3, 1)


def test_looks_count_replicates_by_their_numbers(found):
    """The look after two has replicates 0 and 1, though the comparison at equal KL lacks the second."""
    own = replaced(changed(found, 1, kl_to_sft0=50.0), measure="matched_gold")
    own.config.looks = [2, 4]
    looks = claims.looks(own)
    assert looks["n"].tolist() == [1, 3] and looks["look"].tolist() == [1, 2]
    assert claims.replicates(own)["look"].tolist() == [1, 2, 2]


def table(seed, replicates, prompts=6):
    values = np.random.default_rng(seed).normal(size=(len(replicates), prompts))
    return pd.DataFrame(values, index=list(replicates))


def residual_variance(values):
    """By loops."""
    count, prompts = values.shape
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    squares = sum((values[i, j] - rows[i] - columns[j] + mean) ** 2 for i in range(count) for j in range(prompts))
    return squares / ((count - 1) * (prompts - 1))


def test_the_floor_is_that_of_the_replicates_that_both_arms_have():
    """24 replicates of one arm against 16 of the other, and the floor at the look after 8."""
    long, short = table(0, range(24)), table(1, range(16))
    (difference,) = outcomes._difference(long, short)
    values = pd.DataFrame({"effect": difference.mean(axis=1)})
    outcome = outcomes.Outcome("primary", "gold_reward", "b", "", values, tables=(difference,))
    for count in (16, 8):
        part = outcomes.of_replicates(outcome, range(count))
        expected = residual_variance((long.iloc[:count] - short.iloc[:count]).to_numpy()) / 6
        assert part.sampling_variance == pytest.approx(expected) and len(part.values) == count
    assert outcomes._difference(long, table(1, range(30, 33))) == ()


def test_an_arm_of_fewer_replicates_has_a_floor(found):
    policies = [p for p in found.policies if p.arm != "other" or p.replicate < 3]
    own = replace(replaced(found, baseline="other"), policies=policies)
    row = claims.frame(own).iloc[0]
    assert row["replicates"] == 3 and row["sampling_deviation"] == pytest.approx(0, abs=1e-9)
    assert "no floor" not in row["why"]


def earlier_and_later(first, second, looks=(4, 8)):
    """The decision of a claim of 0.5 whose replicates have these effects until the first look, and after it."""
    effects = [*first, *second]
    values = pd.DataFrame({"effect": effects}, index=range(10, 10 + len(effects)))
    outcome = outcomes.Outcome("primary", "reward", "b", "", values)
    look = sequential.Look(looks, 1)
    test = claims.Test(config.Claim("t", "reward", 0.5), None, [outcome], look, tuple(values.index))
    return test, claims.decision(test, outcome, 0.8)


def test_looks_that_contradict_each_other_leave_a_claim_undecided():
    test, decision = earlier_and_later([1.0, 1.0001, 0.9999, 1.0], [0.9, 0.9001, 0.8999, 0.9])
    (_, first), (_, last) = claims.at_looks(test, test.outcomes[0], 0.8)
    assert first.low > last.high > 0.5  # either alone supports it
    assert decision.contradictory and decision.verdict == "undecided" and math.isnan(decision.low)
    _, decision = earlier_and_later([1.0, 1.0001, 0.9999, 1.0], [-3.0, 5.0, -2.0, 4.0])  # which contradicts nothing
    assert decision.verdict == "supported" and not decision.contradictory


def test_each_look_is_computed_from_its_own_replicates():
    first, second = [0.9, 1.1, 1.0, 1.05], [0.7, 1.3, 0.6, 1.2]
    test, decision = earlier_and_later(first, second)
    looks = [(part, found) for part, found in claims.at_looks(test, test.outcomes[0], 0.8)]
    assert [len(part.values) for part, _ in looks] == [4, 8]
    alone = [
        decisions.decide(first, 0.5, 0.8, sequential.Look((4, 8), 0)),
        decisions.decide(first + second, 0.5, 0.8, sequential.Look((4, 8), 1)),
    ]
    assert [found for _, found in looks] == alone
    assert (decision.low, decision.high) == (max(a.low for a in alone), min(a.high for a in alone))


def test_with_looks_kl_coefs_are_chosen_on_the_replicates_of_the_first(found):
    """Later replicates, in which another kl_coef does better by far, change nothing."""
    policies = [
        replace(p, evaluation=p.evaluation | {"gold_reward": 9.0}) if p.replicate > 1 and p.kl_coef == 0.1 else p
        for p in found.policies
    ]
    own = replace(found, policies=policies)
    assert selection.pair(own, "salsa", "ppo").candidate_kl_coef == 0.1
    own = replace(own, config=replace(own.config, looks=[2, 4]))
    assert selection.pair(own, "salsa", "ppo").candidate_kl_coef == 0.05


def test_the_floor_of_training_is_that_of_the_arms_differences(found):
    """The mean over replicates of the variance of the mean of the differences by iteration, by Newey and West."""
    own = replaced(replace(found, config=replace(found.config, evaluate=config.Evaluate(flat_share=0.7))),
                   measure="training_kl_to_sft0")  # fmt: skip
    generator, variances = np.random.default_rng(0), []
    own = replace(own, policies=[
        replace(p, metrics=[row | {"kl_to_sft0": generator.normal()} for row in p.metrics]) for p in own.policies
    ])  # fmt: skip
    row = claims.frame(own).iloc[0]
    for replicate in range(4):
        ours, theirs = (
            [
                line["kl_to_sft0"]
                for line in own.of(arm=arm, kl_coef=row[f"{side}_kl_coef"], replicate=replicate)[0].metrics
            ]
            for arm, side in (("salsa", "candidate"), ("ppo", "baseline"))
        )
        values = np.subtract(ours, theirs)[-5:]  # 0.7 of 6 iterations, rounded up
        left = values - np.polyval(np.polyfit(range(5), values, 1), range(5))
        products = sum(left[s] * left[t] * (1 - min(abs(s - t), 3) / 3)
                       for s in range(5) for t in range(5))  # fmt: skip
        variances.append(products / (5 * 3))
    assert row["sampling_deviation"] == pytest.approx(math.sqrt(np.mean(variances)))


def test_the_floor_of_kl_is_made_from_evaluation_prompts(found, monkeypatch):
    def rows(study, arm, kl_coef):
        generator = np.random.default_rng(len(arm))
        cells = [(replicate, f"p{j}", generator.normal()) for replicate in range(4) for j in range(5)]
        return pd.DataFrame(cells, columns=["replicate", "prompt_id", "kl_to_sft0"])

    monkeypatch.setattr(selection, "evaluation_rows", rows)
    tables = [rows(None, arm, 0.1)["kl_to_sft0"].to_numpy().reshape(4, 5) for arm in ("salsa", "ppo")]
    row = claims.frame(replaced(found, measure="kl_to_sft0")).iloc[0]
    assert row["sampling_deviation"] == pytest.approx(math.sqrt(residual_variance(tables[0] - tables[1]) / 5))


def test_a_win_rate_by_gold_says_that_it_repeats_gold(found):
    why = claims.frame(replaced(found, measure="win_rate"))["why"][0]
    assert "judge gold scores as gold rewards do, so that this says again what they say" in why


def test_a_deviation_below_that_of_sampling_does_not_decide(found):
    test = claims.tests(found)["higher_gold"]
    outcome = replace(test.outcomes[0], sampling_variance=0.2**2)
    floored = claims.decision(test, outcome, 0.95)
    assert floored.floored and floored.deviation == pytest.approx(0.2) and floored.verdict == "undecided"
    assert "less than sampling alone" in claims._notes(found, replace(test, outcomes=[outcome]), floored)[-1]


def test_sampling_variance_is_that_of_the_mean_over_benchmarks(found):
    primary, *others = claims.tests(found)["preferred"].outcomes
    assert primary.sampling_variance == pytest.approx(sum(part.sampling_variance for part in others) / 4)


@pytest.mark.parametrize("looks, present, place", [([2, 4], 4, 1), ([2, 4], 3, 0), ([2, 4], 2, 0), ([8, 16], 4, 0)])
def test_looks_have_their_own_critical_values(found, looks, present, place):
    own = replace(found, config=replace(found.config, looks=looks),
                  policies=[p for p in found.policies if p.replicate < present])  # fmt: skip
    frame = claims.primary_rows(claims.frame(own)).set_index("claim")
    row, level = frame.loc["higher_gold"], frame.loc["higher_gold", "level"]
    look = sequential.Look(tuple(looks), place)
    assert row["replicates"] == min(present, look.replicates)
    assert row["critical"] == pytest.approx(decisions.critical_value(row["replicates"], level, look))


def test_claims_are_compared_at_the_kl_coef_that_was_fixed(found):
    own = replaced(found, claim_kl_coef=0.1)
    row = claims.frame(own).iloc[0]
    assert (row["candidate_kl_coef"], row["baseline_kl_coef"]) == (0.1, 0.1)
    assert row["effect"] == pytest.approx(0.6 - 0.5 + np.mean(NOISE))
    why = claims.frame(replaced(found, claim_kl_coef=0.05, baseline="other"))["why"][0]
    assert why == "salsa and other were not both run at claim_kl_coef 0.05"
    assert "which was stated in the study's configuration" in conclusions.compared_at(own)
    own.__dict__["registration"] = SimpleNamespace(in_advance=True)
    assert "which was fixed before the study ran" in conclusions.compared_at(own)


def test_without_gold_a_control_is_read_from_win_rates(tmp_path, monkeypatch):
    made = read(Tree(tmp_path, gold=False, prompts=4), monkeypatch)
    assert claims.frame(replaced(made))["why"][0] == "this data has no gold reward"
    row = claims.frame(replaced(made, win_rate_without_gold=0.03)).iloc[0]
    assert row["why"] == "this study has no judge"


STRENGTH = "kl_coef · KL(sft0 ‖ reference) is 0.02 standard deviations of reward"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, f"this study sees a better anchor (salsa against ppo: 0.205 (0.184 to 0.226); {STRENGTH})."),
        ({"smallest_effect": 1.0}, "this study sees a better anchor, but even that gains less than would matter ("),
        ({"measure": "reward", "smallest_effect": 0.5}, "this study can't see a better anchor: that it gains what "
         "would matter is excluded (salsa against ppo: 0.005 "),
        ({"candidate": "ppo", "baseline": "salsa"}, "what should be a better anchor does worse (ppo against salsa: "),
        ({"measure": "reward"}, "whether this study would see a better anchor is undecided (salsa against ppo: "),
        ({"candidate": "strong_reference"}, "it is not tested, for this study has no arm strong_reference; whether "),
    ],
)  # fmt: skip
def test_the_positive_control_comes_first(found, changes, said):
    _, text = one(found, origin="positive_control", **changes)
    assert text.split("\n")[2].startswith("**Positive control (it): " + said)
    assert ("every other verdict stands under that sentence" in text) == bool(changes)


def test_a_study_without_a_positive_control_says_so(found):
    frame, text = one(found)
    assert text.split("\n")[2].startswith("**The study has no positive control: whether it would see a better anchor ")
    assert conclusions.sight(found, frame[:0]) == []


def test_claims_are_ordered_by_origin_then_measure(found):
    ordered = claims.ordered(found.config.claims)
    assert list(ordered)[:3] == ["better_reference_is_seen", "larger_kl", "stable"]
    origins = [claim.origin for claim in ordered.values()]
    assert list(dict.fromkeys(origins)) == list(claims.ORIGINS)


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
    frame = pd.DataFrame({"replicates": pd.array([3, None], dtype="Int64")})
    assert formats.readable(frame).rows == [["3"], [""]]


def test_arms_of_the_tree_are_those_of_the_tables():
    assert set(ARMS) == set(KLS) == set(GOLD)
