"""At which kl_coef an arm is compared, and the values by replicate that every comparison stands on.

Two arms are compared each at the kl_coef that does best on the development prompts (`evaluation.json`), chosen from
the kl_coefs that both were run at, so that neither has more tries than the other. What is compared there was measured
elsewhere, on the benchmarks; only KL, which nothing was chosen for, is that of the development prompts. Nothing is
tested or worded here: `tables` and `claims` do that.
"""

import math
from dataclasses import dataclass

import numpy as np

from salsa import plan
from salsa.evaluate import statistics

PPO = "ppo"  # the role; the arm that plays it is `study.plain`
SFT0 = "sft0"
JUDGE_KINDS = ("gold", "openai", "reward_model", "vader")  # the first that a study has is the one of its claims
DIRECT = "judged against each other"
DEVELOPMENT = ("gold_reward", "reward")  # what a kl_coef is chosen by: the first that the data has


@dataclass(frozen=True)
class Pair:
    """Two arms, each at its chosen kl_coef."""

    candidate: str
    baseline: str
    grid: tuple[float, ...]  # the kl_coefs that both were run at, in the study's order
    candidate_kl_coef: float
    baseline_kl_coef: float


def arm_of(study, name):
    """The arm that stands for a name: an arm that is another is shown under its name, `ppo` is plain PPO. Or None."""
    if name in study.arms:
        return name
    if name == PPO:
        return study.plain
    same = next((names for names, _ in plan.ways(study.config).values() if name in names), ())
    return next((arm for arm in study.arms if arm in same), None)


def grid(study, arm):
    """The kl_coefs at which an arm was run, in the study's order."""
    own = {policy.kl_coef for policy in study.of(arm=arm)}
    return tuple(kl_coef for kl_coef in study.kl_coefs if kl_coef in own)


def measured_by(study):
    """What kl_coefs are chosen by: gold_reward where every policy has it, else reward."""
    return next(name for name in DEVELOPMENT if all(p.evaluation.get(name) is not None for p in study.policies))


def development(study, arm, kl_coef):
    """The mean over replicates of what kl_coefs are chosen by, on the development prompts."""
    name = measured_by(study)
    return float(np.mean([policy.evaluation[name] for policy in study.of(arm=arm, kl_coef=kl_coef)]))


def choose(study, arm, kl_coefs):
    """The kl_coef of these at which an arm does best on the development prompts; of equals, the largest."""
    return max(kl_coefs, key=lambda kl_coef: (development(study, arm, kl_coef), kl_coef))


def pair(study, candidate, baseline):
    """`Pair` of two arms, or None where no kl_coef is common to both."""
    others = grid(study, baseline)
    shared = tuple(kl_coef for kl_coef in grid(study, candidate) if kl_coef in others)
    if not shared:
        return None
    return Pair(candidate, baseline, shared, choose(study, candidate, shared), choose(study, baseline, shared))


def main_judge(study):
    """The judge whose verdicts claims are read from: of the kinds that were asked, the first of JUDGE_KINDS. Or None.

    Of several judges of one kind, the first by name.
    """
    asked = sorted({key[0] for key in study.verdicts})
    kinds = {judge: study.config["judges"][judge]["kind"] for judge in asked}
    return min(asked, key=lambda judge: JUDGE_KINDS.index(kinds[judge]), default=None)


def name_of(study, arm, kl_coef):
    """The name of an arm's policies in verdicts, the same in every replicate."""
    return study.of(arm=arm, kl_coef=kl_coef)[0].name


def replicate_win_rates(study, candidate, baseline, judge, benchmarks):
    """replicate -> adjusted win rate of two models, by their names in verdicts, over all prompts of some benchmarks.

    It does not matter which of the two was judged as model_a.
    """
    scores = {}
    for benchmark in benchmarks:
        for replicate, by_prompt in study.scores(judge, benchmark, candidate, baseline).items():
            scores.setdefault(replicate, []).extend(by_prompt.values())
    return {replicate: statistics.adjusted_win_rate(found) for replicate, found in sorted(scores.items())}


def preference(study, chosen, judge, benchmark):
    """(replicate -> how much the candidate is preferred, how that was judged), by one judge on one benchmark.

    Where the two were judged against each other: the win rate minus ½. Otherwise the difference of their win rates
    against a model that both were judged against: plain PPO where both met the same policy of it, else sft0. Empty
    where neither.
    """
    first = study.of(arm=chosen.candidate, kl_coef=chosen.candidate_kl_coef)[0]
    second = study.of(arm=chosen.baseline, kl_coef=chosen.baseline_kl_coef)[0]
    rates = replicate_win_rates(study, first.name, second.name, judge, [benchmark])
    if rates:
        return {replicate: rate - 0.5 for replicate, rate in rates.items()}, DIRECT
    for role in (PPO, SFT0):
        opponent = first.baselines.get(role)
        if opponent is not None and opponent == second.baselines.get(role):
            ours = replicate_win_rates(study, first.name, opponent, judge, [benchmark])
            theirs = replicate_win_rates(study, second.name, opponent, judge, [benchmark])
            if ours.keys() & theirs.keys():
                return by_replicate(ours, theirs), f"win rates against {role} compared"
    return {}, ""


def by_replicate(first, second):
    """replicate -> first - second, over the replicates that both have."""
    return {replicate: first[replicate] - second[replicate] for replicate in sorted(first.keys() & second.keys())}


def evaluated(study, arm, kl_coef, name):
    """replicate -> a number of evaluation.json, where it is known."""
    found = {policy.replicate: policy.evaluation.get(name) for policy in study.of(arm=arm, kl_coef=kl_coef)}
    return {replicate: value for replicate, value in found.items() if value is not None}


def benchmark_means(study, arm, kl_coef, name, benchmark):
    """replicate -> mean of `reward` or `gold` over a benchmark's responses, where every response has it."""
    found = {}
    for policy in study.of(arm=arm, kl_coef=kl_coef):
        values = [row[name] for row in policy.responses if row["benchmark"] == benchmark]
        if values and None not in values:
            found[policy.replicate] = float(np.mean(values))
    return found


def gold_of(study):
    """The function (arm, kl_coef) -> {replicate: gold reward on the development prompts}."""
    return lambda arm, kl_coef: evaluated(study, arm, kl_coef, "gold_reward")


def rate_of(study, judge, benchmarks):
    """The function (arm, kl_coef) -> {replicate: win rate against sft0}, by one judge on some benchmarks."""
    return lambda arm, kl_coef: replicate_win_rates(study, name_of(study, arm, kl_coef), SFT0, judge, benchmarks)


def matched(study, candidate, baseline, values):
    """replicate -> candidate minus baseline at equal KL to sft0, where their ranges of KL overlap.

    Args:
        values: function of (arm, kl_coef) -> {replicate: value}.

    A curve goes through an arm's trained policies, one point a kl_coef, and takes two of them at least. sft0 itself, at
    KL 0, is no point of it: a straight line from there to the first policy was measured by nobody.
    """
    curves = []
    for arm in (candidate, baseline):
        points = {}
        for kl_coef in grid(study, arm):
            found = values(arm, kl_coef)
            for replicate, kl in evaluated(study, arm, kl_coef, "kl_to_sft0").items():
                if replicate in found:
                    points.setdefault(replicate, []).append((kl, found[replicate]))
        curves.append({replicate: listed for replicate, listed in points.items() if len(listed) > 1})
    first, second = curves
    found = {k: statistics.matched_difference(first[k], second[k]) for k in sorted(first.keys() & second.keys())}
    return {replicate: difference for replicate, difference in found.items() if not math.isnan(difference)}


@dataclass(frozen=True)
class Steadiness:
    """How a policy's responses stand to sft0's, and what gold lost; nan where it is unknown."""

    eos_rate: float  # share of development responses that end, by sft0's
    response_length: float  # their mean length, by sft0's
    gold_loss: float  # gold of the last kept rollouts below their peak

    def known(self):
        return not all(math.isnan(number) for number in (self.eos_rate, self.response_length, self.gold_loss))

    def holds(self, stability):
        """Is it stable by `config.Stability` (a dictionary)? What is unknown speaks neither for nor against."""
        return not (
            self.eos_rate < stability["lowest_end_rate"]
            or self.response_length < stability["shortest_length"]
            or self.gold_loss > stability["largest_gold_loss"]
        )


def steadiness(study, policy):
    """`Steadiness` of a policy; sft0's responses are those of its replicate's landscape, on the same prompts."""
    line = next((row for row in study.landscape(policy.replicate).line if row["alpha"] == 0), {})
    gold = list(policy.gold.values())  # by iteration

    def relative(name):
        base = line.get(name, math.nan)
        return policy.evaluation[name] / base if base else math.nan

    return Steadiness(relative("eos_rate"), relative("response_length"), max(gold) - gold[-1] if gold else math.nan)
