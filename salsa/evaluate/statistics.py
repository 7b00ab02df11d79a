"""Win rates and their uncertainty, from verdicts alone.

    python -m salsa.evaluate.statistics VERDICTS.jsonl --candidate NAME --baseline NAME [--seed N] [--judge NAME]

prints one JSON object. The unit of every count and of the bootstrap is the prompt, (benchmark, prompt_id): both orders
of a prompt, and its answers by several replicates, are no independent evidence. The bootstrap interval is therefore
conditional on the models that were judged; what is claimed of an arm needs `replicate_interval`. This module asks no
judge and draws no figure.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from salsa import runs

WINNERS = ("model_a", "model_b", "tie", "error")
FIELDS = ("prompt_id", "benchmark", "model_a", "model_b", "order", "winner", "judge")
CHUNK = 4_000_000  # indices that the bootstrap holds at a time


def read_verdicts(path):
    """Checked verdict lines of a JSONL file.

    Raises UserError (one line, with file and line number) for a missing file, field, or an unknown winner or order.
    """
    if not Path(path).is_file():
        raise runs.UserError(f"{path}: no such file; give the verdicts.jsonl that a judge run wrote")
    verdicts = runs.read_jsonl(path)
    for number, verdict in enumerate(verdicts, 1):
        if not isinstance(verdict, dict):
            raise runs.UserError(f"{path}:{number}: a verdict is a JSON object; mend or remove the line")
        missing = [name for name in FIELDS if name not in verdict]
        if missing:
            raise runs.UserError(f"{path}:{number}: no field {missing[0]!r}; a verdict has {', '.join(FIELDS)}")
        if verdict["winner"] not in WINNERS:
            raise runs.UserError(f"{path}:{number}: winner {verdict['winner']!r} is none of {', '.join(WINNERS)}")
        if verdict["order"] not in (0, 1):
            raise runs.UserError(f"{path}:{number}: order {verdict['order']!r} is neither 0 nor 1")
    return verdicts


def battles(verdicts, candidate, baseline):
    """The judged comparisons of one pair: (benchmark, prompt_id) -> replicate -> [value, …], and the errors' number.

    A value is the candidate's: 1 win, 0.5 tie, 0 loss. Of several lines on one (prompt, order, judge, replicate) the
    last counts, so that a comparison judged again replaces an error; the order is compared as the model shown first,
    so that it does not matter which of the two a line calls model_a. An error drops its order.
    """
    pair, latest = {candidate, baseline}, {}
    for verdict in verdicts:
        if {verdict["model_a"], verdict["model_b"]} == pair:
            candidate_first = (verdict["model_a"] == candidate) == (verdict["order"] == 0)
            cluster = (verdict["benchmark"], verdict["prompt_id"])
            latest[cluster, verdict.get("replicate"), verdict["judge"], candidate_first] = _value(verdict, candidate)
    clusters, errors = defaultdict(lambda: defaultdict(list)), 0
    for (cluster, replicate, _, _), value in latest.items():
        if value is None:
            errors += 1
        else:
            clusters[cluster][replicate].append(value)
    return {cluster: dict(clusters[cluster]) for cluster in sorted(clusters, key=_sortable)}, errors


def _value(verdict, candidate):
    if verdict["winner"] == "error":
        return None
    if verdict["winner"] == "tie":
        return 0.5
    return float(verdict[verdict["winner"]] == candidate)


def _sortable(cluster):
    return tuple(str(part) for part in cluster)


def prompt_scores(verdicts, candidate, baseline):
    """(benchmark, prompt_id) -> the candidate's score in [0, 1], in an order that the lines' order does not change.

    A prompt's score is the mean over its replicates of the mean over its orders.
    """
    clusters, _ = battles(verdicts, candidate, baseline)
    return _scores(clusters)


def _scores(clusters):
    return {
        cluster: math.fsum(math.fsum(values) / len(values) for values in replicates.values()) / len(replicates)
        for cluster, replicates in clusters.items()
    }


def adjusted_win_rate(scores):
    """The mean of prompts' scores (N,), each in [0, 1]: wins + ties/2 where the orders agree. No prompt: nan."""
    scores = np.asarray(scores, dtype=np.float64)
    return float(scores.mean()) if scores.size else math.nan


def bootstrap_interval(scores, seed=0, resamples=2000, level=0.95):
    """Percentile interval (low, high) of the mean of `scores` (N,), one a prompt, by resampling prompts.

    Conditional on the models judged: it says nothing of other training seeds. No prompt: (nan, nan).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // scores.size)
    means = [
        scores[generator.integers(scores.size, size=(min(rows, resamples - start), scores.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def replicate_interval(values, level=0.95):
    """(mean, low, high) of replicates' values (R,): the t interval of their mean; nan values are left out.

    One replicate has no spread: its bounds are nan; so is everything where there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if values.size == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return mean, mean - half, mean + half


def paired_differences(first, second):
    """first - second, by replicate, over the replicates that both mappings (replicate -> value) have; (R,)."""
    shared = sorted(set(first) & set(second))
    return np.array([first[replicate] - second[replicate] for replicate in shared], dtype=np.float64)


def outcomes(scores):
    """(wins, ties, losses): prompts whose score lies above, at or below 0.5."""
    scores = np.asarray(scores, dtype=np.float64)
    return int((scores > 0.5).sum()), int((scores == 0.5).sum()), int((scores < 0.5).sum())


def sign_test(wins, losses):
    """Two-sided exact binomial p-value that wins and losses are equally likely; ties are left out."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values):
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the order given; (M,)."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    factors = np.arange(p_values.size, 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def swap_consistency(verdicts, candidate, baseline):
    """The share of prompts judged in both orders whose two verdicts name the same winner or are both a tie.

    Each replicate's answers to a prompt count by themselves. nan where nothing was judged in both orders.
    """
    clusters, _ = battles(verdicts, candidate, baseline)
    return _consistency(clusters)


def _consistency(clusters):
    both = [values for replicates in clusters.values() for values in replicates.values() if len(values) == 2]
    return sum(first == second for first, second in both) / len(both) if both else math.nan


def compare(verdicts, candidate, baseline, seed=0, resamples=2000):
    """Everything that verdicts of one judge say about a pair, as one dictionary of plain numbers."""
    clusters, errors = battles(verdicts, candidate, baseline)
    scores = list(_scores(clusters).values())
    low, high = bootstrap_interval(scores, seed, resamples)
    wins, ties, losses = outcomes(scores)
    return {
        "adjusted_win_rate": adjusted_win_rate(scores),
        "ci_low": low,
        "ci_high": high,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "prompts": len(scores),
        "swap_consistency": _consistency(clusters),
        "sign_test_p": sign_test(wins, losses),
        "errors": errors,
    }


def select(verdicts, candidate, baseline, judge=None, source="verdicts"):
    """The verdicts of one pair by one judge. UserError: no such pair, or several judges and none chosen."""
    if candidate == baseline:
        raise runs.UserError(f"candidate and baseline are both {candidate!r}; compare two models")
    pairs = {frozenset((v["model_a"], v["model_b"])) for v in verdicts}
    chosen = [v for v in verdicts if {v["model_a"], v["model_b"]} == {candidate, baseline}]
    if not chosen:
        known = "; ".join(sorted(" and ".join(sorted(map(str, pair))) for pair in pairs)) or "none"
        raise runs.UserError(f"{source}: no verdict on {candidate!r} and {baseline!r}; its pairs are: {known}")
    judges = sorted({v["judge"] for v in chosen})
    if judge is None and len(judges) > 1:
        raise runs.UserError(f"{source}: verdicts of several judges ({', '.join(judges)}); choose one with --judge")
    if judge is not None and judge not in judges:
        raise runs.UserError(f"{source}: no verdict by judge {judge!r} on this pair; its judges: {', '.join(judges)}")
    return [v for v in chosen if judge is None or v["judge"] == judge]


def main(argv=None):
    """The command line; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(prog="python -m salsa.evaluate.statistics", description=__doc__.split("\n")[0])
    parser.add_argument("verdicts", help="verdicts.jsonl of a judge run")
    parser.add_argument("--candidate", required=True)
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--judge", help="required where the file has several")
    arguments = parser.parse_args(argv)
    try:
        verdicts = select(
            read_verdicts(arguments.verdicts),
            arguments.candidate,
            arguments.baseline,
            arguments.judge,
            source=arguments.verdicts,
        )
    except runs.UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    result = compare(verdicts, arguments.candidate, arguments.baseline, arguments.seed)
    print(json.dumps({name: None if value != value else value for name, value in result.items()}))


if __name__ == "__main__":
    main()
