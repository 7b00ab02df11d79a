"""Proxy against gold reward over training: where gold turns down alone, the proxy is over-optimised."""

import math

import numpy as np
from matplotlib.lines import Line2D

from salsa.report import selection, style
from salsa.report.sections import Section


def over_optimisation(study, frames):
    """Proxy and gold reward over training, a panel an arm: over-optimised where gold turns down alone.

    Both are gains over where plain PPO starts, in shares of the largest gain of any arm, so that one axis holds them;
    against sqrt(KL), as in Gao et al. (2023), Scaling laws for reward model overoptimization.
    """
    frame = style.measured(frames, "frontier", "kl_to_sft0", "reward")
    if frame.empty:
        return style.not_measured("proxy and gold reward over training")
    means = trajectories(frame)
    gains = {name: scaled(study, means, name) for name in ("gold_reward", "reward") if style.known(means, name)}
    arms = [arm for arm in study.arms if arm in set(means["arm"])]
    columns = len(arms) if len(arms) <= 3 else 4 if len(arms) <= 8 else 5
    rows = math.ceil(len(arms) / columns)
    figure = style.blank(style.WIDTH, min(style.TALLEST, (2.2 if rows == 1 else 1.55) * rows + 0.9))
    ends = style.limits(np.concatenate(list(gains.values())))
    labels = ("KL to sft0, nats", "share of the largest gain")
    for arm, axis in style.arm_grid(figure, figure.add_gridspec(rows, columns), arms, columns, labels).items():
        axis.axhline(0, color=style.DARK, linewidth=0.7)
        for kl_coef, size in style.sizes(study).items():
            chosen = (means["arm"] == arm) & (means["kl_coef"] == kl_coef)
            for name, gain in gains.items():
                own = means[chosen].assign(gain=gain[chosen.to_numpy()])
                _trajectory(axis, own, style.looks(study)[arm], size, gold=name == "gold_reward")
        style.sqrt_axis(axis, means["kl_to_sft0"], gap=0.13 if columns <= 3 else 0.25)
        axis.set_ylim(ends)
    entries = [
        Line2D([], [], color=style.DARK, linewidth=1.3, label="gold in training"),
        style.mark("gold, final policy"),
    ]
    if "gold_reward" not in gains:
        entries = [Line2D([], [], linestyle="none", label="gold: not measured")]
    entries += [
        Line2D([], [], color=style.DARK, linewidth=1.0, linestyle=(0, (2, 1.2)), label="proxy in training"),
        style.mark("proxy, final policy", markerfacecolor="white"),
    ]
    style.legend(figure, study, arms=(), extra=entries)
    return figure


def trajectories(frame):
    """Means over replicates of the frontier frame: arm, kl_coef, iteration, kl_to_sft0, reward, gold_reward, is_final.

    Only iterations that all replicates of an arm at a kl_coef have.
    """
    keys = ["arm", "kl_coef", "iteration"]
    found = frame.groupby(keys, sort=False)[["kl_to_sft0", "reward", "gold_reward"]].mean().reset_index()
    found["count"] = frame.groupby(keys, sort=False).size().to_numpy()
    runs = found.groupby(keys[:2], sort=False)
    found["is_final"] = found["iteration"] == runs["iteration"].transform("max")
    found = found[found["count"] == runs["count"].transform("max")]
    return found.drop(columns="count").sort_values(keys, kind="stable").reset_index(drop=True)


def scaled(study, means, name):
    """Gains of a measure (N,) over where plain PPO (or else the first arm) starts, in shares of the largest gain."""
    base, largest = gain_scale(study, means, name)
    return (means[name].to_numpy() - base) / largest


def gain_scale(study, means, name):
    """(start, largest gain) of a measure, in its own unit."""
    own = means[means["arm"] == study.plain].dropna(subset=name)
    own = own if len(own) else means.dropna(subset=name)
    base = own.loc[own["iteration"] == own["iteration"].min(), name].mean()
    largest = means[name].max() - base
    return base, largest if largest > 0 else 1.0


def _trajectory(axis, frame, shown, size, gold):
    training, final = frame[~frame["is_final"]], frame[frame["is_final"]]
    line = "-" if gold else (0, (2, 1.2))
    axis.plot(training["kl_to_sft0"], training["gain"], color=shown.colour, linestyle=line, linewidth=1.3 * size)
    face = shown.colour if gold else "white"
    axis.plot(final["kl_to_sft0"], final["gain"], color=shown.colour, marker=shown.marker, linestyle="none",
              markersize=4.5 * size, markerfacecolor=face, markeredgewidth=0.9)  # fmt: skip


def caption(study, frames):
    return (
        "Proxy and gold reward over training against KL to sft0, as shares of the largest gain of any arm: where gold "
        "turns down while the proxy rises, the proxy is over-optimised."
    )


def reading(study, frames):
    frame = style.measured(frames, "frontier", "kl_to_sft0", "reward")
    if frame.empty:
        return ""
    means = trajectories(frame)
    parts = [
        f"{selection.number(gain_scale(study, means, name)[1])} of {text}"
        for name, text in (("gold_reward", "gold"), ("reward", "proxy reward"))
        if style.known(means, name)
    ]
    text = f"1 is a gain of {' and '.join(parts)}; lines are means over replicates, marks the final policies"
    training = means[~means["is_final"]].dropna(subset="gold_reward")
    if len(training):
        peaks = training.groupby(["arm", "kl_coef"])["gold_reward"]
        turned = int((peaks.max() > peaks.last()).sum())
        text += f"; in training, gold ends below its peak in {turned} of {len(peaks)} curves"
    return text + "."


SECTION = Section(
    name="over_optimisation",
    heading="Rewards and KL",
    place=4,
    figure=over_optimisation,
    caption=caption,
    reading=reading,
)
