"""Where final policies and soups are: the frontier, rewards and loss over alpha, and the way in weight space."""

import math

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from salsa.report import tables
from salsa.report.figures.style import (
    DARK,
    FEW,
    GOLD,
    GREY,
    KL_OWN,
    KL_SFT0,
    MARKERS,
    NEUTRAL,
    PALE,
    PROXY,
    WIDTH,
    arm_grid,
    bars,
    blank,
    cross,
    has_intervals,
    known,
    legend,
    limits,
    look,
    looks,
    mark,
    measured,
    not_measured,
    panels,
    sizes,
    sqrt_axis,
    styled,
    triple,
)

BEHIND = NEUTRAL._replace(colour=PALE)  # the look of the other arms behind one


@styled
def frontier(study, frames):
    """Final policies: gold and proxy reward against KL to sft0.

    With few arms, beside it against KL to the own reference, every replicate shown. With many, one panel with the
    means of all, then one panel an arm with its replicates before the means of the others.
    """
    frame = measured(frames, "frontier", "kl_to_sft0")
    last = tables.final(frame) if len(frame) else frame
    rewards = [(name, label) for name, label in (("gold_reward", GOLD), ("reward", PROXY)) if known(last, name)]
    if not rewards:
        return not_measured("reward and KL of final policies")
    figure = _few(study, last, rewards) if len(study.arms) <= FEW else _many(study, last, rewards)
    entries = [mark("sft0", "*", 9, color="black"), mark("a replicate", size=4, alpha=0.4)]
    entries.append(mark("their mean", size=7, markeredgecolor="white"))
    if has_intervals(study):
        entries.append(Line2D([], [], color=DARK, linewidth=1.0, marker="+", markersize=9, label="95 % t interval"))
    legend(figure, study, extra=entries)
    return figure


def _few(study, last, rewards):
    figure, axes = panels(len(rewards), 2, sharey="row")
    for row, (reward, label) in enumerate(rewards):
        for column, (kl, kl_label) in enumerate((("kl_to_sft0", KL_SFT0), ("kl_to_reference", KL_OWN))):
            axis = axes[row, column]
            for arm, shown in looks(study).items():
                _replicates(axis, study, last[last["arm"] == arm], kl, reward, shown)
                _means(axis, study, last[last["arm"] == arm], kl, reward, shown, crosses=True)
            if kl == "kl_to_sft0":
                _start_point(axis, study, reward)
            sqrt_axis(axis, last[kl])
            axis.set_ylim(limits([*last[reward], *_start(study, reward)]))
            axis.set_xlabel(kl_label + "  (√ scale)")
        axes[row, 0].set_ylabel(label)
    return figure


def _many(study, last, rewards):
    columns = 5
    rows = math.ceil(len(study.arms) / columns)
    figure = blank(WIDTH, 2.5 + 1.35 * rows + 1.1)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[2.4, 1.35 * rows])
    places = top.subgridspec(1, len(rewards))
    for place, (reward, label) in enumerate(rewards):
        axis = figure.add_subplot(places[place])
        for arm, shown in looks(study).items():
            _means(axis, study, last[last["arm"] == arm], "kl_to_sft0", reward, shown)
        _finish(axis, study, last, reward)
        axis.set_ylabel(label)
        axis.set_xlabel(KL_SFT0 + "  (√ scale)")
    reward, label = rewards[0]
    grid, labels = bottom.subgridspec(rows, columns), ("KL to sft0, nats", label)
    for arm, axis in arm_grid(figure, grid, study.arms, columns, labels).items():
        for other in study.arms:
            _means(axis, study, last[last["arm"] == other], "kl_to_sft0", reward, BEHIND, small=0.4)
        own, shown = last[last["arm"] == arm], looks(study)[arm]
        _replicates(axis, study, own, "kl_to_sft0", reward, shown, small=0.7)
        _means(axis, study, own, "kl_to_sft0", reward, shown, crosses=True, small=0.7)
        _finish(axis, study, last, reward, gap=0.25)
    return figure


def _finish(axis, study, last, reward, gap=0.13):
    _start_point(axis, study, reward)
    sqrt_axis(axis, last["kl_to_sft0"], gap)
    axis.set_ylim(limits([*last[reward], *_start(study, reward)]))


def _replicates(axis, study, frame, kl, reward, shown, small=1.0):
    """Each replicate's final policies, joined over kl_coef: what an interpolation within a replicate would follow."""
    for _, own in frame.sort_values(kl).groupby("replicate"):
        axis.plot(own[kl], own[reward], color=shown.colour, linewidth=0.6, alpha=0.35, zorder=2)
    for kl_coef, size in sizes(study).items():
        some = frame[frame["kl_coef"] == kl_coef]
        axis.scatter(some[kl], some[reward], s=13 * (size * small) ** 2, color=shown.colour, marker=shown.marker,
                     alpha=0.4, linewidths=0)  # fmt: skip


def _means(axis, study, frame, kl, reward, shown, crosses=False, small=1.0):
    means = []
    for kl_coef, size in sizes(study).items():
        some = frame[frame["kl_coef"] == kl_coef]
        if len(some):
            means.append((some[kl].mean(), some[reward].mean(), size * small))
            if crosses and has_intervals(study):
                cross(axis, some[kl], some[reward], shown.colour, zorder=3)
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


@styled
def alpha_curve(study, frames):
    """By alpha: proxy and gold reward and win rate against sft0, of SFT soups before PPO and policies after it; and the
    soups' validation loss."""
    frame = measured(frames, "alpha_curve", "alpha")
    wanted = (("reward", PROXY), ("gold_reward", GOLD), ("win_rate_vs_sft0", "win rate against sft0"),
              ("loss", "validation loss, nats a token"))  # fmt: skip
    shown = [(name, label) for name, label in wanted if known(frame, name)]
    if not shown:
        return not_measured("reward and loss by alpha")
    columns = len(shown) if len(shown) < 4 else 2
    figure, axes = panels(math.ceil(len(shown) / columns), columns, height=2.3)
    for axis, (name, label) in zip(axes.flat, shown, strict=True):
        _soups(axis, study, frame[frame["kind"] == "sft_soup"].dropna(subset=name), name)
        for index, kl_coef in enumerate(study.kl_coefs):
            some = frame[(frame["kind"] == "policy") & (frame["kl_coef"] == kl_coef)]
            _alpha_policies(axis, study, some, name, index)
        if name == "win_rate_vs_sft0":
            axis.axhline(0.5, color=DARK, linewidth=0.9, linestyle="--")
            axis.set_ylim(0, 1)  # an interval over few replicates may reach beyond what a rate can be
        axis.set_xlabel("alpha (0: sft0, 1: sft1)")
        axis.set_ylabel(label)
        axis.set_xlim(-0.08, 1.08)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    soup = Line2D([], [], color=DARK, marker=".", markersize=6, label="SFT soup, before PPO")
    policy = Line2D([], [], color=GREY, marker="o", markersize=5, linewidth=0.9, label="policy, after PPO")
    on_the_line = {policy.arm for policy in study.policies if policy.alpha is not None}
    legend(figure, study, arms=on_the_line, extra=(soup, policy))
    return figure


def _soups(axis, study, frame, name):
    axis.plot(frame["alpha"], frame[name], color=DARK, linestyle="-", marker=".", markersize=6)
    if has_intervals(study) and f"{name}_low" in frame:
        axis.fill_between(frame["alpha"], frame[f"{name}_low"], frame[f"{name}_high"], color=DARK, alpha=0.15, lw=0)


def _alpha_policies(axis, study, frame, name, index):
    frame = frame.dropna(subset=name)
    count = len(study.kl_coefs)
    x = frame["alpha"] + (index - (count - 1) / 2) * 0.03  # so that bars of several kl_coefs stay apart
    size = sizes(study)[study.kl_coefs[index]]
    axis.plot(x, frame[name], color=GREY, linewidth=0.9 * size, zorder=2)
    for place, row in zip(x, frame.to_dict("records"), strict=True):
        arm = next(p.arm for p in study.of(alpha=row["alpha"], kl_coef=row["kl_coef"]))
        shown = look(arm, row["alpha"])
        if has_intervals(study):
            bars(axis, (place, math.nan, math.nan), triple(row, name), shown.colour, linewidth=1.2 * size, zorder=3)
        axis.plot(place, row[name], color=shown.colour, marker=shown.marker, markersize=5 * size, zorder=4)


@styled
def loss_line(study, frames):
    """Validation loss along the line between the SFT models, with the straight line that a barrier rises above."""
    figure, axes = panels(1, 1, width=3.5, height=2.4)
    axis, count = axes[0, 0], len(study.replicates)
    for index, replicate in enumerate(study.replicates):
        line = study.landscape(replicate).line
        c = matplotlib.colormaps["cividis"](0.1 + 0.75 * index / max(count - 1, 1))
        alphas = [row["alpha"] for row in line]
        axis.plot(alphas, [row["loss"] for row in line], color=c, marker=MARKERS[index % len(MARKERS)], markersize=4,
                  label=f"replicate {replicate}")  # fmt: skip
        axis.plot(alphas, [row["loss_interpolated"] for row in line], color=c, linestyle="--", linewidth=0.9)
    axis.plot([], [], color=GREY, linestyle="--", linewidth=0.9, label="interpolated")
    barriers = measured(frames, "gates", "barrier").get("barrier", pd.Series(dtype=float))
    title = (
        f"{'largest ' * (count > 1)}barrier: {barriers.max():.2g} nats a token" if len(barriers) else "no barrier known"
    )
    axis.set_title(title, loc="left")
    axis.set_xlabel("alpha (0: sft0, 1: sft1)")
    axis.set_ylabel("validation loss, nats a token")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.2)
    return figure


@styled
def geometry(study, frames):
    """Where policies went in weight space: how far from sft0, against how far along, and how much towards, sft1."""
    frame = measured(frames, "geometry", "from_sft0")
    shown = [
        (name, label)
        for name, label in (
            ("along_sft1", "place along sft0 → sft1 (0: sft0, 1: sft1)"),
            ("cosine_sft1", "cosine of policy − sft0 and sft1 − sft0"),
        )
        if known(frame, name)
    ]
    if not shown:
        return not_measured("where the policies went in weight space")
    figure, axes = panels(1, len(shown), height=3.2, sharey=True, width=WIDTH if len(shown) > 1 else 3.5)
    apart = frame["sft0_to_sft1"].mean() if known(frame, "sft0_to_sft1") else math.nan
    far = limits([0, *frame["from_sft0"]])
    for axis, (name, label) in zip(axes[0], shown, strict=True):
        for row in frame.dropna(subset=name).to_dict("records"):
            _place(axis, study, row, name)
        axis.set_xlabel(label)
        axis.set_ylim(0, far[1])
        axis.set_xlim(limits([0, *frame[name]], margin=0.12))
        axis.axvline(0, color=DARK, linewidth=0.8, linestyle="--")
        if apart < far[1]:
            axis.axhline(apart, color=GREY, linewidth=0.9, linestyle=":")
    axes[0, 0].set_ylabel("distance from sft0, ‖policy − sft0‖")
    entries = [Line2D([], [], color=GREY, linewidth=0.9, linestyle=":", label=f"‖sft1 − sft0‖: {apart:.3g}")]
    legend(figure, study, arms=set(frame["arm"]), extra=entries if apart == apart else ())
    return figure


def _place(axis, study, row, name):
    shown, size = looks(study)[row["arm"]], sizes(study)[row["kl_coef"]]
    if has_intervals(study):
        bars(axis, triple(row, name), triple(row, "from_sft0"), shown.colour, linewidth=0.8, alpha=0.6, zorder=2)
    axis.plot(row[name], row["from_sft0"], color=shown.colour, marker=shown.marker, markersize=6 * size,
              markeredgecolor="white", markeredgewidth=0.6, linestyle="none", zorder=3)  # fmt: skip
