"""What a study says of each claim that its configuration makes: a table, and the differences of all replicates.

The figure has a row for each claim that is tested, in the claim's own unit: a dot for each replicate, the mean with the
interval that decides, and the verdict in words. Claims of the abstract come first; the positive control and the
controls stand below them, paler.
"""

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from salsa.evaluate import decisions
from salsa.report import claims, conclusions, outcomes, selection, style
from salsa.report.sections import Section, manipulation, sides_at_all_kl_coefs

PART = "· "  # before a secondary outcome of a claim
COLOURS = {  # of verdicts
    decisions.SUPPORTED: style.LOOKS["ppo"].colour,
    decisions.TOO_SMALL: style.LOOKS["ppo"].colour,
    decisions.EXCLUDED: style.LOOKS["salsa"].colour,
    decisions.REVERSED: style.LOOKS["salsa"].colour,
    decisions.UNDECIDED: style.GREY,
}
FIRST = ("abstract", "positive_control", "control")  # origins, downwards
UNITS = {  # measure -> what the numbers of a row are, in few words
    "kl_to_sft0": "KL to sft0, nats per response",
    "training_kl_to_sft0": "KL to sft0 in training, nats",
    "stable": "what is left of the margins",
    "reward": "proxy reward, SD",
    "training_reward": "proxy reward in training, SD",
    "gold_reward": "gold reward",
    "win_rate": "win rate − ½",
    "matched_gold": "gold reward at equal KL",
    "matched_win_rate": "win rate at equal KL",
}
FEW_CLAIMS = 3  # a study of no more shows each single benchmark too
MOST = 24  # rows of one page
LINE = 0.16  # inches of a line of text
WORDS_A_LINE = 130  # characters of 7 pt


@dataclass(frozen=True)
class Row:
    """A row of the figure: an outcome's numbers as the table of claims has them, and its replicates' effects."""

    label: str
    numbers: dict
    effects: list[float]

    @property
    def primary(self):
        return self.numbers["outcome"] == outcomes.PRIMARY

    @property
    def pale(self):
        return self.numbers["origin"] != "abstract" or not self.primary


def figure(study, tables):
    """The differences that decide the claims, one row a claim; None where no claim is tested."""
    rows = drawn_rows(study, tables)
    if not rows:
        return None
    above, below = _above(study, tables), _below(study, tables)
    each = min(0.5, (style.TALLEST - 1.2) / len(rows))
    heights = [LINE * len(above), *[each] * len(rows), 0.12 + LINE * len(below)]
    figure = style.blank(style.WIDTH, sum(heights) + 0.4)
    figure.get_layout_engine().set(h_pad=0.01, hspace=0)
    axes = figure.subplots(len(heights), 1, height_ratios=[max(height, 0.01) for height in heights])
    _say(axes[0], above)
    for axis, row in zip(axes[1:-1], rows, strict=True):
        _draw_row(axis, study, row)
    _say(axes[-1], below)
    style.below(figure, _entries(rows))
    return figure


def drawn_rows(study, tables):
    """The rows of the figure, downwards: by algorithm, then by origin; no more than a page holds.

    The claims' primary outcomes, and where there are few claims, the others in the claim's unit.
    """
    frame = style.measured(tables, "claims", "effect")
    if frame.empty:
        return []
    frame = claims.tested_rows(frame)
    if frame["claim"].nunique() > FEW_CLAIMS:
        frame = claims.primary_rows(frame)
    frame = frame[frame["smallest_effect"].notna()]  # the win rate beside gold scores has another unit
    plain = list(dict.fromkeys(study.plain_arms.values()))
    rows = sorted(frame.to_dict("records"), key=lambda row: _order(study, plain, row))
    effects = tables.get("replicates", pd.DataFrame(columns=claims.REPLICATE_COLUMNS))
    return [Row(_label(row), row, _effects(effects, row)) for row in rows[:MOST]]


def _order(study, plain, row):
    anchor = study.plain_of(row["candidate"])
    return plain.index(anchor) if anchor in plain else -1, FIRST.index(row["origin"])


def _effects(frame, row):
    """The finite effects of an outcome, in the order of its replicates."""
    own = frame[(frame["claim"] == row["claim"]) & (frame["outcome"] == row["outcome"])]
    own = own[(own["measure"] == row["measure"]) & (own["benchmark"] == row["benchmark"])]
    return [float(effect) for effect in own.sort_values("replicate")["effect"] if math.isfinite(effect)]


def _label(row):
    if row["outcome"] != outcomes.PRIMARY:
        return PART + (row["benchmark"] or outcomes.WORDS[row["measure"]][0]).replace("_", " ")
    control = "positive control: " if row["origin"] == "positive_control" else ""
    return control + row["claim"].replace("_", " ")


def _above(study, tables):
    """The lines above the rows: how strongly the study manipulates what policies are anchored to."""
    frame = tables.get("manipulation")
    return style.wrapped(manipulation.sentence(study, frame), WORDS_A_LINE) if frame is not None else []


def _below(study, tables):
    """The lines below the rows: the claims that are not tested, and why."""
    frame = tables["claims"]
    untested = frame[frame["claim_verdict"] == decisions.NOT_TESTED]
    reasons = {}
    for row in untested.to_dict("records"):
        reasons.setdefault(row.get("why", ""), []).append(row["claim"].replace("_", " "))
    parts = [", ".join(names) + (f" ({why})" if why else "") for why, names in reasons.items()]
    return style.wrapped(f"Not tested: {'; '.join(parts)}.", WORDS_A_LINE) if parts else []


def _say(axis, lines):
    """Lines of text across the whole figure, in an axis of their own."""
    axis.set_axis_off()
    across = blended_transform_factory(axis.figure.transFigure, axis.transAxes)
    text = axis.text(0.01, 0.5, "\n".join(lines), transform=across, va="center", fontsize=7, color=style.DARK)
    text.set_in_layout(False)  # it may be wider than the rows


def _draw_row(axis, study, row):
    numbers, colour = row.numbers, COLOURS.get(row.numbers["verdict"], style.GREY)
    smallest, alpha = seen_effect(numbers), 0.65 if row.pale else 1.0
    axis.axvspan(-smallest, smallest, color=style.PALE, alpha=0.45, linewidth=0)
    axis.axvline(0, color=style.DARK, linewidth=0.9)
    look = style.looks(study).get(numbers["candidate"], style.NEUTRAL)
    axis.scatter(row.effects, [place(i) for i in range(len(row.effects))], s=13, color=look.colour, marker="o",
                 alpha=0.45 * alpha, linewidths=0, zorder=2)  # fmt: skip
    mean, low, high = outcomes.shown_interval(numbers)
    style.whisker(axis, (mean, low, high), 0, style.DARK, linewidth=2.2 if row.primary else 1.2, alpha=alpha, zorder=3)
    axis.plot(mean, 0, marker="D", markersize=5 if row.primary else 4, color=style.DARK, markeredgecolor="white",
              markeredgewidth=0.7, alpha=alpha, zorder=4)  # fmt: skip
    axis.set_xlim(row_limits(row))
    axis.set_ylim(-0.5, 0.5)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(axis="x", labelsize=7, length=2, pad=1)
    _write_beside(axis, study, row, colour)


def _write_beside(axis, study, row, colour):
    """On the left what is compared, in which unit; on the right the verdict, the effect and how many replicates."""
    numbers, dark = row.numbers, style.GREY if row.pale else "black"
    left = {"xycoords": "axes fraction", "ha": "right", "annotation_clip": False}
    right, weight = left | {"ha": "left"}, "normal" if row.pale else "bold"
    label = row.label + _collapsed(study, numbers) * row.primary
    axis.annotate(label, (-0.02, 0.54), va="bottom", fontsize=8, color=dark, fontweight=weight, **left)
    pair = f"{UNITS.get(numbers['measure'], 'margins')}: {numbers['candidate']} − {numbers['baseline']}"
    axis.annotate(pair, (-0.02, 0.46), va="top", fontsize=7, color=style.GREY, **left)
    verdict = verdict_words(numbers)
    axis.annotate(verdict, (1.02, 0.54), va="bottom", fontsize=8, color=colour, fontweight=weight, **right)
    axis.annotate(effect_words(numbers), (1.02, 0.46), va="top", fontsize=7, color=style.GREY, **right)


def _collapsed(study, row):
    """What stands after a claim that compares a collapsed policy."""
    sides = ((row[side], row.get(f"{side}_kl_coef", math.nan)) for side in ("candidate", "baseline"))
    marks = [selection.collapsed(study, arm, None if kl_coef != kl_coef else kl_coef) for arm, kl_coef in sides]
    return " (collapsed policy)" if any(marks) else ""


def verdict_words(row):
    """The verdict of a row, and whether it shows an equivalence; "" of an outcome that decides nothing."""
    words = [row["verdict"], "equivalent" if row["verdict"] and row.get("equivalent") is True else ""]
    return ", ".join(word for word in words if word)


def effect_words(row):
    """The mean of a row with its interval, and the number of replicates."""
    mean, low, high = (selection.number(x).replace("-", "−") for x in outcomes.shown_interval(row))
    return mean + (f" ({low} to {high})" if low else "") + f", n {row['replicates']:.0f}"


def seen_effect(row):
    """The smallest effect that would matter, as far as this outcome shows one: half of the grey band's width."""
    shown = row.get("smallest_effect_shown", math.nan)
    return shown if shown == shown else row["smallest_effect"]


def place(index):
    """The height of a row's dot: spread evenly, and never by chance, so that equal input gives equal figures."""
    return 0.62 * (((index + 1) * 0.6180339887) % 1 - 0.5)


def row_limits(row):
    """(low, high) of a row's axis: 0, the band, all replicates, and of the interval as much as these take twice."""
    smallest, (mean, low, high) = seen_effect(row.numbers), style.triple(row.numbers, "effect")
    points = [-1.15 * smallest, 1.15 * smallest, mean, *row.effects]
    room = 0.5 * (max(points) - min(points))
    ends = [max(low, min(points) - room), min(high, max(points) + room)]
    return style.limits([*points, *(end for end in ends if end == end)], margin=0.04)


def _entries(rows):
    entries = [Patch(color=style.PALE, alpha=0.45, label="too small to matter, either way")]
    if any(row.effects for row in rows):
        entries.append(style.mark("a replicate (colour: the arm)", "o", 4, alpha=0.5))
    mean = style.mark("mean, with the interval that decides", "D", 5, linestyle="-", linewidth=2.2)
    return [*entries, mean, Line2D([], [], color=style.DARK, linewidth=0.9, label="no difference")]


def for_readers(frame):
    """The rows with intervals of win rates as readers see them."""
    triples = [outcomes.shown_interval(row) for row in frame.to_dict("records")]
    return frame.assign(effect_low=[low for _, low, _ in triples], effect_high=[high for *_, high in triples])


def caption(study, tables):
    frame = tables["claims"]
    if frame.empty:
        return "This study makes no claims."
    verdicts = claims.primary_rows(frame)["claim_verdict"].value_counts()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    sight = " ".join(conclusions.sight(study, frame))
    return (sight + " " if sight else "") + (
        f"{verdicts.sum()} claims, {conclusions.stated(study)}: {counts}. Effects are candidate minus baseline over "
        f"replicates. {conclusions.compared_at(study)} {conclusions.families(study)}{cut(frame)}"
    )


def cut(frame):
    """A sentence that says so where a win rate's interval is shown cut; it begins with a space, or is ""."""
    reach = [row["effect_high"] - row["effect_low"] for row in frame.to_dict("records")]
    drawn = [high - low for _, low, high in map(outcomes.shown_interval, frame.to_dict("records"))]
    beyond = any(shown < whole for shown, whole in zip(drawn, reach, strict=True))
    return " Intervals of win rates are cut at 0 and 1, beyond which there are none; the CSV has them whole." * beyond


def reading(study, tables):
    rows = drawn_rows(study, tables)
    if not rows:
        return ""
    primary = claims.primary_rows(claims.tested_rows(tables["claims"]))
    left = len(primary) - sum(row.primary for row in rows)
    return (
        "Each row has its own unit: dots are replicates' differences (candidate minus baseline, paired by replicate), "
        "bars the intervals of their means at the level of the family, from which the verdicts are read, and grey is "
        f"what is too small to matter; a bar that reaches the frame goes on beyond it; n is {_counts(rows)} replicates."
    ) + (f" {left} more claims stand in the table alone." if left else "")


def _counts(rows):
    counts = sorted({int(row.numbers["replicates"]) for row in rows})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


SECTION = Section(
    name="claims",
    heading="Claims",
    place=1,
    table=claims.frame,
    left_out=("origin", "text", "measure", "judge", "how"),
    rows=for_readers,
    figure=figure,
    caption=caption,
    reading=reading,
    sides=sides_at_all_kl_coefs,
)
