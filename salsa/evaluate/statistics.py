"""Win rates and their uncertainty, from verdicts alone.

    python -m salsa.evaluate.statistics VERDICTS.jsonl --candidate NAME --baseline NAME [--seed N] [--judge NAME]

prints one JSON object. The unit of every count and of the bootstrap is the prompt, (benchmark, prompt_id), because a
prompt's two orders, its turns, and the answers of several samples, training seeds and replicates to it are no
independent evidence. The bootstrap
interval is therefore conditional on the models that were judged; a claim about an arm needs `replicate_interval`. This
module asks no judge and draws no figure.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import special, stats

from salsa.data import rows
from salsa.workflow import runs
from salsa.workflow.messages import UserError

WINNERS = ("model_a", "model_b", "tie", "error")
FIELDS = ("prompt_id", "benchmark", "model_a", "model_b", "order", "winner", "judge")
CHUNK = 4_000_000  # indices that a bootstrap holds at a time
RIDGE = 0.01  # on the slope of `length_controlled`
FEWEST = 6  # prompts that can agree beyond chance: five coins all fall alike in 2/2⁵ = 6 % of tosses, six in 3 %
SMALL = 30  # with fewer scores a percentile bootstrap alone is too narrow
FEWEST_RESAMPLES = 20  # with fewer, the two tails of 2.5 % together hold less than one resample
PRIOR = 2  # z²/2 for 95 %, as Agresti and Coull (American Statistician 52, 1998) add it to each of two counts
SHOWN = 20  # pairs that a message names
SAME = 1e-9  # values nearer to each other than this differ by rounding alone


def read_verdicts(path):
    """The verdicts of a JSONL file, checked; a byte order mark and blank lines are skipped.

    Raises UserError (one line, with file and line number) for a missing file or field, a value of a wrong type, or an
    unknown winner or order.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the verdicts.jsonl that a judge run wrote")
    return [_checked(verdict, place) for place, verdict in rows.read(path)]


def _checked(verdict, place):
    """The verdict, if the rest of this module can rely on it; else a UserError that begins with `place`."""
    missing = [name for name in FIELDS if name not in verdict]
    if missing:
        raise UserError(f"{place}: no field {missing[0]!r}; a verdict has {', '.join(FIELDS)}")
    if verdict["winner"] not in WINNERS:
        raise UserError(f"{place}: winner {verdict['winner']!r} is none of {', '.join(WINNERS)}")
    if isinstance(verdict["order"], bool) or verdict["order"] not in (0, 1):
        raise UserError(f"{place}: order {verdict['order']!r} is neither 0 nor 1")
    for name in ("turn", "sample", "seed"):
        if not isinstance(verdict.get(name), int | None):
            raise UserError(f"{place}: {name} {verdict[name]!r} is no whole number")
    for name in ("benchmark", "model_a", "model_b", "judge"):
        if not isinstance(verdict[name], str):
            raise UserError(f"{place}: {name} {verdict[name]!r} is no text")
    for name in ("prompt_id", "replicate"):
        value = verdict.get(name)
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"{place}: {name} {value!r} is neither text nor a number")
    return verdict


def latest(verdicts):
    """The last verdict on each comparison by each judge, so that a comparison judged again replaces an error.

    Returns (first, second, benchmark, prompt_id, replicate, seed, sample, turn, judge) -> verdict, where `first` is the
    model shown first, whichever of the two a line calls model_a. A line without a seed or a sample is of the first.
    """
    by_comparison = {}
    for verdict in verdicts:
        models = (verdict["model_a"], verdict["model_b"])[:: -1 if verdict["order"] else 1]
        prompt, training = (verdict["benchmark"], verdict["prompt_id"]), trained_as(verdict)
        answer = verdict.get("sample") or 0, verdict.get("turn")
        by_comparison[*models, *prompt, *training, *answer, verdict["judge"]] = verdict
    return by_comparison


def trained_as(verdict):
    """(replicate, training seed) of the policies that a verdict compares."""
    return verdict.get("replicate"), verdict.get("seed") or 0


def battles(verdicts, candidate, baseline):
    """The judged comparisons of one pair, and the number of errors.

    Returns (benchmark, prompt_id) -> (replicate, training seed) -> [value, …]. A value is the candidate's in one
    sample, turn and order: 1 for a win, 0.5 for a tie, 0 for a loss. Of several lines on one comparison the last
    counts. An error drops its sample, turn and order.
    """
    clusters, errors = defaultdict(lambda: defaultdict(list)), 0
    for (*prompt, replicate, seed, _, _), value in comparisons(verdicts, candidate, baseline):
        if value is None:
            errors += 1
        else:
            clusters[tuple(prompt)][replicate, seed].append(value)
    return {cluster: dict(clusters[cluster]) for cluster in sorted(clusters, key=_sortable)}, errors


def comparisons(verdicts, candidate, baseline):
    """Yield ((benchmark, prompt_id, replicate, seed, sample, turn), value) of each comparison of a pair.

    The value is the candidate's, 1, 0.5 or 0, or None for an error; of several lines on one comparison the last counts.
    """
    for (first, second, *place, _), verdict in latest(verdicts).items():
        if {first, second} == {candidate, baseline}:
            yield tuple(place), _value(verdict, candidate)


def _value(verdict, candidate):
    if verdict["winner"] == "error":
        return None
    if verdict["winner"] == "tie":
        return 0.5
    return float(verdict[verdict["winner"]] == candidate)


def _sortable(cluster):
    return tuple(str(part) for part in cluster)


def prompt_scores(clusters):
    """(benchmark, prompt_id) -> the candidate's score in [0, 1], from the clusters of `battles`.

    A prompt's score is the mean over its replicates of the mean over their training seeds, of each of which it is the
    mean over its samples, turns and orders.
    """
    return {cluster: mean(replicate_scores(trainings).values()) for cluster, trainings in clusters.items()}


def replicate_scores(trainings):
    """replicate -> the mean over its training seeds of the means of their values, of one cluster of `battles`."""
    by_replicate = defaultdict(list)
    for (replicate, _), values in trainings.items():
        by_replicate[replicate].append(mean(values))
    return {replicate: mean(scores) for replicate, scores in by_replicate.items()}


def mean(values):
    """The mean of some numbers, rounded once."""
    return math.fsum(values) / len(values)


def adjusted_win_rate(scores):
    """The mean of prompts' scores (N,), each in [0, 1]: wins + ties/2 where the orders agree; nan without prompts."""
    scores = np.asarray(scores, dtype=np.float64)
    return float(scores.mean()) if scores.size else math.nan


def bootstrap_interval(scores, seed=0, resamples=2000, level=0.95):
    """Percentile interval (low, high) of the mean of `scores` (N,), one per prompt, by resampling prompts.

    The interval is conditional on the models judged: it says nothing about other training seeds. Where a bootstrap sees
    no spread, or too few prompts to see it, the bounds are those of `bounds_of_few`, which never leave [0, 1]. Fewer
    than two prompts, or fewer than 20 resamples, whose tails would be empty, have no interval: (nan, nan).
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.size < 2 or resamples < FEWEST_RESAMPLES:
        return math.nan, math.nan
    if np.ptp(scores) < SAME:
        return bounds_of_few(scores, level)
    return _widened(_resampled_sums(scores, seed, resamples) / scores.size, scores.mean(), scores, level)


def _percentiles(samples, level):
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bounds_of_few(scores, level=0.95):
    """Bounds (low, high) of the mean of a distribution on [0, 1] from which N scores were drawn.

    Let a and b be the least and the greatest score. If less than q = ((1 - level)/2)^(1/N) of the distribution were in
    [a, b], all N draws would fall there with a probability below (1 - level)/2. So at least q of it lies in [a, b] and
    the rest anywhere: q·a ≤ mean ≤ 1 - q·(1 - b). Where all scores are 1, or all 0, these are the bounds of Clopper and
    Pearson (Biometrika 26, 1934).
    """
    inside = ((1 - level) / 2) ** (1 / len(scores))
    return float(inside * np.min(scores)), float(1 - inside * (1 - np.max(scores)))


def _widened(samples, rate, scores, level):
    """The percentile interval of a bootstrap's samples (R,), widened where there are few scores.

    A resample never leaves the range of its sample, which few prompts may share by chance: 6 wins of 7 would exclude ½,
    which a sign test does not. With fewer than SMALL scores the interval is therefore no narrower than Wilson's of that
    rate (Journal of the American Statistical Association 22, 1927), with fewer than FEWEST than `bounds_of_few`.
    """
    low, high = _percentiles(samples, level)
    if len(scores) < SMALL:
        z, n, mean = float(stats.norm.ppf((1 + level) / 2)), len(scores), float(rate)
        middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
        low, high = min(low, middle - half), max(high, middle + half)
    if len(scores) < FEWEST:
        least, greatest = bounds_of_few(scores, level)
        low, high = min(low, least), max(high, greatest)
    return max(low, 0.0), min(high, 1.0)


def length_controlled(scores, differences):
    """The candidate's win rate if both answers had been equally long, as AlpacaEval 2 estimates it.

    Dubois et al. 2024 (2404.04475), section 3, without its term of the instruction's difficulty, which is fitted on a
    leaderboard of models: a logistic regression of the score on [1, tanh(difference / standard deviation)], and its
    rate at a difference of 0. A ridge of `RIDGE`/2 · slope² holds the slope finite where length separates wins from
    losses; the intercept is free. Scores that are all 0 or all 1 are their own mean.

    Args:
        scores: (N,) the candidate's score on each prompt, in [0, 1], as soft labels.
        differences: (N,) length of the candidate's answer minus the baseline's, in tokens; the unit cancels. Where all
            are equal, length explains nothing, and the result is the plain mean.

    Returns nan without prompts.
    """
    scores, differences = (np.asarray(values, dtype=np.float64) for values in (scores, differences))
    return float(_rates_at_one_length(scores[None], differences[None])[0]) if scores.size else math.nan


def length_controlled_interval(scores, differences, seed=0, resamples=2000, level=0.95):
    """Percentile interval (low, high) of `length_controlled` by resampling prompts and fitting each resample anew.

    Without spread, and with few prompts or resamples, it is what `bootstrap_interval` says.
    """
    scores, differences = (np.asarray(values, dtype=np.float64) for values in (scores, differences))
    if scores.size < 2 or resamples < FEWEST_RESAMPLES:
        return math.nan, math.nan
    if np.ptp(scores) < SAME:
        return bounds_of_few(scores, level)
    generator, rows, rates = np.random.default_rng(seed), max(1, CHUNK // scores.size), []
    for start in range(0, resamples, rows):
        indices = generator.integers(scores.size, size=(min(rows, resamples - start), scores.size))
        rates.append(_rates_at_one_length(scores[indices], differences[indices]))
    return _widened(np.concatenate(rates), length_controlled(scores, differences), scores, level)


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
        # Near separation a full step overshoots to where every weight is 0, so no step is longer than 1.
        steps /= np.maximum(determinant, np.abs(steps).max(axis=0))
        intercept, slope = intercept + steps[0], slope + steps[1]
        if np.abs(steps).max() < 1e-10:
            break
    means[fitted] = special.expit(intercept)
    return means


def replicate_interval(values, level=0.95):
    """(mean, low, high) of replicates' values (R,): the t interval of their mean, over the finite values.

    One replicate has no spread, so its bounds are nan; without values all three are. Where all values are equal, both
    bounds are that value: this describes the values, and decides nothing (see `decisions.decide`).
    """
    values = finite(values)
    if not values.size:
        return math.nan, math.nan, math.nan
    mean = float(values.mean())
    if values.size == 1:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf((1 + level) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size))
    return mean, mean - half, mean + half


def finite(values):
    """The finite ones of the values, as float64 (N,)."""
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    return values[np.isfinite(values)]


def matched_difference(first, second):
    """The mean of first - second over the KL that both curves of a replicate reach: how much more value at equal KL.

    Args:
        first, second: (M, 2) rows of (kl, value), in any order. Points of equal kl are averaged, nan rows left out.

    Both curves are interpolated linearly between their points, inside the common range of kl and never beyond. The
    integral of the difference over that range is exact, and divided by its length. Where the ranges only touch, both
    curves must have a point at that kl, and the difference there is the result. It is nan without a common range, and
    for a curve of one point at whose kl the other has none.
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


def outcomes(scores):
    """(wins, ties, losses): the numbers of prompts whose score lies above, at or below 0.5."""
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
    """Of the prompts judged in both orders, the share whose two verdicts name the same winner or are both a tie.

    Each turn, each sample, and the answers of each training count separately. nan where nothing was judged in both
    orders.
    """
    pair = {candidate, baseline}
    return _consistency(verdict for verdict in verdicts if {verdict["model_a"], verdict["model_b"]} == pair)


def _consistency(verdicts):
    same = [one == other for _, (_, one), (_, other) in _both_orders(verdicts)]
    return sum(same) / len(same) if same else math.nan


def _both_orders(verdicts):
    """Comparisons judged in both orders without an error, as (prompt, verdict in one order, verdict in the other).

    A prompt is (benchmark, prompt_id); a verdict is (the model shown first, the winner or None for a tie).
    """
    both = defaultdict(list)
    for (first, second, benchmark, prompt_id, *rest), verdict in latest(verdicts).items():
        if verdict["winner"] != "error":
            winner = verdict.get(verdict["winner"])
            both[(benchmark, prompt_id), frozenset((first, second)), *rest].append((first, winner))
    return [(prompt, *judged) for (prompt, *_), judged in both.items() if len(judged) == 2]


def judge_quality(verdicts):
    """What the verdicts of one judge, on any pairs, say about the judge.

    `verdicts` is the number of comparisons judged without an error, `errors` that of the others, `ties` the share of
    ties among the former. `swap_consistency` is the share of answers judged alike in both orders, and
    `first_position_share` the share of the verdicts with a winner that name the model shown first: ½ for a judge
    without a position bias. A share of nothing is nan.
    """
    comparisons = latest(verdicts)
    judged = [verdict for verdict in comparisons.values() if verdict["winner"] != "error"]
    decided = [verdict for verdict in judged if verdict["winner"] != "tie"]
    first = sum((verdict["winner"] == "model_a") == (verdict["order"] == 0) for verdict in decided)
    return {
        "verdicts": len(judged),
        "errors": len(comparisons) - len(judged),
        "ties": 1 - len(decided) / len(judged) if judged else math.nan,
        "swap_consistency": _consistency(comparisons.values()),
        "first_position_share": first / len(decided) if decided else math.nan,
    }


def agreement(verdicts, first_judge, second_judge):
    """How far two judges agree on the comparisons (pair, prompt, training, sample, turn, order) that both judged.

    Returns `comparisons`, the number that both judged without an error; `agreement`, the share in which both say win,
    tie or loss alike; `kappa`, Cohen's (Educational and Psychological Measurement 20, 1960) over these three. A win is
    one of the model that the pair's first line calls model_a, wherever it is shown: two judges that both nearly always
    prefer one model agree by chance. nan without comparisons, and for kappa where there is only one outcome.
    """
    pairs = [(first, second) for _, first, second in _judged_by_both(verdicts, first_judge, second_judge)]
    if not pairs:
        return {"comparisons": 0, "agreement": math.nan, "kappa": math.nan}
    table = np.zeros((3, 3))
    np.add.at(table, tuple((2 * np.array(pairs)).astype(int).T), 1 / len(pairs))
    observed, kappa = _kappa(table)
    return {"comparisons": len(pairs), "agreement": observed, "kappa": kappa}


def _judged_by_both(verdicts, first_judge, second_judge):
    """(comparison, first judge's value, second's) of each comparison that both judged without an error."""
    subjects, outcome = {}, {first_judge: {}, second_judge: {}}
    for (*comparison, judge), verdict in latest(verdicts).items():
        subject = subjects.setdefault(frozenset(comparison[:2]), verdict["model_a"])
        if judge in outcome and verdict["winner"] != "error":
            outcome[judge][tuple(comparison)] = _value(verdict, subject)
    first, second = outcome[first_judge], outcome[second_judge]
    return [(comparison, first[comparison], second[comparison]) for comparison in first if comparison in second]


def _kappa(table):
    """(observed agreement, kappa) of a table (3, 3) of shares; kappa nan where there is one outcome alone."""
    observed, chance = float(table.trace()), float(table.sum(0) @ table.sum(1))
    if abs(observed - chance) < 1e-12 < 1 - chance:
        return observed, 0.0  # but for rounding
    return observed, (observed - chance) / (1 - chance) if chance < 1 - 1e-12 else math.nan


def kappa_interval(verdicts, first_judge, second_judge, seed=0, resamples=2000, level=0.95):
    """Percentile interval (low, high) of `agreement`'s kappa by resampling prompts.

    Fewer than FEWEST prompts have none, nor has a kappa of one outcome alone: (nan, nan). A resample of one outcome
    alone counts as 0, which is no agreement beyond chance.
    """
    by_prompt = defaultdict(lambda: np.zeros((3, 3)))
    for (_, _, *prompt), first, second in _judged_by_both(verdicts, first_judge, second_judge):
        by_prompt[tuple(prompt[:2])][int(2 * first), int(2 * second)] += 1
    tables = np.array([by_prompt[prompt] for prompt in sorted(by_prompt, key=_sortable)]).reshape(-1, 3, 3)
    if len(tables) < FEWEST or resamples < FEWEST_RESAMPLES or math.isnan(_kappa(tables.sum(axis=0) / tables.sum())[1]):
        return math.nan, math.nan
    drawn = _resampled_sums(tables.reshape(-1, 9), seed, resamples).reshape(-1, 3, 3)
    return _percentiles(np.nan_to_num([_kappa(table / table.sum())[1] for table in drawn]), level)


def _resampled_sums(rows, seed, resamples):
    """Sums of bootstrap samples of the rows (N,) or (N, K), one row per prompt: (R,) or (R, K).

    Only how often a resample holds each different row matters, so these counts are drawn, and not the rows.
    """
    values, counts = np.unique(rows, axis=0, return_counts=True)
    return np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), resamples) @ values


def place_counts(verdicts):
    """For each prompt (N, 3), how the two orders of its pairs were judged, independent of the order of the lines.

    Of the pairs that were judged in both orders without an error or a tie, the number in which both verdicts name one
    model, in which both name the model shown first, and in which both name the model shown second. The verdicts are of
    one judge, on any pairs of models; each turn, each sample, and the answers of each training count separately.
    """
    counts = defaultdict(lambda: np.zeros(3))
    for prompt, (first, winner), (_, other) in _both_orders(verdicts):
        if winner is not None and other is not None:
            counts[prompt][0 if winner == other else 1 if winner == first else 2] += 1
    return np.array([counts[prompt] for prompt in sorted(counts, key=_sortable)]).reshape(-1, 3)


def discrimination(counts, seed=0, resamples=2000, level=0.95):
    """(share, low, high): how much of a judge's preference comes from the answers and not from positions or dice.

    Let a judge's verdict follow the answers with probability d and otherwise ignore them, naming the position that it
    likes, or any. Its win rates are then d times as far from ½ as those of a judge with d = 1. It names one model in
    both orders in C = d² / 2 + 2·f·(1 - f) of the pairs, where f is the share of verdicts that name the model shown
    first. A judge that ignores the answers does so in 2·f·(1 - f) of them, or fewer where the position that it likes
    depends on the prompt. So d = √(2·(C - 2·f·(1 - f))), and 0 where that is not above 0. A judge that always names the
    same model has 1, one that always names the same position 0, one that throws dice 0.

    The pairs of `PRIOR` average prompts are added that name the first position, and as many that name the second. This
    lowers the share where pairs are few: what ten pairs do not show may still happen. Without them, a judge of
    positions alone would have the share C instead of 0.

    Args:
        counts: (N, 3), see `place_counts`.

    The bounds are percentiles over resampled prompts. Without pairs all three are nan.
    """
    counts = np.asarray(counts, dtype=np.float64).reshape(-1, 3)
    if not counts.sum():
        return math.nan, math.nan, math.nan
    extra = PRIOR * counts.sum() / len(counts)
    drawn = _resampled_sums(counts, seed, max(resamples, FEWEST_RESAMPLES))
    share = float(_discriminates(counts.sum(axis=0)[None], extra)[0])
    return share, *_percentiles(_discriminates(drawn, extra), level)


def _discriminates(counts, extra):
    """The share of each of R sums of counts, (R, 3) -> (R,); see `discrimination`."""
    same, first, second = np.add(counts, [0, extra, extra]).T
    total = same + first + second
    share = (same / 2 + first) / total
    return np.sqrt(np.clip(2 * (same / total - 2 * share * (1 - share)), 0, 1))


def judge_intervals(verdicts, seed=0, resamples=2000, level=0.95):
    """Percentile intervals of the shares `ties`, `swap_consistency` and `first_position_share`, over prompts.

    The shares are those of `judge_quality`. Returns a dictionary of the three names with _low and _high; nan where
    `bootstrap_interval` has no interval either.
    """
    ties, same, decided = defaultdict(list), defaultdict(list), defaultdict(list)
    for prompt, (_, winner), (_, other) in _both_orders(verdicts):
        same[prompt].append(winner == other)
    for (first, _, benchmark, prompt_id, *_), verdict in latest(verdicts).items():
        if verdict["winner"] != "error":
            ties[benchmark, prompt_id].append(verdict["winner"] == "tie")
        if verdict["winner"] in ("model_a", "model_b"):
            decided[benchmark, prompt_id].append(verdict[verdict["winner"]] == first)
    bounds = {}
    for name, by_prompt in (("ties", ties), ("swap_consistency", same), ("first_position_share", decided)):
        bounds[f"{name}_low"], bounds[f"{name}_high"] = _share_interval(by_prompt, seed, resamples, level)
    return bounds


def _share_interval(by_prompt, seed, resamples, level):
    """Percentile interval of the share of true values in prompt -> [true or false, …], by resampling prompts."""
    if len(by_prompt) < 2 or resamples < FEWEST_RESAMPLES:
        return math.nan, math.nan
    counts = np.array([(sum(by_prompt[p]), len(by_prompt[p])) for p in sorted(by_prompt, key=_sortable)], dtype=float)
    shares = counts[:, 0] / counts[:, 1]
    if np.ptp(shares) < SAME:
        return bounds_of_few(shares, level)
    drawn = _resampled_sums(counts, seed, resamples)
    return _widened(drawn[:, 0] / drawn[:, 1], counts[:, 0].sum() / counts[:, 1].sum(), shares, level)


def compare(verdicts, candidate, baseline, seed=0, resamples=2000):
    """Everything that verdicts of one judge say about a pair, as one dictionary of plain numbers."""
    clusters, errors = battles(verdicts, candidate, baseline)
    scores = list(prompt_scores(clusters).values())
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
    """The verdicts of one pair by one judge. UserError for no such pair, and for several judges and none named."""
    if candidate == baseline:
        raise UserError(f"candidate and baseline are both {candidate!r}; compare two models")
    pairs = {frozenset((v["model_a"], v["model_b"])) for v in verdicts}
    of_pair = [v for v in verdicts if {v["model_a"], v["model_b"]} == {candidate, baseline}]
    if not of_pair:
        names = sorted(" and ".join(sorted(pair)) for pair in pairs)
        more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        names = ("; ".join(names[:SHOWN]) or "none") + more
        raise UserError(f"{source}: no verdict on {candidate!r} and {baseline!r}; its pairs are: {names}")
    judges = sorted({v["judge"] for v in of_pair})
    if judge is None and len(judges) > 1:
        raise UserError(f"{source}: verdicts of several judges ({', '.join(judges)}); choose one with --judge")
    if judge is not None and judge not in judges:
        raise UserError(f"{source}: no verdict by judge {judge!r} on this pair; its judges: {', '.join(judges)}")
    return [v for v in of_pair if judge is None or v["judge"] == judge]


def main(argv=None):
    """The command line; a user's mistake ends it with one line."""
    parser = argparse.ArgumentParser(prog="python -m salsa.evaluate.statistics", description=__doc__.split("\n")[0])
    parser.add_argument("verdicts", help="verdicts.jsonl of a judge run")
    parser.add_argument("--candidate", required=True)
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap; 0 or more")
    parser.add_argument("--judge", help="judge to read, required where the file has several")
    arguments = parser.parse_args(argv)
    if arguments.seed < 0:
        parser.error(f"argument --seed: {arguments.seed} is negative")
    runs.print_anything()
    pair = arguments.candidate, arguments.baseline
    try:
        verdicts = select(read_verdicts(arguments.verdicts), *pair, arguments.judge, arguments.verdicts)
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    result = compare(verdicts, *pair, arguments.seed)
    print(json.dumps({name: None if value != value else value for name, value in result.items()}, allow_nan=False))


if __name__ == "__main__":
    main()
