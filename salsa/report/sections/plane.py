"""Reward over the plane of weights through sft0, sft1 and a policy, and along the line from sft0 through the policy."""

import math

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.tri import Triangulation

from salsa.report import selection, style, words
from salsa.report.sections import Section

EQUILATERAL = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])
WEIGHTS = ["w_sft0", "w_sft1", "w_policy"]
REWARDS = (("reward", "proxy reward"), ("gold_reward", "gold reward"))
DISTANCES = ("sft0_to_sft1", "along_sft1", "off_line")
COLUMNS = [
    *("arm", "kl_coef", "replicate", "kind"),
    *WEIGHTS,
    *["reward", "reward_se", "gold_reward", "gold_reward_se", "kl_from_sft0", "response_length", "eos_rate"],
]


def table(study):
    """One row per point: rewards and KL at weights w_sft0, w_sft1, w_policy, for each policy that spans a plane."""
    rows = [
        {"arm": policy.arm, "kl_coef": policy.kl_coef, "replicate": policy.replicate} | point
        for policy in study.policies
        for point in policy.plane
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def figure(study, tables):
    """For each arm that spans a plane: contours of proxy and of gold reward over it, and both along sft0 → policy.

    After Garipov et al. (2018, arXiv 1802.10026, figure 1): an orthonormal basis of the plane through three models, so
    that distances are those of weight space. Points of several replicates are averaged at equal weights.
    """
    frame = style.measured(tables, "plane", "reward", *WEIGHTS)
    if frame.empty:
        return None
    planes = list(frame.groupby(["arm", "kl_coef"], sort=False))
    distances = style.measured(tables, "geometry", *DISTANCES)
    figure = style.blank(style.WIDTH, 2.5 * len(planes) + 0.2)
    rewards = [(name, label) for name, label in REWARDS if style.known(frame, name)]
    count = len(rewards)
    grid = figure.add_gridspec(count * len(planes), count + 1, width_ratios=[*[1] * count, 0.9])
    for place, ((arm, kl_coef), points) in enumerate(planes):
        at, is_apart = corners(distances, arm, kl_coef)
        policy = f"{style.arm_label(study, arm)}, kl_coef {kl_coef:g}\ntowards the policy"
        first = None
        for column, (name, label) in enumerate(rewards):
            axis = figure.add_subplot(grid[count * place : count * (place + 1), column])
            _draw_surface(axis, points[points["kind"] == "plane"], name, at)
            if axis.axison:
                axis.set_title(label)
                axis.set_xlabel("towards sft1" + " (weight distance)" * is_apart)
                axis.set_ylabel(policy if column == 0 else "")
            line = first = figure.add_subplot(grid[count * place + column, count], sharex=first)
            _draw_line(line, points[points["kind"] == "line"], name, style.looks(study)[arm].colour)
            line.set_title("along sft0 → policy" if column == 0 else "")
            line.set_ylabel(label)
            line.tick_params(labelbottom=column == count - 1)
        first.set_xlabel("weight of the policy")
    return figure


def corners(distances, arm, kl_coef):
    """(places (3, 2) of sft0, sft1 and the policy in an orthonormal basis of their plane, whether distances are known).

    sft0 is the origin, sft1 on the first axis; the policy's place is its projection on sft0 → sft1 and its distance
    from that line. An equilateral triangle of side 1 where distances are not known, or there is no plane.
    """
    for row in distances.to_dict("records"):
        side, off = row["sft0_to_sft1"], row["off_line"]
        if (row["arm"], row["kl_coef"]) == (arm, kl_coef) and side > 0 and off > 0:
            return np.array([[0, 0], [side, 0], [row["along_sft1"] * side, off]]), True
    return EQUILATERAL, False


def _draw_surface(axis, frame, name, at):
    """Filled contours of a measure over the grid's points, drawn where `at` (3, 2) puts the three models."""
    means = means_of(frame, name)
    if len(means) < 3:
        style.say_nothing(axis)
        return
    weights, values = means[WEIGHTS].to_numpy(), means[name].to_numpy()
    x, y = (weights @ at).T
    even = Triangulation(*(weights @ EQUILATERAL).T)  # of an even grid: a thin triangle's would have slivers
    low = min(np.quantile(values, 0.1), values[(weights >= 0).all(axis=1)].min(initial=math.inf))
    levels = levels_of(low, values.max(), standard_error(frame, name))  # far outside reward falls without bound
    places = Triangulation(x, y, even.triangles)
    contours = axis.tricontourf(places, values, levels=levels, cmap="viridis", extend="min")
    axis.figure.colorbar(contours, ax=axis, location="bottom", shrink=0.85, aspect=25, pad=0.03, spacing="proportional",
                         ticks=levels[:: max(1, len(levels) // 4)])  # fmt: skip
    axis.plot(x, y, linestyle="none", marker=".", markersize=2, color="white", alpha=0.7, markeredgewidth=0)
    _draw_models(axis, at)
    if 0.4 < np.ptp(y) / np.ptp(x) < 2.5:  # beyond it, true proportions would leave nothing to see
        axis.set_aspect("equal", adjustable="box")
    axis.set_xlim(x.min(), x.max())
    axis.set_ylim(y.min(), y.max())
    axis.grid(visible=False)


def standard_error(frame, name):
    """The error of a point's mean: between replicates where there are several, else over prompts; 0: not known."""
    rows = frame.reindex(columns=[*WEIGHTS, "replicate", name, f"{name}_se"])
    count = rows["replicate"].nunique()
    if count > 1:
        centred = rows[name] - rows.groupby("replicate")[name].transform("mean")  # a replicate's level moves no contour
        variances = centred.groupby([rows[weight] for weight in WEIGHTS]).var()
        return math.sqrt(np.nan_to_num(variances.median()) / count)
    return float(np.nan_to_num(rows[f"{name}_se"].median()))


def levels_of(low, high, error):
    """The levels of contours: about nine, but no closer than two standard errors, so that noise is no landscape."""
    levels = MaxNLocator(9).tick_values(low, high)
    if levels[1] - levels[0] < 2 * error:
        count = max(int((high - low) / (2 * error)), 1)
        levels = low + 2 * error * np.arange(count + 2)
    return levels


def means_of(frame, name):
    """Means of a measure over replicates, by weights, without what is no finite number: far out it may be none."""
    rows = frame.reindex(columns=[*WEIGHTS, name])
    finite = rows[np.isfinite(rows[name].to_numpy(dtype=float))]
    return finite.groupby(WEIGHTS, sort=True)[name].mean().reset_index()


def _draw_models(axis, at):
    axis.plot(*np.vstack([at, at[:1]]).T, color="white", linewidth=0.8, alpha=0.8)
    for name, place, marker in zip(("sft0", "sft1", "policy"), at, "*Do", strict=True):
        axis.plot(*place, marker=marker, markersize=8 if marker == "*" else 5, color="black", markeredgecolor="white",
                  markeredgewidth=0.8, zorder=5)  # fmt: skip
        axis.annotate(name, place, xytext=(0, 6 if name == "policy" else -11), textcoords="offset points", ha="center",
                      fontsize=7, path_effects=[withStroke(linewidth=2, foreground="white")])  # fmt: skip


def _draw_line(axis, frame, name, colour):
    """A measure along the line, one curve per replicate, with its standard error over prompts as a band."""
    if not style.known(frame, name):
        style.say_nothing(axis)
        return
    for _, rows in frame.sort_values("w_policy").groupby("replicate", sort=True):
        x, y, error = rows["w_policy"], rows[name], rows[f"{name}_se"]
        axis.plot(x, y, color=colour, marker=".", markersize=3, linewidth=1.2)
        axis.fill_between(x, y - error, y + error, color=colour, alpha=0.18, linewidth=0)
    for place in (0, 1):
        axis.axvline(place, color=style.DARK, linewidth=0.7, linestyle="--")
    axis.yaxis.set_major_locator(MaxNLocator(4))


def caption(study, tables):
    frame = tables["plane"]
    if frame.empty:
        return "No policy spans a plane in this study."
    policies, replicates = len(frame[["arm", "kl_coef", "replicate"]].drop_duplicates()), frame["replicate"].nunique()
    of = "of one replicate" if replicates == 1 else f"means over {replicates} replicates"
    return (
        f"Rewards at {len(frame)} points of the planes through sft0, sft1 and each of {policies} policies, and along "
        f"sft0 → policy beyond both, {of}: proxy reward {words.spread(frame['reward'])}, gold reward "
        f"{words.spread(frame['gold_reward'])}, KL from sft0 up to {selection.number(frame['kl_from_sft0'].max())} "
        "nats."
    )


def reading(study, tables):
    frame = style.measured(tables, "plane", "reward", *WEIGHTS)
    if frame.empty:
        return ""
    texts, apart = [], []
    distances = style.measured(tables, "geometry", *DISTANCES)
    for (arm, kl_coef), points in frame[frame["kind"] == "plane"].groupby(["arm", "kl_coef"], sort=False):
        apart.append(corners(distances, arm, kl_coef)[1])
        name = "gold_reward" if style.known(points, "gold_reward") else "reward"
        means = means_of(points, name).set_index(WEIGHTS)[name]
        if means.empty:
            continue
        weights = words.listed(means.idxmax())
        texts.append(f"{arm}: {name.replace('_', ' ')} is best at weights ({weights}) of (sft0, sft1, policy)")
    shape = "distances are those of weight space, means over replicates"
    if not all(apart):
        shape = "where the distances in weight space are not known, an equilateral triangle"
    return (
        f"{'; '.join(texts)}; {shape}; dots are the points that answered, what lies below the scale has its lowest "
        "colour, contours are two standard errors apart at least, and bands are standard errors over prompts."
    )


SECTION = Section(
    name="plane",
    heading="The space of weights",
    place=3,
    table=table,
    figure=figure,
    caption=caption,
    reading=reading,
)
