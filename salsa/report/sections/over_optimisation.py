"""Proxy against gold reward over training: where gold turns down alone, the proxy is over-optimised."""

import math

import numpy as np
from matplotlib.lines import Line2D

from salsa.report import selection, style
from salsa.report.sections import Section

DASHES = (0, (2, 1.2))  # of the proxy's line


def figure(study, tables):
    """Proxy and gold reward over training, a panel per arm: over-optimised where gold turns down alone.

    Both are gains over where the plain anchor starts, in shares of the largest gain of any arm, so that one axis holds
    them; against sqrt(KL), as in Gao et al. (2023), Scaling laws for reward model overoptimization.
    """
    frame = style.measured(tables, "frontier", "kl_to_sft0", "reward")
    if frame.empty:
        return None
    means = trajectories(frame)
    gains = {name: scaled(study, means, name) for name in ("gold_reward", "reward") if style.known(means, name)}
    means = means.assign(**{f"{name}_gain": gain for name, gain in gains.items()})
    arms = [arm for arm in study.arms if arm in set(means["arm"])]
    columns = len(arms) if len(arms) <= 3 else 3 if len(arms) <= 6 else 4 if len(arms) <= 8 else 5
    rows = math.ceil(len(arms) / columns)
    figure = style.blank(style.WIDTH, min(style.TALLEST, (2.2 if rows == 1 else 1.55) * rows + 0.9))
    limits = style.limits(np.concatenate(list(gains.values())))
    labels = ("KL to sft0, nats", "share of the largest gain")
    for arm, axis in style.arm_grid(figure, figure.add_gridspec(rows, columns), arms, columns, labels).items():
        axis.axhline(0, color=style.DARK, linewidth=0.7)
        for kl_coef, size in style.sizes(study.kl_coefs).items():
            curve = means[(means["arm"] == arm) & (means["kl_coef"] == kl_coef)]
            for name in gains:
                _draw_trajectory(axis, curve, name, style.looks(study)[arm], size)
        style.sqrt_axis(axis, means["kl_to_sft0"], gap=0.13 if columns <= 3 else 0.25)
        axis.set_ylim(limits)
    style.legend(figure, study, arms=(), extra=_entries(gold="gold_reward" in gains))
    return figure


def _entries(gold):
    """The legend's entries of curves and marks."""
    entries = [
        Line2D([], [], color=style.DARK, linewidth=1.3, label="gold in training"),
        style.mark("gold, final policy"),
    ]
    if not gold:
        entries = [Line2D([], [], linestyle="none", label="gold: not measured")]
    proxy = Line2D([], [], color=style.DARK, linewidth=1.0, linestyle=DASHES, label="proxy in training")
    return [*entries, proxy, style.mark("proxy, final policy", markerfacecolor="white")]


def trajectories(frame):
    """Means over replicates of the frontier: arm, kl_coef, iteration, kl_to_sft0, reward, gold_reward, is_final.

    Only iterations that all replicates of an arm at a kl_coef have.
    """
    keys = ["arm", "kl_coef", "iteration"]
    means = frame.groupby(keys, sort=False)[["kl_to_sft0", "reward", "gold_reward"]].mean().reset_index()
    means["count"] = frame.groupby(keys, sort=False).size().to_numpy()
    curves = means.groupby(keys[:2], sort=False)
    means["is_final"] = means["iteration"] == curves["iteration"].transform("max")
    means = means[means["count"] == curves["count"].transform("max")]
    return means.drop(columns="count").sort_values(keys, kind="stable").reset_index(drop=True)


def scaled(study, means, name):
    """Gains of a measure (N,) over the start of the plain anchor (or the first arm), in shares of the largest gain."""
    start, largest = gain_scale(study, means, name)
    return (means[name].to_numpy() - start) / largest


def gain_scale(study, means, name):
    """(start, largest gain) of a measure, in its own unit."""
    rows = means[means["arm"] == study.plain].dropna(subset=name)
    rows = rows if len(rows) else means.dropna(subset=name)
    start = rows.loc[rows["iteration"] == rows["iteration"].min(), name].mean()
    largest = means[name].max() - start
    return start, largest if largest > 0 else 1.0


def _draw_trajectory(axis, curve, name, look, size):
    gold, gain = name == "gold_reward", f"{name}_gain"
    training, final = curve[~curve["is_final"]], curve[curve["is_final"]]
    line, face = ("-", look.colour) if gold else (DASHES, "white")
    axis.plot(training["kl_to_sft0"], training[gain], color=look.colour, linestyle=line, linewidth=1.3 * size)
    axis.plot(final["kl_to_sft0"], final[gain], color=look.colour, marker=look.marker, linestyle="none",
              markersize=4.5 * size, markerfacecolor=face, markeredgewidth=0.9)  # fmt: skip


def caption(study, tables):
    return (
        "Proxy and gold reward over training against KL to sft0, as shares of the largest gain of any arm: where gold "
        "turns down while the proxy rises, the proxy is over-optimised."
    )


def reading(study, tables):
    frame = style.measured(tables, "frontier", "kl_to_sft0", "reward")
    if frame.empty:
        return ""
    means = trajectories(frame)
    gains = [
        f"{selection.number(gain_scale(study, means, name)[1])} of {text}"
        for name, text in (("gold_reward", "gold"), ("reward", "proxy reward"))
        if style.known(means, name)
    ]
    text = f"1 is a gain of {' and '.join(gains)}; lines are means over replicates, marks the final policies"
    training = means[~means["is_final"]].dropna(subset="gold_reward")
    if len(training):
        curves = training.groupby(["arm", "kl_coef"])["gold_reward"]
        turned = int((curves.max() > curves.last()).sum())
        text += f"; in training, gold ends below its peak in {turned} of {len(curves)} curves"
    return text + "."


SECTION = Section(
    name="over_optimisation",
    heading="Rewards and KL",
    place=4,
    figure=figure,
    caption=caption,
    reading=reading,
)
