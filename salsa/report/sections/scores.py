"""What benchmarks measure in each answer by itself, such as whether it is the right one; judges compare the others."""

from statistics import fmean

import pandas as pd

from salsa.report import words
from salsa.report.frames import over_replicates
from salsa.report.sections import Section

MODEL = ["benchmark", "measure", "arm", "kl_coef"]


def table(study):
    """One row per benchmark × measure × model: mean over prompts, then mean and t interval over replicates.

    Models are sft0, sft1 and their soup, then every arm at every kl_coef.
    """
    responses = study.frames.responses
    rows = responses.assign(pair=responses["scores"].map(lambda scores: list(scores.items())))
    rows = rows.explode("pair", ignore_index=True).dropna(subset="pair", ignore_index=True)
    rows[["measure", "score"]] = pd.DataFrame(rows["pair"].tolist(), columns=["measure", "score"])
    rows["arm"] = rows["arm"].mask(rows["arm"] == "", rows["model"])
    rows = rows.sort_values("measure", kind="stable")
    rows = rows.sort_values("benchmark", kind="stable", key=lambda column: column.map(study.benchmarks.index))
    trainings = rows.groupby([*MODEL, "replicate", "seed"], sort=False, dropna=False)
    means = trainings.agg(prompts=("prompt_id", "nunique"), score=("score", fmean)).reset_index()
    frame = over_replicates(means, MODEL, ["score"])
    prompts = means.groupby(MODEL, sort=False, dropna=False)["prompts"].max()
    frame.insert(len(MODEL), "prompts", prompts.to_numpy())
    return frame


def caption(study, tables):
    frame = tables["scores"]
    measures = ", ".join(dict.fromkeys(f"{row.measure} ({row.benchmark})" for row in frame.itertuples())) or "none"
    return (
        f"What benchmarks measure in each answer by itself: {measures}; means over prompts, over "
        f"{words.replicates_by_arm(study)} ({words.band(study)}); sft0, sft1 and their soup are those before training."
    )


SECTION = Section(name="scores", heading="Rewards and KL", place=5, table=table, caption=caption)
