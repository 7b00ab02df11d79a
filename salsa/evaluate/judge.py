"""Pairwise verdicts on responses that are already written: the candidate against each of its baselines.

The judges here score each response by itself and compare the scores: `gold`, the score that PPO never sees, and
`vader`, the compound sentiment of a lexicon (Hutto & Gilbert, ICWSM 2014). Neither reads the prompt, and neither can
prefer a place; both orders are judged all the same, so that every judge's verdicts have one form. Verdicts are appended
as they come, so a killed run continues where it stopped. Judges that are models are not here.
"""

import functools
import json
import os

from salsa import config, runs

VERSION = 1
ORDERS = (0, 1)  # 1: model_b is shown first


def judge(settings, parents, output, execution):
    """Write verdicts.jsonl: candidate (model_a) against every baseline (model_b), both orders of every prompt.

    Parents: `candidate`, a folder whose responses.jsonl has rows of model "policy", and `baseline/<name>` for each
    of `settings.baselines`, the value naming the model of the rows to take.
    """
    score = scorer(settings.judge)
    candidate = responses(parents["candidate"], "policy")
    baselines = {name: responses(parents[f"baseline/{name}"], model) for name, model in settings.baselines.items()}
    check(candidate, baselines, parents)
    path = output / "verdicts.jsonl"
    done = {_key(row) for row in resume(path)}
    with open(path, "a", encoding="utf-8") as file:
        for verdict in _verdicts(settings, candidate, baselines, score, done):
            file.write(json.dumps(verdict, ensure_ascii=False) + "\n")
            file.flush()
        os.fsync(file.fileno())
    return {"prompts": len(candidate), "baselines": len(baselines), "kept": len(done)}


def _verdicts(settings, candidate, baselines, score, done):
    for name, rows in baselines.items():
        for (benchmark, prompt_id), row in candidate.items():
            for order in ORDERS:
                if (name, benchmark, prompt_id, order) in done:
                    continue
                scores = score(row), score(rows[benchmark, prompt_id])
                yield {
                    "prompt_id": prompt_id,
                    "benchmark": benchmark,
                    "model_a": settings.candidate,
                    "model_b": name,
                    "order": order,
                    "winner": winner(*scores, settings.judge.tie_margin),
                    "judge": settings.name,
                    "replicate": settings.replicate,
                }


def winner(score_a, score_b, tie_margin=0.0):
    """The name of the better response, "model_a" or "model_b", or "tie" for a difference up to `tie_margin`."""
    if abs(score_a - score_b) <= tie_margin:
        return "tie"
    return "model_a" if score_a > score_b else "model_b"


def scorer(judge):
    """The function from a row of responses.jsonl to its score. UserError for an unknown or uninstalled judge."""
    if judge.kind == "gold":
        return gold
    if judge.kind == "vader":
        analyser = _vader()
        return lambda row: sum(analyser(text) for text in row["responses"]) / len(row["responses"])
    raise runs.UserError(f"judge.kind: {judge.kind!r} is no judge; choose gold or vader")


def gold(row):
    """The gold score that came with the response."""
    if row.get("gold") is None:
        raise runs.UserError(
            f"judge gold: the response of {row['model']} to {row['benchmark']}/{row['prompt_id']} has no gold score; "
            "this data has no gold judge: choose another"
        )
    return row["gold"]


def _vader():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise runs.UserError("judge vader: not installed; run `pip install vaderSentiment`") from None
    analyser = SentimentIntensityAnalyzer()
    return functools.cache(lambda text: analyser.polarity_scores(text)["compound"])


def responses(folder, model):
    """(benchmark, prompt_id) -> row of responses.jsonl, for one model. UserError where it has none."""
    path = folder / "responses.jsonl"
    rows = {(row["benchmark"], row["prompt_id"]): row for row in runs.read_jsonl(path) if row["model"] == model}
    if not rows:
        raise runs.UserError(f"{path}: no response of model {model!r}; give the folder of a run that answered with it")
    return rows


def check(candidate, baselines, parents):
    """Refuse a prompt that the candidate answered and a baseline did not."""
    for name, rows in baselines.items():
        missing = [key for key in candidate if key not in rows]
        if missing:
            raise runs.UserError(
                f"{parents[f'baseline/{name}'] / 'responses.jsonl'}: {len(missing)} of the candidate's prompts have no "
                f"response of {name}, first {missing[0][0]}/{missing[0][1]}; answer the same benchmarks with both"
            )


def _key(verdict):
    return verdict["model_b"], verdict["benchmark"], verdict["prompt_id"], verdict["order"]


def resume(path):
    """The complete verdicts of an interrupted run; a torn last line is cut off the file."""
    if not path.exists():
        return []
    with open(path, "rb+") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return runs.read_jsonl(path)


if __name__ == "__main__":
    runs.command(
        "judge", VERSION, judge, config.JudgeSettings, roles=("candidate", "baseline/NAME"), description=__doc__
    )
