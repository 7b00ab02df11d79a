"""Comparisons, a row each, with intervals: win rates, differences at equal KL, claims and Bradley-Terry scores."""

import math

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, MultipleLocator, NullLocator

from salsa.report import selection
from salsa.report.figures.style import (
    DARK,
    GREY,
    LOOKS,
    NEUTRAL,
    TALLEST,
    WIDTH,
    arm_label,
    bars,
    below,
    drawn_kl_coefs,
    known,
    legend,
    looks,
    mark,
    measured,
    not_measured,
    panels,
    sizes,
    styled,
    triple,
)

PART = "· "  # before a benchmark of a claim
NO_BOUNDS = (math.nan, math.nan)
VERDICTS = {  # verdict -> marker, colour, filled
    "supported": ("^", LOOKS["ppo"].colour, True),
    "refuted": ("v", LOOKS["salsa"].colour, True),
    "undecided": ("o", GREY, False),
}


@styled
def win_rates(study, frames):
    """Adjusted win rates of arms, a panel a benchmark and baseline, with bootstrap intervals and a line at ½.

    Beside each, hollow, the length-controlled rate. Where all kl_coefs would not fit on a page, only those that curves
    show.
    """
    frame = measured(frames, "win_rates", "adjusted_win_rate")
    if frame.empty:
        return not_measured("win rates")
    frame, kl_coefs = shown_win_rates(study, frame)
    rows = _comparisons(frame)
    names = [name for name in study.benchmarks if name in set(frame["benchmark"])]
    slots = {row: _slots(study, frame[_is(frame, *row)], kl_coefs) for row in rows}
    heights = [_height(slots[row]) for row in rows]
    figure, axes = panels(len(rows), len(names), width=max(3.5, min(WIDTH, 1.2 + 2.1 * len(names))),
                          height=sum(heights) / len(rows) + 0.1, sharex=True, sharey="row",
                          gridspec_kw={"height_ratios": heights})  # fmt: skip
    for row, (judge, baseline) in enumerate(rows):
        some = frame[_is(frame, judge, baseline)]
        for column, benchmark in enumerate(names):
            _win_panel(axes[row, column], study, some[some["benchmark"] == benchmark], slots[judge, baseline])
            if row == 0:
                axes[row, column].set_title(benchmark.replace("_", " "))
        axes[row, 0].set_ylabel(f"against {baseline}\n(judge: {judge})")
    for axis in axes[-1]:
        axis.set_xlabel("adjusted win rate")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(MultipleLocator(0.2 if high - low > 0.5 else 0.1 if high - low > 0.2 else 0.05))
    entries = [mark("adjusted win rate")]
    if known(frame, "length_controlled"):
        entries.append(mark("length-controlled", markerfacecolor="white"))
    legend(figure, study, arms=set(frame["candidate"]), kl_coefs=kl_coefs, extra=entries)
    return figure


def shown_win_rates(study, frame):
    """(rows, kl_coefs): all, or where they would not fit on a page, those at the kl_coefs that curves show."""
    if len(_comparisons(frame)) * _height(_slots(study, frame, study.kl_coefs)) <= TALLEST - 1:
        return frame, study.kl_coefs
    kl_coefs = drawn_kl_coefs(study)
    return frame[frame["kl_coef"].isin(kl_coefs)], kl_coefs


def _comparisons(frame):
    """(judge, baseline) of each row of panels."""
    return list(dict.fromkeys(zip(frame["judge"], frame["baseline"], strict=True)))


def _is(frame, judge, baseline):
    return (frame["judge"] == judge) & (frame["baseline"] == baseline)


def _slots(study, frame, kl_coefs):
    """(arm, kl_coef) -> y, downwards: an arm's kl_coefs 1 apart, and more between arms."""
    present, places, y = set(zip(frame["candidate"], frame["kl_coef"], strict=True)), {}, 0.0
    between = 0.6 if len(kl_coefs) > 1 else 0.15
    for arm in study.arms:
        own = [kl_coef for kl_coef in sorted(kl_coefs) if (arm, kl_coef) in present]
        for kl_coef in own:
            places[arm, kl_coef] = y
            y += 1
        y += between * bool(own)
    return places


def _height(slots):
    """Inches of a panel with these rows; no less than its label needs."""
    return max(1.25, 0.45 + 0.115 * (max(slots.values(), default=0) + 1))


def _win_panel(axis, study, frame, slots):
    axis.axvline(0.5, color=DARK, linewidth=0.9, linestyle="--")
    for row in frame.to_dict("records"):
        y = slots[row["candidate"], row["kl_coef"]]
        shown, size = looks(study)[row["candidate"]], min(sizes(study)[row["kl_coef"]], 1.2)
        controlled = row.get("length_controlled", math.nan)
        apart = 0.2 if controlled == controlled else 0
        point = (row["adjusted_win_rate"], row["ci_low"], row["ci_high"])
        bars(axis, point, (y - apart, *NO_BOUNDS), shown.colour, linewidth=1.4)
        axis.plot(point[0], y - apart, color=shown.colour, marker=shown.marker, markersize=3.2 * size)
        if apart:
            bars(axis, triple(row, "length_controlled"), (y + apart, *NO_BOUNDS), shown.colour, linewidth=0.7)
            axis.plot(controlled, y + apart, color=shown.colour, marker=shown.marker, markersize=2.8 * size,
                      markerfacecolor="white", markeredgewidth=0.6)  # fmt: skip
    _arm_rows(axis, study, slots)


def _arm_rows(axis, study, slots):
    """One tick an arm, in the middle of its rows."""
    arms = dict.fromkeys(arm for arm, _ in slots)
    middles = [np.mean([y for (name, _), y in slots.items() if name == arm]) for arm in arms]
    axis.set_yticks(middles, [arm_label(study, arm) for arm in arms])
    axis.set_ylim(max(slots.values()) + 0.9, -0.9)
    axis.grid(axis="y", visible=False)


@styled
def matched_kl(study, frames):
    """Each arm minus its baseline at equal KL to sft0: a panel a measure, t intervals over replicates, a line at 0."""
    frame = measured(frames, "matched_kl", "difference")
    if frame.empty:
        return not_measured("differences at equal KL")
    shown = list(dict.fromkeys(zip(frame["measure"], frame["baseline"], strict=True)))
    arms = [arm for arm in study.arms if arm in set(frame["arm"])]
    figure, axes = panels(1, len(shown), height=0.7 + 0.2 * len(arms), width=max(3.5, min(WIDTH, 3.5 * len(shown))),
                          sharey=True)  # fmt: skip
    for axis, (measure, baseline) in zip(axes[0], shown, strict=True):
        own = frame[(frame["measure"] == measure) & (frame["baseline"] == baseline)]
        axis.axvline(0, color=DARK, linewidth=0.9, linestyle="--")
        for row in own.to_dict("records"):
            look = looks(study)[row["arm"]]
            bars(axis, triple(row, "difference"), (arms.index(row["arm"]), *NO_BOUNDS), look.colour, linewidth=1.4)
            axis.plot(row["difference"], arms.index(row["arm"]), color=look.colour, marker=look.marker, markersize=5)
        axis.set_xlabel(f"{measure.replace('_', ' ')},\narm minus {baseline} at equal KL")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(arms)), [arm_label(study, arm) for arm in arms])
    axes[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


@styled
def claims(study, frames):
    """A forest plot of the claims: effects with intervals in units of the smallest effect of interest, and verdicts.

    A claim of several benchmarks has a line of its own, with its verdict, above theirs.
    """
    frame = measured(frames, "claims", "verdict")
    if frame.empty:
        return not_measured("claims")
    lines = claim_lines(frame)
    figure, axes = panels(1, 1, height=0.45 + 0.19 * len(lines))
    axis = axes[0, 0]
    axis.axvline(0, color=DARK, linewidth=0.9, linestyle="--")
    axis.axvline(1, color=DARK, linewidth=0.9, linestyle=":")
    for y, (_, text, row) in enumerate(lines):
        if row is not None:
            _effect(axis, row, y)
        axis.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=DARK)
    _symlog(axis, [row for _, _, row in lines if row is not None])
    axis.set_yticks(range(len(lines)), [label + _claim_mark(study, row) for label, _, row in lines])
    for tick, (label, _, _) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_color(GREY if label.startswith(PART) else DARK)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("effect, in units of the smallest effect of interest\n(linear to ±2, then logarithmic)")
    entries = [mark(name, marker, color=colour, markerfacecolor=colour if filled else "white")
               for name, (marker, colour, filled) in VERDICTS.items()]  # fmt: skip
    entries.append(Line2D([], [], color=DARK, linewidth=0.9, linestyle=":", label="smallest effect of interest"))
    below(figure, entries)
    return figure


def _claim_mark(study, row):
    """(collapsed) behind a claim that compares such a policy."""
    sides = ((row[side], row.get(f"{side}_kl_coef", math.nan)) for side in ("candidate", "baseline")) if row else ()
    marks = [selection.collapsed(study, arm, None if kl_coef != kl_coef else kl_coef) for arm, kl_coef in sides]
    return " (collapsed policy)" if any(marks) and row["verdict"] != "not tested" else ""


def claim_lines(frame):
    """(label, words on the right, row or None) of each line of the forest, downwards."""
    lines = []
    for name, own in frame.groupby("claim", sort=False):
        rows, label = own.to_dict("records"), name.replace("_", " ")
        if len(rows) == 1:
            benchmark = (rows[0].get("benchmark") or "").replace("_", " ")
            own_label = label if benchmark in ("", label) else f"{label} ({benchmark})"
            lines.append((own_label, _words(rows[0], rows[0]["verdict"], p=True, needed=True), rows[0]))
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
        bars(axis, x, (y, *NO_BOUNDS), colour, linewidth=1.4)
        axis.plot(x[0], y, marker=marker, color=colour, markersize=5.5, markerfacecolor=colour if filled else "white")


def in_units(row):
    """(effect, low, high) of a claim's row, divided by its smallest effect; nan of `stable`, a share."""
    unit = row["smallest_effect"] if row.get("measure") != "stable" else 0
    return tuple(x / unit for x in triple(row, "effect")) if unit > 0 else (math.nan,) * 3


def _symlog(axis, rows):
    """Linear where effects are of the size of interest, logarithmic beyond: one wide interval hides no other."""
    axis.set_xscale("symlog", linthresh=2, linscale=1.2)
    found = [x for row in rows for x in in_units(row) if math.isfinite(x)]
    low, high = min([*found, -1]), max([*found, 2])
    axis.set_xlim(low * (1.2 if low < -2 else 1.3), high * 1.2)
    ticks = [-1000, -100, -10, -2, -1, 0, 1, 2, 10, 100, 1000]
    axis.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low * 1.2 <= tick <= high * 1.2]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")


@styled
def bradley_terry(study, frames):
    """Bradley-Terry scores of all judged models, a panel a judge, with bootstrap intervals."""
    frame = measured(frames, "bradley_terry", "score")
    if frame.empty:
        return not_measured("Bradley-Terry scores")
    judges = list(dict.fromkeys(frame["judge"]))
    models = list(dict.fromkeys(frame["model"]))
    figure, axes = panels(1, len(judges), height=min(TALLEST - 1, 0.5 + 0.15 * len(models)), sharey=True,
                          width=max(3.5, min(WIDTH, 2.0 + 2.5 * len(judges))))  # fmt: skip
    for axis, judge in zip(axes[0], judges, strict=True):
        for row in frame[frame["judge"] == judge].to_dict("records"):
            y = models.index(row["model"])
            shown, size = model_look(study, row["model"])
            bars(axis, triple(row, "score"), (y, *NO_BOUNDS), shown.colour, linewidth=1.2)
            axis.plot(row["score"], y, color=shown.colour, marker=shown.marker, markersize=4.5 * size)
        axis.set_title(f"judge: {judge}")
        axis.set_xlabel("Bradley-Terry score")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(models)), [model + _collapsed(study, model) for model in models])
    axes[0, 0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def _collapsed(study, model):
    for policy in study.policies:
        if model in (policy.name, f"{policy.arm}, kl_coef {policy.kl_coef:g}"):
            return selection.collapsed(study, policy.arm, policy.kl_coef)
    return ""


def model_look(study, model):
    """(look, size) of a judged model, by the policy's name or by the arm and kl_coef that its name begins and ends
    with; grey and of size 1 where it is no policy."""
    for policy in study.policies:
        if model in (policy.name, f"{policy.arm}, kl_coef {policy.kl_coef:g}"):
            return looks(study)[policy.arm], sizes(study)[policy.kl_coef]
    return (looks(study)[model], 1.0) if model in study.arms else (NEUTRAL, 1.0)
