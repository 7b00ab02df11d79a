"""All judged models on one scale."""

import math

import pandas as pd

from salsa.evaluate import tournament
from salsa.report import judging, selection, style, words
from salsa.report.sections import Section

COLUMNS = ["judge", "model", "score", "score_low", "score_high", "arm", "kl_coef"]


def table(study):
    """One row per judge × model, best first: its score on one scale, sft0's being 0; bounds: bootstrap over prompts.

    All verdicts of a judge together, those on every benchmark and of every replicate.
    """
    report, rows = study.config.report, []
    policies = {policy.name: policy for policy in study.policies}
    for judge in judging.asked(study):
        lines = judging.lines_of(study, judge)[judging.ALL]
        models = {line[side] for line in lines if line["winner"] != "error" for side in ("model_a", "model_b")}
        if not models:
            continue
        anchor = selection.SFT0 if selection.SFT0 in models else min(models)
        for model, fit in tournament.bradley_terry(lines, anchor, report.seed, report.bootstrap).items():
            label, arm, kl_coef = model, model, math.nan
            if model in policies:
                label, arm, kl_coef = label_of(policies[model]), policies[model].arm, policies[model].kl_coef
            rows.append((judge, label, fit["score"], fit["low"], fit["high"], arm, kl_coef))
    return pd.DataFrame(rows, columns=COLUMNS)


def label_of(policy):
    """The name of a policy among the models."""
    return f"{policy.arm}, kl_coef {policy.kl_coef:g}"


def figure(study, tables):
    """Bradley-Terry scores of all judged models, a panel per judge, with bootstrap intervals."""
    frame = style.measured(tables, "bradley_terry", "score")
    if frame.empty:
        return None
    judges = list(dict.fromkeys(frame["judge"]))
    models = list(dict.fromkeys(frame["model"]))
    figure, axes = style.panels(1, len(judges), height=min(style.TALLEST - 1, 0.5 + 0.15 * len(models)), sharey=True,
                                width=max(3.5, min(style.WIDTH, 2.0 + 2.5 * len(judges))))  # fmt: skip
    for axis, judge in zip(axes[0], judges, strict=True):
        for row in frame[frame["judge"] == judge].to_dict("records"):
            y = models.index(row["model"])
            look, size = model_look(study, row["model"])
            style.whisker(axis, style.triple(row, "score"), y, look.colour, linewidth=1.2)
            axis.plot(row["score"], y, color=look.colour, marker=look.marker, markersize=4.5 * size)
        axis.set_title(f"judge: {judge}")
        axis.set_xlabel("Bradley-Terry score")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(models)), [model + _mark(study, model) for model in models])
    axes[0, 0].set_ylim(len(models) - 0.4, -0.6)
    return figure


def policy_of(study, model):
    """The policy with this name in verdicts or this label; None where the model is no policy."""
    return next((policy for policy in study.policies if model in (policy.name, label_of(policy))), None)


def _mark(study, model):
    policy = policy_of(study, model)
    return selection.collapsed(study, policy.arm, policy.kl_coef) if policy else ""


def model_look(study, model):
    """(look, size) of a judged model; grey and of size 1 where it is no policy."""
    policy = policy_of(study, model)
    if policy:
        return style.looks(study)[policy.arm], style.sizes(study.kl_coefs)[policy.kl_coef]
    return style.looks(study).get(model, style.NEUTRAL), 1.0


def caption(study, tables):
    frame = tables["bradley_terry"]
    if frame.empty:
        return words.no_verdicts(study) + words.doubts(study)
    policies = frame.dropna(subset="kl_coef")
    above, below = int((policies["score_low"] > 0).sum()), int((policies["score_high"] < 0).sum())
    return (
        "Scores of all models on one scale, by judge and over all benchmarks' and replicates' verdicts together: "
        f"log-odds of a win over sft0, ties aside (Davidson 1970); of {len(policies)} scores of policies, {above} "
        f"intervals lie above sft0 and {below} below, by resampling prompts, conditional on these models."
    ) + words.doubts(study)


def reading(study, tables):
    frame = style.measured(tables, "bradley_terry", "score")
    if frame.empty:
        return ""
    best = frame.loc[frame["score"].idxmax()]
    return (
        "Bars are 95 % bootstrap intervals over prompts; the highest score is that of "
        f"{best['model']}, judge {best['judge']}."
    )


SECTION = Section(
    name="bradley_terry",
    heading="Preferences",
    place=4,
    table=table,
    left_out=("data", "arm", "kl_coef"),
    figure=figure,
    caption=caption,
    reading=reading,
)
