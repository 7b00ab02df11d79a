"""What a claim's two arms did in each replicate: the numbers that its verdict is decided on, and those beside them.

A claim has one *primary* outcome, a number for each replicate, which alone decides; of several benchmarks it is their
mean. *Secondary* outcomes stand beside it: each benchmark by itself, the win rate where gold scores are compared, and
the three losses of which stability is the worst. The variance that prompts, responses and the wandering of a run give
to a number by themselves is measured too, where its parts were kept: scores of prompts (`salsa.evaluate.sampling`), or
the iterations of the flat part of training (`salsa.evaluate.flat`).

A replicate that both arms are run in has a row, whose effect is nan where one has no finite number. Only a comparison
at equal KL leaves replicates out: those in which the two arms reach no common KL, of which it says nothing.

Nothing is decided here: `claims` does that. At which kl_coef arms are compared, is in `selection`.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from salsa.evaluate import flat, sampling
from salsa.report import judging, selection
from salsa.workflow.families import JUDGED, ON_BENCHMARKS

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
SHORT = {  # measure -> words, where there is little room
    "gold_reward": "gold reward",
    "reward": "proxy reward",
    "win_rate": "win rate",
    "kl_to_sft0": "KL to sft0",
    "training_kl_to_sft0": "KL to sft0 in training",
    "training_reward": "proxy reward in training",
}
LOSSES = {  # column of frames.policies -> (what is left of its margin, setting of `stability`, sign of a loss)
    "end_rate_relative": ("share of responses that end, by sft0's", "end_rate_margin", -1),
    "length_relative": ("length of responses, by sft0's", "length_margin", -1),
    "gold_loss": ("fall of gold from its peak", "gold_margin", 1),
}
WORDS = MEASURES | {column: (f"what is left of its margin: {text}", "margins") for column, (text, *_) in LOSSES.items()}
MOST = {"win_rate": 0.5, "matched_win_rate": 1.0}  # measure -> the largest difference that there can be
FLAT = {"training_kl_to_sft0": "flat_kl_to_sft0", "training_reward": "flat_reward"}  # measure -> column of policies
EQUAL_KL = "where both reach the same KL"
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
        tables: what it is known from: candidate minus baseline (replicates × prompts), one table for each benchmark.
        variances: or what else: replicate -> the variance of its effect, by its own training alone.
        apart: the replicates left out because the two arms reach no common KL there.
    """

    kind: str
    measure: str
    benchmark: str
    judge: str
    values: pd.DataFrame
    how: str = ""
    seen: float = 1.0
    sampling_variance: float = math.nan
    tables: tuple = ()
    variances: pd.Series | None = None
    apart: tuple = ()


def shown_interval(row):
    """(effect, low, high) of a row of claims as readers see it: that of win rates cut where none can lie.

    No verdict changes by it: 0 and the smallest effect lie within.
    """
    most = MOST.get(row["measure"], math.inf)
    low, high = (min(max(row[f"effect{bound}"], -most), most) for bound in ("_low", "_high"))
    return row["effect"], low, high


def of_replicates(outcome, replicates):
    """The outcome as it is in a study of these replicates alone: their values, and the variance that these tell."""
    kept = [replicate for replicate in replicates if replicate in outcome.values.index]
    part = replace(
        outcome,
        values=outcome.values.loc[kept],
        tables=tuple(table.loc[table.index.isin(kept)] for table in outcome.tables),
        variances=None if outcome.variances is None else outcome.variances.reindex(kept),
        apart=tuple(replicate for replicate in outcome.apart if replicate in replicates),
    )
    if part.tables:
        return replace(part, sampling_variance=sampling.sampling_variance(part.tables))
    return part if part.variances is None else replace(part, sampling_variance=float(part.variances.mean()))


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
    """The outcomes of a claim (`families.resolved`), the primary one first. NotTested: data are missing.

    They are of all `replicates_of` the pair; `of_replicates` cuts them, and has to, to know `sampling_variance`.
    """
    measure = claim.measure
    if measure == "stable":
        return _stability(study, pair)
    if measure in ON_BENCHMARKS:
        return _on_benchmarks(study, claim, pair)
    if measure == "matched_gold":
        return [_matched(study, Outcome(PRIMARY, measure, "", "", pd.DataFrame()), pair, selection.gold_of(study))]
    if measure in FLAT:
        return [_over_training(study, measure, pair)]
    numbers = [selection.evaluated(study, arm, kl_coef, measure) for arm, kl_coef in sides(pair)]
    tables = [_evaluation_means(study, arm, kl_coef) for arm, kl_coef in sides(pair)]
    values = _paired(study, pair, *numbers)
    return [Outcome(PRIMARY, measure, "", "", values, tables=_difference(*tables))]


def at_all_kl_coefs(measure):
    """Whether a measure compares arms over all of their kl_coefs."""
    return measure.startswith("matched")


def replicates_of(study, pair):
    """The replicates in which both arms are run, in the study's order. NotTested: there is none."""
    shared = set.intersection(*({policy.replicate for policy in study.of(arm=arm)} for arm, _ in sides(pair)))
    if not shared:
        raise NotTested("the two arms have no replicate in common")
    return [replicate for replicate in study.config.replicates if replicate in shared]


def sides(pair):
    """(arm, kl_coef) of the candidate and of the baseline."""
    return (pair.candidate, pair.candidate_kl_coef), (pair.baseline, pair.baseline_kl_coef)


def _paired(study, pair, first, second):
    """The values of two sides, replicate -> number, over the pair's replicates; nan where one has no number."""
    replicates = replicates_of(study, pair)
    numbers = [(first.get(replicate, math.nan), second.get(replicate, math.nan)) for replicate in replicates]
    rows = [(ours, theirs, ours - theirs) for ours, theirs in numbers]
    return pd.DataFrame(rows, index=replicates, columns=VALUES, dtype=float)


def _difference(first, second):
    """The tables of an outcome on one benchmark: two arms' tables (replicates × prompts), over what both have."""
    shared = first.index.intersection(second.index)
    return () if shared.empty else (first.loc[shared] - second.loc[shared],)


def _alone(effects):
    """The values of effects (replicate -> number) that are no difference of two numbers."""
    frame = pd.DataFrame({"effect": pd.Series(effects, dtype=float)})
    return frame.reindex(columns=VALUES)


def policy_means(study, arm, kl_coef, column):
    """replicate -> mean over the training seeds of a column of frames.policies, as a series; nan where one lacks it."""
    policies = study.frames.policies
    policies = policies[(policies["arm"] == arm) & (policies["kl_coef"] == kl_coef)]
    return policies.groupby("replicate")[column].agg(lambda values: values.mean(skipna=False))


def _over_training(study, measure, pair):
    """The outcome of a mean over the flat part of training."""
    column, numbers = FLAT[measure], []
    for arm, kl_coef in sides(pair):
        numbers.append(policy_means(study, arm, kl_coef, column))
        if numbers[-1].dropna().empty:
            raise NotTested(f"nothing is known of the flat part of the training of {arm}")
    values = _paired(study, pair, *(means.to_dict() for means in numbers))
    return Outcome(PRIMARY, measure, "", "", values, variances=_training_variances(study, measure, pair))


def _training_variances(study, measure, pair):
    """replicate -> the variance that the iterations of its two arms give to the difference of their flat means.

    Arms with the same training seeds are asked the same prompts in the same iteration, which moves both: so the series
    of their differences is taken where their iterations are the same, and else the sum of both variances.
    """
    name = measure.removeprefix("training_")
    first, second = (_flat_series(study, arm, kl_coef, name) for arm, kl_coef in sides(pair))
    variances = {}
    for replicate in first.keys() & second.keys():
        ours, theirs = first[replicate], second[replicate]
        if ours.index.equals(theirs.index):
            variances[replicate] = flat.mean_variance(ours - theirs)
        else:
            variances[replicate] = flat.mean_variance(ours) + flat.mean_variance(theirs)
    return pd.Series(variances, dtype=float)


def _flat_series(study, arm, kl_coef, name):
    """replicate -> a measure by iteration of the flat part of training, the mean over training seeds, as a series."""
    by_replicate = {}
    for policy in study.of(arm=arm, kl_coef=kl_coef):
        series = {row["iteration"]: row[name] for row in study.frames.flat_rows(policy)}
        by_replicate.setdefault(policy.replicate, []).append(pd.Series(series, dtype=float))
    return {k: pd.concat(series, axis=1).mean(axis=1, skipna=False) for k, series in by_replicate.items()}


def _evaluation_means(study, arm, kl_coef):
    """A table (replicates × prompts) of the KL to sft0 on evaluation prompts."""
    rows = selection.evaluation_rows(study, arm, kl_coef)
    return rows.pivot_table(index="replicate", columns="prompt_id", values="kl_to_sft0", aggfunc="mean", sort=False)


def _matched(study, outcome, pair, values):
    """The outcome with its values, at equal KL; `values` is a function as that of `selection.matched`."""
    if min(len(selection.grid(study, arm)) for arm, _ in sides(pair)) < 2:
        raise NotTested("a comparison at equal KL needs two kl_coefs of each arm")
    if outcome.measure == "matched_gold" and selection.measured_by(study) != "gold_reward":
        raise NotTested("this data has no gold reward")
    effects = selection.matched(study, pair.candidate, pair.baseline, values)
    if not effects:
        raise NotTested("in no replicate do the two arms reach the same KL")
    lost = _not_finite(study, pair, values)
    rows = {k: math.nan if k in lost else effects.get(k) for k in replicates_of(study, pair)}
    apart = tuple(replicate for replicate, effect in rows.items() if effect is None)
    return replace(outcome, values=_alone({k: x for k, x in rows.items() if x is not None}), how=EQUAL_KL, apart=apart)


def _not_finite(study, pair, values):
    """The replicates in which a point of either arm's curve (its KL, or its value) is missing or no finite number."""
    lost = set()
    for arm, _ in sides(pair):
        for kl_coef in selection.grid(study, arm):
            run = {policy.replicate for policy in study.of(arm=arm, kl_coef=kl_coef)}
            for numbers in (values(arm, kl_coef), selection.evaluated(study, arm, kl_coef, "kl_to_sft0")):
                lost |= {replicate for replicate in run if not math.isfinite(numbers.get(replicate, math.nan))}
    return lost


# Stability: what the candidate loses against the baseline, in margins.


def _stability(study, pair):
    """What is left of the margin by the worst of three losses, and by each of them.

    Of each, 1 − loss/margin, and never more than 1: 1 where nothing is lost against the baseline, 0 where all of the
    margin is. The worst is taken in each replicate, before the mean, so that chance alone makes it a little smaller,
    and never larger; and nothing that one replicate gains makes up for what another loses.
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
    unknown = [LOSSES[loss.measure][0] for loss in losses if loss not in known]
    how = f"not measured: {', '.join(unknown)}" if unknown else ""
    return [Outcome(PRIMARY, "stable", "", "", _alone(worst), how), *known]


def _margin_left(study, pair, column, margin, sign):
    first, second = (policy_means(study, arm, kl_coef, column) for arm, kl_coef in sides(pair))
    values = _paired(study, pair, first.to_dict(), second.to_dict())
    return values.assign(effect=(1 - sign * values["effect"] / margin).clip(upper=1))


# Benchmarks: the mean over them decides.


def _on_benchmarks(study, claim, pair):
    benchmarks = claim.benchmarks or study.compared
    missing = [name for name in benchmarks if name not in study.benchmarks]
    if missing or not benchmarks:
        raise NotTested(f"this study has no benchmark {missing[0]}" if missing else "this study has no benchmark")
    outcomes = _mean_first([_on_benchmark(study, claim, pair, name) for name in benchmarks])
    return outcomes + (_win_rates_beside(study, pair, benchmarks) if claim.measure == "gold_reward" else [])


def _on_benchmark(study, claim, pair, benchmark):
    """The secondary outcome of one benchmark."""
    measure = claim.measure
    if measure not in JUDGED:
        name = measure.removesuffix("_reward")  # gold, reward: as responses call them
        return _scores(study, pair, measure, name, benchmark)
    judge = selection.main_judge(study)
    if judge is None:
        raise NotTested("this study has no judge")
    seen = judge_shows(study, claim, judge, benchmark)
    if measure == "matched_win_rate":
        outcome = Outcome(SECONDARY, measure, benchmark, judge, pd.DataFrame())
        outcome = _matched(study, outcome, pair, selection.rate_of(study, judge, [benchmark]))
    else:
        outcome = _win_rates(study, pair, judge, benchmark, claim.origin == "abstract")
    if seen < 1:
        how = f"{outcome.how}; judge {judge} shows {selection.number(100 * seen)} % of an effect at least"
        outcome = replace(outcome, how=how, seen=seen)
    return outcome


def _scores(study, pair, measure, name, benchmark):
    means = [selection.benchmark_means(study, arm, kl_coef, name, benchmark) for arm, kl_coef in sides(pair)]
    if measure == "gold_reward" and not all(means):
        raise NotTested("this data has no gold reward")
    tables = [prompt_means(study, arm, kl_coef, name, benchmark) for arm, kl_coef in sides(pair)]
    return Outcome(SECONDARY, measure, benchmark, "", _paired(study, pair, *means), tables=_difference(*tables))


def prompt_means(study, arm, kl_coef, name, benchmark):
    """A table (replicates × prompts) of `reward` or `gold`: means over a prompt's responses of an arm's policies."""
    rows = study.frames.responses
    rows = rows[(rows["arm"] == arm) & (rows["kl_coef"] == kl_coef) & (rows["benchmark"] == benchmark)]
    return rows.pivot_table(index="replicate", columns="prompt_id", values=name, aggfunc="mean", sort=False)


def _win_rates(study, pair, judge, benchmark, by_third=False):
    """The outcome of win rates; through a third model only where that is allowed."""
    opponent, how = selection.meeting(study, pair, judge, benchmark)
    first, second = selection.names(study, pair)
    if how == selection.DIRECT:
        tables = (pd.DataFrame(study.scores(judge, benchmark, first, second)).T,)
        rates = selection.replicate_win_rates(study, first, second, judge, [benchmark])
        rates = rates, dict.fromkeys(rates, 0.5)
    elif how and by_third:
        models = (first, second)
        tables = _difference(*(pd.DataFrame(study.scores(judge, benchmark, name, opponent)).T for name in models))
        rates = [selection.replicate_win_rates(study, name, opponent, judge, [benchmark]) for name in models]
    else:
        raise NotTested(_not_judged(pair, benchmark, by_third))
    return Outcome(SECONDARY, "win_rate", benchmark, judge, _paired(study, pair, *rates), how, tables=tables)


def _not_judged(pair, benchmark, by_third):
    third = ", or both with a third model" if by_third else ""
    return f"no verdict on {benchmark} compares {pair.candidate} and {pair.baseline}{third}"


def _mean_first(outcomes):
    """The outcomes of a measure on benchmarks, the primary one first: the only one, or the mean of all."""
    if len(outcomes) == 1:
        return [replace(outcomes[0], kind=PRIMARY)]
    shared = [k for k in outcomes[0].values.index if all(k in outcome.values.index for outcome in outcomes)]
    if not shared:
        raise NotTested("in no replicate can all benchmarks be compared")
    known = all(outcome.tables for outcome in outcomes)
    primary = replace(
        outcomes[0],
        kind=PRIMARY,
        benchmark=f"mean of {len(outcomes)} benchmarks",
        values=sum(outcome.values.loc[shared] for outcome in outcomes) / len(outcomes),
        how="; ".join(dict.fromkeys(outcome.how for outcome in outcomes if outcome.how)),
        seen=min(outcome.seen for outcome in outcomes),
        tables=tuple(table for outcome in outcomes for table in outcome.tables) if known else (),
        apart=tuple(dict.fromkeys(replicate for outcome in outcomes for replicate in outcome.apart)),
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
