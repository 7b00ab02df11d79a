"""Rewards, win rates and loss by alpha: of soups before training, and of policies after it."""

import math

import pandas as pd
from matplotlib.lines import Line2D

from salsa.report import selection, style, words
from salsa.report.frames import over_replicates
from salsa.report.sections import Section, sides

MEASURES = {
    "reward": style.PROXY,
    "gold_reward": style.GOLD,
    "win_rate_vs_sft0": "win rate against sft0",
    "loss": "validation loss, nats per token",
}


def table(study):
    """By alpha: SFT soups before training; after it, policies from sft0 with the soup of that alpha as reference.

    loss is the validation loss of an SFT soup, nats per token.
    """
    policies = study.frames.policies.dropna(subset="alpha").assign(kind="policy")
    order = {kl_coef: place for place, kl_coef in enumerate(study.kl_coefs)}
    policies = policies.sort_values("alpha").sort_values("kl_coef", key=lambda column: column.map(order), kind="stable")
    rows = pd.concat([study.frames.soups.sort_values("alpha").assign(kind="sft_soup"), policies])
    return over_replicates(rows, ["kind", "alpha", "kl_coef"], MEASURES)


def figure(study, tables):
    """By alpha: rewards and win rate of SFT soups and of policies, and the soups' validation loss."""
    frame = style.measured(tables, "alpha_curve", "alpha")
    measures = {name: label for name, label in MEASURES.items() if style.known(frame, name)}
    if not measures:
        return None
    columns = len(measures) if len(measures) < 4 else 2
    figure, axes = style.panels(math.ceil(len(measures) / columns), columns, height=2.3)
    for axis, (name, label) in zip(axes.flat, measures.items(), strict=True):
        rows = frame.dropna(subset=name)
        _draw_soups(axis, study, rows[rows["kind"] == "sft_soup"], name)
        for kl_coef in study.kl_coefs:
            _draw_policies(axis, study, rows[(rows["kind"] == "policy") & (rows["kl_coef"] == kl_coef)], name, kl_coef)
        if name == "win_rate_vs_sft0":
            axis.axhline(0.5, color=style.DARK, linewidth=0.9, linestyle="--")
            # An interval over few replicates may reach beyond what a rate can be.
            ends = rows.reindex(columns=[f"{name}_low", f"{name}_high"]).clip(0, 1).to_numpy().ravel()
            axis.set_ylim(style.limits([*rows[name], *ends]))
        axis.set_xlabel("alpha (0: sft0, 1: sft1)")
        axis.set_ylabel(label)
        axis.set_xlim(-0.08, 1.08)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    soup = Line2D([], [], color=style.DARK, marker=".", markersize=6, label="SFT soup, before training")
    policy = Line2D([], [], color=style.GREY, marker="o", markersize=5, linewidth=0.9, label="policy, after training")
    on_the_line = {policy.arm for policy in study.policies if policy.alpha is not None}
    style.legend(figure, study, arms=on_the_line, extra=(soup, policy))
    return figure


def _draw_soups(axis, study, frame, name):
    alphas = frame["alpha"]
    axis.plot(alphas, frame[name], color=style.DARK, linestyle="-", marker=".", markersize=6)
    if style.has_intervals(study) and f"{name}_low" in frame:
        axis.fill_between(alphas, frame[f"{name}_low"], frame[f"{name}_high"], color=style.DARK, alpha=0.15, lw=0)


def _draw_policies(axis, study, frame, name, kl_coef):
    offset = study.kl_coefs.index(kl_coef) - (len(study.kl_coefs) - 1) / 2
    x = frame["alpha"] + offset * 0.03  # so that bars of several kl_coefs stay apart
    size = style.sizes(study.kl_coefs)[kl_coef]
    axis.plot(x, frame[name], color=style.GREY, linewidth=0.9 * size, zorder=2)
    for place, row in zip(x, frame.to_dict("records"), strict=True):
        arm = next(p.arm for p in study.of(alpha=row["alpha"], kl_coef=kl_coef))
        look, at = style.look(arm, row["alpha"]), (place, math.nan, math.nan)
        if style.has_intervals(study):
            style.bars(axis, at, style.triple(row, name), look.colour, linewidth=1.2 * size, zorder=3)
        axis.plot(place, row[name], color=look.colour, marker=look.marker, markersize=5 * size, zorder=4)


def caption(study, tables):
    kinds = tables["alpha_curve"]["kind"]
    return (
        "Reward, and the soups' validation loss, from sft0 (alpha 0) to sft1 (alpha 1), before training at "
        f"{(kinds == 'sft_soup').sum()} soups and after training at {(kinds == 'policy').sum()} settings of alpha and "
        f"kl_coef, {words.replicates_by_arm(study)}; {words.band(study)}."
    )


def reading(study, tables):
    frame = style.measured(tables, "alpha_curve", "loss")
    soups = frame[frame["kind"] == "sft_soup"] if len(frame) else frame
    if soups.empty:
        return ""
    best = soups.loc[soups["loss"].idxmin()]
    return (
        f"Of the soups, the one at alpha {best['alpha']:g} has the lowest loss, {selection.number(best['loss'])} nats "
        "per token."
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
    table=table,
    shares=("win_rate_vs_sft0",),
    figure=figure,
    caption=caption,
    reading=reading,
    sides=policies_at,
)
