"""How often judges prefer each arm to the plain anchor and to sft0."""

import math
from collections import defaultdict

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from salsa.evaluate import statistics
from salsa.report import judging, selection, style, words
from salsa.report.frames import identity
from salsa.report.sections import Section

COLUMNS = [
    "model",
    "data",
    "benchmark",
    "judge",
    "candidate",
    "baseline",
    "kl_coef",
    "adjusted_win_rate",
    "ci_low",
    "ci_high",
    "prompts",
    "replicates",
    "replicates_low",
    "replicates_high",
    "length_controlled",
    "length_controlled_low",
    "length_controlled_high",
    "wins",
    "ties",
    "losses",
    "swap_consistency",
    "sign_test_p",
    "holm_p",
]


def table(study):
    """One row per benchmark × judge × candidate arm × baseline × kl_coef; ci: bootstrap over prompts.

    replicates_low and replicates_high bound the 95 % t interval over replicates, of two at least.
    holm_p corrects the sign tests over all rows of one baseline: the plain anchor, or sft0.
    """
    report, lengths, rows = study.config.report, response_lengths(study), []
    for (arm, kl_coef), (policy, *_) in study.groups().items():
        for baseline, name in policy.baselines.items():
            for judge, benchmark in judging.judged(study):
                lines = study.lines(judge, benchmark, policy.name, name)
                rate = statistics.compare(lines, policy.name, name, report.seed, report.bootstrap)
                if rate["prompts"]:
                    row = {"benchmark": benchmark, "judge": judge, "candidate": arm, "baseline": baseline}
                    row |= {"kl_coef": kl_coef, "replicates": len({line["replicate"] for line in lines})}
                    rates = selection.replicate_win_rates(study, policy.name, name, judge, [benchmark])
                    _, low, high = statistics.replicate_interval(list(rates.values()))
                    row |= {"replicates_low": low, "replicates_high": high}
                    row |= length_controlled(study, judge, benchmark, policy.name, name, lengths)
                    rows.append(identity(study) | row | rate)
    frame = pd.DataFrame(rows, columns=COLUMNS)
    for _, p in frame.groupby("baseline")["sign_test_p"]:
        frame.loc[p.index, "holm_p"] = statistics.holm(p)
    return frame


def response_lengths(study):
    """(replicate, training seed, model's name in verdicts, benchmark, prompt's id) -> tokens of its answer, all turns.

    Of several answers to a prompt the mean.
    """
    keys = ["replicate", "seed", "model", "benchmark", "prompt_id"]
    return study.frames.responses.groupby(keys, sort=False)["tokens"].mean().to_dict()


def length_controlled(study, judge, benchmark, candidate, baseline, lengths):
    """The length-controlled win rate of a pair and its bounds, as columns; a prompt's numbers are replicates' means."""
    pairs = defaultdict(lambda: defaultdict(list))  # prompt -> replicate -> (score, difference) of each training seed
    for (replicate, seed), scores in study.training_scores(judge, benchmark, candidate, baseline).items():
        for prompt, score in scores.items():
            tokens, others = (
                selection.response_of(lengths, replicate, seed, model, benchmark, prompt)
                for model in (candidate, baseline)
            )
            pairs[prompt][replicate].append((score, tokens - others))
    means = [
        np.mean([np.mean(values, axis=0) for values in replicates.values()], axis=0) for replicates in pairs.values()
    ]
    scores, differences = np.array(means).reshape(-1, 2).T
    report = study.config.report
    few = min(report.bootstrap, statistics.FEWEST_RESAMPLES)
    resamples = max(few, report.bootstrap // 4)  # each is a fit
    low, high = statistics.length_controlled_interval(scores, differences, report.seed, resamples)
    rate = statistics.length_controlled(scores, differences)
    return {"length_controlled": rate, "length_controlled_low": low, "length_controlled_high": high}


def figure(study, tables):
    """Adjusted win rates of arms, a panel per benchmark and baseline, with a scale per baseline.

    Intervals are over replicates; of one replicate, over prompts. Beside each, hollow, the length-controlled one. Where
    all kl_coefs would not fit on a page, only those that curves show.
    """
    frame = style.measured(tables, "win_rates", "adjusted_win_rate")
    if frame.empty:
        return None
    frame, kl_coefs = drawn_rows(study, frame)
    panels = list(frame.groupby(["judge", "baseline"], sort=False))
    names = [name for name in study.benchmarks if name in set(frame["benchmark"])]
    slots = [_slots(study, rows, kl_coefs) for _, rows in panels]
    heights = [_height(places) for places in slots]
    figure, axes = style.panels(len(panels), len(names), width=max(3.5, min(style.WIDTH, 1.2 + 2.1 * len(names))),
                                height=sum(heights) / len(panels) + 0.1, sharex="row", sharey="row",
                                gridspec_kw={"height_ratios": heights})  # fmt: skip
    for row, ((judge, baseline), rows) in enumerate(panels):
        for axis, benchmark in zip(axes[row], names, strict=True):
            _draw_panel(axis, study, rows[rows["benchmark"] == benchmark], slots[row])
            axis.set_title(benchmark.replace("_", " ") if row == 0 else "")
            axis.set_xlim(_limits(rows))
            axis.xaxis.set_major_locator(MaxNLocator(4))
        axes[row, 0].set_ylabel(f"against {baseline}\n(judge: {judge})")
    for axis in axes[-1]:
        axis.set_xlabel("adjusted win rate")
    entries = [style.mark("adjusted win rate")]
    if style.known(frame, "length_controlled"):
        entries.append(style.mark("length-controlled", markerfacecolor="white"))
    style.legend(figure, study, arms=set(frame["candidate"]), kl_coefs=kl_coefs, extra=entries)
    return figure


def of_rates(row):
    """(rate, low, high) of a row: over replicates, or of one replicate, over prompts."""
    ends = ("replicates_low", "replicates_high") if row.get("replicates", 1) > 1 else ("ci_low", "ci_high")
    return row["adjusted_win_rate"], *(float(np.clip(row.get(end, math.nan), 0, 1)) for end in ends)


def for_readers(frame):
    """The rows with the interval over replicates beside the rate that it is of, not beside their number."""
    bounds = {f"over_replicates{end}": frame[f"replicates{end}"] for end in ("_low", "_high")}
    several = bounds["over_replicates_low"].notna()
    place = frame.columns.get_loc("prompts")
    shown = frame.drop(columns=["replicates_low", "replicates_high"])
    shown.insert(place, "over_replicates", frame["adjusted_win_rate"].where(several))
    return shown.assign(**bounds)


def _limits(frame):
    """Around all rates, and intervals no wider than these; ½ is among them, unless all rates lie far from it."""
    rates = frame.reindex(columns=["adjusted_win_rate", "length_controlled"]).to_numpy(dtype=float)
    low, high = np.nanmin(rates), np.nanmax(rates)
    reach = max(high - low, 0.05)
    ends = [np.clip(end, low - reach, high + reach) for row in frame.to_dict("records") for end in of_rates(row)[1:]]
    half = [0.5] if low - reach <= 0.5 <= high + reach else []
    low, high = style.limits([low, high, *ends, *half])
    return max(low, -0.02), min(high, 1.02)


def drawn_rows(study, frame):
    """(rows, kl_coefs): all, or where they would not fit on a page, those at the kl_coefs that curves show."""
    panels = len(frame[["judge", "baseline"]].drop_duplicates())
    if panels * _height(_slots(study, frame, study.kl_coefs)) <= style.TALLEST - 1:
        return frame, study.kl_coefs
    kl_coefs = style.drawn_kl_coefs(study)
    return frame[frame["kl_coef"].isin(kl_coefs)], kl_coefs


def _slots(study, frame, kl_coefs):
    """(arm, kl_coef) -> y, downwards: an arm's kl_coefs 1 apart, and more between arms."""
    present, places, y = set(zip(frame["candidate"], frame["kl_coef"], strict=True)), {}, 0.0
    between = 0.6 if len(kl_coefs) > 1 else 0.15
    for arm in study.arms:
        rows = [(arm, kl_coef) for kl_coef in sorted(kl_coefs) if (arm, kl_coef) in present]
        for row in rows:
            places[row] = y
            y += 1
        y += between * bool(rows)
    return places


def _height(slots):
    """Inches of a panel with these rows; no less than its label needs."""
    return max(1.25, 0.45 + 0.115 * (max(slots.values(), default=0) + 1))


def _draw_panel(axis, study, frame, slots):
    looks, sizes = style.looks(study), style.sizes(study.kl_coefs)
    axis.axvline(0.5, color=style.DARK, linewidth=0.9, linestyle="--")
    for row in frame.to_dict("records"):
        y = slots[row["candidate"], row["kl_coef"]]
        look, size = looks[row["candidate"]], min(sizes[row["kl_coef"]], 1.2)
        controlled = row.get("length_controlled", math.nan)
        apart = 0.2 if controlled == controlled else 0
        point = of_rates(row)
        style.whisker(axis, point, y - apart, look.colour, linewidth=1.4)
        axis.plot(point[0], y - apart, color=look.colour, marker=look.marker, markersize=3.2 * size)
        if apart:
            if row.get("replicates", 1) == 1:  # else its interval over prompts would stand beside one over replicates
                style.whisker(axis, style.triple(row, "length_controlled"), y + apart, look.colour, linewidth=0.7)
            axis.plot(controlled, y + apart, color=look.colour, marker=look.marker, markersize=2.8 * size,
                      markerfacecolor="white", markeredgewidth=0.6)  # fmt: skip
    _arm_rows(axis, study, slots)


def _arm_rows(axis, study, slots):
    """One tick per arm, in the middle of its rows."""
    arms = dict.fromkeys(arm for arm, _ in slots)
    middles = [np.mean([y for (name, _), y in slots.items() if name == arm]) for arm in arms]
    axis.set_yticks(middles, [style.arm_label(study, arm) for arm in arms])
    axis.set_ylim(max(slots.values()) + 0.9, -0.9)
    axis.grid(axis="y", visible=False)


def caption(study, tables):
    frame = tables["win_rates"]
    if frame.empty:
        return words.no_verdicts(study) + words.doubts(study)
    clear, intervals = ((frame["ci_low"] > 0.5) | (frame["ci_high"] < 0.5)).sum(), frame["ci_low"].notna().sum()
    text = (
        f"{clear} of {intervals} intervals exclude ½" if intervals else "none has an interval, which takes two prompts"
    )
    return (
        f"Adjusted win rates (wins + ties/2) with 95 % intervals that resample {words.spread(frame['prompts'])} "
        f"prompts over {words.replicates_by_arm(study)}, conditional on these models: {text}; length-controlled: "
        "at answers of one length (2404.04475); Holm's p over all rows against one baseline."
    ) + words.doubts(study)


def reading(study, tables):
    frame = style.measured(tables, "win_rates", "adjusted_win_rate")
    if frame.empty:
        return ""
    frame, kl_coefs = drawn_rows(study, frame)
    over = "t intervals over replicates"
    if len(study.replicates) == 1:
        over = "bootstrap intervals over the prompts of one replicate, which say nothing of other SFT pairs"
    text = f"Bars are 95 % {over}, and {style.CUT}; kl_coef {words.listed(sorted(kl_coefs))}"
    if style.known(frame, "length_controlled"):
        shift = (frame["length_controlled"] - frame["adjusted_win_rate"]).abs().max()
        text += f"; hollow: at equal response length, which moves a rate by at most {selection.number(shift)}"
    return text + "."


SECTION = Section(
    name="win_rates",
    heading="Preferences",
    place=3,
    table=table,
    left_out=("model", "data", "wins", "ties", "losses"),
    shares=("adjusted_win_rate", "replicates", "length_controlled"),
    rows=for_readers,
    figure=figure,
    caption=caption,
    reading=reading,
)
