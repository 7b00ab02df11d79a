"""Each arm against plain PPO where both are as far from sft0."""

from matplotlib.ticker import MaxNLocator

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section, sides_at_all_kl_coefs


def matched_kl(study, frames):
    """Each arm minus its baseline at equal KL to sft0: a panel a measure, t intervals over replicates, a line at 0."""
    frame = style.measured(frames, "matched_kl", "difference")
    if frame.empty:
        return style.not_measured("differences at equal KL")
    shown = list(dict.fromkeys(zip(frame["measure"], frame["baseline"], strict=True)))
    arms = [arm for arm in study.arms if arm in set(frame["arm"])]
    width = max(3.5, min(style.WIDTH, 3.5 * len(shown)))
    figure, axes = style.panels(1, len(shown), height=0.7 + 0.2 * len(arms), width=width, sharey=True)
    for axis, (measure, baseline) in zip(axes[0], shown, strict=True):
        own = frame[(frame["measure"] == measure) & (frame["baseline"] == baseline)]
        axis.axvline(0, color=style.DARK, linewidth=0.9, linestyle="--")
        for row in own.to_dict("records"):
            look = style.looks(study)[row["arm"]]
            style.whisker(axis, style.triple(row, "difference"), arms.index(row["arm"]), look.colour, linewidth=1.4)
            axis.plot(row["difference"], arms.index(row["arm"]), color=look.colour, marker=look.marker, markersize=5)
        axis.set_xlabel(f"{measure.replace('_', ' ')},\narm minus {baseline} at equal KL")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(arms)), [style.arm_label(study, arm) for arm in arms])
    axes[0, 0].set_ylim(len(arms) - 0.4, -0.6)
    return figure


def caption(study, frames):
    frame = frames["matched_kl"]
    if frame.empty:
        return "No arm beside plain PPO was run at two kl_coefs, or none reaches the same KL."
    spread = frame["difference_high"] > frame["difference_low"]  # equal replicates have no interval
    above = int((spread & (frame["difference_low"] > 0)).sum())
    below = int((spread & (frame["difference_high"] < 0)).sum())
    return (
        f"Arms minus {study.plain} at equal KL to sft0, over the range that the curves through both arms' final "
        f"policies share (no point at sft0 itself, and nothing beyond a curve's ends): of {len(frame)} differences, "
        f"{above} intervals lie above 0 and {below} below; {words.band(study)}."
    )


def reading(study, frames):
    frame = style.measured(frames, "matched_kl", "difference")
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
    table=tables.matched_kl,
    figure=matched_kl,
    caption=caption,
    reading=reading,
    sides=sides_at_all_kl_coefs,
)
