"""What a study says of each claim that its configuration makes: a table, and a forest plot of the effects."""

import math

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator

from salsa.report import claims, selection, style
from salsa.report.sections import Section, sides_at_all_kl_coefs

PART = "· "  # before a benchmark of a claim
VERDICTS = {  # verdict -> marker, colour, filled
    "supported": ("^", style.LOOKS["ppo"].colour, True),
    "refuted": ("v", style.LOOKS["salsa"].colour, True),
    "undecided": ("o", style.GREY, False),
}


def figure(study, tables):
    """A forest plot of the claims: effects with intervals in units of the smallest effect of interest, and verdicts.

    A claim of several benchmarks has a line of its own, with its verdict, above theirs.
    """
    frame = style.measured(tables, "claims", "verdict")
    if frame.empty:
        return style.not_measured("claims")
    lines = claim_lines(frame)
    figure, axes = style.panels(1, 1, height=0.45 + 0.19 * len(lines))
    axis = axes[0, 0]
    axis.axvline(0, color=style.DARK, linewidth=0.9, linestyle="--")
    axis.axvline(1, color=style.DARK, linewidth=0.9, linestyle=":")
    for y, (_, text, row) in enumerate(lines):
        if row is not None:
            _effect(axis, row, y)
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=style.DARK)
    _symlog(axis, [row for _, _, row in lines if row is not None])
    axis.set_yticks(range(len(lines)), [label + _claim_mark(study, row) for label, _, row in lines])
    for tick, (label, _, _) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_color(style.GREY if label.startswith(PART) else style.DARK)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("effect, in units of the smallest effect of interest\n(linear to ±2, then logarithmic)")
    entries = [style.mark(name, marker, color=colour, markerfacecolor=colour if filled else "white")
               for name, (marker, colour, filled) in VERDICTS.items()]  # fmt: skip
    entries.append(Line2D([], [], color=style.DARK, linewidth=0.9, linestyle=":", label="smallest effect of interest"))
    style.below(figure, entries)
    return figure


def _claim_mark(study, row):
    """What stands after a claim that compares a collapsed policy."""
    sides = ((row[side], row.get(f"{side}_kl_coef", math.nan)) for side in ("candidate", "baseline")) if row else ()
    marks = [selection.collapsed(study, arm, None if kl_coef != kl_coef else kl_coef) for arm, kl_coef in sides]
    return " (collapsed policy)" if any(marks) and row["verdict"] != "not tested" else ""


def claim_lines(frame):
    """(label, words on the right, row or None) of each line of the forest, downwards."""
    lines = []
    for name, tests in frame.groupby("claim", sort=False):
        rows, label = tests.to_dict("records"), name.replace("_", " ")
        if len(rows) == 1:
            benchmark = (rows[0].get("benchmark") or "").replace("_", " ")
            label += "" if label.endswith(benchmark) else f" ({benchmark})"  # grpo_out_of_distribution says it
            lines.append((label, _words(rows[0], rows[0]["verdict"], p=True, needed=True), rows[0]))
            continue
        verdict = rows[0].get("claim_verdict", "")
        lines.append((f"{label}, on all of:", _words(rows[0], verdict, p=bool(verdict)), None))
        lines += [
            (PART + row["benchmark"].replace("_", " "), _words(row, row["verdict"], needed=True), row) for row in rows
        ]
    return lines


def _words(row, verdict, p=False, needed=False):
    parts = [verdict]
    if p and pd.notna(row.get("holm_p")):
        parts.append(f"p {row['holm_p']:.2g}")
    if needed and verdict == "undecided" and pd.notna(row.get("replicates_needed")):
        parts.append(f"needs {row['replicates_needed']:.0f} replicates")
    return ", ".join(part for part in parts if part)


def _effect(axis, row, y):
    x = in_units(row)
    if x[0] == x[0]:
        marker, colour, filled = VERDICTS[row["verdict"]]
        style.whisker(axis, x, y, colour, linewidth=1.4)
        axis.plot(x[0], y, marker=marker, color=colour, markersize=5.5, markerfacecolor=colour if filled else "white")


def in_units(row):
    """(effect, low, high) of a claim's row, divided by its smallest effect; nan of `stable`, a share."""
    unit = row["smallest_effect"] if row.get("measure") != "stable" else 0
    return tuple(x / unit for x in style.triple(row, "effect")) if unit > 0 else (math.nan,) * 3


def _symlog(axis, rows):
    """Linear where effects are of the size of interest, logarithmic beyond: one wide interval hides no other."""
    axis.set_xscale("symlog", linthresh=2, linscale=1.2)
    numbers = [x for row in rows for x in in_units(row) if math.isfinite(x)]
    low, high = min([*numbers, -1]), max([*numbers, 2])
    axis.set_xlim(low * (1.2 if low < -2 else 1.3), high * 1.2)
    ticks = [-1000, -100, -10, -2, -1, 0, 1, 2, 10, 100, 1000]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low * 1.2 <= tick <= high * 1.2]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


def caption(study, tables):
    frame = tables["claims"]
    if frame.empty:
        return "This study makes no claims."
    verdicts = frame.drop_duplicates("claim")["claim_verdict"].value_counts()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return (
        f"{verdicts.sum()} claims, fixed before the study ran: {counts}; effects are candidate minus baseline with "
        "95 % t intervals over replicates, each arm at its chosen kl_coef, p one-sided and corrected after Holm."
    )


def reading(study, tables):
    frame = style.measured(tables, "claims", "effect")
    if frame.empty:
        return ""
    inside = sum(abs(in_units(row)[0]) < 1 for row in frame.to_dict("records"))
    return (
        f"{len(frame)} effects in units of the smallest that would matter, {inside} of them smaller than that; bars "
        "are 95 % t intervals, and the words on the right the verdict, p after Holm, and the replicates that would "
        "decide."
    )


SECTION = Section(
    name="claims",
    heading="Claims",
    place=1,
    table=claims.frame,
    left_out=("origin", "text", "measure", "judge", "how"),
    figure=figure,
    caption=caption,
    reading=reading,
    sides=sides_at_all_kl_coefs,
)
