"""The scores behind the claims, prompt by prompt, in two compressed files that any program reads as CSV.

`tables/prompt_scores.csv.gz` has every response to a benchmark of the policies that claims compare: its gold score, its
proxy reward and its length. `tables/prompt_win_rates.csv.gz` has, for each judged pair that a claim is read from, the
score of the first model on each prompt: 1 win, ½ tie, 0 loss, mean over orders, turns, responses and training seeds.
With them, and `tables/replicates.csv`, every verdict can be computed again without the runs. The same content gives
the same bytes.
"""

import gzip

import pandas as pd

from salsa.report import claims, formats, outcomes, selection
from salsa.workflow import runs

SCORES = [
    "replicate",
    "seed",
    "arm",
    "kl_coef",
    "model",
    "benchmark",
    "prompt_id",
    "sample",
    "tokens",
    "reward",
    "gold",
]
RATES = ["judge", "benchmark", "replicate", "prompt_id", "model", "opponent", "score"]


def write(study, folder):
    """Write both files into the folder of tables."""
    for name, frame in (("prompt_scores", scores(study)), ("prompt_win_rates", win_rates(study))):
        content = gzip.compress(formats.csv(frame).encode(), mtime=0)
        runs.write_atomically(folder / f"{name}.csv.gz", content)


def scores(study):
    """One row per response of the policies that the study's claims compare, at their kl_coefs."""
    responses = study.frames.responses
    sides = {side for test in _tests(study) for side in outcomes.sides(test.pair)}
    kept = [side in sides for side in zip(responses["arm"], responses["kl_coef"], strict=True)]
    return responses[kept].reindex(columns=[name for name in SCORES if name in responses]).reset_index(drop=True)


def win_rates(study):
    """One row per judged pair × replicate × prompt; pairs are those that claims' win rates are read from."""
    rows = []
    for judge, benchmark, model, opponent in dict.fromkeys(_judged(study)):
        for replicate, by_prompt in study.scores(judge, benchmark, model, opponent).items():
            rows += [
                (judge, benchmark, replicate, prompt, model, opponent, score) for prompt, score in by_prompt.items()
            ]
    return pd.DataFrame(rows, columns=RATES)


def _tests(study):
    return [test for test in claims.tests(study).values() if isinstance(test, claims.Test)]


def _judged(study):
    """(judge, benchmark, model, opponent) of each pair whose verdicts a claim is read from."""
    for test in _tests(study):
        for outcome in test.outcomes:
            if outcome.measure == "win_rate":
                for benchmark in test.claim.benchmarks or study.compared:
                    opponent, _ = selection.meeting(study, test.pair, outcome.judge, benchmark)
                    first, second = selection.names(study, test.pair)
                    models = (first, second) if opponent else (first,)
                    yield from ((outcome.judge, benchmark, model, opponent or second) for model in models)
