"""A study of two training seeds and two responses a prompt: every number against loops over the runs' own files."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_cards import ModelTree
from tree import Tree

import salsa
from salsa.evaluate import statistics
from salsa.report import frames, judging, reader, selection, study
from salsa.report.sections import gates
from salsa.workflow import runs, studies
from salsa.workflow.messages import UserError

REPLICATES, SEEDS, SAMPLES, PROMPTS = (0, 1, 2), 2, 2, 6


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Tree(tmp_path_factory.mktemp("seeds"), REPLICATES, seeds=SEEDS, samples=SAMPLES, prompts=PROMPTS,
                    arms={"ppo": "0", "salsa": "0.5"}, kl_coefs=(0.05, 0.1))  # fmt: skip
        output = tree.build(monkeypatch)
        monkeypatch.setattr(study, "gold_judge", lambda prepare: None)
        yield tree, output, study.read(tree.settings, tree.parents)


def table(output, name):
    return pd.read_csv(output / "tables" / f"{name}.csv")


def members(tree, arm, kl_coef):
    """replicate -> the members of a study that are one policy of it, by training seed."""
    chosen = [policy for policy in tree.policies if (policy["arm"], policy["kl_coef"]) == (arm, kl_coef)]
    return {k: [policy for policy in chosen if policy["replicate"] == k] for k in REPLICATES}


def evaluations(tree, arm, kl_coef, name):
    """A number of each replicate: the mean over its seeds of what evaluation.json says."""
    means = []
    for policies in members(tree, arm, kl_coef).values():
        assert [policy["seed"] for policy in policies] == [0, 1]
        files = [tree.parents[f"respond/{policy['index']}"] / "evaluation.json" for policy in policies]
        means.append(sum(runs.read_json(file)[name] for file in files) / SEEDS)
    return means


def training(tree, arm, kl_coef, name):
    """A number of each replicate: the mean over its seeds of the mean over the last quarter of training, rounded up."""
    means = []
    for policies in members(tree, arm, kl_coef).values():
        lines = [runs.read_jsonl(tree.parents[f"policy/{policy['index']}"] / "metrics.jsonl") for policy in policies]
        last = [[line[name] for line in each[-((len(each) + 3) // 4) :]] for each in lines]
        means.append(sum(sum(values) / len(values) for values in last) / SEEDS)
    return means


def interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


@pytest.mark.parametrize("name", ["reward", "gold_reward", "kl_to_sft0", "kl_to_reference"])
def test_rewards_are_of_replicates_and_no_seed_counts_as_one(built, name):
    tree, output, _ = built
    rows = table(output, "rewards").set_index(["arm", "kl_coef"])
    for arm in ("ppo", "salsa"):
        for kl_coef in (0.05, 0.1):
            row = rows.loc[(arm, kl_coef)]
            expected = interval(evaluations(tree, arm, kl_coef, name))
            assert row[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx(expected, rel=1e-9)
            assert row["replicates"] == len(REPLICATES)


def naive_scores(tree, arm, kl_coef, opponent, benchmark):
    """replicate -> prompt -> mean over seeds of the mean over samples and orders, from the files of verdicts."""
    scores = {}
    for replicate, policies in members(tree, arm, kl_coef).items():
        by_seed = []
        for policy in policies:
            lines = runs.read_jsonl(tree.parents[f"judge/gold/{policy['index']}"] / "verdicts.jsonl")
            values = {}
            for line in lines:
                if (line["model_b"], line["benchmark"]) == (opponent, benchmark):
                    assert line.get("seed", 0) == policy["seed"] and line["sample"] in range(SAMPLES)
                    value = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[line["winner"]]
                    values.setdefault(line["prompt_id"], []).append(value)
            assert {len(each) for each in values.values()} == {2 * SAMPLES}
            by_seed.append({prompt: sum(each) / len(each) for prompt, each in values.items()})
        scores[replicate] = {prompt: sum(seed[prompt] for seed in by_seed) / SEEDS for prompt in by_seed[0]}
    return scores


@pytest.mark.parametrize("opponent", ["sft0", "ppo"])
def test_win_rates(built, opponent):
    tree, output, read = built
    rows = table(output, "win_rates").set_index(["candidate", "baseline", "kl_coef", "benchmark"])
    name = "sft0" if opponent == "sft0" else "ppo-kl_0.05"
    for benchmark in tree.benchmarks:
        by_replicate = naive_scores(tree, "salsa", 0.05, name, benchmark)
        prompts = [sum(scores[p] for scores in by_replicate.values()) / len(REPLICATES) for p in by_replicate[0]]
        row = rows.loc[("salsa", opponent, 0.05, benchmark)]
        assert row["adjusted_win_rate"] == pytest.approx(sum(prompts) / len(prompts), rel=1e-12)
        assert (row["prompts"], row["replicates"]) == (PROMPTS, len(REPLICATES))
        assert row[["ci_low", "ci_high"]].tolist() == pytest.approx(statistics.bootstrap_interval(prompts, 0, 200))
        rates = selection.replicate_win_rates(read, "salsa-kl_0.05", name, "gold", [benchmark])
        assert rates == pytest.approx({k: sum(s.values()) / PROMPTS for k, s in by_replicate.items()})
    assert len({tuple(scores.values()) for scores in by_replicate.values()}) == 1  # of every replicate alike


def test_claims_rest_on_replicates(built):
    tree, output, _ = built
    rows = table(output, "claims").set_index(["claim", "benchmark"])
    for claim, measure in (("larger_kl", "kl_to_sft0"), ("higher_reward", "reward")):
        row = rows.xs(claim).iloc[0]
        sides = [training(tree, arm, row[f"{role}_kl_coef"], measure)
                 for arm, role in (("salsa", "candidate"), ("ppo", "baseline"))]  # fmt: skip
        assert row["effect"] == pytest.approx(np.mean(np.subtract(*sides))) and row["replicates"] == len(REPLICATES)
    higher = rows.loc[("higher_gold", "in_distribution")]
    effects = []
    for replicate in REPLICATES:
        means = {}
        for arm in ("salsa", "ppo"):
            kl_coef = higher["candidate_kl_coef" if arm == "salsa" else "baseline_kl_coef"]
            means[arm] = []
            for policy in members(tree, arm, kl_coef)[replicate]:
                lines = runs.read_jsonl(tree.parents[f"respond/{policy['index']}"] / "responses.jsonl")
                golds = [line["gold"] for line in lines if line["benchmark"] == "in_distribution"]
                assert len(golds) == PROMPTS * SAMPLES
                means[arm].append(sum(golds) / len(golds))
        effects.append(np.mean(means["salsa"]) - np.mean(means["ppo"]))
    assert higher["effect"] == pytest.approx(np.mean(effects))
    assert higher["replicates"] == len(REPLICATES)


def test_a_row_a_policy_names_its_seed(built):
    tree, output, _ = built
    for name in ("frontier", "sources", "manipulation"):
        assert {0, 1} == set(table(output, name)["seed"]), name
    final = table(output, "frontier").groupby(["arm", "kl_coef", "replicate", "seed"])["iteration"].max()
    assert len(final) == len(tree.policies)
    assert "seed" not in table(output, "plane")  # of the first seed alone
    assert table(output, "stability")["policies"].tolist() == [len(REPLICATES) * SEEDS] * 4
    cards = {path.name for path in (output / "cards").iterdir()}
    assert len(cards) == len(tree.policies) and {"salsa-kl0.1-r2.md", "salsa-kl0.1-r2-t1.md"} <= cards
    assert "replicate 2, training seed 1" in (output / "cards" / "salsa-kl0.1-r2-t1.md").read_text()
    listed = pd.read_csv(output / "runs.csv")
    assert set(listed[listed["stage"] == "ppo"]["training_seed"]) == {0, 1}
    assert listed[listed["stage"] == "landscape"]["training_seed"].isna().all()
    assert "2 training seeds" in (output / "report.md").read_text()


def test_frames_have_seeds_and_samples(built):
    tree, output, read = built
    responses, verdicts = read.frames.responses, read.frames.verdicts
    assert len(responses) == 2 * PROMPTS * SAMPLES * (len(tree.policies) + 3 * len(REPLICATES))
    assert set(responses[responses["model"] == "sft0"]["seed"]) == {0}
    keys = ["replicate", "seed", "model", "benchmark", "prompt_id", "sample"]
    assert not responses.duplicated(keys).any()
    assert not verdicts.duplicated([*keys[:2], "model_a", "model_b", *keys[3:], "order"]).any()
    assert set(map(tuple, verdicts[["seed", "sample"]].to_numpy())) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    own = read.frames.policies.set_index(["arm", "kl_coef", "replicate", "seed"])["reward"]
    mean = frames.over_replicates(read.frames.policies, ["arm", "kl_coef"], ["reward"]).set_index(["arm", "kl_coef"])
    by_replicate = [own.loc[("salsa", 0.1, k)].mean() for k in REPLICATES]
    assert mean.loc[("salsa", 0.1), "reward"] == pytest.approx(np.mean(by_replicate))
    trajectories = read.frames.trajectories
    assert not trajectories.duplicated(["replicate", "seed", "name", "iteration"]).any()
    loaded = salsa.load(output)
    assert list(loaded.policies.columns)[:5] == ["arm", "kl_coef", "replicate", "seed", "name"]


def test_the_win_rate_of_a_policy_is_its_own(built):
    tree, _, read = built
    rates = read.frames.policies.set_index("name").loc["salsa-kl_0.05"].set_index(["replicate", "seed"])
    for policy in tree.policies:
        if policy["name"] == "salsa-kl_0.05":
            lines = runs.read_jsonl(tree.parents[f"judge/gold/{policy['index']}"] / "verdicts.jsonl")
            values = [float(line["winner"] == "model_a") for line in lines if line["model_b"] == "sft0"]
            place = policy["replicate"], policy["seed"]
            assert rates.loc[place, "win_rate_vs_sft0"] == pytest.approx(sum(values) / len(values))


def test_gold_of_a_verdict_is_that_of_its_seed_and_sample(built):
    tree, _, read = built
    lines = judging.lines_of(read, "gold")[judging.ALL]
    for line, verdict in zip(lines, judging.gold_verdicts(read, lines), strict=True):
        golds = []
        for side in ("model_a", "model_b"):
            if line[side] == "sft0":
                rows = runs.read_jsonl(tree.parents[f"landscape/r{line['replicate']}"] / "responses.jsonl")
                rows = [row for row in rows if row["model"] == "sft0"]
            else:
                (index,) = (policy["index"] for policy in tree.policies
                            if (policy["name"], policy["replicate"], policy["seed"])
                            == (line[side], line["replicate"], line.get("seed", 0)))  # fmt: skip
                rows = runs.read_jsonl(tree.parents[f"respond/{index}"] / "responses.jsonl")
            place = line["prompt_id"], line["sample"]
            golds += [row["gold"] for row in rows if (row["prompt_id"], row["sample"]) == place]
        first, second = golds
        assert verdict["winner"] == ("tie" if first == second else "model_a" if first > second else "model_b")


def test_gates_take_all_seeds_and_samples(built):
    tree, _, read = built
    share, pairs = gates.policy_agreement(read, 0)
    assert 0 <= share <= 1 and pairs > 0
    gains = []
    for benchmark in tree.benchmarks:
        for i in range(PROMPTS):
            values = {"ppo": [], "sft0": []}
            for policy in members(tree, "ppo", 0.05)[0]:
                rows = runs.read_jsonl(tree.parents[f"respond/{policy['index']}"] / "responses.jsonl")
                values["ppo"] += [row["gold"] for row in rows if row["prompt_id"] == f"{benchmark}-{i}"]
            rows = runs.read_jsonl(tree.parents["landscape/r0"] / "responses.jsonl")
            values["sft0"] += [row["gold"] for row in rows
                               if (row["prompt_id"], row["model"]) == (f"{benchmark}-{i}", "sft0")]  # fmt: skip
            gains.append(np.mean(values["ppo"]) - np.mean(values["sft0"]))
    gain, error = gates.plain_gain(read, 0)
    assert gain == pytest.approx(np.mean(gains))
    parts = np.reshape(gains, (len(tree.benchmarks), PROMPTS))
    squares = sum(part.var(ddof=1) / PROMPTS for part in parts)
    assert error == pytest.approx(math.sqrt(squares) / len(parts))


def test_the_reader_shows_the_first_response_of_every_seed(built):
    tree, _, read = built
    data = reader.reader(read)
    assert data["replicates"] == [0, "0, training seed 1", 1, "1, training seed 1", 2, "2, training seed 1"]
    assert len(data["responses"]) == len(REPLICATES) * SEEDS
    for place, (replicate, seed) in enumerate((k, s) for k in REPLICATES for s in range(SEEDS)):
        policy = members(tree, "salsa", 0.05)[replicate][seed]
        rows = runs.read_jsonl(tree.parents[f"respond/{policy['index']}"] / "responses.jsonl")
        (first,) = (row for row in rows if (row["prompt_id"], row["sample"]) == ("in_distribution-3", 0))
        model = data["models"].index("salsa, kl_coef 0.05")
        _, tokens, _, reward, _ = data["responses"][place][model][0][3]
        assert tokens == first["tokens"] and reward == pytest.approx(first["reward"], rel=1e-3)
        entries = [entry for entry in data["verdicts"] if entry["replicate"] == place and model in entry["pair"]]
        assert {len(lines) for entry in entries for lines in entry["lines"]} == {2}  # the two orders of one sample


def test_export_takes_the_seed(tmp_path, tokenizer):
    tree = ModelTree(tmp_path, tokenizer, replicates=(0,), arms={"ppo": "0"}, prompts=2, seeds=2)
    output = tree.cards()
    with pytest.raises(UserError, match=r"--replicate 0 --seed 0; ppo --kl-coef 0.05 --replicate 0 --seed 1"):
        studies.export(output, "ppo", tmp_path / "policy")
    exported = studies.export(output, "ppo", tmp_path / "policy", seed=1)
    assert "training seed 1" in (exported / "README.md").read_text()
