"""The report of synthetic studies: exact files, contract columns, hand-checkable numbers, text that cannot break it."""

import csv
import html
import itertools
import json
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from tree import EVERY_ARM, Tree, composed, lines, table_of

from salsa.evaluate import statistics
from salsa.report import comparison, sections, study, style, words
from salsa.report.sections import gates, win_rates
from salsa.workflow import config, runs, schema


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Tree(tmp_path_factory.mktemp("two"))
        yield tree, tree.build(monkeypatch, drawn=True)


def table(output, name):
    return pd.read_csv(output / "tables" / f"{name}.csv")


def test_exact_set_of_files(built):
    _, output = built
    expected = {"runs.csv", "samples.md", "claims.md", "report.md", "report.html", "manifest.json", ".lock"}
    names = ("arms", "win_rates", "frontier", "alpha_curve", "gates", "rewards", "claims", "chosen", "paper_table",
             "ablations", "sources", "judges", "judge_pairs", "bradley_terry", "matched_kl", "stability", "geometry",
             "plane", "scores", "manipulation", "replicates", "variance", "allocation")  # fmt: skip
    expected |= {f"tables/prompt_{name}.csv.gz" for name in ("scores", "win_rates")}
    expected |= {f"tables/{name}.{kind}" for name in names for kind in ("csv", "md", "tex")}
    expected |= {f"cards/{arm}-kl0.05-r{replicate}.md" for arm in ("ppo", "salsa", "other") for replicate in (0, 1)}
    expected |= {
        f"figures/{name}.{kind}"
        for name, section in sections.sections().items()
        if section.figure and name not in ("regimes", "matched_kl")  # of several SFT pairs, and of several kl_coefs
        for kind in ("png", "pdf")
    }
    assert {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()} == expected


def test_contract_columns(built):
    _, output = built
    win = (
        "model, data, benchmark, judge, candidate, baseline, kl_coef, adjusted_win_rate, ci_low, ci_high, prompts, "
        "replicates"
    )
    line = (
        "model, data, arm, kl_coef, replicate, iteration, kl_to_reference, kl_to_sft0, reward, gold_reward, "
        "response_length, eos_rate"
    )
    assert list(table(output, "win_rates").columns)[:12] == win.split(", ")
    assert list(table(output, "frontier").columns) == line.split(", ")


def test_win_rates(built):
    _, output = built
    frame = table(output, "win_rates")
    assert len(frame) == 2 * (3 + 2)  # benchmarks x (three arms against sft0, two against ppo)
    assert set(frame["replicates"]) == {2} and set(frame["prompts"]) == {12}
    assert set(zip(frame["candidate"], frame["baseline"], strict=True)) == {
        ("ppo", "sft0"), ("salsa", "sft0"), ("other", "sft0"), ("salsa", "ppo"), ("other", "ppo"),
    }  # fmt: skip
    against = frame.set_index(["candidate", "baseline", "benchmark"])["adjusted_win_rate"]
    assert against["ppo", "sft0", "in_distribution"] == pytest.approx(8 / 12)
    assert against["salsa", "ppo", "in_distribution"] == pytest.approx((1 + 11 / 2) / 12)
    assert against["other", "ppo", "out_of_distribution"] == 0.5
    assert (frame["ci_low"] <= frame["adjusted_win_rate"]).all() and (
        frame["adjusted_win_rate"] <= frame["ci_high"]
    ).all()


def test_win_rates_equal_the_statistics_command(built, capsys):
    tree, _ = built
    path = tree.parents["judge/gold/1"] / "verdicts.jsonl"
    statistics.main([str(path), "--candidate", "salsa-kl_0.05", "--baseline", "sft0"])
    assert json.loads(capsys.readouterr().out)["adjusted_win_rate"] == pytest.approx(8 / 12)


def test_frontier(built):
    _, output = built
    frame = table(output, "frontier")
    assert len(frame) == 6 * 3  # policies x (iterations 0, 5, final)
    one = frame[(frame["arm"] == "salsa") & (frame["replicate"] == 1)].set_index("iteration")
    assert list(one.index) == [0, 5, 6]
    assert one["gold_reward"].tolist() == pytest.approx([2, 7, 0.3 + 1.35 / 10])  # mean letters, then evaluation.json
    assert one.loc[6, "kl_to_reference"] == 5.5


def test_rewards_and_alpha_curve(built):
    _, output = built
    row = table(output, "rewards").set_index("arm").loc["ppo"]
    assert row["reward"] == pytest.approx(1.05)
    half = 12.706204736432095 * 0.05  # t(0.975, 1) x sd / sqrt(2) of 1.0 and 1.1
    assert (row["reward_low"], row["reward_high"]) == pytest.approx((1.05 - half, 1.05 + half))
    curve = table(output, "alpha_curve")
    assert curve[curve["kind"] == "sft_soup"]["gold_reward"].tolist() == pytest.approx(
        [0.205, 0.23, 0.255, 0.28, 0.305]
    )
    policies = curve[curve["kind"] == "policy"]
    assert policies["alpha"].tolist() == [0, 0.5, 1]
    assert policies["win_rate_vs_sft0"].tolist() == pytest.approx([8 / 12] * 3)


def test_gates(built):
    _, output = built
    frame = table(output, "gates")
    assert frame["replicate"].tolist() == [0, 1]
    assert frame["policy_gold_agreement"].tolist() == [0, 0]  # each pair: the one of higher reward has lower gold
    assert frame["policy_pairs"].tolist() == [3 * 2 * 12] * 2
    assert frame["gold_ppo_minus_sft0"].tolist() == pytest.approx([1.0, 1.1])
    assert frame["largest_manipulation"].tolist() == pytest.approx([0.02, 0.02])
    assert frame["soup_minus_sft0_reward"].tolist() == [0.05, 0.04]
    gate = gates_of((output / "report.md").read_text())
    name = "the share of pairs of two final policies' responses in which the reward model agrees with gold"
    assert gate[name][1:5] == ["after PPO", "at least 0.75", "0 (r0, r1)", "0 of 2 replicates"]
    assert gate["KL(sft0 ‖ soup)"][1:] == ["before PPO", "at least 0.05", "0.4 (r0, r1) nats per response",
                                           "2 of 2 replicates", ""]  # fmt: skip
    held_out = "the share of held-out pairs in which the reward model agrees with gold"
    assert gate[held_out][3:] == ["0.85 (r0, r1)", "2 of 2 replicates", ""]
    assert gate["the kl_coef of the claims"][3:5] == ["the only one run (ppo, salsa, other)", "0 of 3 arms"]


def test_gates_are_read_at_the_kl_coef_of_claims(built):
    tree, output = built
    result = study.read(tree.settings, tree.parents)
    assert gates.table(result)["claim_manipulation"].isna().all()
    for landscape in result.landscapes.values():
        landscape.gates |= {"claim_kl_coef": 0.05, "claim_manipulation": 0.05 * 0.4, "largest_manipulation": None}
    frames = {"gates": gates.table(result)} | {name: table(output, name) for name in ("manipulation", "claims")}
    assert frames["gates"]["claim_manipulation"].tolist() == pytest.approx([0.05 * 0.4] * 2)
    quantities = [check.gate.quantity for check in gates.checks(result, frames)]
    assert "kl_coef · KL(sft0 ‖ soup) at the claims' kl_coef" in quantities
    assert "the largest kl_coef · KL(sft0 ‖ soup)" not in quantities


def test_evaluation_noise_is_a_share_of_the_deviation_between_replicates():
    row = {"claim_verdict": "undecided", "outcome": "primary"}
    numbers = [("a", 0.01, 0.04), ("b", math.nan, 0.04), ("c", 0.02, math.nan), ("d", 0.0, 0.0), ("e", 0.03, 0.03)]
    rows = [row | {"claim": claim, "sampling_deviation": x, "deviation": y} for claim, x, y in numbers]
    rows.append(rows[0] | {"outcome": "secondary", "sampling_deviation": 1.0})
    rows.append(rows[0] | {"claim": "f", "claim_verdict": "not tested"})
    assert gates.evaluation_noise(pd.DataFrame(rows)) == {"a": 0.25, "e": 1.0}
    assert gates.evaluation_noise(None) == {}


def gates_of(report):
    """Gate -> the cells of its row in report.md."""
    lines = [line for line in report.split("## Checks")[1].split("\n\n")[2].splitlines() if line.startswith("| ")]
    rows = [[html.unescape(cell.strip()) for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {row[0]: row for row in rows}


def test_an_averaged_reward_model_is_called_that(built):
    tree, output = built
    result = study.read(tree.settings, tree.parents)
    frames = {"gates": table(output, "gates")}
    assert "average" not in gates.caption(result, frames) and words.reward_model(result.config) == "reward model"
    result.config.reward_model.models = 3
    for replicate, model in result.reward_models.items():
        model["members"] = [{"held_out_accuracy": 0.7 + 0.01 * i + 0.02 * replicate} for i in range(3)]
    says = "The reward model is the average of 3: of held-out pairs, its share in the right order is 0.8, and that of "
    assert f" {says}its members alone 0.7 to 0.74." in gates.caption(result, frames)
    frames["manipulation"] = table(output, "manipulation")
    assert any("reward model (average of 3) agrees" in check.gate.quantity for check in gates.checks(result, frames))


def test_runs(built):
    tree, output = built
    with open(output / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    stages = [row["stage"] for row in rows]
    expected = {
        "prepare": 1,
        "base": 1,
        "sft": 4,
        "reward_model": 2,
        "landscape": 2,
        "gates": 2,
        "ppo": 6,
        "respond": 6,
        "judge": 6,
        "plane": 1,
    }
    assert {stage: stages.count(stage) for stage in set(stages)} == expected
    by_folder = {row["folder"]: row for row in rows}
    sft = by_folder["sft/r1-s1-0123456789ab"]
    assert (sft["replicate"], sft["seed"], sft["arm"]) == ("1", "1", "")
    assert sft["address"] == runs.manifest_of(tree.root / "sft" / "r1-s1-0123456789ab")["address"]
    ppo = by_folder["ppo/r0-salsa-kl_0.05-0123456789ab"]
    assert (ppo["replicate"], ppo["arm"], ppo["kl_coef"]) == ("0", "salsa", "0.05")
    assert float(ppo["wall_seconds"]) >= 0 and float(ppo["peak_memory_mib"]) > 0


def test_sign_tests_are_corrected_among_the_rows_of_one_baseline(built):
    _, output = built
    frame = table(output, "win_rates")
    assert frame["wins"].tolist() == [8 if b == "sft0" else int(c == "salsa") for b, c in
                                      zip(frame["baseline"], frame["candidate"], strict=True)]  # fmt: skip
    for baseline in ("sft0", "ppo"):
        own = frame[frame["baseline"] == baseline]
        assert own["holm_p"].tolist() == pytest.approx(naive_holm(own["sign_test_p"].tolist()))


def naive_holm(p_values):
    """The largest, up to each p in ascending order, of p times the number of those not yet rejected; at most 1."""
    ascending = sorted(p_values)
    return [min(1, max(p * (len(ascending) - ascending.index(p)) for p in ascending if p <= own)) for own in p_values]


def test_sources_lead_to_the_verdicts(built):
    tree, output = built
    frame = table(output, "sources")
    assert len(frame) == 2 * (3 + 2)  # replicates x (three arms against sft0, two against ppo)
    for row in frame.to_dict("records"):
        found = runs.read_jsonl(tree.root / row["verdicts"])
        pair = {(line["model_a"], line["model_b"], line["replicate"]) for line in found}
        assert (row["candidate_model"], row["baseline_model"], row["replicate"]) in pair
        assert row["candidate_model"] == f"{row['candidate']}-kl_0.05"


def test_length_controlled_rates_are_of_answers_of_one_length(built):
    tree, output = built
    frame = table(output, "win_rates").set_index(["candidate", "baseline", "benchmark"])
    rate = frame.loc[("salsa", "sft0", "in_distribution"), "length_controlled"]
    assert rate == pytest.approx(8 / 12)  # all answers are equally long
    found = study.read(tree.settings, tree.parents)
    lengths = win_rates.response_lengths(found)
    lengths[0, 0, "salsa-kl_0.05", "in_distribution", "in_distribution-1"] += 90  # two replicates' mean: 45 longer
    row = win_rates.length_controlled(found, "gold", "in_distribution", "salsa-kl_0.05", "sft0", lengths)
    scores = [float(i % 3 > 0) for i in range(12)]
    differences = [45.0 * (i == 1) for i in range(12)]
    assert row["length_controlled"] == pytest.approx(statistics.length_controlled(scores, differences))
    assert row["length_controlled"] != pytest.approx(8 / 12)


def test_judges_without_a_gold_judge_are_held_to_gold_scores(built):
    """Gold of sft0's answers is i, of ppo's 1 + i or 1.1 + i: ppo should always win, and wins 8 of 12."""
    tree, output = built
    assert table(output, "judges")["gold_agreement"].isna().all()  # gold is not held to itself
    found = study.read(tree.settings, tree.parents)
    found.config = replace(found.config, judges={"gold": config.Judge("openai")})
    found.verdicts = {key: rows for key, rows in found.verdicts.items() if key[2:] == ("ppo-kl_0.05", "sft0")}
    frame = table_of(found, "judges")
    assert frame["benchmark"].tolist() == ["all", "in_distribution", "out_of_distribution"]
    assert frame["verdicts"].tolist() == [96, 48, 48]
    assert frame["gold_agreement"].tolist() == pytest.approx([8 / 12] * 3)


def test_bradley_terry_of_two_models_is_their_log_odds(built):
    tree, _ = built
    found = study.read(tree.settings, tree.parents)
    found.verdicts = {key: rows for key, rows in found.verdicts.items() if key[2:] == ("ppo-kl_0.05", "sft0")}
    frame = table_of(found, "bradley_terry").set_index("model")
    assert frame.loc["sft0", "score"] == 0
    assert frame.loc["ppo, kl_coef 0.05", "score"] == pytest.approx(math.log(2), abs=0.01)  # 8 wins, 4 losses


def test_geometry_and_plane(built):
    _, output = built
    row = table(output, "geometry").set_index("arm").loc["salsa"]  # 2.0 and 2.2 from sft0
    assert row["from_sft0"] == pytest.approx(2.1)
    assert row["from_sft0_high"] - row["from_sft0"] == pytest.approx(12.706204736432095 * 0.1)
    assert row["along_sft1"] == pytest.approx(0.6 * 2.1 / 4)
    plane = table(output, "plane")
    assert (plane["kind"] == "plane").sum() == 9 and (plane["kind"] == "line").sum() == 5
    assert set(zip(plane["arm"], plane["replicate"], strict=True)) == {("salsa", 0)}
    assert plane["reward"].tolist() == pytest.approx((plane["w_sft1"] + 2 * plane["w_policy"]).tolist())


def test_stability(built):
    tree, output = built
    frame = table(output, "stability")
    assert frame["end_rate_relative"].tolist() == pytest.approx([0.95 / 0.98] * 3)
    assert frame["length_relative"].tolist() == pytest.approx([22 / 25] * 3)
    assert frame["gold_loss"].tolist() == [0] * 3 and frame["stable"].tolist() == [2] * 3
    found = study.read(tree.settings, tree.parents)
    found.config = replace(found.config, stability=config.Stability(shortest_length=0.9))
    assert table_of(found, "stability")["stable"].tolist() == [0] * 3


def test_model_text_cannot_break_the_samples(built):
    _, output = built
    text = (output / "samples.md").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "**bold**" not in text and "[link]" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(line.count("|") == 5 for line in rows)
    assert text.count("| sft0 |") == text.count("| salsa, kl_coef 0.05 |") == 2 * 2
    assert "in&#95;distribution-0" in text and "in&#95;distribution-1**" in text and "distribution-2" not in text


def test_samples_are_in_the_order_of_numbers():
    ids = sorted(({"prompt_id": name} for name in ("b-10", "b-9", "a-11")), key=words.natural)
    assert [row["prompt_id"] for row in ids] == ["a-11", "b-9", "b-10"]


def test_report_links_exist_and_gates_come_first(built):
    _, output = built
    text = (output / "report.md").read_text()
    assert text.index("Gold reward before training") < text.index("## Results") < text.index("figures/frontier.png")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((output / link).is_file() for link in links)
    assert "salsa run experiment=tiny_test" in text and "overrides are not known" in text


def test_latex_is_escaped(built):
    _, output = built
    text = (output / "tables" / "win_rates.tex").read_text()
    assert r"\toprule" in text and r"in\_distribution" in text and r"95 \%" in text and "½" not in text


def test_no_torch(built):
    import subprocess
    import sys

    code = "import sys; import salsa.report.study; assert not {'torch', 'hydra', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_replicate(tmp_path, monkeypatch):
    output = Tree(tmp_path, replicates=(3,)).build(monkeypatch)
    text = (output / "claims.md").read_text()
    assert "One replicate: everything here is conditional on one SFT pair" in text
    assert set(table(output, "claims")["claim_verdict"]) == {"undecided", "not tested"}
    assert "but one replicate: conditional on one SFT pair" in text and "nothing is decided" in text
    assert table(output, "rewards")["reward_low"].isna().all()


def test_without_gold_and_judges(tmp_path, monkeypatch):
    output = Tree(tmp_path, gold=False).build(monkeypatch)
    assert table(output, "frontier")["gold_reward"].isna().all()
    assert list(table(output, "win_rates").columns) == win_rates.COLUMNS and table(output, "win_rates").empty
    assert "no gold judge" in (output / "report.md").read_text()
    why = table(output, "claims").set_index("claim")["why"]
    assert why["higher_gold"] == "this data has no gold reward" and why["preferred"] == "this study has no judge"
    assert set(table(output, "chosen")["by"]) == {"reward"}


def test_one_sft_model_and_no_line_between_two(tmp_path, monkeypatch):
    tree = Tree(tmp_path, replicates=(0,), arms={"ppo": "0"}, judges=())  # sft0 answers nothing
    del tree.parents["landscape/r0"]
    output = tree.build(monkeypatch)
    assert "No claim can be tested here" in (output / "claims.md").read_text()
    assert table(output, "stability")["end_rate_relative"].isna().all()


def test_looks_are_stable_and_alphas_differ():
    assert style.look("salsa", 0.5) == ("#D55E00", "s", "-")
    assert style.look("alpha_0.25", 0.25) != style.look("alpha_0.75", 0.75)
    assert style.look("my_arm") == style.look("my_arm") != style.look("your_arm")


# What is seen without one kind of cones, of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
VISION = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "all cones": np.eye(3).tolist(),
}


def lab(colour, vision):
    """CIELAB coordinates of a colour as it is seen; a distance of 2.3 is just noticeable."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_arms_are_told_apart_by_readers_of_any_colour_vision():
    assert set(style.LOOKS) <= set(EVERY_ARM)  # an arm that is added has a look by its name
    assert len({shown.marker for shown in style.LOOKS.values()}) == len(style.LOOKS)
    for one, other in itertools.combinations(style.LOOKS.values(), 2):
        distance = min(np.linalg.norm(lab(one.colour, v) - lab(other.colour, v)) for v in VISION)
        assert distance > 15, (one, other)
        assert distance > 25 or one.line != other.line, (one, other)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A study of every arm of conf/arm and an alpha that is none, at two kl_coefs."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        arms = EVERY_ARM | {"alpha_0.25": "0.25"}
        tree = Tree(tmp_path_factory.mktemp("every"), arms=arms, replicates=(0,), kl_coefs=(0.02, 0.05), prompts=4)
        yield tree, tree.build(monkeypatch)


def test_every_arm_has_its_place(every):
    tree, output = every
    names = {*EVERY_ARM, "alpha_0.25"}
    for name in ("win_rates", "frontier", "rewards"):
        frame = table(output, name)
        assert names <= set(frame["candidate" if name == "win_rates" else "arm"]), name
        assert set(frame["kl_coef"].dropna()) == {0.02, 0.05}
    for name in ("frontier", "training_curves", "lengths_and_ends", "win_rates"):
        shown = {text.get_text() for legend in tree.figures[name].legends for text in legend.get_texts()}
        assert names <= shown, name
    claims = (output / "claims.md").read_text()
    compared = names - {"ppo", "ppo_long"}  # which are plain anchors
    assert all(f"| {name} | 0.02 |" in claims for name in compared)
    assert set(table(output, "ablations")["arm"]) == compared
    # No other starts below its anchor's largest KL, which is 7.5 for ppo.
    assert set(table(output, "matched_kl")["arm"]) == {"salsa", "other", "salsa_long"}


class OfflineTree(Tree):
    """One whose arm `other` samples nothing while it is trained."""

    def ppo(self, replicate, arm, kl_coef):
        if arm != "other":
            return super().ppo(replicate, arm, kl_coef)
        return {"metrics.jsonl": lines({"iteration": i, "loss": 0.7 - 0.05 * i} for i in range(self.iterations))}


def test_an_arm_without_trajectories_is_in_all_but_their_figures(tmp_path, monkeypatch):
    tree = OfflineTree(tmp_path, prompts=6)
    output = tree.build(monkeypatch)
    report = (output / "report.md").read_text()
    assert report.count("Arms that sample nothing while they are trained have no curve: other.") == 2
    assert "Training of 2 arms at the kl_coef of the claims (0.05), sampled before each iteration's update" in report
    curves = tree.figures["training_curves"]
    assert [len(axis.lines) for axis in curves.axes] == [2] * 6
    assert {text.get_text() for legend in curves.legends for text in legend.get_texts()} == {
        "ppo", "salsa", "the flat part, over which claims average",
    }  # fmt: skip
    frame = table(output, "frontier")
    final = frame[frame["arm"] == "other"]
    assert final["iteration"].tolist() == [6, 6] and not final[["kl_to_sft0", "gold_reward"]].isna().any(axis=None)
    assert set(table(output, "win_rates")["candidate"]) == {"ppo", "salsa", "other"}
    assert table(output, "stability").set_index("arm").loc["other", "stable"] > 0


def test_the_plain_anchor_is_shown_under_its_own_name(tmp_path, monkeypatch):
    tree = Tree(tmp_path, prompts=6)
    arms = tree.settings.config["arms"]
    arms["mine"] = arms.pop("ppo")
    for policy in tree.settings.policies:
        policy["arm"] = "mine" if policy["arm"] == "ppo" else policy["arm"]
    output = tree.build(monkeypatch)
    assert set(table(output, "win_rates")["baseline"]) == {"sft0", "mine"}
    assert "mine" in set(table(output, "claims")["baseline"]) and set(table(output, "matched_kl")["arm"]) == set()
    assert set(table(output, "paper_table")["salsa_vs_ppo"]) == {(1 + 5 / 2) / 6}
    assert "## Every arm against mine" in (output / "claims.md").read_text()
    assert comparison.against_plain([{}], [output])["arm"].unique().tolist() == ["salsa", "other"]
    frame = study.read(tree.settings, tree.parents).frames.policies
    assert frame["arm"].unique().tolist() == ["mine", "salsa", "other"]


def test_arms_are_described(every):
    _, output = every
    frame = table(output, "arms").set_index("arm")
    assert list(frame.index) == [*EVERY_ARM, "alpha_0.25"]
    expected = {
        "ppo": ("sft0", "sft0", 1, "fixed"),
        "salsa": ("sft0", "1/2 sft0 + 1/2 sft1", 1, "fixed"),
        "soup_start_ppo": ("1/2 sft0 + 1/2 sft1", "sft0", 1, "fixed"),
        "n_soup": ("sft0", "1/3 sft0 + 1/3 sft1 + 1/3 sft2", 1, "fixed"),
        "noise": ("sft0", "sft0 moved at random, as far as 1/2 sft0 + 1/2 sft1", 1, "fixed"),
        "multi_kl": ("sft0", "a KL to each: 1/2 sft0 + 1/2 sft1", 1, "fixed"),
        "ema": ("sft0", "sft0, then a moving average of the policy, rate 0.05", 1, "fixed"),
        "reset": ("sft0", "sft0, then the policy, every 10 iterations", 1, "fixed"),
        "smaller_beta": ("sft0", "sft0", 0.5, "fixed"),
        "decaying_beta": ("sft0", "sft0", 1, "falls linearly to 0 × kl_coef"),
        "alpha_0.25": ("sft0", "3/4 sft0 + 1/4 sft1", 1, "fixed"),
    }
    for arm, row in expected.items():
        assert tuple(frame.loc[arm, ["start", "reference", "kl_scale", "kl_schedule"]]) == row
    assert frame.loc["ema", "description"] == composed().arms["ema"].description
    report = (output / "report.md").read_text()
    assert report.index("## Arms") < report.index(" sft0 | sft0, then a moving") < report.index("## Checks")
    assert "p{4cm}" in (output / "tables" / "arms.tex").read_text()


def planned(arms, *names):
    """A study of these arms, whose policies have these names."""
    policies = [study.Policy(name, None, 0.05, 0, name, i, {}, [], {}, []) for i, name in enumerate(names)]
    return study.Study(replace(composed(), arms=arms), policies, {}, {}, {}, [])


def test_an_arm_that_is_another_is_shown_under_its_name():
    arms = {name: composed().arms[name] for name in ("ppo", "salsa")}
    twin = replace(arms["salsa"], description="once more")
    frame = table_of(planned({"again": twin} | arms, "salsa", "ppo"), "arms")
    assert frame["arm"].tolist() == ["salsa", "ppo", "again"]
    assert frame["description"].tolist()[2] == "the same as salsa, and shown under that name"
    assert frame["reference"].tolist() == ["1/2 sft0 + 1/2 sft1", "sft0", "1/2 sft0 + 1/2 sft1"]


def test_schedules_in_words():
    found = planned({"ppo": composed().arms["ppo"]}, "ppo")
    schedule = schema.KlSchedule("adaptive", target=3.5)
    found.config = replace(found.config, ppo=replace(found.config.ppo, kl_schedule=schedule))
    frame = table_of(found, "arms")
    assert frame["kl_schedule"].tolist() == ["adapts to a KL of 3.5 nats, over 10000 responses"]


def test_kl_coef_is_drawn_where_it_changes(every, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "gold_judge", lambda prepare: None)

    def curves(folder, arms):
        tree = Tree(tmp_path / folder, arms=arms, prompts=2, planes=())
        figure = sections.sections()["training_curves"].draw(study.read(tree.settings, tree.parents), {})
        return figure, [axis.get_title(loc="left") for axis in figure.axes]

    figure, titles = curves("changes", {"ppo": "0", "decaying_beta": None})
    panel = figure.axes[titles.index("kl_coef")]
    falling = next(line for line in panel.lines if line.get_color() == style.LOOKS["decaying_beta"].colour)
    assert falling.get_ydata()[0] == pytest.approx(0.05) and falling.get_ydata()[-1] < 0.0125
    assert "kl_coef" not in curves("constant", {"ppo": "0", "salsa": "0.5"})[1]
    groups = len(every[0].figures["training_curves"].axes) // 3
    assert groups == -(-len(EVERY_ARM) // 4)  # of many arms the main measures alone: four or five beside plain PPO


def test_kl_coefs_differ_in_size(every):
    markers = {line.get_label(): line.get_markersize() for line in every[0].figures["frontier"].legends[0].get_lines()}
    assert markers["kl_coef 0.02"] < markers["ppo"] < markers["kl_coef 0.05"]
