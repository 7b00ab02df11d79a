"""Where policies went in the space of weights."""

import math

from matplotlib.lines import Line2D

from salsa.report import style, tables, words
from salsa.report.sections import Section


def geometry(study, frames):
    """Where policies went in weight space: how far from sft0, against how far along, and how much towards, sft1."""
    frame = style.measured(frames, "geometry", "from_sft0")
    shown = [
        (name, label)
        for name, label in (
            ("along_sft1", "place along sft0 → sft1 (0: sft0, 1: sft1)"),
            ("cosine_sft1", "cosine of policy − sft0 and sft1 − sft0"),
        )
        if style.known(frame, name)
    ]
    if not shown:
        return style.not_measured("where the policies went in weight space")
    figure, axes = style.panels(1, len(shown), height=3.2, sharey=True, width=style.WIDTH if len(shown) > 1 else 3.5)
    apart = frame["sft0_to_sft1"].mean() if style.known(frame, "sft0_to_sft1") else math.nan
    far = style.limits([0, *frame["from_sft0"]])
    for axis, (name, label) in zip(axes[0], shown, strict=True):
        for row in frame.dropna(subset=name).to_dict("records"):
            _place(axis, study, row, name)
        axis.set_xlabel(label)
        axis.set_ylim(0, far[1])
        axis.set_xlim(style.limits([0, *frame[name]], margin=0.12))
        axis.axvline(0, color=style.DARK, linewidth=0.8, linestyle="--")
        if apart < far[1]:
            axis.axhline(apart, color=style.GREY, linewidth=0.9, linestyle=":")
    axes[0, 0].set_ylabel("distance from sft0, ‖policy − sft0‖")
    entries = [Line2D([], [], color=style.GREY, linewidth=0.9, linestyle=":", label=f"‖sft1 − sft0‖: {apart:.3g}")]
    style.legend(figure, study, arms=set(frame["arm"]), extra=entries if apart == apart else ())
    return figure


def _place(axis, study, row, name):
    shown, size = style.looks(study)[row["arm"]], style.sizes(study)[row["kl_coef"]]
    if style.has_intervals(study):
        style.bars(
            axis,
            style.triple(row, name),
            style.triple(row, "from_sft0"),
            shown.colour,
            linewidth=0.8,
            alpha=0.6,
            zorder=2,
        )
    axis.plot(row[name], row["from_sft0"], color=shown.colour, marker=shown.marker, markersize=6 * size,
              markeredgecolor="white", markeredgewidth=0.6, linestyle="none", zorder=3)  # fmt: skip


def caption(study, frames):
    frame = frames["geometry"]
    return (
        f"Where the policies lie in the space of weights: {words.spread(frame['from_sft0'])} from sft0, "
        f"{words.spread(frame['off_line'])} off the line to sft1, which lies {words.spread(frame['sft0_to_sft1'])} "
        f"away, and {words.spread(frame['along_sft1'])} of the way along it; means over {words.replicates(study)}, "
        f"{words.band(study)}."
    )


def reading(study, frames):
    frame = style.measured(frames, "geometry", "from_sft0")
    if frame.empty:
        return ""
    far = frame.loc[frame["from_sft0"].idxmax()]
    return (
        f"The farthest from sft0 are the policies of {far['arm']} at kl_coef {far['kl_coef']:g}; bars are 95 % t "
        f"intervals over replicates, and {style.CUT}."
    )


SECTION = Section(
    name="geometry",
    heading="The space of weights",
    place=2,
    table=tables.geometry,
    left_out=("sft0_norm", "from_sft1"),
    figure=geometry,
    caption=caption,
    reading=reading,
)
