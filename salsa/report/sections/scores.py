"""What benchmarks measure in each answer by itself, such as whether it is the right one; judges compare the others."""

import math
from collections import defaultdict

import pandas as pd

from salsa.report import words
from salsa.report.frames import interval
from salsa.report.sections import Section

BEFORE = ("sft0", "sft1", "soup")
COLUMNS = ("benchmark", "measure", "arm", "kl_coef", "prompts", "replicates", "score", "score_low", "score_high")


def scores(study):
    """One row a benchmark x measure x model: mean over prompts, then mean and t interval over replicates.

    Models are sft0, sft1 and their soup, then every arm at every kl_coef.
    """
    answers = {(name, math.nan): [_of_model(study, k, name) for k in study.replicates] for name in BEFORE}
    for arm in study.arms:
        for kl_coef in study.kl_coefs:
            answers[arm, kl_coef] = [policy.responses for policy in study.of(arm=arm, kl_coef=kl_coef)]
    rows = []
    for (arm, kl_coef), by_replicate in answers.items():
        for (benchmark, measure), values in _by_measure(by_replicate).items():
            row = {"benchmark": benchmark, "measure": measure, "arm": arm, "kl_coef": kl_coef}
            row |= {"prompts": max(map(len, values)), "replicates": len(values)}
            rows.append(row | interval("score", [math.fsum(some) / len(some) for some in values]))
    order = {name: place for place, name in enumerate(study.benchmarks)}
    rows.sort(key=lambda row: (order[row["benchmark"]], row["measure"]))  # and within, as above
    return pd.DataFrame(rows, columns=COLUMNS)


def _of_model(study, replicate, name):
    return [row for row in study.landscape(replicate).responses if row["model"] == name]


def _by_measure(by_replicate):
    """(benchmark, measure) -> the scores of the answers of each replicate that has some."""
    found = defaultdict(list)
    for responses in by_replicate:
        values = defaultdict(list)
        for row in responses:
            for measure, value in row.get("scores", {}).items():
                values[row["benchmark"], measure].append(value)
        for key, some in values.items():
            found[key].append(some)
    return found


def caption(study, frames):
    frame = frames["scores"]
    measures = ", ".join(dict.fromkeys(f"{row.measure} ({row.benchmark})" for row in frame.itertuples())) or "none"
    return (
        f"What benchmarks measure in each answer by itself: {measures}; means over prompts, over "
        f"{words.replicates(study)} ({words.band(study)}); sft0, sft1 and their soup before PPO."
    )


SECTION = Section(name="scores", heading="Rewards and KL", place=5, table=scores, caption=caption)
