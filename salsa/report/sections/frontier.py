"""Where final policies are: gold and proxy reward against KL to sft0."""

import math

import numpy as np
import pandas as pd

from salsa.report import selection, style, words
from salsa.report.frames import identity
from salsa.report.sections import Section

KEY = ["name", "replicate", "seed"]  # of a policy, in every frame
COLUMNS = [
    "model",
    "data",
    "arm",
    "kl_coef",
    "replicate",
    "seed",
    "iteration",
    "kl_to_reference",
    "kl_to_sft0",
    "reward",
    "gold_reward",
    "response_length",
    "eos_rate",
]
KLS = {"kl_to_sft0": style.KL_SFT0, "kl_to_reference": style.KL_OWN}
REWARDS = {"gold_reward": style.GOLD, "reward": style.PROXY}
BACKGROUND = style.NEUTRAL._replace(colour=style.PALE)  # the look of the other arms in the panel of one


def table(study):
    """Trajectory rows at the iterations whose rollouts were kept, then the final policy on evaluation prompts."""
    policies, rows = study.frames.policies.set_index(KEY), study.frames.trajectories
    rows = rows.join(policies["iteration"].rename("last"), on=KEY)
    training = dict(list(rows[rows["kept"] & (rows["iteration"] < rows["last"])].groupby(KEY)))
    keys = [(policy.name, policy.replicate, policy.seed) for policy in study.policies]
    parts = [part for key in keys for part in (training.get(key), policies.loc[[key]].reset_index())]
    return pd.concat(parts).assign(**identity(study))[COLUMNS].reset_index(drop=True)


def final(frame):
    """The rows of final policies: the last iteration of each (arm, kl_coef, replicate, training seed)."""
    keys = [key for key in ("arm", "kl_coef", "replicate", "seed") if key in frame]
    return frame[frame["iteration"] == frame.groupby(keys)["iteration"].transform("max")]


def figure(study, tables):
    """Final policies: gold and proxy reward against KL to sft0.

    With few arms, beside it against KL to the own reference, every replicate shown. With many, one panel with the
    means of all, then one panel per arm with its replicates before the means of the others.
    """
    frame = style.measured(tables, "frontier", "kl_to_sft0")
    last = selection.seed_means(final(frame), ["arm", "kl_coef"], [*KLS, *REWARDS]) if len(frame) else frame
    rewards = {name: label for name, label in REWARDS.items() if style.known(last, name)}
    if not rewards:
        return None
    curve = best_of_n(study, tables)
    figure = (_of_few_arms if len(study.arms) <= style.FEW else _of_many_arms)(study, last, rewards, curve)
    entries = [style.mark("sft0", "*", 9, color="black"), style.mark("a replicate", size=4, alpha=0.4)]
    entries.append(style.mark("their mean", size=7, markeredgecolor="white"))
    if style.has_intervals(study):
        entries.append(style.mark("95 % t interval", "+", 9, linestyle="-", linewidth=1.0))
    if len(curve):
        entries.append(style.mark("best of 2, 4, …: KL's bound", ".", 5, linestyle="--", linewidth=0.9))
    style.legend(figure, study, extra=entries)
    return figure


def best_of_n(study, tables):
    """The rows of the table best_of_n whose responses are drawn from sft0, from which their KL is then bounded."""
    frame = tables.get("best_of_n", pd.DataFrame(columns=["arm", "kl_bound", *REWARDS]))
    return frame[frame["arm"].isin([arm for arm in study.arms if study.plain_of(arm) == arm])]


def _of_few_arms(study, last, rewards, curve):
    figure, axes = style.panels(len(rewards), 2, sharey="row")
    for row, (reward, label) in enumerate(rewards.items()):
        for axis, (kl, kl_label) in zip(axes[row], KLS.items(), strict=True):
            for arm, look in style.looks(study).items():
                rows = last[last["arm"] == arm]
                _draw_replicates(axis, study, rows, kl, reward, look)
                _draw_means(axis, study, rows, kl, reward, look, crosses=True)
            _finish(axis, study, last, kl, reward, curve)
            axis.set_xlabel(kl_label + "  (√ scale)")
        axes[row, 0].set_ylabel(label)
    return figure


def _of_many_arms(study, last, rewards, curve):
    columns, looks = 5, style.looks(study)
    rows = math.ceil(len(looks) / columns)
    figure = style.blank(style.WIDTH, 2.5 + 1.35 * rows + 1.1)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[2.4, 1.35 * rows])
    for cell, (reward, label) in zip(top.subgridspec(1, len(rewards)), rewards.items(), strict=True):
        axis = figure.add_subplot(cell)
        for arm, look in looks.items():
            _draw_means(axis, study, last[last["arm"] == arm], "kl_to_sft0", reward, look)
        _finish(axis, study, last, "kl_to_sft0", reward, curve)
        axis.set_ylabel(label)
        axis.set_xlabel(style.KL_SFT0 + "  (√ scale)")
    reward, label = next(iter(rewards.items()))
    grid, labels = bottom.subgridspec(rows, columns), ("KL to sft0, nats", label)
    for arm, axis in style.arm_grid(figure, grid, study.arms, columns, labels).items():
        for other in study.arms:
            _draw_means(axis, study, last[last["arm"] == other], "kl_to_sft0", reward, BACKGROUND, scale=0.4)
        policies = last[last["arm"] == arm]
        _draw_replicates(axis, study, policies, "kl_to_sft0", reward, looks[arm], scale=0.7)
        _draw_means(axis, study, policies, "kl_to_sft0", reward, looks[arm], crosses=True, scale=0.7)
        _finish(axis, study, last, "kl_to_sft0", reward, curve, gap=0.25)
    return figure


def _finish(axis, study, last, kl, reward, curve, gap=0.13):
    """The axes' limits, the best of n, and a star where sft0 is, at KL 0 to itself."""
    soups = study.frames.soups
    start = soups[np.isclose(soups["alpha"], 0, atol=1e-6)][reward].dropna()
    if len(start) and kl == "kl_to_sft0":
        axis.plot(0, start.mean(), marker="*", markersize=9, color="black", clip_on=False, zorder=5)
    drawn = curve if kl == "kl_to_sft0" else curve[:0]  # though panels of one row share their y
    for arm, points in drawn.groupby("arm", sort=False):
        axis.plot(points["kl_bound"], points[reward], color=style.looks(study)[arm].colour, marker=".", markersize=4,
                  linestyle="--", linewidth=0.9, zorder=2)  # fmt: skip
    style.sqrt_axis(axis, [*last[kl], *drawn["kl_bound"]], gap)
    axis.set_ylim(style.limits([*last[reward], *start, *curve[reward]]))


def _draw_replicates(axis, study, frame, kl, reward, look, scale=1.0):
    """Each replicate's final policies, joined over kl_coef: what an interpolation within a replicate would follow."""
    for _, rows in frame.sort_values(kl).groupby("replicate"):
        axis.plot(rows[kl], rows[reward], color=look.colour, linewidth=0.6, alpha=0.35, zorder=2)
    for kl_coef, size in style.sizes(study.kl_coefs).items():
        rows = frame[frame["kl_coef"] == kl_coef]
        axis.scatter(rows[kl], rows[reward], s=13 * (size * scale) ** 2, color=look.colour, marker=look.marker,
                     alpha=0.4, linewidths=0)  # fmt: skip


def _draw_means(axis, study, frame, kl, reward, look, crosses=False, scale=1.0):
    means = []
    for kl_coef, size in style.sizes(study.kl_coefs).items():
        rows = frame[frame["kl_coef"] == kl_coef]
        if len(rows):
            means.append((rows[kl].mean(), rows[reward].mean(), size * scale))
            if crosses and style.has_intervals(study):
                style.cross(axis, rows[kl], rows[reward], look.colour, zorder=3)
    means.sort(key=lambda point: point[0])
    axis.plot([x for x, _, _ in means], [y for _, y, _ in means], color=look.colour, linestyle=look.line,
              linewidth=1.1, zorder=3)  # fmt: skip
    for x, y, size in means:
        axis.plot(x, y, marker=look.marker, markersize=7 * size, color=look.colour, markeredgecolor="white",
                  markeredgewidth=0.8 * scale, zorder=4)  # fmt: skip


def caption(study, tables):
    last = final(tables["frontier"])
    return (
        f"{len(last)} final policies of {words.replicates_by_arm(study)}: KL(policy ‖ sft0) from "
        f"{words.spread(last['kl_to_sft0'])} nats per response, gold reward {words.spread(last['gold_reward'])}, proxy "
        f"reward {words.spread(last['reward'])}; KL to the own reference is not comparable between references."
    ) + words.bounds(study)


def reading(study, tables):
    frame = style.measured(tables, "frontier", "kl_to_sft0")
    if frame.empty:
        return ""
    last = final(frame)
    farthest = last.loc[last["kl_to_sft0"].idxmax()]
    text = f"The farthest policy is of {farthest['arm']} at kl_coef {farthest['kl_coef']:g}"
    if style.has_intervals(study):
        text += f"; crosses are 95 % t intervals of the means of KL and reward, and {style.CUT}"
    if len(study.arms) > style.FEW:
        text += "; above are the means of all arms, below each arm and its replicates before the means of the others"
    curve = best_of_n(study, tables)
    if len(curve):
        numbers = ", ".join(map(str, curve["n"].drop_duplicates()))
        text += f"; the dashed line is the best of {numbers} responses of sft0, at the upper bound of its KL"
    return text + "."


SECTION = Section(
    name="frontier",
    heading="Rewards and KL",
    place=2,
    table=table,
    rows=final,
    left_out=("model", "data", "iteration"),
    figure=figure,
    caption=caption,
    reading=reading,
)
