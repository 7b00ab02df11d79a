"""Where final policies are: gold and proxy reward against KL to sft0."""

import math

import numpy as np
from matplotlib.lines import Line2D

from salsa.report import style, tables, words
from salsa.report.sections import Section

BEHIND = style.NEUTRAL._replace(colour=style.PALE)  # the look of the other arms behind one


def frontier(study, frames):
    """Final policies: gold and proxy reward against KL to sft0.

    With few arms, beside it against KL to the own reference, every replicate shown. With many, one panel with the
    means of all, then one panel an arm with its replicates before the means of the others.
    """
    frame = style.measured(frames, "frontier", "kl_to_sft0")
    last = tables.final(frame) if len(frame) else frame
    rewards = [
        (name, label)
        for name, label in (("gold_reward", style.GOLD), ("reward", style.PROXY))
        if style.known(last, name)
    ]
    if not rewards:
        return style.not_measured("reward and KL of final policies")
    figure = _few(study, last, rewards) if len(study.arms) <= style.FEW else _many(study, last, rewards)
    entries = [style.mark("sft0", "*", 9, color="black"), style.mark("a replicate", size=4, alpha=0.4)]
    entries.append(style.mark("their mean", size=7, markeredgecolor="white"))
    if style.has_intervals(study):
        entries.append(
            Line2D([], [], color=style.DARK, linewidth=1.0, marker="+", markersize=9, label="95 % t interval")
        )
    style.legend(figure, study, extra=entries)
    return figure


def _few(study, last, rewards):
    figure, axes = style.panels(len(rewards), 2, sharey="row")
    for row, (reward, label) in enumerate(rewards):
        for column, (kl, kl_label) in enumerate((("kl_to_sft0", style.KL_SFT0), ("kl_to_reference", style.KL_OWN))):
            axis = axes[row, column]
            for arm, shown in style.looks(study).items():
                _replicates(axis, study, last[last["arm"] == arm], kl, reward, shown)
                _means(axis, study, last[last["arm"] == arm], kl, reward, shown, crosses=True)
            if kl == "kl_to_sft0":
                _start_point(axis, study, reward)
            style.sqrt_axis(axis, last[kl])
            axis.set_ylim(style.limits([*last[reward], *_start(study, reward)]))
            axis.set_xlabel(kl_label + "  (√ scale)")
        axes[row, 0].set_ylabel(label)
    return figure


def _many(study, last, rewards):
    columns = 5
    rows = math.ceil(len(study.arms) / columns)
    figure = style.blank(style.WIDTH, 2.5 + 1.35 * rows + 1.1)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[2.4, 1.35 * rows])
    places = top.subgridspec(1, len(rewards))
    for place, (reward, label) in enumerate(rewards):
        axis = figure.add_subplot(places[place])
        for arm, shown in style.looks(study).items():
            _means(axis, study, last[last["arm"] == arm], "kl_to_sft0", reward, shown)
        _finish(axis, study, last, reward)
        axis.set_ylabel(label)
        axis.set_xlabel(style.KL_SFT0 + "  (√ scale)")
    reward, label = rewards[0]
    grid, labels = bottom.subgridspec(rows, columns), ("KL to sft0, nats", label)
    for arm, axis in style.arm_grid(figure, grid, study.arms, columns, labels).items():
        for other in study.arms:
            _means(axis, study, last[last["arm"] == other], "kl_to_sft0", reward, BEHIND, small=0.4)
        own, shown = last[last["arm"] == arm], style.looks(study)[arm]
        _replicates(axis, study, own, "kl_to_sft0", reward, shown, small=0.7)
        _means(axis, study, own, "kl_to_sft0", reward, shown, crosses=True, small=0.7)
        _finish(axis, study, last, reward, gap=0.25)
    return figure


def _finish(axis, study, last, reward, gap=0.13):
    _start_point(axis, study, reward)
    style.sqrt_axis(axis, last["kl_to_sft0"], gap)
    axis.set_ylim(style.limits([*last[reward], *_start(study, reward)]))


def _replicates(axis, study, frame, kl, reward, shown, small=1.0):
    """Each replicate's final policies, joined over kl_coef: what an interpolation within a replicate would follow."""
    for _, own in frame.sort_values(kl).groupby("replicate"):
        axis.plot(own[kl], own[reward], color=shown.colour, linewidth=0.6, alpha=0.35, zorder=2)
    for kl_coef, size in style.sizes(study).items():
        some = frame[frame["kl_coef"] == kl_coef]
        axis.scatter(some[kl], some[reward], s=13 * (size * small) ** 2, color=shown.colour, marker=shown.marker,
                     alpha=0.4, linewidths=0)  # fmt: skip


def _means(axis, study, frame, kl, reward, shown, crosses=False, small=1.0):
    means = []
    for kl_coef, size in style.sizes(study).items():
        some = frame[frame["kl_coef"] == kl_coef]
        if len(some):
            means.append((some[kl].mean(), some[reward].mean(), size * small))
            if crosses and style.has_intervals(study):
                style.cross(axis, some[kl], some[reward], shown.colour, zorder=3)
    means.sort(key=lambda point: point[0])
    axis.plot([m[0] for m in means], [m[1] for m in means], color=shown.colour, linestyle=shown.line, linewidth=1.1,
              zorder=3)  # fmt: skip
    for x, y, size in means:
        axis.plot(x, y, marker=shown.marker, markersize=7 * size, color=shown.colour, markeredgecolor="white",
                  markeredgewidth=0.8 * small, zorder=4)  # fmt: skip


def _start(study, reward):
    return [line[reward] for line in tables.line_rows(study, 0.0) if line[reward] == line[reward]]


def _start_point(axis, study, reward):
    values = _start(study, reward)
    if values:
        axis.plot(0, np.mean(values), marker="*", markersize=9, color="black", clip_on=False, zorder=5)


def caption(study, frames):
    last = tables.final(frames["frontier"])
    return (
        f"{len(last)} final policies of {words.replicates(study)}: KL(policy ‖ sft0) from "
        f"{words.spread(last['kl_to_sft0'])} nats a response, gold reward {words.spread(last['gold_reward'])}, proxy "
        f"reward {words.spread(last['reward'])}; KL to the own reference is not comparable between references."
    )


def reading(study, frames):
    frame = style.measured(frames, "frontier", "kl_to_sft0")
    if frame.empty:
        return ""
    last = tables.final(frame)
    farthest = last.loc[last["kl_to_sft0"].idxmax()]
    text = f"The farthest policy is of {farthest['arm']} at kl_coef {farthest['kl_coef']:g}"
    if style.has_intervals(study):
        text += f"; crosses are 95 % t intervals of the means of KL and reward, and {style.CUT}"
    if len(study.arms) > style.FEW:
        text += "; above, the means of all arms, below, each arm and its replicates before the means of the others"
    return text + "."


SECTION = Section(
    name="frontier",
    heading="Rewards and KL",
    place=2,
    table=tables.frontier,
    rows=tables.final,
    left_out=("model", "data", "iteration"),
    figure=frontier,
    caption=caption,
    reading=reading,
)
