"""How often judges prefer each arm to plain PPO and to sft0."""

import math

import numpy as np
from matplotlib.ticker import MultipleLocator

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section


def win_rates(study, frames):
    """Adjusted win rates of arms, a panel a benchmark and baseline, with bootstrap intervals and a line at ½.

    Beside each, hollow, the length-controlled rate. Where all kl_coefs would not fit on a page, only those that curves
    show.
    """
    frame = style.measured(frames, "win_rates", "adjusted_win_rate")
    if frame.empty:
        return style.not_measured("win rates")
    frame, kl_coefs = shown_win_rates(study, frame)
    rows = _comparisons(frame)
    names = [name for name in study.benchmarks if name in set(frame["benchmark"])]
    slots = {row: _slots(study, frame[_is(frame, *row)], kl_coefs) for row in rows}
    heights = [_height(slots[row]) for row in rows]
    figure, axes = style.panels(len(rows), len(names), width=max(3.5, min(style.WIDTH, 1.2 + 2.1 * len(names))),
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
    entries = [style.mark("adjusted win rate")]
    if style.known(frame, "length_controlled"):
        entries.append(style.mark("length-controlled", markerfacecolor="white"))
    style.legend(figure, study, arms=set(frame["candidate"]), kl_coefs=kl_coefs, extra=entries)
    return figure


def shown_win_rates(study, frame):
    """(rows, kl_coefs): all, or where they would not fit on a page, those at the kl_coefs that curves show."""
    if len(_comparisons(frame)) * _height(_slots(study, frame, study.kl_coefs)) <= style.TALLEST - 1:
        return frame, study.kl_coefs
    kl_coefs = style.drawn_kl_coefs(study)
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
    axis.axvline(0.5, color=style.DARK, linewidth=0.9, linestyle="--")
    for row in frame.to_dict("records"):
        y = slots[row["candidate"], row["kl_coef"]]
        shown, size = style.looks(study)[row["candidate"]], min(style.sizes(study)[row["kl_coef"]], 1.2)
        controlled = row.get("length_controlled", math.nan)
        apart = 0.2 if controlled == controlled else 0
        point = (row["adjusted_win_rate"], row["ci_low"], row["ci_high"])
        style.whisker(axis, point, y - apart, shown.colour, linewidth=1.4)
        axis.plot(point[0], y - apart, color=shown.colour, marker=shown.marker, markersize=3.2 * size)
        if apart:
            style.whisker(axis, style.triple(row, "length_controlled"), y + apart, shown.colour, linewidth=0.7)
            axis.plot(controlled, y + apart, color=shown.colour, marker=shown.marker, markersize=2.8 * size,
                      markerfacecolor="white", markeredgewidth=0.6)  # fmt: skip
    _arm_rows(axis, study, slots)


def _arm_rows(axis, study, slots):
    """One tick an arm, in the middle of its rows."""
    arms = dict.fromkeys(arm for arm, _ in slots)
    middles = [np.mean([y for (name, _), y in slots.items() if name == arm]) for arm in arms]
    axis.set_yticks(middles, [style.arm_label(study, arm) for arm in arms])
    axis.set_ylim(max(slots.values()) + 0.9, -0.9)
    axis.grid(axis="y", visible=False)


def caption(study, frames):
    frame = frames["win_rates"]
    if frame.empty:
        return words.no_verdicts(study) + words.doubts(study)
    clear, known = int(((frame["ci_low"] > 0.5) | (frame["ci_high"] < 0.5)).sum()), int(frame["ci_low"].notna().sum())
    clear = f"{clear} of {known} intervals exclude ½" if known else "none has an interval, which takes two prompts"
    return (
        f"Adjusted win rates (wins + ties/2) with 95 % intervals that resample {words.spread(frame['prompts'])} "
        f"prompts over {words.replicates(study)}, conditional on these models: {clear}; length-controlled: "
        "at answers of one length (2404.04475); Holm's p over all rows against one baseline."
    ) + words.doubts(study)


def reading(study, frames):
    frame = style.measured(frames, "win_rates", "adjusted_win_rate")
    if frame.empty:
        return ""
    frame, kl_coefs = shown_win_rates(study, frame)
    text = f"Bars are 95 % bootstrap intervals over prompts; kl_coef {words.listed(sorted(kl_coefs))}"
    if style.known(frame, "length_controlled"):
        shift = (frame["length_controlled"] - frame["adjusted_win_rate"]).abs().max()
        text += f"; hollow: at equal response length, which moves a rate by at most {selection.number(shift)}"
    return text + "."


SECTION = Section(
    name="win_rates",
    heading="Preferences",
    place=3,
    table=tables.win_rates,
    left_out=("model", "data", "wins", "ties", "losses"),
    figure=win_rates,
    caption=caption,
    reading=reading,
)
