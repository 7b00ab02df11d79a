"""Where final policies are: gold and proxy reward against KL to sft0."""

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
    """Final policies: gold and proxy reward against KL to sft0, and with few arms, to the own reference.

    At most `style.PANEL` arms stand in a panel, and of many arms each group has a row. A ring marks the kl_coef of
    claims. The axes hold the policies; where sft0 lies outside, it is named at the edge.
    """
    frame = style.measured(tables, "frontier", "kl_to_sft0")
    last = selection.seed_means(final(frame), ["arm", "kl_coef"], [*KLS, *REWARDS]) if len(frame) else frame
    rewards = {name: label for name, label in REWARDS.items() if style.known(last, name)}
    if not rewards:
        return None
    curve = best_of_n(study, tables)
    groups = style.arm_panels(study.arms, {*study.plain_arms.values()})
    if len(groups) == 1:
        cells = [[(study.arms, kl, reward) for kl in KLS] for reward in rewards]
    else:
        cells = [[(arms, "kl_to_sft0", reward) for reward in rewards] for arms in groups]
    height = min(2.6, (style.TALLEST - 1) / len(cells))
    figure, axes = style.panels(len(cells), len(cells[0]), height=height)
    for row, panels in zip(axes, cells, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            _draw_panel(axis, study, last, curve, *panel)
    style.legend(figure, study, extra=_entries(study, curve))
    return figure


def _entries(study, curve):
    entries = [style.mark("a replicate", size=4, alpha=0.4), style.mark("their mean", size=7, markeredgecolor="white")]
    if len(study.kl_coefs) > 1:
        entries.append(style.mark("kl_coef of the claims", size=9, markerfacecolor="none", markeredgewidth=1.0))
    if style.has_intervals(study):
        entries.append(style.mark("95 % t interval", "+", 9, linestyle="-", linewidth=1.0))
    if len(curve):
        entries.append(style.mark("best of 2, 4, …: KL's bound", ".", 5, linestyle="--", linewidth=0.9))
    return entries


def best_of_n(study, tables):
    """The rows of the table best_of_n whose responses are drawn from sft0, from which their KL is then bounded."""
    frame = tables.get("best_of_n", pd.DataFrame(columns=["arm", "kl_bound", *REWARDS]))
    return frame[frame["arm"].isin([arm for arm in study.arms if study.plain_of(arm) == arm])]


def _draw_panel(axis, study, last, curve, arms, kl, reward):
    """Some arms' policies: a reward against a KL, with the axes that all arms need."""
    for arm in arms:
        rows, look = last[last["arm"] == arm], style.looks(study)[arm]
        _draw_replicates(axis, study, rows, kl, reward, look)
        _draw_means(axis, study, rows, kl, reward, look, crosses=True)
    drawn = curve if kl == "kl_to_sft0" else curve[:0]
    for arm, points in drawn.groupby("arm", sort=False):
        axis.plot(points["kl_bound"], points[reward], color=style.looks(study)[arm].colour, marker=".", markersize=4,
                  linestyle="--", linewidth=0.9, zorder=2)  # fmt: skip
    own = last[last["arm"].isin(arms)]
    style.sqrt_axis(axis, [*own[kl], *drawn["kl_bound"]], low=True)
    axis.set_ylim(style.limits([*own[reward], *drawn[reward]], margin=0.12))
    axis.set_xlabel(KLS[kl] + "  (√ scale)", fontsize=7.5)
    axis.set_ylabel(REWARDS[reward])
    if kl == "kl_to_sft0":
        _name_sft0(axis, study, reward)


def _name_sft0(axis, study, reward):
    """A star where sft0 is, at KL 0 to itself; where that lies outside the axes, at their edge, with its reward."""
    soups = study.frames.soups
    start = soups[np.isclose(soups["alpha"], 0, atol=1e-6)][reward].dropna()
    if start.empty:
        return
    (left, _), (low, high), level = axis.get_xlim(), axis.get_ylim(), float(start.mean())
    axis.plot(left, min(max(level, low), high), marker="*", markersize=9, color="black", clip_on=False, zorder=5)
    if left > 0 or not low <= level <= high:
        at = 0.03 if level < low else 0.97 if level > high else (level - low) / (high - low)
        words = f"sft0 is outside: KL 0, {selection.number(level)}"
        axis.annotate(words, (0.03, at), xycoords="axes fraction", fontsize=7, va="top" if at > 0.9 else "bottom")


def _draw_replicates(axis, study, frame, kl, reward, look, scale=1.0):
    """Each replicate's final policies, joined over kl_coef: what an interpolation within a replicate would follow."""
    faint = 0.35 if frame["replicate"].nunique() < style.FEW else 0.12  # many would hide the means
    for _, rows in frame.sort_values(kl).groupby("replicate"):
        axis.plot(rows[kl], rows[reward], color=look.colour, linewidth=0.6, alpha=faint, zorder=2)
    for kl_coef, size in style.sizes(study.kl_coefs).items():
        rows = frame[frame["kl_coef"] == kl_coef]
        axis.scatter(rows[kl], rows[reward], s=13 * (size * scale) ** 2, color=look.colour, marker=look.marker,
                     alpha=max(faint, 0.25), linewidths=0)  # fmt: skip


def _draw_means(axis, study, frame, kl, reward, look, crosses=False, scale=1.0):
    means, claimed = [], style.claim_kl_coefs(study)
    for kl_coef, size in style.sizes(study.kl_coefs).items():
        rows = frame[frame["kl_coef"] == kl_coef]
        if len(rows):
            means.append((rows[kl].mean(), rows[reward].mean(), size * scale))
            if claimed[rows["arm"].iloc[0]] == kl_coef and len(study.kl_coefs) > 1:
                axis.plot(*means[-1][:2], marker="o", markersize=7 * size * scale + 5, color=style.DARK,
                          markerfacecolor="none", markeredgewidth=0.9, zorder=5)  # fmt: skip
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
    if len(study.kl_coefs) > 1:
        text += "; a ring marks the kl_coef at which claims compare an arm"
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
