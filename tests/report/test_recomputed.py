"""A hostile reader: every verdict computed again from a study's files, with pandas and scipy alone."""

import gzip
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import Tree

from salsa.workflow import runs

REPLICATES = (0, 1, 2, 3)
LOOKS = (3, 4)


class Noisy(Tree):
    """A study of four replicates whose scores differ from prompt to prompt, and whose salsa is better than its ppo."""

    def respond(self, replicate, arm, kl_coef):
        files = super().respond(replicate, arm, kl_coef)
        generator = np.random.default_rng([replicate, list(self.arms).index(arm)])
        rows = [json.loads(line) for line in files["responses.jsonl"].splitlines()]
        for row in rows:
            row["gold"] = float(generator.normal(arm == "salsa", 0.5))
            row["reward"] = float(generator.normal(1.0, 0.5))
        return files | {"responses.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}


def built(root, looks=()):
    """The folder of the study's tables."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Noisy(root, replicates=REPLICATES, tournament=True, planes=())
        tree.settings.config["looks"] = list(looks)
        claims = tree.settings.config["claims"]
        claims["too_much"] = claims["higher_gold"] | {"smallest_effect": 2.0}
        claims["the_other_way"] = claims["higher_gold"] | {"candidate": "ppo", "baseline": "salsa"}
        claims["proxy"] = claims["higher_gold"] | {"measure": "reward", "smallest_effect": 1.0, "origin": "control"}
        return tree.build(monkeypatch) / "tables"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return built(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    return built(tmp_path_factory.mktemp("looked"), looks=LOOKS)


def read(folder, name):
    return pd.read_csv(folder / name)


def verdict(low, high, smallest):
    """As the documentation says, in other words than the program's."""
    if math.isnan(low):
        return "undecided"
    if low > 0 and high < smallest:
        return "too small"
    if low > 0:
        return "supported"
    if high < 0:
        return "reversed"
    return "excluded" if high < smallest else "undecided"


def of_primary(frame, claim):
    return frame[(frame["claim"] == claim) & (frame["outcome"] == "primary")]


def decided(folder):
    """The rows of claims.csv that have a verdict, and the level of all their intervals."""
    claims = read(folder, "claims.csv")
    rows = claims[(claims["outcome"] == "primary") & (claims["verdict"] != "not tested")]
    count = int(re.search(r"The (\d+) claims that this study plans", (folder.parent / "claims.md").read_text())[1])
    assert len(rows) == count >= 9
    return rows, 1 - 0.05 / count


def interval(effects, floor, critical):
    """mean ± critical · standard error, from the larger of both deviations."""
    half = critical * max(effects.std(ddof=1), floor) / math.sqrt(len(effects))
    return (effects.mean() - half, effects.mean() + half) if half > 1e-12 else (math.nan, math.nan)


def test_every_verdict_is_computed_again(folder):
    replicates, (claims, level) = read(folder, "replicates.csv"), decided(folder)
    for row in claims.itertuples():
        values = of_primary(replicates, row.claim)
        effects, floor = values["effect"].to_numpy(), np.nan_to_num(values["sampling_variance"].iloc[0]) ** 0.5
        low, high = interval(effects, floor, stats.t.ppf((1 + level) / 2, len(effects) - 1))
        assert verdict(low, high, row.smallest_effect_shown) == row.verdict == row.claim_verdict
        assert (row.effect_low, row.effect_high) == pytest.approx((low, high), nan_ok=True)
    assert {"supported", "too small", "reversed", "excluded", "undecided"} == set(claims["verdict"])


def test_every_verdict_of_a_study_with_looks_is_computed_again(looked):
    replicates, looks, (claims, level) = read(looked, "replicates.csv"), read(looked, "looks.csv"), decided(looked)
    for row in claims.itertuples():
        values, bounds = of_primary(replicates, row.claim), []
        for look in looks[looks["claim"] == row.claim].itertuples():
            effects = values["effect"][values["look"] <= look.look].to_numpy()
            assert (look.n, look.level) == (len(effects), pytest.approx(level))
            assert look.deviation == pytest.approx(max(effects.std(ddof=1), np.nan_to_num(look.floor)), abs=1e-12)
            bounds.append(interval(effects, np.nan_to_num(look.floor), look.critical))
            assert (look.low, look.high) == pytest.approx(bounds[-1], nan_ok=True)
        assert len(bounds) == len(LOOKS)
        bounds = pd.DataFrame(bounds)
        low, high = bounds[0].max(), bounds[1].min()
        low, high = (low, high) if low <= high else (math.nan, math.nan)
        assert verdict(low, high, row.smallest_effect_shown) == row.verdict
        assert (row.effect_low, row.effect_high) == pytest.approx((low, high), nan_ok=True)
    assert {"supported", "undecided"} <= set(claims["verdict"])


def test_the_error_of_the_first_look_is_computed_again(looked):
    """What is spent until a share t of the replicates is there: 2 − 2Φ(z/√t) of the level's error."""
    first = read(looked, "looks.csv").query("look == 1")
    spent = 2 * stats.norm.sf(stats.norm.isf((1 - first["level"]) / 2) / math.sqrt(LOOKS[0] / LOOKS[1]))
    assert first["critical"].to_numpy() == pytest.approx(stats.t.isf(spent / 2, LOOKS[0] - 1))


def test_every_number_is_computed_again_from_scores(folder):
    replicates, scores = read(folder, "replicates.csv"), read(folder, "prompt_scores.csv.gz")
    for measure, column in (("gold_reward", "gold"), ("reward", "reward")):
        rows = replicates[(replicates["measure"] == measure) & (replicates["outcome"] == "primary")]
        assert len(rows) >= len(REPLICATES)
        for row in rows.itertuples():
            for side in ("candidate", "baseline"):
                arm, kl_coef = getattr(row, side), getattr(row, f"{side}_kl_coef")
                own = scores[(scores["arm"] == arm) & (scores["kl_coef"] == kl_coef)]
                own = own[own["replicate"] == row.replicate]
                mean = own.groupby("benchmark")[column].mean().mean()
                assert getattr(row, f"{side}_value") == pytest.approx(mean, abs=1e-12)
            assert row.effect == pytest.approx(row.candidate_value - row.baseline_value, abs=1e-12)


def floor_of_gold(scores, replicates):
    """The deviation that prompts and responses alone give to the difference of gold of two arms in a replicate."""
    variances = []
    for _, rows in scores[scores["replicate"].isin(replicates)].groupby("benchmark"):
        tables = {arm: rows[rows["arm"] == arm].pivot(index="replicate", columns="prompt_id", values="gold")
                  for arm in ("salsa", "ppo")}  # fmt: skip
        differences = tables["salsa"] - tables["ppo"]
        left = differences.sub(differences.mean(axis=1), axis=0).sub(differences.mean(axis=0), axis=1)
        left += differences.to_numpy().mean()
        count, prompts = differences.shape
        variances.append((left.to_numpy() ** 2).sum() / ((count - 1) * (prompts - 1)) / prompts)
    return math.sqrt(sum(variances)) / len(variances)


def test_the_floor_is_computed_again_from_scores(folder):
    claims, scores = read(folder, "claims.csv"), read(folder, "prompt_scores.csv.gz")
    row = of_primary(claims, "higher_gold").iloc[0]
    assert row["sampling_deviation"] == pytest.approx(floor_of_gold(scores, REPLICATES))


def test_each_look_has_the_floor_of_its_own_replicates(looked):
    looks, scores = read(looked, "looks.csv"), read(looked, "prompt_scores.csv.gz")
    floors = looks[looks["claim"] == "higher_gold"]["floor"].tolist()
    assert floors == pytest.approx([floor_of_gold(scores, REPLICATES[:count]) for count in LOOKS])


def test_win_rates_are_computed_again_from_judged_prompts(folder):
    replicates, rates = read(folder, "replicates.csv"), read(folder, "prompt_win_rates.csv.gz")
    names = (
        read(folder, "prompt_scores.csv.gz")[["arm", "kl_coef", "model"]]
        .drop_duplicates()
        .set_index(["arm", "kl_coef"])
    )
    rows = replicates[(replicates["claim"] == "preferred") & (replicates["outcome"] == "secondary")]
    assert len(rows) == 2 * len(REPLICATES)
    for row in rows.itertuples():
        models = (
            names["model"][row.candidate, row.candidate_kl_coef],
            names["model"][row.baseline, row.baseline_kl_coef],
        )
        own = rates[(rates["benchmark"] == row.benchmark) & (rates["replicate"] == row.replicate)]
        own = own[(own["model"] == models[0]) & (own["opponent"] == models[1])]
        assert row.effect == pytest.approx(own["score"].mean() - 0.5)


def test_the_same_content_gives_the_same_bytes(folder):
    content = (folder / "prompt_scores.csv.gz").read_bytes()
    assert content[4:8] == bytes(4)  # no time of writing
    assert gzip.compress(gzip.decompress(content), mtime=0) == content
    assert "tables/prompt_scores.csv.gz" in runs.manifest_of(folder.parent)["artefacts"]
