"""Where policies went in the space of weights."""

import math

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from salsa.report import style, words
from salsa.report.frames import GEOMETRY, over_replicates
from salsa.report.sections import Section

DIRECTIONS = {
    "along_sft1": "place along sft0 → sft1 (0: sft0, 1: sft1)",
    "cosine_sft1": "cosine of policy − sft0 and sft1 − sft0",
}


def table(study):
    """One row per arm × kl_coef: where its policies lie in the space of weights; mean and t interval over replicates.

    Distances are Euclidean; along_sft1 is the share of the way from sft0 to sft1, off_line the distance from that line.
    """
    return over_replicates(study.frames.policies, ["arm", "kl_coef"], GEOMETRY)


def figure(study, tables):
    """Where policies went in weight space: how far from sft0, against how far along, and how much towards, sft1."""
    frame = style.measured(tables, "geometry", "from_sft0")
    directions = {name: label for name, label in DIRECTIONS.items() if style.known(frame, name)}
    if not directions:
        return None
    width = style.WIDTH if len(directions) > 1 else 3.5
    figure, axes = style.panels(1, len(directions), height=3.2, sharey=True, width=width)
    apart = frame["sft0_to_sft1"].mean() if style.known(frame, "sft0_to_sft1") else math.nan
    lowest, highest = style.limits(frame["from_sft0"], margin=0.15)
    for axis, (name, label) in zip(axes[0], directions.items(), strict=True):
        for row in frame.dropna(subset=name).to_dict("records"):
            _draw_policy(axis, study, row, name)
        axis.set_xlabel(label)
        axis.set_ylim(lowest, highest)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.set_xlim(style.limits([0, *frame[name]], margin=0.12))
        axis.axvline(0, color=style.DARK, linewidth=0.8, linestyle="--")
        if lowest < apart < highest:
            axis.axhline(apart, color=style.GREY, linewidth=0.9, linestyle=":")
    axes[0, 0].set_ylabel("distance from sft0, ‖policy − sft0‖")
    entries = [Line2D([], [], color=style.GREY, linewidth=0.9, linestyle=":", label=f"‖sft1 − sft0‖: {apart:.3g}")]
    style.legend(figure, study, arms=set(frame["arm"]), extra=entries if lowest < apart < highest else ())
    return figure


def _draw_policy(axis, study, row, name):
    look, size = style.looks(study)[row["arm"]], style.sizes(study.kl_coefs)[row["kl_coef"]]
    if style.has_intervals(study):
        x, y = style.triple(row, name), style.triple(row, "from_sft0")
        style.bars(axis, x, y, look.colour, linewidth=0.8, alpha=0.6, zorder=2)
    axis.plot(row[name], row["from_sft0"], color=look.colour, marker=look.marker, markersize=6 * size,
              markeredgecolor="white", markeredgewidth=0.6, linestyle="none", zorder=3)  # fmt: skip


def caption(study, tables):
    frame = tables["geometry"]
    return (
        f"Where the policies lie in the space of weights: {words.spread(frame['from_sft0'])} from sft0, "
        f"{words.spread(frame['off_line'])} off the line to sft1, which lies {words.spread(frame['sft0_to_sft1'])} "
        f"away, and {words.spread(frame['along_sft1'])} of the way along it; means over "
        f"{words.replicates_by_arm(study)}, {words.band(study)}."
    )


def reading(study, tables):
    frame = style.measured(tables, "geometry", "from_sft0")
    if frame.empty:
        return ""
    farthest = frame.loc[frame["from_sft0"].idxmax()]
    return (
        f"The farthest from sft0 are the policies of {farthest['arm']} at kl_coef {farthest['kl_coef']:g}; bars are "
        f"95 % t intervals over replicates, and {style.CUT}."
    )


SECTION = Section(
    name="geometry",
    heading="The space of weights",
    place=2,
    table=table,
    left_out=("sft0_norm", "from_sft1"),
    figure=figure,
    caption=caption,
    reading=reading,
)
