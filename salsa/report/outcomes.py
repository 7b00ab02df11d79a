"""What a claim's two arms did in each replicate: the numbers that its verdict is decided on, and those beside them.

A claim has one *primary* outcome, a number for each replicate, which alone decides; of several benchmarks it is their
mean. *Secondary* outcomes stand beside it: each benchmark by itself, the win rate where gold scores are compared, and
the three losses of which stability is the worst. Where a number comes from responses to prompts, the variance that
prompts and sampling alone give to it is measured too (`salsa.evaluate.sampling`).

Nothing is decided here: `claims` does that. At which kl_coef arms are compared, is in `selection`.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from salsa.evaluate import sampling
from salsa.report import judging, selection

PRIMARY, SECONDARY = "primary", "secondary"
MEASURES = {  # measure -> (what is compared, its unit)
    "kl_to_sft0": ("KL(policy ‖ sft0) on the development prompts", "nats per response"),
    "training_kl_to_sft0": ("KL(policy ‖ sft0) over the flat part of training", "nats per response"),
    "stable": ("what is left of the margin of stability, by the worst of three", "margins"),
    "reward": ("proxy reward on a benchmark's responses", "standard deviations on sft0's responses"),
    "training_reward": ("proxy reward over the flat part of training", "standard deviations on sft0's responses"),
    "gold_reward": ("gold reward on a benchmark's responses", ""),
    "win_rate": ("adjusted win rate of the candidate minus ½", ""),
    "matched_gold": ("gold reward on the development prompts at equal KL to sft0", ""),
    "matched_win_rate": ("win rate against sft0 at equal KL to sft0", ""),
}
LOSSES = {  # column of frames.policies -> (what is left of its margin, setting of `stability`, sign of a loss)
    "end_rate_relative": ("share of responses that end, by sft0's", "end_rate_margin", -1),
    "length_relative": ("length of responses, by sft0's", "length_margin", -1),
    "gold_loss": ("fall of gold from its peak", "gold_margin", 1),
}
WORDS = MEASURES | {column: (f"what is left of its margin: {text}", "margins") for column, (text, *_) in LOSSES.items()}
FLAT = {"training_kl_to_sft0": "flat_kl_to_sft0", "training_reward": "flat_reward"}  # measure -> column of policies
JUDGED = ("win_rate", "matched_win_rate")
ON_BENCHMARKS = ("reward", "gold_reward", *JUDGED)
VALUES = ["candidate_value", "baseline_value", "effect"]


class NotTested(Exception):
    """The study lacks what a claim needs; the text says what."""


@dataclass(frozen=True)
class Outcome:
    """What was measured of a claim in each replicate.

    Attributes:
        kind: PRIMARY, which decides the claim, or SECONDARY.
        measure: a measure of claims, or one of LOSSES.
        benchmark: "" for the development prompts and for training; the words "mean of 3 benchmarks" for several.
        judge: "" where none was asked.
        values: by replicate, the columns VALUES: effect is what is claimed to be above 0, mostly candidate minus
            baseline. nan: no finite number.
        how: in what way the two were compared, where there are several.
        seen: the share of a true effect that shows in these numbers, at least: below 1 for a judge that errs.
        sampling_variance: of one replicate's effect, by prompts and responses alone; nan where that is not known.
    """

    kind: str
    measure: str
    benchmark: str
    judge: str
    values: pd.DataFrame
    how: str = ""
    seen: float = 1.0
    sampling_variance: float = math.nan


def resolved(study, claim):
    """The claim as this study can test it: one of gold scores is one of win rates where the data has no gold."""
    if claim.measure == "gold_reward" and claim.win_rate_without_gold is not None and not has_gold(study):
        return replace(claim, measure="win_rate", smallest_effect=claim.win_rate_without_gold)
    return claim


def has_gold(study):
    """Whether every response to a benchmark has a gold score."""
    return not study.frames.responses["gold"].isna().any()


def compared(study, claim):
    """The claim's two arms, each at the kl_coef of claims. NotTested: an arm or a common kl_coef is missing."""
    arms = [selection.arm_of(study, getattr(claim, role)) for role in ("candidate", "baseline")]
    missing = [getattr(claim, role) for role, arm in zip(("candidate", "baseline"), arms, strict=True) if arm is None]
    if missing:
        raise NotTested("this study has no arm " + " and no arm ".join(missing))
    if arms[0] == arms[1]:
        raise NotTested(f"{claim.candidate} and {claim.baseline} are one arm in this study")
    pair = selection.pair(study, *arms)
    if pair is None:
        fixed = study.config.claim_kl_coef
        run = "run at no common kl_coef" if fixed is None else f"not both run at claim_kl_coef {fixed:g}"
        raise NotTested(f"{arms[0]} and {arms[1]} were {run}")
    return pair


def measured(study, claim, pair):
    """The outcomes of a `resolved` claim, the primary one first. NotTested: data are missing."""
    measure = claim.measure
    if measure == "stable":
        return _stability(study, pair)
    if measure in ON_BENCHMARKS:
        return _on_benchmarks(study, claim, pair)
    if measure == "matched_gold":
        values = _matched(study, measure, pair, selection.gold_of(study))
        return [Outcome(PRIMARY, measure, "", "", values, "where both reach the same KL")]
    if measure in FLAT:
        numbers = [_flat(study, measure, arm, kl_coef) for arm, kl_coef in sides(pair)]
    else:
        numbers = [selection.evaluated(study, arm, kl_coef, measure) for arm, kl_coef in sides(pair)]
    return [Outcome(PRIMARY, measure, "", "", _paired(*numbers))]


def sides(pair):
    """(arm, kl_coef) of the candidate and of the baseline."""
    return (pair.candidate, pair.candidate_kl_coef), (pair.baseline, pair.baseline_kl_coef)


def _paired(first, second):
    """The values of two sides, replicate -> number, over the replicates that both have. NotTested: there is none."""
    replicates = sorted(first.keys() & second.keys())
    if not replicates:
        raise NotTested("the two arms have no replicate in common")
    rows = [(first[k], second[k], first[k] - second[k]) for k in replicates]
    return pd.DataFrame(rows, index=replicates, columns=VALUES, dtype=float)


def _alone(effects):
    """The values of effects (replicate -> number) that are no difference of two numbers."""
    frame = pd.DataFrame({"effect": pd.Series(effects, dtype=float)})
    return frame.reindex(columns=VALUES)


def policy_means(study, arm, kl_coef, column):
    """replicate -> mean over the training seeds of a column of frames.policies, as a series; nan where one lacks it."""
    policies = study.frames.policies
    policies = policies[(policies["arm"] == arm) & (policies["kl_coef"] == kl_coef)]
    return policies.groupby("replicate")[column].agg(lambda values: values.mean(skipna=False))


def _flat(study, measure, arm, kl_coef):
    column = FLAT[measure]
    means = policy_means(study, arm, kl_coef, column) if column in study.frames.policies else pd.Series(dtype=float)
    if means.dropna().empty:
        raise NotTested(f"nothing is known of the flat part of the training of {arm}")
    return means.to_dict()


def _matched(study, measure, pair, values):
    effects = selection.matched(study, pair.candidate, pair.baseline, values)
    if effects:
        return _alone(effects)
    if min(len(selection.grid(study, arm)) for arm in (pair.candidate, pair.baseline)) < 2:
        raise NotTested("a comparison at equal KL needs two kl_coefs of each arm")
    if measure == "matched_gold" and selection.measured_by(study) != "gold_reward":
        raise NotTested("this data has no gold reward")
    raise NotTested("in no replicate do the two arms reach the same KL")


# Stability: what the candidate loses against the baseline, in margins.


def _stability(study, pair):
    """What is left of the margin by the worst of three losses, and by each of them.

    Of each, 1 − loss/margin: 1 where nothing is lost against the baseline, 0 where all of the margin is. The worst is
    taken in each replicate, before the mean, so that chance alone makes it a little smaller, and never larger.
    """
    stability = study.config.stability
    losses = [
        Outcome(SECONDARY, column, "", "", _margin_left(study, pair, column, getattr(stability, setting), sign))
        for column, (_, setting, sign) in LOSSES.items()
    ]
    known = [loss for loss in losses if loss.values["effect"].notna().any()]
    if not known:
        raise NotTested("nothing is known of the responses of sft0, nor of gold")
    worst = pd.concat([loss.values["effect"] for loss in known], axis=1).min(axis=1, skipna=False)
    return [Outcome(PRIMARY, "stable", "", "", _alone(worst)), *known]


def _margin_left(study, pair, column, margin, sign):
    first, second = (policy_means(study, arm, kl_coef, column) for arm, kl_coef in sides(pair))
    values = _paired(first.to_dict(), second.to_dict())
    return values.assign(effect=1 - sign * values["effect"] / margin)


# Benchmarks: the mean over them decides.


def _on_benchmarks(study, claim, pair):
    benchmarks = claim.benchmarks or study.compared
    missing = [name for name in benchmarks if name not in study.benchmarks]
    if missing or not benchmarks:
        raise NotTested(f"this study has no benchmark {missing[0]}" if missing else "this study has no benchmark")
    outcomes = _mean_first([_on_benchmark(study, claim, pair, name) for name in benchmarks])
    return outcomes + (_win_rates_beside(study, pair, benchmarks) if claim.measure == "gold_reward" else [])


def _on_benchmark(study, claim, pair, benchmark):
    """(the secondary outcome of one benchmark, its table of differences (replicates × prompts), or None)."""
    measure = claim.measure
    if measure not in JUDGED:
        name = measure.removesuffix("_reward")  # gold, reward: as responses call them
        return _scores(study, pair, measure, name, benchmark)
    judge = selection.main_judge(study)
    if judge is None:
        raise NotTested("this study has no judge")
    seen = judge_shows(study, claim, judge, benchmark)
    if measure == "matched_win_rate":
        values = _matched(study, measure, pair, selection.rate_of(study, judge, [benchmark]))
        outcome, table = Outcome(SECONDARY, measure, benchmark, judge, values, "where both reach the same KL"), None
    else:
        outcome, table = _win_rates(study, pair, judge, benchmark, claim.origin == "abstract")
    if seen < 1:
        how = f"{outcome.how}; judge {judge} shows {selection.number(100 * seen)} % of an effect at least"
        outcome = replace(outcome, how=how, seen=seen)
    return outcome, table


def _scores(study, pair, measure, name, benchmark):
    means = [selection.benchmark_means(study, arm, kl_coef, name, benchmark) for arm, kl_coef in sides(pair)]
    if measure == "gold_reward" and not all(means):
        raise NotTested("this data has no gold reward")
    tables = [prompt_means(study, arm, kl_coef, name, benchmark) for arm, kl_coef in sides(pair)]
    return Outcome(SECONDARY, measure, benchmark, "", _paired(*means)), tables[0] - tables[1]


def prompt_means(study, arm, kl_coef, name, benchmark):
    """A table (replicates × prompts) of `reward` or `gold`: means over a prompt's responses of an arm's policies."""
    rows = study.frames.responses
    rows = rows[(rows["arm"] == arm) & (rows["kl_coef"] == kl_coef) & (rows["benchmark"] == benchmark)]
    return rows.pivot_table(index="replicate", columns="prompt_id", values=name, aggfunc="mean", sort=False)


def _win_rates(study, pair, judge, benchmark, by_third=False):
    """(outcome, its table of prompts' scores) of win rates; through a third model only where that is allowed."""
    opponent, how = selection.meeting(study, pair, judge, benchmark)
    first, second = selection.names(study, pair)
    if how == selection.DIRECT:
        scores = pd.DataFrame(study.scores(judge, benchmark, first, second)).T
        rates = selection.replicate_win_rates(study, first, second, judge, [benchmark])
        values = _paired(rates, dict.fromkeys(rates, 0.5))
    elif how and by_third:
        ours, theirs = (pd.DataFrame(study.scores(judge, benchmark, name, opponent)).T for name in (first, second))
        scores = ours - theirs
        rates = [selection.replicate_win_rates(study, name, opponent, judge, [benchmark]) for name in (first, second)]
        values = _paired(*rates)
    else:
        raise NotTested(_not_judged(pair, benchmark, by_third))
    return Outcome(SECONDARY, "win_rate", benchmark, judge, values, how), scores


def _not_judged(pair, benchmark, by_third):
    third = ", or both with a third model" if by_third else ""
    return f"no verdict on {benchmark} compares {pair.candidate} and {pair.baseline}{third}"


def _mean_first(measurements):
    """The outcomes of a measure on benchmarks, the primary one first: the only one, or the mean of all.

    Args:
        measurements: (outcome, table or None) of each benchmark.
    """
    outcomes, tables = zip(*measurements, strict=True)
    variances = [math.nan if table is None else sampling.sampling_variance([table]) for table in tables]
    outcomes = [replace(each, sampling_variance=v) for each, v in zip(outcomes, variances, strict=True)]
    if len(outcomes) == 1:
        return [replace(outcomes[0], kind=PRIMARY)]
    shared = sorted(set.intersection(*(set(outcome.values.index) for outcome in outcomes)))
    if not shared:
        raise NotTested("the two arms have no replicate in common")
    mean = sum(outcome.values.loc[shared] for outcome in outcomes) / len(outcomes)
    primary = replace(
        outcomes[0],
        kind=PRIMARY,
        benchmark=f"mean of {len(outcomes)} benchmarks",
        values=mean,
        how="; ".join(dict.fromkeys(outcome.how for outcome in outcomes if outcome.how)),
        seen=min(outcome.seen for outcome in outcomes),
        sampling_variance=sum(variances) / len(variances) ** 2,
    )
    return [primary, *outcomes]


def _win_rates_beside(study, pair, benchmarks):
    """The win rate beside gold scores, the mean over the benchmarks: secondary; nothing where nobody judged."""
    judge = selection.main_judge(study)
    if judge is None or any(judging.quality(study, judge, name).reason for name in benchmarks):
        return []
    try:
        primary = _mean_first([_win_rates(study, pair, judge, name) for name in benchmarks])[0]
    except NotTested:
        return []
    return [replace(primary, kind=SECONDARY)]


def judge_shows(study, claim, judge, benchmark):
    """The share of an effect that a judge shows at least. NotTested: it can't measure the smallest effect."""
    quality = judging.quality(study, judge, benchmark)
    if quality.reason:
        everywhere = judging.quality(study, judge).reason
        raise NotTested(quality.reason if everywhere else f"on {benchmark}, {quality.reason}")
    if quality.row["verdicts"] and quality.seen / 2 < claim.smallest_effect:
        raise NotTested(
            f"judge {judge} can't show an effect of {claim.smallest_effect:g} on {benchmark}: even a model that is "
            f"always better need not win by more than {selection.number(quality.seen / 2)}"
        )
    return quality.seen
