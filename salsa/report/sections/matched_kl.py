"""Each arm against its plain anchor where both are as far from sft0."""

import pandas as pd
from matplotlib.ticker import MaxNLocator

from salsa.report import selection, style, words
from salsa.report.frames import interval
from salsa.report.sections import Section, sides_at_all_kl_coefs

COLUMNS = [
    "arm",
    "baseline",
    "measure",
    "judge",
    "kl_coefs",
    "replicates",
    "difference",
    "difference_low",
    "difference_high",
]


def table(study):
    """One row per arm × measure: the arm minus its plain anchor at equal KL to sft0, over the KL that both reach.

    Measures: gold reward on the development prompts; the win rate against sft0 over all benchmarks' prompts. Of the
    arms that were run at two kl_coefs at least; bounds: t over replicates.
    """
    rows, main = [], selection.main_judge(study)
    measures = [("gold_reward", "", selection.gold_of(study))]
    if main:
        measures.append(("win_rate_vs_sft0", main, selection.rate_of(study, main, study.benchmarks)))
    for arm in study.arms:
        plain = study.plain_of(arm)
        for measure, judge, values in measures if plain not in (None, arm) else ():
            differences = selection.matched(study, arm, plain, values)
            if differences:
                row = {"arm": arm, "baseline": plain, "measure": measure, "judge": judge}
                row |= {"kl_coefs": words.listed(selection.grid(study, arm)), "replicates": len(differences)}
                rows.append(row | interval("difference", list(differences.values())))
    return pd.DataFrame(rows, columns=COLUMNS)


def figure(study, tables):
    """Each arm minus its baseline at equal KL to sft0: one panel per measure, t intervals, a line at 0."""
    frame = style.measured(tables, "matched_kl", "difference")
    if frame.empty:
        return None
    panels = list(frame.groupby(["measure", "baseline"], sort=False))
    arms, looks = [arm for arm in study.arms if arm in set(frame["arm"])], style.looks(study)
    width = max(3.5, min(style.WIDTH, 3.5 * len(panels)))
    figure, axes = style.panels(1, len(panels), height=0.7 + 0.2 * len(arms), width=width, sharey=True)
    for axis, ((measure, baseline), rows) in zip(axes[0], panels, strict=True):
        axis.axvline(0, color=style.DARK, linewidth=0.9, linestyle="--")
        for row in rows.to_dict("records"):
            look, y = looks[row["arm"]], arms.index(row["arm"])
            style.whisker(axis, style.triple(row, "difference"), y, look.colour, linewidth=1.4)
            axis.plot(row["difference"], y, color=look.colour, marker=look.marker, markersize=5)
        axis.set_xlabel(f"{measure.replace('_', ' ')},\narm minus {baseline} at equal KL")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(arms)), [style.arm_label(study, arm) for arm in arms])
    axes[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def caption(study, tables):
    frame = tables["matched_kl"]
    if frame.empty:
        return "No arm beside the plain anchor was run at two kl_coefs, or none reaches the same KL."
    spread = frame["difference_high"] > frame["difference_low"]  # equal replicates have no interval
    above = int((spread & (frame["difference_low"] > 0)).sum())
    below = int((spread & (frame["difference_high"] < 0)).sum())
    plain = " or ".join(frame["baseline"].unique())
    return (
        f"Arms minus {plain} at equal KL to sft0, over the range that the curves through both arms' final "
        f"policies share (no point at sft0 itself, and nothing beyond a curve's ends): of {len(frame)} differences, "
        f"{above} intervals lie above 0 and {below} below; {words.band(study)}."
    )


def reading(study, tables):
    frame = style.measured(tables, "matched_kl", "difference")
    if frame.empty:
        return ""
    largest = frame.loc[frame["difference"].abs().idxmax()]
    return (
        f"Bars are 95 % t intervals over replicates; the largest difference is that of {largest['arm']}, "
        f"{selection.number(largest['difference'])} in {largest['measure'].replace('_', ' ')}."
    )


SECTION = Section(
    name="matched_kl",
    heading="Rewards and KL",
    place=3,
    table=table,
    figure=figure,
    caption=caption,
    reading=reading,
    sides=sides_at_all_kl_coefs,
)
