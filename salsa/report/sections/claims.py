"""What a study says of each claim that its configuration makes: a table, and a forest plot of the effects."""

import math

import pandas as pd
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from salsa.evaluate import decisions
from salsa.report import claims, conclusions, selection, style
from salsa.report.sections import Section, sides_at_all_kl_coefs

PART = "· "  # before a secondary outcome of a claim
VERDICTS = {  # verdict -> marker, colour, filled
    decisions.SUPPORTED: ("^", style.LOOKS["ppo"].colour, True),
    decisions.TOO_SMALL: ("^", style.LOOKS["ppo"].colour, False),
    decisions.EXCLUDED: ("v", style.LOOKS["salsa"].colour, False),
    decisions.REVERSED: ("v", style.LOOKS["salsa"].colour, True),
    decisions.UNDECIDED: ("o", style.GREY, False),
}
BESIDE = ("|", style.GREY, True)  # of an outcome that decides nothing
EQUIVALENT = "equivalent"


def figure(study, tables):
    """A forest plot of the claims: effects with intervals in units of the smallest effect of interest, and verdicts.

    A claim that is tested has a line with its verdict, and below it one for each outcome that decides nothing.
    """
    frame = style.measured(tables, "claims", "verdict")
    lines = [] if frame.empty else claim_lines(claims.tested_rows(frame))
    if not lines:
        return style.not_measured("claims")
    figure, axes = style.panels(1, 1, height=0.55 + 0.19 * len(lines))
    axis = axes[0, 0]
    axis.axvspan(-1, 1, color=style.PALE, alpha=0.45, linewidth=0)
    axis.axvline(0, color=style.DARK, linewidth=0.9, linestyle="--")
    for y, (_, text, row) in enumerate(lines):
        _effect(axis, row, y)
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=style.DARK)
    _symlog(axis, [row for _, _, row in lines])
    axis.set_yticks(range(len(lines)), [label + _claim_mark(study, row) for label, _, row in lines])
    for tick, (label, _, _) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_color(style.GREY if label.startswith(PART) else style.DARK)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("effect, in units of the smallest effect of interest\n(linear to ±2, then logarithmic)")
    entries = [style.mark(name, marker, color=colour, markerfacecolor=colour if filled else "white")
               for name, (marker, colour, filled) in VERDICTS.items() if name in set(frame["verdict"])]  # fmt: skip
    entries.append(Patch(color=style.PALE, alpha=0.45, label="too small to matter, either way"))
    style.below(figure, entries)
    return figure


def _claim_mark(study, row):
    """What stands after a claim that compares a collapsed policy."""
    if not row["verdict"]:
        return ""
    sides = ((row[side], row.get(f"{side}_kl_coef", math.nan)) for side in ("candidate", "baseline"))
    marks = [selection.collapsed(study, arm, None if kl_coef != kl_coef else kl_coef) for arm, kl_coef in sides]
    return " (collapsed policy)" if any(marks) else ""


def claim_lines(frame):
    """(label, words on the right, row) of each line of the forest, downwards.

    A secondary outcome in another unit, such as the win rate beside gold scores, has no line.
    """
    lines = []
    for name, rows in frame.groupby("claim", sort=False):
        primary, *others = rows.to_dict("records")
        benchmark, label = primary["benchmark"].replace("_", " "), name.replace("_", " ")
        label += "" if not benchmark or label.endswith(benchmark) else f" ({benchmark})"  # grpo_out_of_distribution
        lines.append((label, _words(primary), primary))
        for row in others:
            if pd.notna(row["smallest_effect"]):
                lines.append((PART + (row["benchmark"] or row["measure"]).replace("_", " "), "", row))
    return lines


def _words(row):
    parts = [row["verdict"], EQUIVALENT if row.get("equivalent") is True else ""]
    if pd.notna(row.get("replicates")):
        parts.append(f"n {row['replicates']:.0f}")
    return ", ".join(part for part in parts if part)


def _effect(axis, row, y):
    x = in_units(row)
    if x[0] == x[0]:
        marker, colour, filled = VERDICTS.get(row["verdict"], BESIDE)
        style.whisker(axis, x, y, colour, linewidth=1.4 if row["verdict"] else 0.8)
        axis.plot(x[0], y, marker=marker, color=colour, markersize=5.5, markerfacecolor=colour if filled else "white")


def in_units(row):
    """(effect, low, high) of a claim's row, divided by its smallest effect; nan where it has none in its unit."""
    unit = row["smallest_effect"]
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
    verdicts = claims.primary_rows(frame)["claim_verdict"].value_counts()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    sight = " ".join(conclusions.sight(study, frame))
    return (sight + " " if sight else "") + (
        f"{verdicts.sum()} claims, fixed before the study ran: {counts}. Effects are candidate minus baseline over "
        f"replicates. {conclusions.compared_at(study)} {conclusions.families(study)}"
    )


def reading(study, tables):
    frame = style.measured(tables, "claims", "effect")
    if frame.empty:
        return ""
    rows = claims.primary_rows(claims.tested_rows(frame)).to_dict("records")
    inside = sum(abs(in_units(row)[0]) < 1 for row in rows)
    return (
        f"The {len(rows)} effects that were tested, in units of the smallest that would matter, {inside} of them "
        "smaller than that (grey); bars are their intervals at the level of the family, thin for what decides "
        "nothing; on the right stand the verdict and the number of replicates."
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
