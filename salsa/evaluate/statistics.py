"""Win rates and their uncertainty, from verdicts alone.

    python -m salsa.evaluate.statistics VERDICTS.jsonl --candidate NAME --baseline NAME [--seed N] [--judge NAME]

prints one JSON object. The unit of every count and of the bootstrap is the prompt, (benchmark, prompt_id): both orders
of a prompt, its turns, and its answers by several replicates, are no independent evidence. The bootstrap interval is
therefore conditional on the models that were judged; what is claimed of an arm needs `replicate_interval`. This module
asks no judge and draws no figure.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import special, stats

from salsa import runs

WINNERS = ("model_a", "model_b", "tie", "error")
FIELDS = ("prompt_id", "benchmark", "model_a", "model_b", "order", "winner", "judge")
CHUNK = 4_000_000  # indices that a bootstrap holds at a time
RIDGE = 0.01  # of the slope of `length_controlled`
MOST_REPLICATES = 10_000  # that `decide` thinks of


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
        if not isinstance(verdict.get("turn"), int | None):
            raise runs.UserError(f"{path}:{number}: turn {verdict['turn']!r} is no whole number")
    return verdicts


def latest(verdicts):
    """The last verdict on each comparison by each judge, so that a comparison judged again replaces an error.

    Returns (first, second, benchmark, prompt_id, replicate, turn, judge) -> verdict, `first` the model shown first: it
    does not matter which of the two a line calls model_a.
    """
    found = {}
    for verdict in verdicts:
        shown = (verdict["model_a"], verdict["model_b"])[:: -1 if verdict["order"] else 1]
        prompt = verdict["benchmark"], verdict["prompt_id"]
        found[*shown, *prompt, verdict.get("replicate"), verdict.get("turn"), verdict["judge"]] = verdict
    return found


def battles(verdicts, candidate, baseline):
    """The judged comparisons of one pair: (benchmark, prompt_id) -> replicate -> [value, …], and the errors' number.

    A value is the candidate's in one turn and order: 1 win, 0.5 tie, 0 loss. Of several lines on one comparison the
    last counts. An error drops its turn and order.
    """
    clusters, errors = defaultdict(lambda: defaultdict(list)), 0
    for (first, second, *prompt, replicate, _, _), verdict in latest(verdicts).items():
        if {first, second} != {candidate, baseline}:
            continue
        value = _value(verdict, candidate)
        if value is None:
            errors += 1
        else:
            clusters[tuple(prompt)][replicate].append(value)
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

    A prompt's score is the mean over its replicates of the mean over its turns and orders.
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
    # Prompts of one score are alike, so a resample is how many of each score it holds.
    values, counts = np.unique(scores, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(scores.size, counts / scores.size, resamples)
    low, high = np.quantile(drawn @ values / scores.size, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def length_controlled(scores, differences):
    """The candidate's win rate if both answers had been of one length, as AlpacaEval 2 estimates it.

    Dubois et al. 2024 (2404.04475), section 3, without its term of the instruction's difficulty, which is fitted on a
    leaderboard of models: a logistic regression of the score on [1, tanh(difference / standard deviation)], and its
    rate at a difference of 0. A ridge of `RIDGE`/2 · slope² holds the slope finite where length separates wins from
    losses; the intercept is free. Scores that are all 0 or all 1 are their own mean.

    Args:
        scores: (N,) of the candidate by prompt, in [0, 1]; soft labels.
        differences: (N,) length of the candidate's answer minus the baseline's, in tokens; the unit cancels. Where all
            are equal, length can explain nothing: the plain mean.

    Returns nan where there is no prompt.
    """
    scores, differences = (np.asarray(values, dtype=np.float64) for values in (scores, differences))
    return float(_rates_at_one_length(scores[None], differences[None])[0]) if scores.size else math.nan


def length_controlled_interval(scores, differences, seed=0, resamples=2000, level=0.95):
    """Percentile interval (low, high) of `length_controlled` by resampling prompts, each resample fitted anew."""
    scores, differences = (np.asarray(values, dtype=np.float64) for values in (scores, differences))
    if not scores.size:
        return math.nan, math.nan
    rates = [
        _rates_at_one_length(scores[indices], differences[indices])
        for indices in _resampled(scores.size, seed, resamples)
    ]
    low, high = np.quantile(np.concatenate(rates), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(size, seed, resamples):
    """Indices (R, size) of bootstrap samples, `resamples` rows in all, a bounded number at a time."""
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // size)
    for start in range(0, resamples, rows):
        yield generator.integers(size, size=(min(rows, resamples - start), size))


def _rates_at_one_length(scores, differences):
    """`length_controlled` of R samples at once, (R, N) each -> (R,): Newton's method on intercept and slope."""
    means = scores.mean(axis=1)
    fitted = (means > 0) & (means < 1) & (np.ptp(differences, axis=1) > 0)
    if not fitted.any():
        return means
    scores, differences = scores[fitted], differences[fitted]
    features = np.tanh(differences / differences.std(axis=1, ddof=1, keepdims=True))  # (R, N)
    intercept, slope = special.logit(means[fitted]), np.zeros(len(features))
    for _ in range(100):
        rates = special.expit(intercept[:, None] + slope[:, None] * features)
        errors, weights = scores - rates, rates * (1 - rates)
        gradient = errors.sum(axis=1), np.einsum("rn,rn->r", errors, features) - RIDGE * slope
        first, mixed = weights.sum(axis=1), np.einsum("rn,rn->r", weights, features)
        second = np.einsum("rn,rn,rn->r", weights, features, features) + RIDGE
        determinant = first * second - mixed**2
        steps = np.stack([second * gradient[0] - mixed * gradient[1], first * gradient[1] - mixed * gradient[0]])
        # Near separation a full step overshoots to where every weight is 0: no step is longer than 1.
        steps /= np.maximum(determinant, np.abs(steps).max(axis=0))
        intercept, slope = intercept + steps[0], slope + steps[1]
        if np.abs(steps).max() < 1e-10:
            break
    means[fitted] = special.expit(intercept)
    return means


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


def interquartile_mean(values):
    """The mean of the middle half (M,): a quarter of the values, rounded down, is left out at each end.

    As Agarwal et al. 2021 (2108.13264) recommend for few runs. nan values are left out; no value: nan.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    return float(stats.trim_mean(values, 0.25)) if values.size else math.nan


def matched_difference(first, second):
    """The mean of first - second over the KL that both reach: how much more value at the same KL; one replicate.

    Args:
        first, second: (M, 2) of (kl, value), in any order; points of one kl are averaged, nan rows left out.

    Both are interpolated linearly between their points, inside the common range of kl, never beyond; the integral of
    the difference over that range is exact, and divided by its length. Where the ranges only touch, the kl must have
    been measured in both, and the difference there counts. nan: no common range, or a curve of one point that the
    other has not measured.
    """
    (first_kl, first_value), (second_kl, second_value) = _curve(first), _curve(second)
    if not (first_kl.size and second_kl.size):
        return math.nan
    low, high = max(first_kl[0], second_kl[0]), min(first_kl[-1], second_kl[-1])
    if low > high or (low == high and not (low in first_kl and low in second_kl)):
        return math.nan
    knots = np.union1d(first_kl, second_kl)
    knots = knots[(knots >= low) & (knots <= high)]
    difference = np.interp(knots, first_kl, first_value) - np.interp(knots, second_kl, second_value)
    return float(np.trapezoid(difference, knots) / (high - low)) if high > low else float(difference[0])


def _curve(points):
    """kl ascending and without repetition, and the mean value at each."""
    points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    points = points[~np.isnan(points).any(axis=1)]
    kl, place = np.unique(points[:, 0], return_inverse=True)
    return kl, np.bincount(place, points[:, 1], kl.size) / np.bincount(place, minlength=kl.size)


def decide(values, smallest_effect, level=0.95):
    """What replicates' values (R,) say of the claim that their mean is above 0; nan values are left out.

    Args:
        smallest_effect: the smallest mean worth claiming, in the values' unit; not negative.

    Returns a dictionary:
        mean, low, high: `replicate_interval` at `level`.
        p: of the one-sided t test of mean ≤ 0 against mean > 0; nan with fewer than two values.
        replicates: R.
        verdict: "refuted" where high is below smallest_effect: whatever there is, is too small to matter. Otherwise
            "supported" where low is above 0, and "undecided" where neither, or where fewer than two values can't tell.
        replicates_needed: where undecided, the smallest number of replicates whose t interval, with this mean and this
            standard deviation, would decide either way: a guess to plan with, no promise. None where decided, with
            fewer than two values, or above 10,000.

    Values that are all equal have an interval of no length: they decide, unless they and smallest_effect are 0; their p
    is 0, ½ or 1 as they lie above, at or below 0.
    """
    if smallest_effect < 0:
        raise ValueError(f"smallest_effect: {smallest_effect} is negative")
    values = np.asarray(values, dtype=np.float64)
    values = values[~np.isnan(values)]
    mean, low, high = replicate_interval(values, level)
    p = verdict = needed = None
    if values.size < 2:
        p, verdict = math.nan, "undecided"
    else:
        spread = float(values.std(ddof=1)) if np.ptp(values) else 0.0
        error = spread / math.sqrt(values.size)
        p = float(stats.t.sf(mean / error, values.size - 1)) if error else 0.5 - 0.5 * float(np.sign(mean))
        verdict = "refuted" if high < smallest_effect else "supported" if low > 0 else "undecided"
        if verdict == "undecided":
            needed = _replicates_needed(max(mean, smallest_effect - mean), spread, level)
    return {
        "mean": mean,
        "low": low,
        "high": high,
        "p": p,
        "replicates": int(values.size),
        "verdict": verdict,
        "replicates_needed": needed,
    }


def _replicates_needed(distance, spread, level):
    """The smallest number of values with this spread whose t interval reaches less than `distance` from its mean."""
    numbers = np.arange(2, MOST_REPLICATES + 1)
    enough = stats.t.ppf((1 + level) / 2, numbers - 1) * spread / np.sqrt(numbers) < distance
    return int(numbers[enough.argmax()]) if enough.any() else None


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

    Each turn, and each replicate's answers, count by themselves. nan where nothing was judged in both orders.
    """
    pair = {candidate, baseline}
    return _consistency(verdict for verdict in verdicts if {verdict["model_a"], verdict["model_b"]} == pair)


def _consistency(verdicts):
    both = defaultdict(list)
    for (first, second, *rest), verdict in latest(verdicts).items():
        if verdict["winner"] != "error":
            both[frozenset((first, second)), *rest].append(verdict.get(verdict["winner"]))  # None for a tie
    both = [winners for winners in both.values() if len(winners) == 2]
    return sum(first == second for first, second in both) / len(both) if both else math.nan


def judge_quality(verdicts):
    """What the verdicts of one judge, on any pairs, say about the judge.

    `verdicts` comparisons judged without an error, `errors` the others; `ties`, their share of the former;
    `swap_consistency`, the share of answers judged in both orders to the same end; `first_position_share`, how many of
    the verdicts that name a winner name the model shown first: ½ for a judge without a preference of place. A share of
    nothing is nan.
    """
    found = latest(verdicts)
    judged = [verdict for verdict in found.values() if verdict["winner"] != "error"]
    decided = [verdict for verdict in judged if verdict["winner"] != "tie"]
    first = sum((verdict["winner"] == "model_a") == (verdict["order"] == 0) for verdict in decided)
    return {
        "verdicts": len(judged),
        "errors": len(found) - len(judged),
        "ties": 1 - len(decided) / len(judged) if judged else math.nan,
        "swap_consistency": _consistency(found.values()),
        "first_position_share": first / len(decided) if decided else math.nan,
    }


def agreement(verdicts, first_judge, second_judge):
    """How far two judges agree on the comparisons (pair, prompt, replicate, turn, order) that both judged.

    Returns `comparisons`, their number without an error of either; `agreement`, the share where both say win, tie or
    loss alike; `kappa`, Cohen's (Educational and Psychological Measurement 20, 1960) over these three. Win and loss are
    those of the model that the pair's first line calls model_a: of the model, not the place, because two judges that
    both nearly always prefer one model agree by chance. nan: no comparison, or for kappa only one outcome.
    """
    subjects, outcome = {}, {first_judge: {}, second_judge: {}}
    for (*comparison, judge), verdict in latest(verdicts).items():
        subject = subjects.setdefault(frozenset(comparison[:2]), verdict["model_a"])
        if judge in outcome and verdict["winner"] != "error":
            outcome[judge][tuple(comparison)] = _value(verdict, subject)
    first, second = outcome[first_judge], outcome[second_judge]
    pairs = [(first[comparison], second[comparison]) for comparison in first if comparison in second]
    if not pairs:
        return {"comparisons": 0, "agreement": math.nan, "kappa": math.nan}
    table = np.zeros((3, 3))
    np.add.at(table, tuple((2 * np.array(pairs)).astype(int).T), 1 / len(pairs))
    observed, chance = float(table.trace()), float(table.sum(0) @ table.sum(1))
    kappa = (observed - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan
    return {"comparisons": len(pairs), "agreement": observed, "kappa": kappa}


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
        "swap_consistency": swap_consistency(verdicts, candidate, baseline),
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
