"""A hostile reader: every verdict computed again from a study's files, with pandas and scipy alone."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tree import Tree

from salsa.workflow import runs

REPLICATES = (0, 1, 2, 3)


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Noisy(tmp_path_factory.mktemp("hostile"), replicates=REPLICATES, tournament=True, planes=())
        claims = tree.settings.config["claims"]
        claims["too_much"] = claims["higher_gold"] | {"smallest_effect": 2.0}
        claims["the_other_way"] = claims["higher_gold"] | {"candidate": "ppo", "baseline": "salsa"}
        claims["proxy"] = claims["higher_gold"] | {"measure": "reward", "smallest_effect": 1.0, "origin": "control"}
        return tree.build(monkeypatch) / "tables"


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


def test_every_verdict_is_computed_again(folder):
    claims, replicates = read(folder, "claims.csv"), read(folder, "replicates.csv")
    decided = claims[(claims["outcome"] == "primary") & (claims["verdict"] != "not tested")]
    tested = decided["origin"].value_counts()
    assert len(decided) >= 9
    for row in decided.itertuples():
        values = replicates[(replicates["claim"] == row.claim) & (replicates["outcome"] == "primary")]
        effects = values["effect"].to_numpy()
        floor = np.nan_to_num(values["sampling_variance"].iloc[0])
        deviation = math.sqrt(max(effects.var(ddof=1), floor))
        level = 1 - 0.05 / tested[row.origin]
        half = stats.t.ppf((1 + level) / 2, len(effects) - 1) * deviation / math.sqrt(len(effects))
        low, high = (effects.mean() - half, effects.mean() + half) if half > 1e-12 else (math.nan, math.nan)
        assert verdict(low, high, row.smallest_effect) == row.verdict == row.claim_verdict
        assert (row.effect_low, row.effect_high) == pytest.approx((low, high), nan_ok=True)
    assert {"supported", "too small", "reversed", "excluded", "undecided"} == set(decided["verdict"])


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


def test_the_floor_is_computed_again_from_scores(folder):
    claims, scores = read(folder, "claims.csv"), read(folder, "prompt_scores.csv.gz")
    row = claims[(claims["claim"] == "higher_gold") & (claims["outcome"] == "primary")].iloc[0]
    variances = []
    for _, rows in scores.groupby("benchmark"):
        tables = {arm: rows[rows["arm"] == arm].pivot(index="replicate", columns="prompt_id", values="gold")
                  for arm in ("salsa", "ppo")}  # fmt: skip
        differences = tables["salsa"] - tables["ppo"]
        left = differences.sub(differences.mean(axis=1), axis=0).sub(differences.mean(axis=0), axis=1)
        left += differences.to_numpy().mean()
        count, prompts = differences.shape
        variances.append((left.to_numpy() ** 2).sum() / ((count - 1) * (prompts - 1)) / prompts)
    assert row["sampling_deviation"] == pytest.approx(math.sqrt(sum(variances)) / len(variances))


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
