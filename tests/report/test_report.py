"""The report of synthetic studies: exact files, contract columns, hand-checkable numbers, text that cannot break it."""

import csv
import dataclasses
import itertools
import json
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from tree import EVERY_ARM, Tree, presets

from salsa import compose, config, plan, runs
from salsa.evaluate import statistics
from salsa.report import claims, figures, study, tables


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        tree = Tree(tmp_path_factory.mktemp("two"))
        yield tree, tree.build(monkeypatch, drawn=True)


def table(output, name):
    return pd.read_csv(output / "tables" / f"{name}.csv")


def test_exact_set_of_files(built):
    _, output = built
    expected = {"runs.csv", "samples.md", "claims.md", "report.md", "manifest.json", ".lock"}
    names = ("arms", "win_rates", "frontier", "alpha_curve", "gates", "rewards")
    expected |= {f"tables/{name}.{kind}" for name in names for kind in ("csv", "md", "tex")}
    expected |= {f"figures/{name}.{kind}" for name in figures.NAMES for kind in ("png", "pdf")}
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
    assert list(table(output, "win_rates").columns) == win.split(", ")
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
    report = (output / "report.md").read_text()
    assert "**Warning**: reward model agrees with gold on at least 75% of pairs of two final policies' " in report
    before, after = report.split("## Results")
    assert "0.85, 0.85" in before and "ppo" not in before.split("## Before PPO")[1] and "two standard errors" in after


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


def test_claims_say_what_intervals_allow(built):
    _, output = built
    text = (output / "claims.md").read_text()
    assert text.index("## salsa against ppo") < text.index("## other against ppo")
    part = text.split("## salsa against ppo, kl_coef 0.05")[1].split("##")[0]
    assert "| KL(policy ‖ sft0), nats a response | 2 | [2, 2] | 2 | above ppo" in part
    assert "| gold reward | 0.0225 | [-0.00927, 0.0543] | 2 | the interval contains 0: undecided with 2" in part
    assert "win rate against ppo minus ½: in_distribution, judge gold | 0.0417" in part
    assert "0 of 4 stay below 0.05" in text


@pytest.mark.parametrize(
    "bounds, count, expected",
    [
        ((math.nan, math.nan), 1, "conditional on one SFT pair"),
        ((-1, 1), 3, "the interval contains 0: undecided with 3 replicates"),
        ((0, 1), 3, "undecided"),
        ((0.1, 1), 3, "above ppo"),
        ((-1, -0.1), 3, "below ppo"),
    ],
)
def test_verdict(bounds, count, expected):
    assert expected in claims.verdict(*bounds, count)


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
    ids = sorted(({"prompt_id": name} for name in ("b-10", "b-9", "a-11")), key=study._natural)
    assert [row["prompt_id"] for row in ids] == ["a-11", "b-9", "b-10"]


def test_report_links_exist_and_gates_come_first(built):
    _, output = built
    text = (output / "report.md").read_text()
    assert text.index("Gold reward before any PPO") < text.index("## Results") < text.index("figures/frontier.png")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((output / link).is_file() for link in links)
    assert 'overrides="experiment=tiny_test"' in text


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
    assert "undecided" not in text and "above ppo" not in text
    assert table(output, "rewards")["reward_low"].isna().all()


def test_without_gold_and_judges(tmp_path, monkeypatch):
    output = Tree(tmp_path, gold=False).build(monkeypatch)
    assert table(output, "frontier")["gold_reward"].isna().all()
    assert list(table(output, "win_rates").columns) == tables.WIN_RATES and table(output, "win_rates").empty
    assert "no gold judge" in (output / "report.md").read_text()
    assert "gold reward" not in (output / "claims.md").read_text().split("##", 1)[1]


def test_one_sft_model_and_no_line_between_two(tmp_path, monkeypatch):
    tree = Tree(tmp_path, replicates=(0,), arms={"ppo": "0"})
    del tree.parents["landscape/r0"]
    output = tree.build(monkeypatch)
    assert "no claim can be tested" in (output / "claims.md").read_text()


def test_looks_are_stable_and_alphas_differ():
    assert figures.look("salsa", 0.5) == ("#D55E00", "s", "-")
    assert figures.look("alpha_0.25", 0.25) != figures.look("alpha_0.75", 0.75)
    assert figures.look("my_arm") == figures.look("my_arm") != figures.look("your_arm")


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
    assert set(figures.LOOKS) == set(EVERY_ARM)
    assert len({shown.marker for shown in figures.LOOKS.values()}) == len(figures.LOOKS)
    for one, other in itertools.combinations(figures.LOOKS.values(), 2):
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
    for name in ("frontier", "training_curves", "response_lengths", "win_rates"):
        shown = {text.get_text() for legend in tree.figures[name].legends for text in legend.get_texts()}
        assert names <= shown, name
    claims_ = (output / "claims.md").read_text()
    assert all(f"## {name} against ppo, kl_coef 0.02" in claims_ for name in names - {"ppo"})
    assert "Plain PPO with a smaller kl_coef: is another" in claims_.split("## smaller_beta against ppo")[1]


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
    assert frame.loc["ema", "description"] == presets()["ema"]["description"]
    report = (output / "report.md").read_text()
    assert report.index("## Arms") < report.index("| ema | sft0 | sft0, then a moving") < report.index("## Before PPO")
    assert "p{4cm}" in (output / "tables" / "arms.tex").read_text()


def planned(arms, *names):
    """A study of these arms, whose policies have these names."""
    policies = [study.Policy(name, None, 0.05, 0, name, i, {}, [], {}, []) for i, name in enumerate(names)]
    return study.Study(dataclasses.asdict(config.Config()) | {"arms": arms}, policies, {}, {}, {}, [])


def test_an_arm_that_is_another_is_shown_under_its_name():
    twin = presets()["salsa"] | {"description": "once more"}
    frame = tables.arms(planned({"again": twin, "ppo": presets()["ppo"], "salsa": presets()["salsa"]}, "salsa", "ppo"))
    assert frame["arm"].tolist() == ["salsa", "ppo", "again"]
    assert frame["description"].tolist()[2] == "the same as salsa, and shown under that name"
    assert frame["reference"].tolist() == ["1/2 sft0 + 1/2 sft1", "sft0", "1/2 sft0 + 1/2 sft1"]


def test_schedules_in_words():
    assert set(tables.REFERENCES) == set(compose.REFERENCES) and set(tables.SCHEDULES) == set(plan.SCHEDULES)
    found = planned({"ppo": presets()["ppo"]}, "ppo")
    found.config["ppo"]["kl_schedule"] |= {"kind": "adaptive", "target": 3.5}
    frame = tables.arms(found)
    assert frame["kl_schedule"].tolist() == ["adapts to a KL of 3.5 nats, over 10000 responses"]


def test_kl_coef_is_drawn_where_it_changes(every, built):
    def titles(figure):
        return [axis.get_title(loc="left") for axis in figure.axes]

    curves = every[0].figures["training_curves"]
    assert titles(curves)[6:] == ["kl_coef"] and len(curves.axes[6].lines) == len(EVERY_ARM) + 1
    assert [axis.get_xlabel() for axis in curves.axes] == [""] * 4 + ["PPO iteration"] * 3
    falling = next(line for line in curves.axes[6].lines if line.get_color() == figures.LOOKS["decaying_beta"].colour)
    assert falling.get_ydata()[0] == pytest.approx(0.02) and falling.get_ydata()[-1] < 0.005
    constant = figures.training_curves(study.read(built[0].settings, built[0].parents), {})
    assert len(titles(constant)) == 6 and "kl_coef" not in titles(constant)


def test_kl_coefs_differ_in_size(every):
    markers = {line.get_label(): line.get_markersize() for line in every[0].figures["frontier"].legends[0].get_lines()}
    assert markers["kl_coef 0.02"] < markers["ppo"] < markers["kl_coef 0.05"]
