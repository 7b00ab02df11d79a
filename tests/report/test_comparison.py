"""The comparison of a sweep's studies, from two of them written by hand."""

import dataclasses
import math
import re
from typing import Any

import pandas as pd
import pytest
from tree import composed

from salsa.report import comparison, style
from salsa.workflow import config, runs, schema

POINTS = [{"ppo.learning_rate": "1e-4"}, {"ppo.learning_rate": "2e-4"}]
ALPHAS = {"ppo": "0", "salsa": "0.5"}
WIN_RATES = ["benchmark", "judge", "candidate", "baseline", "kl_coef", "adjusted_win_rate", "ci_low", "ci_high"]
WIN_RATES += ["prompts", "replicates"]


@dataclasses.dataclass
class Settings:
    policies: list[dict[str, Any]]
    config: dict[str, Any]


def reward_row(arm, kl_coef, gold, kl=math.nan):
    row = {"arm": arm, "kl_coef": kl_coef, "replicates": 2, "gold_reward": gold, "reward": 2 * gold, "kl_to_sft0": kl}
    for name, width in (("gold_reward", 0.1), ("reward", 0.2), ("kl_to_sft0", 0.3)):
        row |= {f"{name}_low": row[name] - width, f"{name}_high": row[name] + width}
    return row


def write_study(folder, gain, kl_coefs=(0.05,)):
    """A finished study: gold is 0.2 for sft0, 0.5 for ppo and `gain` more for salsa, which wins where it is above 0."""
    rewards = [reward_row("sft0", math.nan, 0.2)]
    rates = []
    for kl_coef in kl_coefs:
        rewards += [reward_row("ppo", kl_coef, 0.5, 2), reward_row("salsa", kl_coef, 0.5 + gain, 4)]
        for benchmark in ("a", "b"):
            rates.append([benchmark, "gold", "ppo", "sft0", kl_coef, 0.6, 0.55, 0.65, 9, 2])
            rates.append([benchmark, "gold", "salsa", "sft0", kl_coef, 0.6 + gain, 0.55 + gain, 0.65 + gain, 9, 2])
            rates.append([benchmark, "gold", "salsa", "ppo", kl_coef, 0.5 + gain, 0.45 + gain, 0.55 + gain, 9, 2])
    policies = [{"arm": arm, "alpha": alpha} for arm, alpha in ALPHAS.items()]

    def write(settings, parents, output, execution):
        (output / "tables").mkdir()
        pd.DataFrame(rewards).to_csv(output / "tables" / "rewards.csv", index=False)
        pd.DataFrame(rates, columns=WIN_RATES).to_csv(output / "tables" / "win_rates.csv", index=False)

    runs.execute("study", 1, write, Settings(policies, schema.dump(composed())), {}, folder, config.Execution())
    return folder


def build(root, studies, points):
    parents = {f"study/{place}": study for place, study in enumerate(studies)}
    output = root / "studies" / "sweep"
    settings = config.ComparisonSettings(points)
    runs.execute("comparison", 1, comparison.build, settings, parents, output, config.Execution())
    return output


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    studies = [write_study(root / "studies" / f"s{i}", gain) for i, gain in enumerate((0.2, -0.1))]
    return build(root, studies, POINTS)


def test_exact_set_of_files(built):
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    expected = {f"tables/{name}.{kind}" for name in ("comparison", "against_ppo") for kind in ("csv", "md", "tex")}
    expected |= {"figures/comparison.png", "figures/comparison.pdf", "comparison.md", "manifest.json", ".lock"}
    assert found == expected


def test_table(built):
    frame = pd.read_csv(built / "tables" / "comparison.csv")
    assert list(frame.columns) == [
        "point", "ppo.learning_rate", "arm", "kl_coef", "replicates",
        "gold_reward", "gold_reward_low", "gold_reward_high", "reward", "reward_low", "reward_high",
        "kl_to_sft0", "kl_to_sft0_low", "kl_to_sft0_high",
        "win_rate_gold_a", "win_rate_gold_a_low", "win_rate_gold_a_high",
        "win_rate_gold_b", "win_rate_gold_b_low", "win_rate_gold_b_high", "study",
    ]  # fmt: skip
    assert list(frame["arm"]) == ["sft0", "ppo", "salsa"] * 2
    last = frame.iloc[5]
    assert last["point"] == "ppo.learning_rate=2e-4" and last["study"] == "studies/s1"
    assert last["gold_reward"] == pytest.approx(0.4) and last["gold_reward_high"] == pytest.approx(0.5)
    assert last["win_rate_gold_b_low"] == pytest.approx(0.45)
    assert frame.loc[frame["arm"] == "sft0", "win_rate_gold_a"].isna().all()


def test_every_point_against_plain_ppo(built):
    frame = pd.read_csv(built / "tables" / "against_ppo.csv")
    assert list(frame.columns) == [
        "point", "judge", "benchmark", "arm", "kl_coef", "adjusted_win_rate", "ci_low", "ci_high", "prompts",
        "replicates", "study",
    ]  # fmt: skip
    assert len(frame) == 4 and set(frame["arm"]) == {"salsa"}
    assert list(frame["adjusted_win_rate"]) == pytest.approx([0.7, 0.7, 0.4, 0.4])
    assert (
        "| ppo.learning_rate=2e-4 | gold | a | salsa | 0.05 | 0.4 [0.35, 0.45] | 9 | 2 |"
        in (built / "comparison.md").read_text()
    )


def test_sentences_are_what_the_numbers_say(built):
    text = (built / "comparison.md").read_text()
    assert (
        "salsa: mean gold reward above the plain anchor's in 1 of 2 pairs of one point and kl_coef, by -0.1 to 0.2"
        in text
    )
    assert "lies above ½ in 2 and below ½ in 2 of 4 comparisons" in text  # 0.65 to 0.75, and 0.35 to 0.45
    assert "| ppo.learning_rate=1e-4 | salsa | 0.05 | 2 | 0.7 [0.6, 0.8] |" in text
    assert "The highest gold reward is 0.7, of salsa at ppo.learning_rate=1e-4 (kl_coef 0.05): the best of 4" in text


def test_the_report_of_each_points_study_is_linked(built):
    text = (built / "comparison.md").read_text()
    links = re.findall(r"^- (.*): \[(.*)\]\((\.\./.*)/report\.md#how-to-reproduce\)$", text, re.MULTILINE)
    assert [(point, name) for point, name, _ in links] == [
        ("ppo.learning_rate=1e-4", "s0"),
        ("ppo.learning_rate=2e-4", "s1"),
    ]
    assert all((built / folder / "manifest.json").is_file() for _, _, folder in links)


def test_without_gold_proxy_reward_is_compared(tmp_path):
    studies = [write_study(tmp_path / f"s{i}", gain) for i, gain in enumerate((0.2, 0.1))]
    frame = comparison.comparison(POINTS, studies).assign(gold_reward=math.nan)
    lines = comparison.statements(frame, [], {"ppo": "ppo", "salsa": "ppo"})
    assert (
        len(lines) == 2
        and "mean proxy reward above the plain anchor's in 2 of 2" in lines[0]
        and "by 0.2 to 0.4" in lines[0]
    )
    assert "gold_reward" not in comparison.panels(frame)


def test_figure_has_a_panel_a_measure_and_the_arms_colours(tmp_path):
    studies = [write_study(tmp_path / f"s{i}", 0.1, kl_coefs=(0.05, 0.1)) for i in range(3)]
    points = [{"arm": f"[{i}]", "seed": str(i)} for i in range(3)]
    frame = comparison.comparison(points, studies)
    assert "arm (swept)" in frame and list(frame["arm"].unique()) == ["sft0", "ppo", "salsa"]
    drawn = comparison.figure(points, frame, comparison.arm_looks(studies[0]))
    shown = [axis for axis in drawn.axes if axis.get_visible()]
    assert len(shown) == 5  # three measures, two benchmarks
    lines = [line for line in shown[0].lines if len(line.get_xdata()) == 3]
    assert [line.get_color() for line in lines[:4]] == [
        style.look(arm).colour for arm in ("ppo", "ppo", "salsa", "salsa")
    ]
    assert {tuple(round(x) for x in line.get_xdata()) for line in lines} == {(0, 1, 2)}
    assert [text.get_text() for text in shown[-1].get_xticklabels()] == ["[0]\n0", "[1]\n1", "[2]\n2"]


def test_two_points_of_one_study_are_both_shown(tmp_path):
    study = write_study(tmp_path / "s", 0.2)
    other = write_study(tmp_path / "t", 0.1)
    points = [{"execution.threads": "1"}, {"execution.threads": "2"}, {"execution.threads": "3"}]
    output = build(tmp_path, [study, study, other], points)
    frame = pd.read_csv(output / "tables" / "comparison.csv")
    assert list(frame["study"].value_counts()) == [6, 3]
    assert runs.manifest_of(output)["summary"] == {"points": 3, "studies": 2}


def test_names_that_look_like_numbers_or_nothing_stay_names(tmp_path):
    study = write_study(tmp_path / "studies" / "a", 0.1)
    for name in ("rewards", "win_rates"):
        path = study / "tables" / f"{name}.csv"
        path.write_text(path.read_text().replace("salsa", "nan").replace("ppo", "1"))
    frame = comparison.comparison(POINTS[:1], [study])
    assert frame["arm"].tolist() == ["sft0", "1", "nan"]
    assert frame["win_rate_gold_a"].tolist()[1:] == [0.6, 0.7]
