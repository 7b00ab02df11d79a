"""The figures of made-up studies: what is drawn where, that nothing is where nothing was measured, and that it fits."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tree import composed, table_of

from salsa.report import selection, style
from salsa.report.sections import bradley_terry, over_optimisation, plane, sections, sections_of, training, win_rates
from salsa.report.sections import claims as claims_section
from salsa.report.study import Landscape, Policy, Study
from salsa.workflow import config

NAMES = [name for name, section in sections().items() if section.figure]
DRAWN = [name for name in NAMES if name not in ("regimes", "variance")]  # which have tests of their own
THREE = ("ppo", "salsa", "other")
ALPHAS = {"ppo": 0.0, "salsa": 0.5, "other": 1.0}
BENCHMARKS = ("in_distribution", "out_of_distribution")


def made(arms=THREE, kl_coefs=(0.05,), replicates=(0, 1), gold=True, only=None):
    """A study whose numbers are simple functions of arm, kl_coef, replicate and iteration; lengths go to 0 at 0.5."""
    values = replace(
        composed(),
        kl_coefs=list(kl_coefs),
        arms={arm: config.Arm() for arm in arms},
        benchmarks={name: config.Benchmark(name) for name in BENCHMARKS},
        claims={},
    )
    policies = [
        policy(arm, kl_coef, replicate, place, gold)
        for replicate in replicates
        for place, arm in enumerate(arms)
        for kl_coef in (only or {}).get(arm, kl_coefs)
    ]
    line = [
        {"alpha": a, "loss": 2.0 - a * (1 - a), "loss_interpolated": 2.0, "reward": a,
         "gold_reward": 0.2 + a / 10 if gold else math.nan, "response_length": 20.0, "eos_rate": 1.0}
        for a in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    sft0 = [{"model": "sft0", "benchmark": name, "tokens": [20], "gold": None} for name in BENCHMARKS]
    return Study(values, policies, {k: Landscape(line, {"barrier": 0.01}, sft0) for k in replicates}, {}, {}, [])


def policy(arm, kl_coef, replicate, place, gold):
    def row(i):
        kl = (i + 0.1 * replicate) * (1 + place) * 0.01 / kl_coef if i else 0.0
        short = 1 - i / 10 if kl_coef == 0.5 else 1
        return {"iteration": i, "score": 0.1 * i + 0.01 * place, "kl_to_sft0": kl, "kl_to_reference": kl + 0.5,
                "response_length": 20 * short, "eos_rate": 0.9, "entropy": 2.0, "kl_coef": kl_coef}  # fmt: skip

    golds = {i: 0.2 + 0.1 * i - 0.01 * i**2 if gold else math.nan for i in (0, 4, 8)}
    final = row(10) | {"reward": 1.0 + 0.1 * place + 0.1 * replicate, "gold_reward": 0.5 if gold else None}
    answers = [{"model": "policy", "benchmark": name, "tokens": [15, 17], "gold": None} for name in BENCHMARKS]
    name = f"{arm}-kl_{kl_coef:g}"
    return Policy(arm, ALPHAS.get(arm), kl_coef, replicate, name, 0, {}, [row(i) for i in range(10)], final, answers,
                  golds)  # fmt: skip


def bounded(name, value, half):
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def tables_of(study, gold=True):
    """Tables as the sections make them, of hand-made numbers where those would need judges or weights."""
    pairs = [(arm, k) for arm in study.arms for k in study.kl_coefs if study.of(arm=arm, kl_coef=k)]
    win_rates = [
        {"benchmark": benchmark, "judge": judge, "candidate": arm, "baseline": baseline, "kl_coef": k,
         "adjusted_win_rate": 0.6, "ci_low": 0.55, "ci_high": 0.65} | bounded("length_controlled", 0.58, 0.06)
        for judge in ("gold", "reward_model") for baseline in ("sft0", "ppo") for benchmark in BENCHMARKS
        for arm, k in pairs if arm != baseline
    ]  # fmt: skip
    geometry = [
        {"arm": arm, "kl_coef": k} | bounded("from_sft0", 2.5, 0.1) | bounded("along_sft1", 0.375, 0.01)
        | bounded("cosine_sft1", 0.6, 0.01) | bounded("off_line", 2.0, 0.1) | bounded("sft0_to_sft1", 4.0, 0.1)
        for arm, k in pairs
    ]  # fmt: skip
    claim = {"candidate": "salsa", "baseline": "ppo", "benchmark": "", "smallest_effect": 0.1, "outcome": "primary",
             "measure": "win_rate", "replicates": 3, "equivalent": False, "origin": "abstract"}  # fmt: skip
    undecided = {"claim": "preferred", "claim_verdict": "undecided"}
    untested = {"claim_verdict": "not tested", "verdict": "not tested", "replicates": pd.NA}
    beside = {"outcome": "secondary", "verdict": ""}
    made = [
        claim | {"claim": "higher_gold", "claim_verdict": "supported", "verdict": "supported"}
        | bounded("effect", 0.2, 0.1),
        claim | {"claim": "higher_gold", "claim_verdict": "supported", "smallest_effect": math.nan} | beside
        | bounded("effect", 0.3, 0.1),
        claim | undecided | {"benchmark": "mean of 2 benchmarks", "verdict": "undecided"}
        | bounded("effect", 0.05, 0.5),
        claim | undecided | beside | {"benchmark": BENCHMARKS[0]} | bounded("effect", 0.05, 0.02),
        claim | undecided | beside | {"benchmark": BENCHMARKS[1]} | bounded("effect", 0.05, 0.5),
        claim | {"claim": "soup_not_noise"} | untested,
    ]  # fmt: skip
    scores = [{"judge": "gold", "model": "sft0", "score": 0.0}]
    scores += [{"judge": "gold", "model": f"{arm}, kl_coef {k:g}"} | bounded("score", 1, 0.1) for arm, k in pairs]
    return {
        **{name: table_of(study, name) for name in ("frontier", "rewards", "alpha_curve")},
        "gates": pd.DataFrame({"barrier": [0.01]}), "win_rates": pd.DataFrame(win_rates),
        "geometry": pd.DataFrame(geometry), "plane": plane_frame(gold), "claims": pd.DataFrame(made),
        "matched_kl": pd.DataFrame([{"arm": "salsa", "baseline": "ppo", "measure": "gold_reward"}
                                    | bounded("difference", 0.03, 0.01)]),
        "bradley_terry": pd.DataFrame(scores),
    }  # fmt: skip


def plane_frame(gold=True):
    """salsa's plane in quarters, half beyond its models, and its line; best at (0, 1/2, 1/2)."""
    steps = np.arange(-2, 9) / 4
    points = [("plane", 1 - x - y, x, y) for x in steps for y in steps if x + y <= 1.5]
    points += [("line", 1 - x, 0.0, x) for x in np.arange(-4, 13) / 8]
    rows = [
        {"kind": kind, "w_sft0": w0, "w_sft1": w1, "w_policy": wp, "reward": -((w1 - 0.5) ** 2) - (wp - 0.5) ** 2}
        for kind, w0, w1, wp in points
    ]
    frame = pd.DataFrame(rows).assign(arm="salsa", kl_coef=0.05, replicate=0, reward_se=0.1, gold_reward_se=0.01)
    return frame.assign(gold_reward=frame["reward"] / 10 if gold else math.nan)


def texts(figure):
    """All words of a figure, laid out or not."""
    found = [axis.get_title(loc=where) for axis in figure.axes for where in ("left", "center")]
    found += [text.get_text() for axis in figure.axes for text in axis.texts]
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.fixture(scope="module")
def small():
    study = made()
    return study, tables_of(study)


@pytest.fixture(scope="module")
def every():
    """All arms that have a look of their own, half of them at one kl_coef alone."""
    arms = tuple(style.LOOKS)
    study = made(arms, (0.02, 0.05, 0.5), (0, 1, 2), only={arm: (0.05,) for arm in arms[6:]})
    return study, tables_of(study)


def tight(figure):
    """(left, bottom, right, top) of all that is drawn, in shares of the figure."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    return box.x0 / width, box.y0 / height, box.x1 / width, box.y1 / height


@pytest.mark.parametrize("name", DRAWN)
def test_everything_lies_on_the_page(name, small):
    figure = sections()[name].draw(*small)
    left, bottom, right, top = tight(figure)
    assert left > -0.002 and bottom > -0.002 and right < 1.002 and top < 1.002
    assert figure.get_figwidth() <= 7 and figure.get_figheight() <= 10


@pytest.mark.parametrize("name", DRAWN)
def test_pages_of_many_arms_are_no_larger(name, every):
    figure = sections()[name].draw(*every)
    assert figure.get_figwidth() <= 7 and figure.get_figheight() <= 10


NEEDED = {
    "claims": "claims",
    "win_rates": "win_rates",
    "bradley_terry": "bradley_terry",
    "frontier": "frontier",
    "matched_kl": "matched_kl",
    "over_optimisation": "frontier",
    "alpha_curve": "alpha_curve",
    "geometry": "geometry",
    "plane": "plane",
    "regimes": "regimes",
    "variance": "variance",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_empty_frame_has_no_figure(name, small):
    study, tables = small
    needed = NEEDED.get(name)
    for some in ({}, tables | {needed: tables.get(needed, pd.DataFrame())[:0]} if needed else {}):
        figure = sections()[name].draw(study, some)
        assert (figure is None) == (name in NEEDED)
        reading = sections()[name].reading
        assert reading is None or name not in NEEDED or reading(study, some) == ""


def test_without_gold_the_proxy_is_drawn_alone():
    study = made(gold=False)
    tables = tables_of(study, gold=False)
    assert any("gold: not measured" in text for text in texts(sections()["over_optimisation"].draw(study, tables)))
    proxy = sections()["plane"].draw(study, tables)
    assert len(proxy.axes) == 3 and "not measured" not in texts(proxy)  # the plane, its scale and the line
    assert len(sections()["frontier"].draw(study, tables).axes) == 2
    assert "gold" not in sections()["over_optimisation"].reading(study, tables)


@pytest.mark.parametrize(("replicates", "drawn"), [((0,), False), ((0, 1), False), ((0, 1, 2), True)])
def test_intervals_over_replicates_need_three(replicates, drawn):
    study = made(replicates=replicates)
    assert ("95 % t interval" in texts(sections()["frontier"].draw(study, tables_of(study)))) == drawn


def test_equal_input_gives_equal_bytes(small, tmp_path):
    for name in ("claims", "geometry"):
        for folder in ("a", "b"):
            style.save(sections()[name].draw(*small), tmp_path / folder, name)
        for kind in ("png", "pdf"):
            assert (tmp_path / "a" / f"{name}.{kind}").read_bytes() == (tmp_path / "b" / f"{name}.{kind}").read_bytes()


def test_curves_show_the_kl_coef_that_most_arms_have():
    assert style.drawn_kl_coefs(made(kl_coefs=(0.1, 0.05))) == [0.1, 0.05]
    arms = tuple(style.LOOKS)
    assert style.drawn_kl_coefs(made(arms, (0.02, 0.05, 0.1), (0,), only={arms[3]: (0.05, 0.1)})) == [0.05]
    assert style.drawn_kl_coefs(made(arms, (0.02, 0.05), (0,))) == [0.02]
    study = made(arms, (0.1, 0.01, 0.02, 0.05, 0.5), (0,), only={arms[3]: (0.05,)})
    assert style.spread_kl_coefs(study) == [0.01, 0.05, 0.5]


def test_a_collapse_at_the_largest_kl_coef_is_seen(every):
    figure = sections()["lengths_and_ends"].draw(*every)
    axis = next(axis for axis in figure.axes if axis.get_title() == "training, kl_coef 0.5")
    salsa = next(line for line in axis.lines if line.get_color() == style.LOOKS["salsa"].colour)
    assert list(salsa.get_ydata()[[0, -1]]) == pytest.approx([20, 2]) and axis.get_ylim()[0] == 0
    final = next(axis for axis in figure.axes if axis.get_title() == "final policies")
    salsa = [line for line in final.lines if line.get_color() == style.LOOKS["salsa"].colour]
    assert list(salsa[0].get_ydata()) == pytest.approx([20, 20, 0])
    assert "those of ppo at kl_coef 0.5, 0 tokens, where sft0 writes 20" in sections()["lengths_and_ends"].reading(
        *every
    )


def test_many_arms_have_several_panels(every):
    study, tables = every
    figure = sections()["frontier"].draw(study, tables)
    groups = style.arm_panels(study.arms, {"ppo"})
    assert len(figure.axes) == 2 * len(groups) == 6
    colours = {style.LOOKS[arm].colour for arm in groups[0]} | {style.DARK, "black"}  # rings, and the star
    assert {line.get_color() for line in figure.axes[0].lines} == colours
    assert [axis.get_title() for axis in sections()["over_optimisation"].draw(study, tables).axes] == study.arms


def test_training_curves_show_differences_to_plain_ppo_at_the_kl_coef_of_claims(every):
    study, tables = every
    groups = training.curve_groups(study)
    assert [group[0] for group in groups] == ["ppo"] * len(groups) and max(map(len, groups)) <= style.PANEL
    assert {arm for group in groups for arm in group} == set(study.arms)
    figure = sections()["training_curves"].draw(study, tables)
    assert len(figure.axes) == 2 * 3 * len(groups)
    kl, difference = figure.axes[2], figure.axes[5]
    kl_coefs, place = style.claim_kl_coefs(study), study.arms.index("salsa")
    expected = [
        np.mean([(i + 0.1 * k) * ((1 + place) / kl_coefs["salsa"] - 1 / kl_coefs["ppo"]) * 0.01 for k in (0, 1, 2)])
        for i in range(1, 10)
    ]
    line = next(line for line in difference.lines if line.get_color() == style.LOOKS["salsa"].colour)
    assert list(line.get_ydata()[1:]) == pytest.approx(expected) and line.get_ydata()[0] == 0
    assert kl.get_title(loc="left").startswith("KL(policy ‖ sft0)")
    assert "differences to plain PPO, paired by replicate" in sections()["training_curves"].reading(study, tables)
    assert "no bands" in sections()["training_curves"].reading(made(), {})


def test_of_many_replicates_no_one_is_named():
    study = made(replicates=tuple(range(7)))
    axis = sections()["loss_line"].draw(study, tables_of(study)).axes[0]
    assert axis.get_legend_handles_labels()[1] == ["a replicate", "their mean", "interpolated"]
    mean = study.frames.soups.groupby("alpha")["loss"].mean()
    assert any(list(line.get_ydata()) == pytest.approx(list(mean)) for line in axis.lines[7:])


def test_arms_are_split_evenly_into_panels():
    assert style.arm_panels(["ppo", "a"], {"ppo"}) == [["ppo", "a"]]
    groups = style.arm_panels(["ppo", *"abcdefg"], {"ppo"})
    assert groups == [["ppo", *"abcd"], ["ppo", *"efg"]]


def test_axes_of_win_rates_are_spent_on_rates_with_intervals_over_replicates(small):
    study, tables = small
    frame = tables["win_rates"].assign(replicates=3, replicates_low=0.52, replicates_high=0.66)
    panel = sections()["win_rates"].draw(study, tables | {"win_rates": frame}).axes[0]
    rates = frame[frame["baseline"] == frame["baseline"].iloc[0]]["adjusted_win_rate"]
    low, high = panel.get_xlim()
    assert low < rates.min() and rates.max() < high and high - low < 3.5 * max(rates.max() - rates.min(), 0.05)
    assert any(list(line.get_xdata()) == [0.52, 0.66] for line in panel.lines)
    assert win_rates.of_rates({"adjusted_win_rate": 0.6, "ci_low": 0.5, "ci_high": 0.7, "replicates": 1})[1:] == (
        0.5,
        0.7,
    )
    wide = frame.assign(replicates_low=-3.0, replicates_high=4.0)
    low, high = sections()["win_rates"].draw(study, tables | {"win_rates": wide}).axes[0].get_xlim()
    assert low > rates.min() - 2 * max(rates.max() - rates.min(), 0.05) and high < 1.02
    far = frame.assign(adjusted_win_rate=0.9, length_controlled=0.92, replicates_low=0.88, replicates_high=0.93)
    assert sections()["win_rates"].draw(study, tables | {"win_rates": far}).axes[0].get_xlim()[0] > 0.5
    apart = frame.assign(length_controlled=np.nan, adjusted_win_rate=np.where(frame["baseline"] == "sft0", 0.9, 0.5))
    panels = sections()["win_rates"].draw(study, tables | {"win_rates": apart}).axes
    scales = [panel.get_xlim() for panel in panels[:4]]  # two benchmarks against each of two baselines
    assert scales[0] == scales[1] != scales[2] == scales[3]
    near = frame.assign(adjusted_win_rate=0.53, length_controlled=0.54, replicates_low=0.52, replicates_high=0.55)
    assert sections()["win_rates"].draw(study, tables | {"win_rates": near}).axes[0].get_xlim()[0] < 0.5


def test_a_far_sft0_is_named_at_the_edge_of_the_axes():
    study = made()
    for policy in study.policies:
        policy.evaluation |= {"kl_to_sft0": 5 + policy.evaluation["kl_to_sft0"], "gold_reward": 0.5 + policy.replicate}
    gold = sections()["frontier"].draw(study, tables_of(study)).axes[0]
    assert gold.get_xlim()[0] > 4 and gold.get_ylim()[0] > 0.2
    assert [text.get_text() for text in gold.texts] == ["sft0 is outside: KL 0, 0.2"]
    assert gold.lines[-1].get_xdata()[0] == gold.get_xlim()[0] and gold.lines[-1].get_ydata()[0] == gold.get_ylim()[0]


def untrained_study():
    """ppo at two kl_coefs, salsa at one, and the best of n of sft0 at the first kl_coef."""
    study = made(arms=("best", "ppo", "salsa"), kl_coefs=(0.05, 0.1), only={"best": (0.05,)})
    study.config.arms["best"] = config.Arm(algorithm="best_of_n")
    study.config.arms["salsa"] = config.Arm(start=["1/2", "1/2"])
    for policy in study.of(arm="best"):
        drawn = [float(i) for i in range(32)]
        policy.samples = [{"reward": drawn, "gold": None}, {"reward": drawn[::-1], "gold": drawn}]
        policy.metrics, policy.evaluation["iteration"], policy.evaluation["kl_is_bound"] = [], 0, True
    return study


def test_the_best_of_n_is_a_curve_at_its_bound():
    study = untrained_study()
    tables = tables_of(study) | {"best_of_n": table_of(study, "best_of_n")}
    frame = tables["best_of_n"]
    assert list(frame["n"]) == [2, 4, 8, 16, 32] and set(frame["replicates"]) == {2}
    assert list(frame["kl_bound"]) == [math.log(n) - (n - 1) / n for n in frame["n"]]
    assert list(frame["reward"]) == pytest.approx([(32 + 1) * n / (n + 1) - 1 for n in frame["n"]])  # of uniform places
    assert frame["gold_reward"].isna().all()  # of one prompt gold is not known
    axis = sections()["frontier"].draw(study, tables).axes[0]
    assert any(list(line.get_xdata()) == list(frame["kl_bound"]) for line in axis.lines)
    assert "KL of best is not known: it is an upper bound" in sections()["frontier"].caption(study, tables)
    assert "best of 2, 4, 8, 16, 32 responses of sft0" in sections()["frontier"].reading(study, tables)
    assert "have no curve: best." in sections()["training_curves"].caption(study, tables)
    assert "best_of_n" in sections_of(study) and "best_of_n" not in sections_of(made())


def test_an_arm_without_a_penalty_leaves_the_other_its_grid():
    study = untrained_study()
    pair = selection.pair(study, "best", "salsa")
    assert pair.grid == (0.05, 0.1) and pair.candidate_kl_coef == 0.05
    assert selection.pair(study, "salsa", "best").candidate_kl_coef == pair.baseline_kl_coef
    assert study.plain == "ppo" and study.plain_of("best") == "best"
    assert "has one policy, shown at one kl_coef." in sections()["arms"].caption(study, {"arms": ()})
    arms = table_of(study, "arms").set_index("arm")
    assert arms["reference"]["best"] == "none" and math.isnan(arms["kl_scale"]["best"])
    assert set(study.frames.policies.query("arm == 'best'")["reference"]) == {"none"}


def test_merged_policies_of_several_kl_coefs_are_chosen_from_the_shared_ones():
    study = made(arms=("merged", "ppo", "salsa"), kl_coefs=(0.05, 0.1), only={"ppo": (0.05,)})
    study.config.arms["merged"] = config.Arm(start={"policy:salsa": "1"}, algorithm="none")
    pair = selection.pair(study, "merged", "ppo")
    assert pair.grid == (0.05,) and pair.candidate_kl_coef == 0.05  # neither has more tries than the other
    assert selection.pair(study, "salsa", "merged").grid == (0.05, 0.1)
    caption = sections()["arms"].caption(study, {"arms": ()})
    assert caption.endswith("Made of policies with a penalty, and another at each of their kl_coefs: merged.")


def test_trajectories_are_means_over_replicates(small):
    study, tables = small
    means = over_optimisation.trajectories(tables["frontier"])
    for row in means.to_dict("records"):
        own = [r for r in tables["frontier"].to_dict("records")
               if (r["arm"], r["iteration"]) == (row["arm"], row["iteration"])]  # fmt: skip
        assert len(own) == 2 and row["is_final"] == (row["iteration"] == 10)
        for name in ("kl_to_sft0", "reward", "gold_reward"):
            assert row[name] == pytest.approx(sum(r[name] for r in own) / 2)
    # gold starts at 0.2 and is 0.44 at iteration 4, 0.36 at iteration 8 and 0.5 at the end
    start, largest = over_optimisation.gain_scale(study, means, "gold_reward")
    assert (start, largest) == pytest.approx((0.2, 0.3))
    ppo = over_optimisation.scaled(study, means, "gold_reward")[means["arm"] == "ppo"]
    assert list(ppo) == pytest.approx([0, 0.8, 0.16 / 0.3, 1])
    assert "gold ends below its peak in 3 of 3 curves" in sections()["over_optimisation"].reading(study, tables)


def test_an_iteration_that_a_replicate_lacks_is_left_out():
    frame = pd.DataFrame({"arm": "ppo", "kl_coef": 0.1, "iteration": [0, 5, 10, 0, 10], "kl_to_sft0": [0, 1, 2, 0, 4],
                          "reward": 1.0, "gold_reward": 1.0})  # fmt: skip
    means = over_optimisation.trajectories(frame)
    assert means["iteration"].tolist() == [0, 10] and means["kl_to_sft0"].tolist() == [0, 3]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=5, max_size=5), min_size=3, max_size=3))
@settings(deadline=None)
def test_corners_keep_the_distances_of_weight_space(vectors):
    sft0, sft1, end = np.array(vectors, dtype=float)
    side, away = sft1 - sft0, end - sft0
    length = np.linalg.norm(side)
    along = away @ side / length**2 if length else 0.0
    off = np.linalg.norm(away - along * side)
    row = {"arm": "ppo", "kl_coef": 0.1, "sft0_to_sft1": length, "along_sft1": along, "off_line": off}
    at, is_apart = plane.corners(pd.DataFrame([row]), "ppo", 0.1)
    assert is_apart == (length > 0 and off > 0)
    if is_apart:
        drawn = [np.linalg.norm(at[i] - at[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert drawn == pytest.approx([length, np.linalg.norm(away), np.linalg.norm(end - sft1)])
    else:
        assert at is plane.EQUILATERAL


def test_the_plane_is_drawn_where_its_weights_are(small):
    study, tables = small
    figure = sections()["plane"].draw(study, tables)
    proxy, gold = (next(a for a in figure.axes if a.get_title() == f"{name} reward") for name in ("proxy", "gold"))
    points = proxy.lines[0].get_xydata()
    assert len(points) == len(tables["plane"].query("kind == 'plane'")) == 66
    # sft1 lies 4 from sft0, the policy 0.375 of the way to it and 2 off the line: at (1.5, 2)
    for place in ((0, 0), (4, 0), (1.5, 2), (-2, 0), (1.5 * 1.5, 3), (4 * 1.5 - 0.75, -1)):
        assert np.abs(points - place).sum(axis=1).min() == pytest.approx(0, abs=1e-9), place
    assert {"sft0", "sft1", "policy"} == {text.get_text() for text in gold.texts}
    line = next(a for a in figure.axes if a.get_ylabel() == "gold reward")
    assert len(line.lines[0].get_xdata()) == 17 and line.lines[0].get_xdata()[0] == -0.5
    assert "salsa: gold reward is best at weights (0, 0.5, 0.5) of" in sections()["plane"].reading(study, tables)


def test_contours_are_no_closer_than_two_standard_errors():
    frame = plane_frame()[lambda f: f["kind"] == "plane"]
    assert plane.standard_error(frame, "reward") == 0.1  # over prompts, of one replicate
    again = frame.assign(replicate=1, reward=frame["reward"] + 1)
    assert plane.standard_error(pd.concat([frame, again]), "reward") == pytest.approx(0)  # one moved as a whole
    assert np.diff(plane.levels_of(0, 1, 0.01)).max() == pytest.approx(0.2, abs=0.11)
    noisy = plane.levels_of(0, 1, 0.2)
    assert np.diff(noisy) == pytest.approx([0.4] * (len(noisy) - 1)) and noisy[0] == 0 and noisy[-1] > 1
    assert len(plane.levels_of(0, 1, 3)) == 3


def test_points_that_are_no_number_are_left_out(small):
    frame = plane_frame()
    frame.loc[[0, 3], "reward"] = [math.inf, -math.inf]
    again = frame.assign(replicate=1, reward=frame["reward"] + 1)
    means = plane.means_of(pd.concat([frame, again])[lambda f: f["kind"] == "plane"], "reward")
    assert len(means) == 64
    best = means.loc[means["reward"].idxmax()]
    assert best[plane.WEIGHTS].tolist() == [0, 0.5, 0.5] and best["reward"] == pytest.approx(0.5)
    sections()["plane"].draw(small[0], small[1] | {"plane": frame})


def test_rows_of_the_claims(small):
    study, tables = small
    effects = [0.1, 0.2, math.nan, 0.3]
    replicates = pd.DataFrame({"claim": "higher_gold", "outcome": "primary", "measure": "win_rate", "benchmark": "",
                               "replicate": range(4), "effect": effects})  # fmt: skip
    tables = tables | {"replicates": replicates}
    rows = claims_section.drawn_rows(study, tables)
    assert [(row.label, claims_section.verdict_words(row.numbers)) for row in rows] == [
        ("higher gold", "supported"),
        ("preferred", "undecided"),
        ("· in distribution", ""),
        ("· out of distribution", ""),
    ]
    assert rows[0].effects == [0.1, 0.2, 0.3] and rows[1].effects == []
    figure = sections()["claims"].draw(study, tables)
    axis = next(axis for axis in figure.axes if any(text.get_text() == "higher gold" for text in axis.texts))
    assert axis.collections[0].get_offsets()[:, 0].tolist() == [0.1, 0.2, 0.3]
    bar, mean = axis.lines[1:]
    assert list(bar.get_xdata()) == pytest.approx([0.1, 0.3]) and mean.get_xdata()[0] == 0.2
    assert "0.2 (0.1 to 0.3), n 3" in texts(figure) and "Not tested: soup not noise." in texts(figure)
    assert "n is 3 replicates." in sections()["claims"].reading(study, tables)


def test_many_claims_have_no_rows_of_single_benchmarks_and_stay_on_the_page(small):
    study, tables = small
    frame = tables["claims"][:2]
    many = pd.concat([frame.assign(claim=f"claim_{i}", origin="control" if i < 20 else "abstract") for i in range(40)])
    rows = claims_section.drawn_rows(study, tables | {"claims": many})
    assert len(rows) == claims_section.MOST and all(row.primary for row in rows)
    assert [row.numbers["origin"] for row in rows] == ["abstract"] * 20 + ["control"] * 4
    assert tight(sections()["claims"].draw(study, tables | {"claims": many}))[2] < 1.002
    assert "16 more claims stand in the table alone." in sections()["claims"].reading(study, tables | {"claims": many})


def test_a_wide_interval_leaves_a_row_its_replicates():
    numbers = {"effect": 0.2, "effect_low": -9.0, "effect_high": 9.4, "smallest_effect": 0.1}
    low, high = claims_section.row_limits(claims_section.Row("", numbers, [0.1, 0.3]))
    assert -0.5 < low < -0.115 and 0.3 < high < 0.7


def test_length_controlled_rates_are_hollow(small):
    study, tables = small
    panel = sections()["win_rates"].draw(study, tables).axes[0]
    marks = [line for line in panel.lines if line.get_marker() not in ("None", None)]
    hollow = [line for line in marks if line.get_markerfacecolor() == "white"]
    assert [line.get_xdata()[0] for line in hollow] == [0.58] * 3 and len(marks) == 6
    raw = tables["win_rates"].drop(columns="length_controlled")
    assert "length-controlled" not in texts(sections()["win_rates"].draw(study, tables | {"win_rates": raw}))
    assert "moves a rate by at most 0.02." in sections()["win_rates"].reading(study, tables)


def test_win_rates_that_fill_a_page_are_of_the_shared_kl_coef(every, small):
    frame, kl_coefs = win_rates.drawn_rows(every[0], every[1]["win_rates"])
    assert kl_coefs == [0.05] and set(frame["kl_coef"]) == {0.05} and set(frame["candidate"]) == set(style.LOOKS)
    frame, kl_coefs = win_rates.drawn_rows(small[0], small[1]["win_rates"])
    assert len(frame) == len(small[1]["win_rates"])


def test_judged_models_have_the_look_of_their_arm(every):
    study, _ = every
    for model in ("salsa, kl_coef 0.5", "salsa-kl_0.5"):
        assert bradley_terry.model_look(study, model) == (style.LOOKS["salsa"], pytest.approx(1.5))
    assert bradley_terry.model_look(study, "sft0") == (style.NEUTRAL, 1.0)


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=9))
def test_limits_hold_all_values(values):
    known = [value for value in values if value == value]
    found = style.limits(values)
    assert (found is None) == (not known)
    if known:
        assert found[0] < min(known) and max(known) < found[1]


def test_bars_end_where_the_interval_does(small):
    study, tables = small
    axis = sections()["geometry"].draw(made(replicates=(0, 1, 2)), tables).axes[0]
    ends = {tuple(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2}
    assert (pytest.approx(0.365), pytest.approx(0.385)) in [tuple(end) for end in ends]
    axis = sections()["matched_kl"].draw(study, tables).axes[0]
    assert any(list(line.get_xdata()) == pytest.approx([0.02, 0.04]) for line in axis.lines)
    assert any(line.get_marker() == style.LOOKS["salsa"].marker for line in axis.lines)


@pytest.mark.parametrize("label", ["salsa", "grpo_strong_reference", "the best of n responses by the reward model"])
def test_a_legend_of_many_entries_stays_within_the_figure(label):
    figure = Figure(figsize=(7, 3), layout="constrained")
    figure.subplots()
    style.below(figure, [style.mark(f"{label}{i}") for i in range(25)])
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_arms_of_a_study_never_look_alike():
    names = ["ppo", "salsa", "other", "strong_reference", "rounds", "recipe_soup", "greedy_soup"]
    names += [f"warp{part}" for part in ("_a", "_b", "_a_2", "_b_2", "")] + ["best_of_n", "untrained_soup"]
    names += [f"{kind}{name}" for kind in ("rloo", "grpo", "dpo") for name in ("", "_salsa", "_other", "_ema")]
    study = SimpleNamespace(arms=names, of=lambda arm: [SimpleNamespace(alpha=None)])
    looks = style.looks(study)
    assert len({(look.colour, look.line) for look in looks.values()}) == len(names)
    for name in ("salsa", "other"):  # the colour says the reference, the line the algorithm
        assert {looks[f"{kind}_{name}"].colour for kind in ("rloo", "grpo", "dpo")} == {looks[name].colour}
    assert looks["grpo"].colour == looks["ppo"].colour and looks["grpo"].line == looks["grpo_salsa"].line


def test_a_colour_keeps_its_arm_whatever_else_is_there():
    one, all_ = (SimpleNamespace(arms=arms, of=lambda arm: [SimpleNamespace(alpha=None)]) for arms in
                 (["salsa", "grpo_salsa"], ["ppo", "mine", "salsa", "grpo", "grpo_salsa"]))  # fmt: skip
    assert style.looks(one)["grpo_salsa"] == style.looks(all_)["grpo_salsa"] == style.look("grpo_salsa")
