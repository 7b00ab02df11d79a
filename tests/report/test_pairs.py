"""The map over SFT pairs: its rows by hand, its regression as the numbers say, and the words that follow from it."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import Tree, lines

from salsa.report import study
from salsa.report.sections import pairs, regimes

DISTANCES = (0.1, 0.3, 0.5, 0.8, 1.2, 2.0)  # KL(sft0 ‖ soup) of the pairs


class Pairs(Tree):
    """Six SFT pairs, half of them of another recipe; salsa's gold rises with √KL, by a known slope and noise."""

    def __init__(self, root, **options):
        super().__init__(root, replicates=range(6), kl_coefs=(0.1, 0.3), planes=(), **options)
        self.settings.config["regimes"] = {
            "even": {"replicates": [0, 2, 4], "sft": {"epochs": 8}},
            "odd": {"replicates": [1, 3], "sft": {"epochs": 20}, "disjoint": True, "reward_model": {"pairs": 600}},
        }

    def landscape(self, replicate):
        files = super().landscape(replicate)
        gates = json.loads(files["gates.json"])
        rows = [line.split(",") for line in files["line.csv"].splitlines()]
        soup = next(row for row in rows if row[0] == "0.5")
        soup[rows[0].index("reward")] = str(0.05 + 0.02 * replicate + 0.01 * replicate**2)  # sft0's: 0.02 * replicate
        files["line.csv"] = "".join(",".join(row) + "\n" for row in rows)
        return files | {"gates.json": json.dumps(gates | {"kl_sft0_soup": DISTANCES[replicate]})}

    def effect(self, replicate, kl_coef):
        return 0.02 + 0.05 * math.sqrt(DISTANCES[replicate]) + 0.1 * kl_coef + 0.004 * (-1) ** replicate

    def respond(self, replicate, arm, kl_coef):
        effect = self.effect(replicate, kl_coef) if arm == "salsa" else 0.0
        noise = np.random.default_rng([replicate, int(100 * kl_coef), arm == "salsa"])
        rows = self.rows("policy", 1.0, 0.0, "text")
        for row in rows:
            row["gold"] = 0.5 + effect + 0.01 * noise.normal() if self.gold else None
            row["reward"] = 1.0 + effect + 0.01 * noise.normal()
        return super().respond(replicate, arm, kl_coef) | {"responses.jsonl": lines(rows)}


def read_study(tree):
    """A `study.Study` of a tree, which has no gold judge for rollouts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "gold_judge", lambda prepare: None)
        return study.read(tree.settings, tree.parents)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    tree = Pairs(tmp_path_factory.mktemp("pairs"), arms={"ppo": "0", "salsa": "0.5"})
    return tree, read_study(tree)


def by_hand(tree, replicate, kl_coef):
    """Per benchmark, the differences of gold of a pair by prompt."""
    differences = {}
    for benchmark in tree.benchmarks:
        golds = {}
        for arm in ("ppo", "salsa"):
            text = tree.respond(replicate, arm, kl_coef)["responses.jsonl"]
            rows = [json.loads(line) for line in text.splitlines()]
            golds[arm] = {row["prompt_id"]: row["gold"] for row in rows if row["benchmark"] == benchmark}
        differences[benchmark] = {prompt: golds["salsa"][prompt] - golds["ppo"][prompt] for prompt in golds["ppo"]}
    return differences


def test_a_row_has_a_pair_s_recipe_what_was_known_and_the_difference(read):
    tree, made = read
    frame = pairs.table(made)
    assert len(frame) == 12 and set(frame["candidate"]) == {"salsa"} and set(frame["baseline"]) == {"ppo"}
    row = frame[(frame["replicate"] == 3) & (frame["kl_coef"] == 0.3)].iloc[0]
    assert (row["regime"], row["sft.epochs"], row["reward_model.pairs"], row["disjoint"]) == ("odd", 20, 600, True)
    last = frame[frame["replicate"] == 5].iloc[0]
    assert (last["regime"], last["disjoint"]) == ("", False) and last["sft.epochs"] == made.config.sft.epochs
    assert row["kl_sft0_soup"] == 0.8 and row["barrier"] == 0.002 and row["gold_agreement"] == 0.85
    assert row["soup_minus_sft0"] == pytest.approx(0.14) and row["gain_per_kl_coef"] == pytest.approx(0.14 / 0.3)
    assert row["sft0_to_sft1"] == 4
    mean = np.mean([np.mean(list(values.values())) for values in by_hand(tree, 3, 0.3).values()])
    assert row["gold_reward"] == pytest.approx(mean)


def test_the_variance_is_of_what_pairs_and_prompts_do_not_explain(read):
    tree, made = read
    frame = pairs.table(made).set_index(["replicate", "kl_coef"])
    tables = [by_hand(tree, replicate, 0.1) for replicate in range(6)]
    total = 0.0
    for benchmark in tree.benchmarks:
        squares, prompts = 0.0, list(tables[0][benchmark])
        pair_mean = [np.mean(list(table[benchmark].values())) for table in tables]
        grand = np.mean(pair_mean)
        for prompt in prompts:
            prompt_mean = np.mean([table[benchmark][prompt] for table in tables])
            squares += (tables[2][benchmark][prompt] - pair_mean[2] - prompt_mean + grand) ** 2
        total += squares / ((1 - 1 / 6) * (len(prompts) - 1)) / len(prompts)
    assert frame.loc[(2, 0.1), "gold_reward_variance"] == pytest.approx(total / 4)
    alone = np.array([[0.1], [0.3], [0.5]])
    assert pairs.sampling_variances(alone) == pytest.approx([np.var([0.1, 0.3, 0.5], ddof=1) / 3])
    assert pairs.sampling_variances(np.array([[0.1, 0.2]])) == pytest.approx([0, 0])


def test_sampling_variances_are_right_on_average():
    generator = np.random.default_rng(0)
    tables = generator.normal(0, 2, (400, 20, 5)) + generator.normal(0, 3, (400, 20, 1)) + np.arange(5)
    means = np.mean([pairs.sampling_variances(table) for table in tables], axis=0)
    assert means == pytest.approx(np.full(5, 4 / 20), rel=0.1)


def test_the_regression_finds_the_slope(read):
    _, made = read
    rows = regimes.table(made).set_index(["response", "model", "term"])
    row = rows.loc[("gold_reward", "distance", regimes.DISTANCE)]
    assert row["estimate_low"] < 0.05 < row["estimate_high"] and row["estimate_low"] > 0
    assert (row["pairs"], row["effects"], row["degrees_of_freedom"]) == (6, 12, 4)
    assert rows.loc[("gold_reward", "distance", regimes.KL_COEF), "degrees_of_freedom"] == 5
    frame = pairs.table(made)
    means = frame.groupby("replicate")[["kl_sft0_soup", "gold_reward"]].mean()
    line = stats.linregress(np.sqrt(means["kl_sft0_soup"]), means["gold_reward"])
    assert row["estimate"] == pytest.approx(line.slope, rel=0.05)  # weights are nearly equal
    for kl in regimes.POINTS:
        read_off = rows.loc[("gold_reward", "read off", f"at {kl:g} nats")]
        assert read_off["estimate"] == pytest.approx(line.intercept + line.slope * math.sqrt(kl), rel=0.05)
    mean = rows.loc[("gold_reward", "mean", regimes.MEAN)]
    assert mean["estimate"] == pytest.approx(means["gold_reward"].mean(), rel=0.02)
    terms = [term for response, model, term in rows.index if (response, model) == ("gold_reward", "covariates")]
    agreement = "per agreement with gold"  # is equal for all pairs
    assert set(terms) == {*regimes.LINE, regimes.KL_COEF, *regimes.COVARIATES.values()} - {agreement}


def test_arms_of_some_pairs_stand_beside_salsa(tmp_path):
    tree = Pairs(tmp_path, arms={"ppo": "0", "salsa": "0.5", "other": "1"}, only={"other": (0.1,)})
    made = read_study(tree)
    rows = regimes.table(made)
    assert regimes.main_contrast(pairs.table(made)) == ("salsa", "ppo")
    beside = rows[(rows["model"] == "beside salsa − ppo") & (rows["response"] == "gold_reward")]
    assert list(beside["candidate"]) == ["other"] and list(beside["term"]) == [regimes.MEAN]
    expected = -np.mean([tree.effect(k, 0.1) for k in range(6)])
    assert beside["estimate"].iloc[0] == pytest.approx(expected, abs=0.01)
    assert beside["pairs"].iloc[0] == 6 == beside["effects"].iloc[0]
    text = regimes.caption(made, {"pairs": pairs.table(made), "regimes": rows})
    assert "On the same 6 pairs other minus ppo differs from that by -0.0" in text and "in gold reward." in text


def effects(slope, noise=0.001, pairs=12, start=0.0):
    """A table of pairs by hand."""
    generator, kl = np.random.default_rng(1), np.linspace(0.1, 2, pairs)
    rows = [
        {"replicate": k, "kl_coef": kl_coef, "kl_sft0_soup": kl[k], "gold_reward_variance": 1e-8}
        | {"gold_reward": start + slope * math.sqrt(kl[k]) + noise * generator.normal()}
        for k in range(pairs)
        for kl_coef in (0.1, 0.3)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("options", "wanted", "unwanted"),
    [
        ({"slope": 0.05}, ["rises with", "above δ = 0.01 at all distances"], ["excluded", "within"]),
        ({"slope": 0.01}, ["rises with", "above 0 from 0.1", "within ±0.01 from 0.1 to"], []),
        ({"slope": 0.0}, ["shows no slope", "within ±0.01 at all distances"], ["above"]),
        ({"slope": -0.05}, ["falls with", "below 0"], ["above"]),
        ({"slope": 0.0, "noise": 0.1}, ["shows no slope", "decides nothing between 0.1 and 2 nats"], ["excluded"]),
        ({"slope": 0.0, "start": -0.009, "noise": 0.02}, ["below δ = 0.01 (an effect that would matter"], ["above"]),
        ({"slope": 0.05, "pairs": 2}, ["too few pairs for a line"], ["rises"]),
    ],
)
def test_the_words_say_what_the_band_says_and_no_more(options, wanted, unwanted):
    text = regimes.verdict(effects(**options), "gold_reward", 0.01)
    for part in wanted:
        assert part in text, text
    for part in unwanted:
        assert part not in text, text


def test_without_a_smallest_effect_only_the_sign_is_said():
    text = regimes.verdict(effects(0.05), "gold_reward", math.nan)
    assert "above 0 at all distances" in text and "δ" not in text


def test_the_figure_shows_a_dot_for_each_pair_and_kl_coef(read):
    _, made = read
    tables = {"pairs": pairs.table(made), "regimes": regimes.table(made)}
    figure = regimes.figure(made, tables)
    axis = figure.axes[0]
    assert axis.get_title(loc="left") == "gold reward,\nsalsa − ppo" and len(figure.axes) == 3
    dots = [part.get_offsets() for part in axis.collections if len(part.get_offsets()) == 6]
    assert len(dots) == 2 and sorted(dots[0][:, 0]) == pytest.approx(DISTANCES)
    assert regimes.smallest_effect(made, "gold_reward") == 0.01
    text = regimes.reading(made, tables)
    assert "Gold reward: the difference rises with the soup's distance" in text and "√nat" in text
    assert "6 SFT pairs: KL(sft0 ‖ soup) 0.1 to 2 nats" in pairs.caption(made, tables)
    assert regimes.SECTION.present(made)


def test_a_study_of_one_recipe_has_no_map(tmp_path):
    tree = Tree(tmp_path, replicates=(0,), prompts=2, planes=())
    made = read_study(tree)
    assert not regimes.SECTION.present(made) and not pairs.SECTION.present(made)


def test_without_gold_the_map_is_of_the_proxy(tmp_path):
    tree = Pairs(tmp_path, arms={"ppo": "0", "salsa": "0.5"}, gold=False)
    made = read_study(tree)
    tables = {"pairs": pairs.table(made), "regimes": regimes.table(made)}
    assert set(tables["regimes"]["response"]) == {"reward"}  # of KL in training, kl_coef explains all here
    assert len(regimes.figure(made, tables).axes) == 2 and "Gold" not in regimes.reading(made, tables)
