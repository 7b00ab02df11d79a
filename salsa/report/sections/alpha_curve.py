"""Rewards, win rates and loss by alpha: of soups before PPO, and of policies after it."""

import math

from matplotlib.lines import Line2D

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section, sides


def alpha_curve(study, frames):
    """By alpha: proxy and gold reward and win rate against sft0, of SFT soups before PPO and policies after it; and the
    soups' validation loss."""
    frame = style.measured(frames, "alpha_curve", "alpha")
    wanted = (("reward", style.PROXY), ("gold_reward", style.GOLD), ("win_rate_vs_sft0", "win rate against sft0"),
              ("loss", "validation loss, nats a token"))  # fmt: skip
    shown = [(name, label) for name, label in wanted if style.known(frame, name)]
    if not shown:
        return style.not_measured("reward and loss by alpha")
    columns = len(shown) if len(shown) < 4 else 2
    figure, axes = style.panels(math.ceil(len(shown) / columns), columns, height=2.3)
    for axis, (name, label) in zip(axes.flat, shown, strict=True):
        _soups(axis, study, frame[frame["kind"] == "sft_soup"].dropna(subset=name), name)
        for index, kl_coef in enumerate(study.kl_coefs):
            some = frame[(frame["kind"] == "policy") & (frame["kl_coef"] == kl_coef)]
            _alpha_policies(axis, study, some, name, index)
        if name == "win_rate_vs_sft0":
            axis.axhline(0.5, color=style.DARK, linewidth=0.9, linestyle="--")
            axis.set_ylim(0, 1)  # an interval over few replicates may reach beyond what a rate can be
        axis.set_xlabel("alpha (0: sft0, 1: sft1)")
        axis.set_ylabel(label)
        axis.set_xlim(-0.08, 1.08)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    soup = Line2D([], [], color=style.DARK, marker=".", markersize=6, label="SFT soup, before PPO")
    policy = Line2D([], [], color=style.GREY, marker="o", markersize=5, linewidth=0.9, label="policy, after PPO")
    on_the_line = {policy.arm for policy in study.policies if policy.alpha is not None}
    style.legend(figure, study, arms=on_the_line, extra=(soup, policy))
    return figure


def _soups(axis, study, frame, name):
    axis.plot(frame["alpha"], frame[name], color=style.DARK, linestyle="-", marker=".", markersize=6)
    if style.has_intervals(study) and f"{name}_low" in frame:
        axis.fill_between(
            frame["alpha"], frame[f"{name}_low"], frame[f"{name}_high"], color=style.DARK, alpha=0.15, lw=0
        )


def _alpha_policies(axis, study, frame, name, index):
    frame = frame.dropna(subset=name)
    count = len(study.kl_coefs)
    x = frame["alpha"] + (index - (count - 1) / 2) * 0.03  # so that bars of several kl_coefs stay apart
    size = style.sizes(study)[study.kl_coefs[index]]
    axis.plot(x, frame[name], color=style.GREY, linewidth=0.9 * size, zorder=2)
    for place, row in zip(x, frame.to_dict("records"), strict=True):
        arm = next(p.arm for p in study.of(alpha=row["alpha"], kl_coef=row["kl_coef"]))
        shown = style.look(arm, row["alpha"])
        if style.has_intervals(study):
            style.bars(
                axis, (place, math.nan, math.nan), style.triple(row, name), shown.colour, linewidth=1.2 * size, zorder=3
            )
        axis.plot(place, row[name], color=shown.colour, marker=shown.marker, markersize=5 * size, zorder=4)


def caption(study, frames):
    kinds = frames["alpha_curve"]["kind"]
    return (
        "Reward, and the soups' validation loss, from sft0 (alpha 0) to sft1 (alpha 1), before PPO at "
        f"{(kinds == 'sft_soup').sum()} soups and after it at {(kinds == 'policy').sum()} settings of alpha and "
        f"kl_coef, {words.replicates(study)}; {words.band(study)}."
    )


def reading(study, frames):
    frame = style.measured(frames, "alpha_curve", "loss")
    soups = frame[frame["kind"] == "sft_soup"] if len(frame) else frame
    if soups.empty:
        return ""
    best = soups.loc[soups["loss"].idxmin()]
    return (
        f"Of the soups, the one at alpha {best['alpha']:g} has the lowest loss, {selection.number(best['loss'])} nats "
        "a token."
    )


def policies_at(study, row):
    """The policies of a row: all arms of its alpha."""
    if row["kind"] != "policy":
        return sides(study, row)
    return [(policy.arm, policy.kl_coef) for policy in study.of(alpha=row["alpha"], kl_coef=row["kl_coef"])]


SECTION = Section(
    name="alpha_curve",
    heading="The space of weights",
    place=1,
    table=tables.alpha_curve,
    figure=alpha_curve,
    caption=caption,
    reading=reading,
    sides=policies_at,
)
