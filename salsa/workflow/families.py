"""Which claims a study plans to test, by its configuration alone: the family whose verdicts hold at once.

Each of the m claims that a study plans has an interval at the level 1 − 0.05/m (`salsa.evaluate.decisions`). m must not
depend on data: a study that counted the claims it could test would be stricter or laxer by what it happened to see, and
intervals of earlier looks would change with it. So a claim counts where its arms, a common kl_coef and replicate, its
benchmarks, a judge and gold are planned, though it may turn out later that its judge can't measure.
"""

from dataclasses import replace

from salsa import data
from salsa.workflow import policies
from salsa.workflow.config import PLAIN

JUDGED = ("win_rate", "matched_win_rate")
ON_BENCHMARKS = ("reward", "gold_reward", *JUDGED)
OF_GOLD = ("gold_reward", "matched_gold")


def planned(composed):
    """The names of the claims that a study (`policies.Composed`) plans to test, in the configuration's order."""
    return [name for name, claim in composed.config.claims.items() if _is_planned(composed, claim)]


def resolved(study, claim):
    """The claim as a study (`config.Config`) tests it: by win rates where it is of gold, and the data has none."""
    if claim.measure == "gold_reward" and claim.win_rate_without_gold is not None and not has_gold(study):
        return replace(claim, measure="win_rate", smallest_effect=claim.win_rate_without_gold)
    return claim


def has_gold(study):
    """Whether the world that a study's data come from has a gold judge."""
    return data.world_kinds()[study.data.task.kind].gold is not None


def _is_planned(composed, claim):
    claim = resolved(composed.config, claim)
    return _has_arms(composed, claim) and _has_measure(composed.config, claim)


def _has_arms(composed, claim):
    """Whether both arms are planned, are two, and have a kl_coef and a replicate in common."""
    specs = [_spec_of(composed, name) for name in (claim.candidate, claim.baseline)]
    if None in specs or specs[0] == specs[1]:
        return False
    every = policies.policies(composed)
    first, second = ([policy for policy in every if policy.spec == spec] for spec in specs)
    if not set(first[0].replicates) & set(second[0].replicates):
        return False
    if claim.measure.startswith("matched") and min(len(first), len(second)) < 2:
        return False
    grids = [{policy.kl_coef for policy in side} for side in (first, second) if side[0].spec.penalised]
    shared = set.intersection(*grids) if grids else {policy.kl_coef for policy in first + second}
    return bool(shared)


def _spec_of(composed, name):
    """What an arm that a claim names is trained as; None: the study has no such arm. `ppo` is the plain anchor."""
    if name in composed.arms:
        return policies.spec_of(composed.arms[name], composed.config)
    plain = [policy.spec for policy in policies.policies(composed) if policy.plain and policy.spec.penalised]
    return plain[0] if name == PLAIN and plain else None


def _has_measure(study, claim):
    """Whether benchmarks, a judge and gold are planned, as far as the claim needs them."""
    if claim.measure in OF_GOLD and not has_gold(study):
        return False
    if claim.measure in JUDGED and not study.judges:
        return False
    if claim.measure not in ON_BENCHMARKS:
        return True
    kinds = data.benchmark_kinds()
    named = claim.benchmarks or [name for name, each in study.benchmarks.items() if kinds[each.kind].compared]
    return bool(named) and set(named) <= study.benchmarks.keys()
