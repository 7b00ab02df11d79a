"""The map over SFT pairs: its rows by hand, its regression as the numbers say, and the words that follow from it."""

import json
import math
import types

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import Tree, lines

from salsa.report import study
from salsa.report.sections import pairs, regimes
from salsa.workflow import compose

DISTANCES = (0.1, 0.3, 0.5, 0.8, 1.2, 2.0)  # KL(sft0 ‖ soup) of the pairs
SLOPES = {0.1: 0.05, 0.3: 0.08}  # of salsa's gold, per √nat


class Pairs(Tree):
    """Six SFT pairs, half of them of another recipe; salsa's gold rises with √KL, by a slope for each kl_coef."""

    def __init__(self, root, **options):
        super().__init__(root, replicates=range(6), kl_coefs=(0.1, 0.3), planes=(), **options)
        self.settings.config["regimes"] = {
            "even": {"replicates": [0, 2, 4], "sft": {"epochs": 8}},
            "odd": {"replicates": [1, 3], "sft": {"epochs": 20}, "disjoint": True, "reward_model": {"pairs": 600}},
        }

    def landscape(self, replicate):
        files = super().landscape(replicate)
        rows = [line.split(",") for line in files["line.csv"].splitlines()]
        soup = next(row for row in rows if row[0] == "0.5")
        soup[rows[0].index("reward")] = str(0.05 + 0.02 * replicate + 0.01 * replicate**2)  # sft0's: 0.02 * replicate
        files["line.csv"] = "".join(",".join(row) + "\n" for row in rows)
        return files

    def gates(self, replicate):
        gates = json.loads(super().gates(replicate)["gates.json"])
        return {"gates.json": json.dumps(gates | {"kl_sft0_soup": DISTANCES[replicate]})}

    def effect(self, replicate, kl_coef):
        return 0.02 + SLOPES[kl_coef] * math.sqrt(DISTANCES[replicate]) + 0.004 * (-1) ** replicate

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


def gold_rows(made, model):
    """The rows of a model of gold, by term and kl_coef."""
    rows = regimes.table(made)
    return rows[(rows["response"] == "gold_reward") & (rows["model"] == model)].set_index(["term", "kl_coef"])


def test_the_regression_finds_the_slope_of_each_kl_coef(read):
    _, made = read
    rows, frame = gold_rows(made, "distance"), pairs.table(made)
    for kl_coef, slope in SLOPES.items():
        row, effects = rows.loc[(regimes.DISTANCE, kl_coef)], frame[frame["kl_coef"] == kl_coef]
        assert 0 < row["estimate_low"] < slope < row["estimate_high"]
        assert (row["pairs"], row["effects"], row["degrees_of_freedom"]) == (6, 12, 4)
        mean = gold_rows(made, "mean").loc[(regimes.MEAN, kl_coef)]
        assert mean["estimate"] == pytest.approx(effects["gold_reward"].mean(), rel=0.02)
        for kl in regimes.POINTS:
            read_off = gold_rows(made, "read off").loc[(f"at {kl:g} nats", kl_coef)]
            assert read_off["estimate"] == pytest.approx(0.02 + slope * math.sqrt(kl), abs=0.006)
            assert read_off["estimate_low"] < read_off["estimate"] < read_off["estimate_high"]
    more = rows.loc[regimes.more(regimes.DISTANCE, 0.3)].iloc[0]
    assert more["degrees_of_freedom"] == 5 and more["estimate_low"] < 0.03 < more["estimate_high"]
    assert more["estimate"] == pytest.approx(
        rows.loc[(regimes.DISTANCE, 0.3), "estimate"] - rows.loc[(regimes.DISTANCE, 0.1), "estimate"]
    )
    lines = {regimes.INTERCEPT, regimes.DISTANCE, regimes.more(regimes.DISTANCE, 0.3)}
    gain = regimes.COVARIATES["gain_per_kl_coef"]  # the agreement with gold is the same for all pairs
    assert set(gold_rows(made, "covariates").index.get_level_values("term")) == {*lines, gain}


def test_all_lines_meet_where_both_arms_are_one():
    """With nothing but slopes in the data, no kl_coef has an effect at a distance of 0; a band's width is Scheffé's."""
    table = effects(0.05, noise=1e-5)
    table["gold_reward"] *= 1 + (table["kl_coef"] == 0.3)
    model = regimes.distance(table, "gold_reward")
    assert [model.at(kl_coef, 0.0)[0] for kl_coef in (0.1, 0.3)] == pytest.approx([0, 0], abs=1e-4)
    assert [model.at(kl_coef, 1.0)[0] for kl_coef in (0.1, 0.3)] == pytest.approx([0.05, 0.1], abs=1e-4)
    value, _, high = model.at(0.3, 1.0)
    row = np.array([1.0, 1.0, 1.0])
    width = math.sqrt(3 * stats.f.ppf(0.95, 3, 10) * row @ model.fit.covariance @ row)
    assert high - value == pytest.approx(width)


def test_slopes_and_bands_hold_the_truth_as_often_as_they_say():
    generator, studies, slopes = np.random.default_rng(0), 80, {0.1: 0.01, 0.3: 0.02}
    covered = np.zeros(3)
    for _ in range(studies):
        kl, kl_coef = np.repeat(generator.uniform(0.05, 2.5, 24), 2), np.tile(list(slopes), 24)
        y = np.where(kl_coef == 0.3, 0.02, 0.01) * np.sqrt(kl) + np.repeat(generator.normal(0, 0.004, 24), 2)
        y += generator.normal(0, 0.002, 48) + generator.normal(0, 0.002, 48)
        columns = {"replicate": np.repeat(np.arange(24), 2), "kl_coef": kl_coef, "kl_sft0_soup": kl}
        table = pd.DataFrame(columns | {"gold_reward": y, "gold_reward_variance": 0.002**2})
        model = regimes.distance(table, "gold_reward")
        bounds = [(slope, *model.fit.combination(model.weights(k))) for k, slope in slopes.items()]
        band = [(s * math.sqrt(x), *model.at(k, x)) for k, s in slopes.items() for x in (0.05, 0.6, 1.2, 2.5)]
        held = [low <= truth <= high for truth, _, low, high in bounds]
        covered += [*held, all(low <= truth <= high for truth, _, low, high in band)]
    assert (covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)).all()


def test_agreement_with_gold_changes_the_slope_and_not_what_is_at_no_distance():
    table = effects(0.05, noise=1e-5)
    agreement = 0.7 + 0.02 * (table["replicate"] % 5)
    table["gold_reward"] += 0.3 * (agreement - agreement.mean()) * np.sqrt(table["kl_sft0_soup"])
    model = regimes.distance(table.assign(gold_agreement=agreement), "gold_reward", ["gold_agreement"])
    assert model.fit.interval("per √nat and agreement with gold")[0] == pytest.approx(0.3, abs=1e-3)
    assert model.fit.interval(regimes.INTERCEPT)[0] == pytest.approx(0, abs=1e-4)


def test_the_map_s_band_is_that_of_the_claims_of_every_study():
    """Each panel has a band: conf/claims.yaml says of each response which difference would matter."""
    (composed,) = compose.compose(["experiment=regimes"])
    made = types.SimpleNamespace(config=composed.config)
    sizes = {response: regimes.smallest_effect(made, response) for response in regimes.LABELS}
    assert sizes == {"gold_reward": 0.01, "reward": 0.05, pairs.TRAINING: 0.25}
    made.config = types.SimpleNamespace(claims={})
    assert math.isnan(regimes.smallest_effect(made, "reward"))


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
    frame = pairs.beside(made, pairs.table(made), ("other", "ppo"), ("salsa", "ppo")).set_index("replicate")
    table, golds = np.zeros((6, len(tree.benchmarks), 12)), {}
    for replicate in range(6):
        for arm in ("other", "salsa"):
            text = tree.respond(replicate, arm, 0.1)["responses.jsonl"]
            golds[arm] = [(row["benchmark"], row["gold"]) for row in map(json.loads, text.splitlines())]
        for place, name in enumerate(tree.benchmarks):
            ours, theirs = ([gold for benchmark, gold in golds[arm] if benchmark == name] for arm in ("other", "salsa"))
            table[replicate, place] = np.subtract(ours, theirs)
    assert frame["gold_reward"].tolist() == pytest.approx(table.mean(axis=(1, 2)))
    left = table - table.mean(axis=2, keepdims=True) - table.mean(axis=0) + table.mean(axis=(0, 2), keepdims=True)[0]
    variance = (left[4] ** 2).sum(axis=1) / (5 / 6 * 11) / 12  # without the noise of the anchor that both share
    assert frame.loc[4, "gold_reward_variance"] == pytest.approx(variance.sum() / len(tree.benchmarks) ** 2)
    text = regimes.caption(made, {"pairs": pairs.table(made), "regimes": rows})
    assert (
        "On the same 6 pairs other minus ppo differs from that by -0.0" in text
        and "at kl_coef 0.1 in gold reward." in text
    )


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
        (
            {"slope": 0.0, "noise": 0.1},
            ["shows no slope", "decides nothing between 0.1 and 2 nats", "at kl_coef 0.3"],
            ["excluded"],
        ),
        ({"slope": 0.0, "start": -0.009, "noise": 0.02}, ["below δ = 0.01 (an effect that would matter"], ["above"]),
        ({"slope": 0.05, "pairs": 2}, ["too few pairs for a line"], ["rises"]),
    ],
)
def test_the_words_say_what_the_band_says_and_no_more(options, wanted, unwanted):
    text = regimes.verdict(effects(**options), "gold_reward", 0.01)
    assert "kl_coef" not in text or text.index("at kl_coef 0.1 the") < text.index("at kl_coef 0.3 the")
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
    assert "Gold reward: at kl_coef 0.1 the difference rises with the soup's distance" in text and "√nat" in text
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
    assert set(tables["regimes"]["response"]) == {"reward", pairs.TRAINING}
    assert len(regimes.figure(made, tables).axes) == 2 and "Gold" not in regimes.reading(made, tables)
