"""All judged models on one scale."""

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section


def bradley_terry(study, frames):
    """Bradley-Terry scores of all judged models, a panel a judge, with bootstrap intervals."""
    frame = style.measured(frames, "bradley_terry", "score")
    if frame.empty:
        return style.not_measured("Bradley-Terry scores")
    judges = list(dict.fromkeys(frame["judge"]))
    models = list(dict.fromkeys(frame["model"]))
    figure, axes = style.panels(1, len(judges), height=min(style.TALLEST - 1, 0.5 + 0.15 * len(models)), sharey=True,
                          width=max(3.5, min(style.WIDTH, 2.0 + 2.5 * len(judges))))  # fmt: skip
    for axis, judge in zip(axes[0], judges, strict=True):
        for row in frame[frame["judge"] == judge].to_dict("records"):
            y = models.index(row["model"])
            shown, size = model_look(study, row["model"])
            style.whisker(axis, style.triple(row, "score"), y, shown.colour, linewidth=1.2)
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
            return style.looks(study)[policy.arm], style.sizes(study)[policy.kl_coef]
    return (style.looks(study)[model], 1.0) if model in study.arms else (style.NEUTRAL, 1.0)


def caption(study, frames):
    frame = frames["bradley_terry"]
    if frame.empty:
        return words.no_verdicts(study) + words.doubts(study)
    own = frame.dropna(subset="kl_coef")
    above, below = int((own["score_low"] > 0).sum()), int((own["score_high"] < 0).sum())
    return (
        "Scores of all models on one scale, by judge and over all benchmarks' and replicates' verdicts together: "
        f"log-odds of a win over sft0, ties aside (Davidson 1970); of {len(own)} scores of policies, {above} intervals "
        f"lie above sft0 and {below} below, by resampling prompts, conditional on these models."
    ) + words.doubts(study)


def reading(study, frames):
    frame = style.measured(frames, "bradley_terry", "score")
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
    table=tables.bradley_terry,
    left_out=("data", "arm", "kl_coef"),
    figure=bradley_terry,
    caption=caption,
    reading=reading,
)
