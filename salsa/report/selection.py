"""At which kl_coef an arm is compared, and the values by replicate that every comparison stands on.

Two arms are compared at the study's `claim_kl_coef`, which was fixed in advance. Where it names none, each is taken at
the kl_coef that does best on the development prompts (`evaluation.json`), chosen from the kl_coefs that both were run
at, so that neither has more tries than the other. What is compared there was measured
elsewhere, on the benchmarks; only KL, which nothing was chosen for, is that of the development prompts. Nothing is
tested or worded here: `claims` and the sections do that.

Where a replicate has several training seeds, its value is the mean over them, and this is taken here (`over_seeds`,
`seed_means`): they share SFT models and reward model, and so are no replicates.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd

from salsa import judges
from salsa.evaluate import statistics
from salsa.workflow import config, policies, runs

SFT0 = "sft0"
DIRECT = "judged against each other"
DEVELOPMENT = ("gold_reward", "reward")  # what a kl_coef is chosen by: the first that the data has


@dataclass(frozen=True)
class Pair:
    """Two arms, each at its chosen kl_coef."""

    candidate: str
    baseline: str
    grid: tuple[float, ...]  # the kl_coefs that both were run at (`pair`), in the study's order
    candidate_kl_coef: float
    baseline_kl_coef: float


def arm_of(study, name):
    """The arm that a claim means by a name; None where the study has no such arm.

    An arm that equals another is shown under that one's name, and the plain anchor (`config.PLAIN`) under its own.
    """
    if name in study.arms:
        return name
    if name == config.PLAIN:
        return study.plain
    specs = policies.specs(study.composed)
    same = next((names for names, _ in specs.values() if name in names), ())
    return next((arm for arm in study.arms if arm in same), None)


def grid(study, arm):
    """The kl_coefs at which an arm was run, in the study's order."""
    present = {policy.kl_coef for policy in study.of(arm=arm)}
    return tuple(kl_coef for kl_coef in study.kl_coefs if kl_coef in present)


def measured_by(study):
    """The measure by which kl_coefs are chosen: gold_reward where every policy has it, else reward."""
    gold, reward = DEVELOPMENT
    return gold if all(p.evaluation.get(gold) is not None for p in study.policies) else reward


def development(study, arm, kl_coef):
    """The mean of that measure over replicates, on the development prompts; nan where a policy lacks it.

    Of a study with looks they are those of its first look, so that all looks compare the same policies.
    """
    name, looks = measured_by(study), study.config.looks
    chosen_on = study.config.replicates[: looks[0] if looks else None]
    policies = [policy for policy in study.of(arm=arm, kl_coef=kl_coef) if policy.replicate in chosen_on]
    values = over_seeds(policies, lambda policy: number_or_nan(policy.evaluation.get(name)))
    return float(np.mean(list(values.values())))


def choose(study, arm, kl_coefs):
    """The kl_coef of these at which an arm does best on the development prompts; the largest, where several are equal.

    One whose mean is not finite (a replicate has diverged) is chosen only where all are such.
    """
    values = [(development(study, arm, kl_coef), kl_coef) for kl_coef in kl_coefs]
    return max((value if math.isfinite(value) else -math.inf, kl_coef) for value, kl_coef in values)[1]


def pair(study, candidate, baseline):
    """`Pair` of two arms, or None where no kl_coef is common to both, or `claim_kl_coef` isn't.

    An arm without a penalty never narrows the other's grid: its one policy stands for all kl_coefs. Where it is made of
    policies with a penalty, and so has several itself, it is chosen from the shared kl_coefs if it has any of them.
    """
    arms = candidate, baseline
    grids = [grid(study, arm) for arm in arms if study.penalised(arm)]
    grids = grids or [max((grid(study, arm) for arm in arms), key=len)]
    fixed = study.config.claim_kl_coef
    shared = tuple(kl_coef for kl_coef in grids[0] if kl_coef in grids[-1] and fixed in (None, kl_coef))
    if not shared:
        return None
    chosen = []
    for arm in arms:
        run_at = grid(study, arm)
        chosen.append(choose(study, arm, [kl_coef for kl_coef in shared if kl_coef in run_at] or run_at))
    return Pair(candidate, baseline, shared, *chosen)


def of_claims(study, arm):
    """The kl_coef at which claims compare an arm: claim_kl_coef, or what `pair` gives the first claim that compares it.

    An arm that no claim can compare is taken at the best of all its kl_coefs.
    """
    run_at = grid(study, arm)
    if study.config.claim_kl_coef in run_at:
        return study.config.claim_kl_coef
    for claim in study.config.claims.values():
        arms = [arm_of(study, name) for name in (claim.candidate, claim.baseline)]
        compared = pair(study, *arms) if arm in arms and None not in arms else None
        if compared is not None:
            return compared.candidate_kl_coef if arm == compared.candidate else compared.baseline_kl_coef
    return choose(study, arm, run_at)


def kl_bounded(study, arm):
    """Whether the KL of an arm's policies is an upper bound: their answers are the best of several."""
    return any(policy.evaluation.get("kl_is_bound") for policy in study.of(arm=arm))


def main_judge(study):
    """The judge whose verdicts decide claims: of those asked, the one of the lowest rank. None: no judge was asked.

    Of several judges of one rank, the first by name.
    """
    judges_asked = sorted({key[0] for key in study.verdicts})
    return min(judges_asked, key=lambda judge: kind_of(study, judge).rank, default=None)


def kind_of(study, judge):
    """The record of a judge's kind."""
    return judges.find(study.config.judges[judge].kind)


def number_or_nan(x):
    """A float; None (a number that this data lacks) becomes nan."""
    return math.nan if x is None else float(x)


def number(x):
    """Three significant digits without an exponent where that is readable; nothing for nan and None."""
    if x is None or pd.isna(x):
        return ""
    return f"{x:.0f}" if abs(x) >= 100 or x == 0 else f"{x:.3g}"


def seeds(study):
    """The training seeds of the study's policies."""
    return sorted({policy.seed for policy in study.policies})


def response_of(values, replicate, seed, model, *place):
    """What a dictionary holds of a model's response by (replicate, training seed, model, …); nan where it has none.

    A model that is not trained anew with each seed, such as sft0, stands there with seed 0.
    """
    return values.get((replicate, seed, model, *place), values.get((replicate, 0, model, *place), math.nan))


def sft0_responses(study, replicate):
    """The rows of sft0's responses to the benchmarks."""
    return [row for row in study.landscape(replicate).responses if row["model"] == SFT0]


def training_win_rate(study, policy, baseline, judge, benchmarks):
    """The adjusted win rate of one policy over all prompts of some benchmarks; nan without verdicts."""
    scores = []
    for benchmark in benchmarks:
        by_training = study.training_scores(judge, benchmark, policy.name, baseline)
        scores += by_training.get((policy.replicate, policy.seed), {}).values()
    return statistics.adjusted_win_rate(scores)


def replicate_win_rates(study, candidate, baseline, judge, benchmarks):
    """replicate -> adjusted win rate of two models, by their names in verdicts, over all prompts of some benchmarks.

    It does not matter which of the two was judged as model_a.
    """
    scores = defaultdict(list)
    for benchmark in benchmarks:
        for replicate, by_prompt in study.scores(judge, benchmark, candidate, baseline).items():
            scores[replicate] += by_prompt.values()
    return {replicate: statistics.adjusted_win_rate(scores[replicate]) for replicate in sorted(scores)}


def names(study, pair):
    """The names in verdicts of the candidate's and the baseline's policies, the same in every replicate."""
    first = study.of(arm=pair.candidate, kl_coef=pair.candidate_kl_coef)[0]
    second = study.of(arm=pair.baseline, kl_coef=pair.baseline_kl_coef)[0]
    return first.name, second.name


def meeting(study, pair, judge, benchmark):
    """(name of the model that both met, in what way the two were judged), by one judge on one benchmark.

    ("", DIRECT) where they were judged against each other. Otherwise the model that both were judged against: the plain
    anchor where both met the same policy of it, else sft0. ("", "") where neither.
    """
    if study.scores(judge, benchmark, *names(study, pair)):
        return "", DIRECT
    first = study.of(arm=pair.candidate, kl_coef=pair.candidate_kl_coef)[0]
    second = study.of(arm=pair.baseline, kl_coef=pair.baseline_kl_coef)[0]
    for baseline in (study.plain_of(pair.candidate), SFT0):
        opponent = first.baselines.get(baseline)
        if opponent is not None and opponent == second.baselines.get(baseline):
            ours, theirs = (study.scores(judge, benchmark, policy.name, opponent) for policy in (first, second))
            if ours.keys() & theirs.keys():
                return opponent, f"win rates against {baseline} compared"
    return "", ""


def preference(study, pair, judge, benchmark):
    """(replicate -> how much the candidate is preferred, how that was judged), by one judge on one benchmark.

    Where the two were judged against each other: the win rate minus ½. Otherwise the difference of their win rates
    against the model that both met (`meeting`). Empty where there is none.
    """
    opponent, how = meeting(study, pair, judge, benchmark)
    first, second = names(study, pair)
    if how == DIRECT:
        rates = replicate_win_rates(study, first, second, judge, [benchmark])
        return {replicate: rate - 0.5 for replicate, rate in rates.items()}, DIRECT
    if not how:
        return {}, ""
    ours, theirs = (replicate_win_rates(study, name, opponent, judge, [benchmark]) for name in (first, second))
    return by_replicate(ours, theirs), how


def over_seeds(policies, value):
    """replicate -> the mean over its training seeds of `value(policy)`, a number or None; without those that are None.

    Args:
        policies: of one arm and kl_coef.
    """
    values = defaultdict(list)
    for policy in policies:
        number = value(policy)
        if number is not None:
            values[policy.replicate].append(number)
    return {replicate: sum(numbers) / len(numbers) for replicate, numbers in values.items()}


def seed_means(frame, by, measures):
    """A frame with one row per replicate and values `by`, in the frame's order: means over training seeds.

    Columns: by, replicate, and each of `measures` as a number, over the seeds of which it is known.
    """
    keys = [*by, "replicate"]
    numbers = frame[keys].assign(**{name: frame[name].map(number_or_nan).astype(float) for name in measures})
    return numbers.groupby(keys, sort=False, dropna=False)[list(measures)].mean().reset_index()


def by_replicate(first, second):
    """replicate -> first - second, over the replicates that both have."""
    return {replicate: first[replicate] - second[replicate] for replicate in sorted(first.keys() & second.keys())}


def evaluated(study, arm, kl_coef, name):
    """replicate -> a number of evaluation.json, where it is known."""
    return over_seeds(study.of(arm=arm, kl_coef=kl_coef), lambda policy: policy.evaluation.get(name))


def benchmark_means(study, arm, kl_coef, name, benchmark):
    """replicate -> mean of `reward` or `gold` over a benchmark's responses, where every response has it."""

    def mean(policy):
        values = [row[name] for row in policy.responses if row["benchmark"] == benchmark]
        return float(np.mean(values)) if values and None not in values else None

    return over_seeds(study.of(arm=arm, kl_coef=kl_coef), mean)


def evaluation_rows(study, arm, kl_coef):
    """A row for each response of an arm's policies to an evaluation prompt; without a file of them, one a policy."""
    rows = []
    for policy in study.of(arm=arm, kl_coef=kl_coef):
        path = study.parents[f"respond/{policy.index}"] / "evaluation.jsonl"
        known = runs.read_jsonl(path) if path.exists() else [policy.evaluation | {"prompt_id": ""}]
        where = {"benchmark": "", "replicate": policy.replicate, "seed": policy.seed}
        rows += [where | {name: row.get(name) for name in ("prompt_id", "sample", "kl_to_sft0")} for row in known]
    return pd.DataFrame(rows).astype({"kl_to_sft0": float})


def gold_of(study):
    """The function (arm, kl_coef) -> {replicate: gold reward on the development prompts}."""
    return lambda arm, kl_coef: evaluated(study, arm, kl_coef, "gold_reward")


def rate_of(study, judge, benchmarks):
    """The function (arm, kl_coef) -> {replicate: win rate against sft0}, by one judge on some benchmarks."""

    def rates(arm, kl_coef):
        name = study.of(arm=arm, kl_coef=kl_coef)[0].name  # the same in every replicate
        return replicate_win_rates(study, name, SFT0, judge, benchmarks)

    return rates


def matched(study, candidate, baseline, values):
    """replicate -> candidate minus baseline at equal KL to sft0, where their ranges of KL overlap.

    Args:
        values: function of (arm, kl_coef) -> {replicate: value}.

    A curve goes through an arm's trained policies, one point per kl_coef, and takes at least two of them. sft0 itself,
    at KL 0, is no point of it: nobody measured a straight line from there to the first policy.
    """
    first, second = _curves(study, candidate, values), _curves(study, baseline, values)
    differences = {k: statistics.matched_difference(first[k], second[k]) for k in sorted(first.keys() & second.keys())}
    return {replicate: difference for replicate, difference in differences.items() if not math.isnan(difference)}


def _curves(study, arm, values):
    """replicate -> its points (KL to sft0, value), one per kl_coef, where it has at least two."""
    points = defaultdict(list)
    for kl_coef in grid(study, arm):
        by_replicate = values(arm, kl_coef)
        for replicate, kl in evaluated(study, arm, kl_coef, "kl_to_sft0").items():
            if replicate in by_replicate:
                points[replicate].append((kl, by_replicate[replicate]))
    return {replicate: curve for replicate, curve in points.items() if len(curve) > 1}


@dataclass(frozen=True)
class Steadiness:
    """How a policy's responses compare with sft0's, and how much gold it lost; nan where that is unknown."""

    eos_rate: float  # share of development responses that end, by sft0's
    response_length: float  # their mean length, by sft0's
    gold_loss: float  # gold of the last kept rollouts below their peak

    def known(self):
        return not all(math.isnan(number) for number in (self.eos_rate, self.response_length, self.gold_loss))

    def holds(self, stability):
        """Is it stable by `config.Stability`? What is unknown speaks neither for nor against."""
        return not (
            self.eos_rate < stability.lowest_end_rate
            or self.response_length < stability.shortest_length
            or self.gold_loss > stability.largest_gold_loss
        )


def steadiness(study, policy):
    """`Steadiness` of a policy; sft0's responses are those of its replicate's landscape, on the same prompts."""
    start = sft0_measures(study, policy.replicate) or {}
    gold = list(policy.gold.values())  # by iteration

    def relative(name):
        base = start.get(name, math.nan)
        return number_or_nan(policy.evaluation.get(name)) / base if base else math.nan

    return Steadiness(relative("eos_rate"), relative("response_length"), max(gold) - gold[-1] if gold else math.nan)


def sft0_measures(study, replicate):
    """What was measured of sft0 on the development prompts, as a dictionary; None where it was not."""
    return next((row for row in study.landscape(replicate).line if row["alpha"] == 0), None)


def stable(study, policy):
    """Is a policy stable, by `Steadiness.holds` and without having collapsed? None where nothing is known of it."""
    if collapse(study, policy):
        return False
    measures = steadiness(study, policy)
    return measures.holds(study.config.stability) if measures.known() else None


MUST_BE_FINITE = {  # key of evaluation.json -> words
    "reward": "proxy reward",
    "gold_reward": "gold reward",
    "kl_to_sft0": "KL to sft0",
    "kl_to_reference": "KL to the own reference",
    "response_length": "mean response length",
    "eos_rate": "share of responses that end",
}


def collapse(study, policy):
    """Why a policy counts as collapsed by `config.Stability`, in words with its numbers; "" where it does not.

    It hardly ends its responses, or hardly writes any, by what sft0 does on the same prompts (or, where sft0 was not
    measured, by what the policy did before its first update); it says what sft0 would not, at so many nats per token;
    or a number of it is not finite. Losing gold while all this holds is over-optimisation, and no collapse.
    """
    limits, end = study.config.stability, policy.evaluation
    for name, words in MUST_BE_FINITE.items():
        if end.get(name) is not None and not math.isfinite(end[name]):
            return f"its {words} is no finite number"
    sft0, reasons = sft0_measures(study, policy.replicate), []
    start = sft0 or (policy.metrics[0] if policy.metrics else {})
    whose = "sft0's" if sft0 else "before training"
    base, share = (number_or_nan(measures.get("eos_rate")) for measures in (start, end))
    if share < limits.collapsed_end_rate * base:
        reasons.append(f"a share of {number(share)} of its responses end by themselves ({number(base)} {whose})")
    base, length = (number_or_nan(measures.get("response_length")) for measures in (start, end))
    if length < limits.collapsed_length * base:
        reasons.append(f"its responses have {number(length)} tokens ({number(base)} {whose})")
    kl = number_or_nan(end.get("kl_to_sft0"))
    if length > 0 and kl / length > limits.collapsed_kl:
        reasons.append(f"its KL to sft0 is {number(kl)} nats a response, {number(kl / length)} a token")
    return ", ".join(reasons)


def collapses(study, arm, kl_coef=None, replicate=None, seed=None):
    """(number of collapsed policies, number of all) of an arm, of one kl_coef, replicate and training seed or all."""
    wanted = {"kl_coef": kl_coef, "replicate": replicate, "seed": seed}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    policies = study.of(arm=arm, **wanted)
    return sum(bool(collapse(study, policy)) for policy in policies), len(policies)


def collapsed(study, arm, kl_coef=None, replicate=None, seed=None):
    """The mark after an arm's name: " (collapsed)", " (1 of 3 collapsed)", or nothing."""
    count, total = collapses(study, arm, kl_coef, replicate, seed)
    return "" if not count else " (collapsed)" if count == total else f" ({count} of {total} collapsed)"
