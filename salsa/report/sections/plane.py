"""Reward over the plane of weights through sft0, sft1 and a policy, and along the line from sft0 through the policy."""

import math

import numpy as np
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section

EQUILATERAL = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])


WEIGHTS = ["w_sft0", "w_sft1", "w_policy"]


REWARDS = (("reward", "proxy reward"), ("gold_reward", "gold reward"))


def plane(study, frames):
    """Per arm that spans a plane: contours of proxy and of gold reward over it, and both along sft0 → policy.

    After Garipov et al. (2018, arXiv 1802.10026, figure 1): an orthonormal basis of the plane through three models, so
    that distances are those of weight space. Points of several replicates are averaged at equal weights.
    """
    frame = style.measured(frames, "plane", "reward", *WEIGHTS)
    if frame.empty:
        return style.not_measured("reward on the plane through sft0, sft1 and a policy")
    spans = list(frame.groupby(["arm", "kl_coef"], sort=False))
    figure = style.blank(style.WIDTH, 2.5 * len(spans) + 0.2)
    grid = figure.add_gridspec(2 * len(spans), 3, width_ratios=[1, 1, 0.9])
    for place, ((arm, kl_coef), own) in enumerate(spans):
        at, is_apart = corners(
            style.measured(frames, "geometry", "sft0_to_sft1", "along_sft1", "off_line"), arm, kl_coef
        )
        first = None
        for column, (name, label) in enumerate(REWARDS):
            axis = figure.add_subplot(grid[2 * place : 2 * place + 2, column])
            surface(axis, own[own["kind"] == "plane"], name, at)
            if axis.axison:
                axis.set_title(label)
                axis.set_xlabel("towards sft1" + " (weight distance)" * is_apart)
                axis.set_ylabel(
                    f"{style.arm_label(study, arm)}, kl_coef {kl_coef:g}\ntowards the policy" if column == 0 else ""
                )
            line = first = figure.add_subplot(grid[2 * place + column, 2], sharex=first)
            _along(line, own[own["kind"] == "line"], name, style.looks(study)[arm].colour)
            line.set_title("along sft0 → policy" if column == 0 else "")
            line.set_ylabel(label)
            line.tick_params(labelbottom=column == 1)
        first.set_xlabel("weight of the policy")
    return figure


def corners(geometry, arm, kl_coef):
    """(places (3, 2) of sft0, sft1 and the policy in an orthonormal basis of their plane, whether distances are known).

    sft0 is the origin, sft1 on the first axis; the policy's place is its projection on sft0 → sft1 and its distance
    from that line. An equilateral triangle of side 1 where distances are not known, or there is no plane.
    """
    own = geometry[(geometry["arm"] == arm) & (geometry["kl_coef"] == kl_coef)] if len(geometry) else geometry
    for row in own.to_dict("records"):
        side, off = row["sft0_to_sft1"], row["off_line"]
        if side > 0 and off > 0:
            return np.array([[0, 0], [side, 0], [row["along_sft1"] * side, off]]), True
    return EQUILATERAL, False


def surface(axis, frame, name, at):
    """Filled contours of a measure over the grid's points, drawn where `at` (3, 2) puts the three models."""
    mean = over_replicates(frame, name)
    if len(mean) < 3:
        style.say_nothing(axis)
        return
    weights, values = mean[WEIGHTS].to_numpy(), mean[name].to_numpy()
    x, y = (weights @ at).T
    even = Triangulation(*(weights @ EQUILATERAL).T)  # of an even grid: a thin triangle's would have slivers
    low = min(np.quantile(values, 0.1), values[(weights >= 0).all(axis=1)].min(initial=math.inf))
    levels = MaxNLocator(9).tick_values(low, values.max())  # far outside reward falls without bound: one colour
    drawn = axis.tricontourf(Triangulation(x, y, even.triangles), values, levels=levels, cmap="viridis", extend="min")
    axis.figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.85, aspect=25, pad=0.03, spacing="proportional",
                         ticks=levels[:: max(1, len(levels) // 4)])  # fmt: skip
    axis.plot(x, y, linestyle="none", marker=".", markersize=2, color="white", alpha=0.7, markeredgewidth=0)
    _models(axis, at)
    if 0.4 < np.ptp(y) / np.ptp(x) < 2.5:  # beyond it, true proportions would leave nothing to see
        axis.set_aspect("equal", adjustable="box")
    axis.set_xlim(x.min(), x.max())
    axis.set_ylim(y.min(), y.max())
    axis.grid(visible=False)


def over_replicates(frame, name):
    """Weights and mean of a measure over the replicates: far out it may be no finite number, and is left out."""
    found = frame.reindex(columns=[*WEIGHTS, name])
    finite = found[np.isfinite(found[name].to_numpy(dtype=float))]
    return finite.groupby(WEIGHTS, sort=True)[name].mean().reset_index()


def _models(axis, at):
    axis.plot(*np.vstack([at, at[:1]]).T, color="white", linewidth=0.8, alpha=0.8)
    for name, place, marker in zip(("sft0", "sft1", "policy"), at, "*Do", strict=True):
        axis.plot(*place, marker=marker, markersize=8 if marker == "*" else 5, color="black", markeredgecolor="white",
                  markeredgewidth=0.8, zorder=5)  # fmt: skip
        axis.annotate(name, place, xytext=(0, 6 if name == "policy" else -11), textcoords="offset points", ha="center",
                      fontsize=7, path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip


def _along(axis, frame, name, colour):
    """A measure along the line, a curve a replicate, with its standard error over prompts as a band."""
    if not style.known(frame, name):
        style.say_nothing(axis)
        return
    for _, own in frame.sort_values("w_policy").groupby("replicate", sort=True):
        x, y, error = own["w_policy"], own[name], own[f"{name}_se"]
        axis.plot(x, y, color=colour, marker=".", markersize=3, linewidth=1.2)
        axis.fill_between(x, y - error, y + error, color=colour, alpha=0.18, linewidth=0)
    for place in (0, 1):
        axis.axvline(place, color=style.DARK, linewidth=0.7, linestyle="--")
    axis.yaxis.set_major_locator(MaxNLocator(4))


def caption(study, frames):
    frame = frames["plane"]
    if frame.empty:
        return "No policy spans a plane in this study."
    policies = len(frame[["arm", "kl_coef", "replicate"]].drop_duplicates())
    return (
        f"Rewards at {len(frame)} points of the planes through sft0, sft1 and each of {policies} policies, and along "
        f"sft0 → policy beyond both: proxy reward {words.spread(frame['reward'])}, gold reward "
        f"{words.spread(frame['gold_reward'])}, KL from sft0 up to {selection.number(frame['kl_from_sft0'].max())} "
        "nats."
    )


def reading(study, frames):
    frame = style.measured(frames, "plane", "reward", *WEIGHTS)
    if frame.empty:
        return ""
    texts, apart = [], []
    distances = style.measured(frames, "geometry", "sft0_to_sft1", "along_sft1", "off_line")
    for (arm, kl_coef), own in frame[frame["kind"] == "plane"].groupby(["arm", "kl_coef"], sort=False):
        apart.append(corners(distances, arm, kl_coef)[1])
        name = "gold_reward" if style.known(own, "gold_reward") else "reward"
        means = over_replicates(own, name).set_index(WEIGHTS)[name]
        if means.empty:
            continue
        weights = words.listed(means.idxmax())
        texts.append(f"{arm}: {name.replace('_', ' ')} is best at weights ({weights}) of (sft0, sft1, policy)")
    shape = "distances are those of weight space, means over replicates"
    if not all(apart):
        shape = "where the distances in weight space are not known, an equilateral triangle"
    return (
        f"{'; '.join(texts)}; {shape}; dots are the points that answered, what lies below the scale has its lowest "
        "colour, and bands are standard errors over prompts."
    )


SECTION = Section(
    name="plane",
    heading="The space of weights",
    place=3,
    table=tables.plane,
    figure=plane,
    caption=caption,
    reading=reading,
)
