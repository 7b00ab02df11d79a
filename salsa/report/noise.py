"""A study's outcomes value by value, as `salsa.evaluate.variance` takes them, and what the study's runs cost.

An outcome is a measure of one arm, or the difference of two arms: gold and proxy reward on the benchmarks, the win rate
where a judge was asked, KL to sft0 on the evaluation prompts, and means over the flat part of training. The arms are
those that the claims compare, each at the kl_coef of the claims. Of a measure on benchmarks there is an outcome for
each, and one for their mean. Nothing is estimated here.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from salsa.evaluate import statistics
from salsa.evaluate.variance import Cost
from salsa.report import provenance, selection
from salsa.report.outcomes import FLAT, NotTested, compared, sides
from salsa.workflow import runs, stages

DIFFERENCE = "difference"
MEAN = "mean of all"  # the benchmark of an outcome that is the mean over all benchmarks that judges compare
SCORES = {"gold_reward": "gold", "reward": "reward"}  # measure -> column of frames.responses
PROMPT = ["benchmark", "prompt_id"]
CELL = ["replicate", "seed", "sample"]  # what a value is of, beside its prompt
ONCE = ("corpus", "prepare", "benchmark", "base")  # stages of which more replicates need no more runs


@dataclass(frozen=True)
class Outcome:
    """One outcome, value by value.

    Attributes:
        of: DIFFERENCE, or the arm that was measured.
        measure: as claims call it.
        benchmark: its name, MEAN, or "" for what is on no benchmark.
        tables: an array (replicates, seeds, prompts, responses) for each benchmark.
        left_out: prompts left out, because a policy has no number on them.
    """

    of: str
    measure: str
    benchmark: str
    tables: list
    left_out: int


def pairs(study):
    """The pairs of arms (`selection.Pair`) that the claims compare, each once; those of the abstract's claims first."""
    claims = sorted(study.config.claims.values(), key=lambda claim: claim.origin != "abstract")
    by_arms = {}
    for claim in claims:
        try:
            pair = compared(study, claim)
        except NotTested:
            continue
        by_arms.setdefault((pair.candidate, pair.baseline), pair)
    return list(by_arms.values())


def outcomes(study, pair, alone=False):
    """Yield the outcomes of the difference of a pair's arms, then with `alone` those of either arm."""
    candidate, baseline = (measures(study, *side) for side in sides(pair))
    differences = {name: _difference(candidate[name], baseline[name]) for name in candidate if name in baseline}
    names = [study.of(arm=arm, kl_coef=kl_coef)[0].name for arm, kl_coef in sides(pair)]
    direct = win_rates(study, *names)
    if not direct.empty:
        differences["win_rate"] = direct
    subjects = {DIFFERENCE: differences} | ({pair.candidate: candidate, pair.baseline: baseline} if alone else {})
    for of, by_measure in subjects.items():
        for measure, values in by_measure.items():
            yield from _outcomes(of, measure, values)


def _difference(first, second):
    """The difference of two arms' values; an arm with a single training seed stands beside each seed of the other."""
    seeds = [values.columns.unique("seed") for values in (first, second)]
    if len(seeds[0]) != len(seeds[1]) == 1:
        second = _at_seeds(second, seeds[0])
    elif len(seeds[1]) != len(seeds[0]) == 1:
        first = _at_seeds(first, seeds[1])
    return first - second


def _at_seeds(values, seeds):
    """The values of a single training seed, as those of each of these seeds."""
    alike = {seed: values.droplevel("seed", axis=1) for seed in seeds}
    return pd.concat(alike, axis=1, names=["seed"]).reorder_levels(CELL, axis=1)


def measures(study, arm, kl_coef):
    """measure -> values of one arm: a row for each prompt (PROMPT), a column for each of CELL; measured ones alone."""
    responses, policies = (frame[_at(frame, arm, kl_coef)] for frame in (study.frames.responses, study.frames.policies))
    responses = responses[responses["benchmark"].isin(study.compared)]
    name = study.of(arm=arm, kl_coef=kl_coef)[0].name
    values = {measure: _wide(responses, column) for measure, column in SCORES.items()}
    values["win_rate"] = win_rates(study, name, selection.SFT0)
    values["kl_to_sft0"] = _wide(selection.evaluation_rows(study, arm, kl_coef), "kl_to_sft0")
    for measure, column in FLAT.items():
        values[measure] = _wide(policies.assign(benchmark="", prompt_id=""), column)
    return {measure: wide for measure, wide in values.items() if not wide.empty}


def _at(frame, arm, kl_coef):
    return (frame["arm"] == arm) & (frame["kl_coef"] == kl_coef)


def _wide(long, column):
    """The values of a column: rows PROMPT, columns CELL. Several values of one cell (orders, turns) are averaged."""
    if column not in long or long[column].isna().all():
        return pd.DataFrame()
    for name in CELL:  # what was made once has no number
        long = long.assign(**{name: long[name].fillna(0).astype(int) if name in long else 0})
    return long.pivot_table(index=PROMPT, columns=CELL, values=column, aggfunc="mean")


def win_rates(study, candidate, baseline):
    """The candidate's score minus ½ by the main judge, as `_wide`; names of models are those in verdicts.

    An error has no score.
    """
    main = selection.main_judge(study)
    lines = [line for (judge, *_), part in study.verdicts.items() if judge == main for line in part]
    comparisons = statistics.comparisons(lines, candidate, baseline)
    rows = [(*place, value) for place, value in comparisons if value is not None and place[0] in study.compared]
    frame = pd.DataFrame(rows, columns=[*PROMPT, *CELL, "turn", "score"])
    return _wide(frame.assign(value=frame["score"].astype(float) - 0.5), "value")


def _outcomes(of, measure, values):
    """Yield the `Outcome` of each benchmark that values (as `_wide`) are on, and that of their mean."""
    by_benchmark = {name: values.loc[[name]] for name in values.index.unique("benchmark")}
    several = {MEAN: list(by_benchmark.values())} if len(by_benchmark) > 1 else {}
    for benchmark, parts in (several | {name: [part] for name, part in by_benchmark.items()}).items():
        tables, left_out = balanced(parts)
        if tables:
            yield Outcome(of, measure, benchmark, tables, left_out)


def balanced(parts):
    """(arrays (R, S, P, J), number of prompts left out): what every replicate, seed and sample has a number for.

    Args:
        parts: values of each benchmark, as `_wide`.

    A number is a finite one. A policy that has none on most prompts of a benchmark is left out, and with it its
    replicate, or its seed in all replicates; of what remains, a prompt without one of its numbers is. No array: nothing
    remains.
    """
    parts = [part.where(np.isfinite(part)) for part in parts]
    columns = [{cell for cell in part if part[cell].notna().mean() > 0.5} for part in parts]
    cells = set.intersection(*columns)
    by_replicate = {}
    for replicate, seed, sample in cells:
        by_replicate.setdefault(replicate, set()).add((seed, sample))
    if not by_replicate:
        return [], 0
    shared = set.intersection(*by_replicate.values())
    seeds, samples = (sorted({pair[place] for pair in shared}) for place in (0, 1))
    complete = pd.MultiIndex.from_product([sorted(by_replicate), seeds, samples])
    if not shared or not cells.issuperset(complete):
        return [], 0
    rows = [part[complete].dropna() for part in parts]
    left_out = sum(len(part) - len(kept) for part, kept in zip(parts, rows, strict=True))
    shape = len(by_replicate), len(seeds), len(samples)
    arrays = [kept.to_numpy().reshape(-1, *shape).transpose(1, 2, 0, 3) for kept in rows]
    return (arrays if all(len(kept) for kept in rows) else []), left_out


# What it costs.


def cost(study, pair):
    """(`variance.Cost` of a pair of arms at the kl_coef of claims, answers to benchmarks of a policy that it has paid).

    Counted are the runs that the two arms need and that more replicates need again: SFT, reward models, training,
    answers and verdicts. An evaluation prompt takes as long to answer as a benchmark's, so that a stage that answers
    both is divided by its number of answers. None where a run does not say how long it took, or nothing was answered.
    """
    policies = [policy for side in sides(pair) for policy in study.of(arm=side[0], kl_coef=side[1])]
    minutes = _minutes(study, policies)
    answers = len(policies[0].responses)
    if minutes is None or not answers:
        return None
    replicates = len({policy.replicate for policy in policies})
    trainings = len({(policy.replicate, policy.seed) for policy in policies})  # of both arms
    landscape = study.landscape(policies[0].replicate)
    evaluation = (policies[0].evaluation.get("prompts") or 0) * study.config.evaluate.samples
    after = answers / (answers + evaluation)  # the share of benchmarks in all answers
    before = len(landscape.responses) / max(1, len(landscape.responses) + evaluation * len(landscape.line))
    paid = Cost(
        replicate=(minutes["replicate"] + minutes["landscape"] * (1 - before)) / replicates,
        seed=(minutes["training"] + minutes["respond"] * (1 - after)) / trainings,
        before=minutes["landscape"] * before / (replicates * answers),
        response=(minutes["respond"] * after + minutes["judge"]) / (trainings * answers),
    )
    return paid, answers


def _minutes(study, policies):
    """Core-minutes by what was computed: replicate, landscape, training, respond, judge; None where one is unknown."""
    folders = {row["address"]: row["folder"] for row in study.runs}
    results, judge = study.parents["prepare"].parent.parent, selection.main_judge(study)
    roles = [role for p in policies for role in (f"respond/{p.index}", f"judge/{judge}/{p.index}")]
    roles += [f"landscape/r{replicate}" for replicate in {policy.replicate for policy in policies}]
    waiting, done, minutes = [study.parents[role] for role in roles if role in study.parents], set(), Counter()
    while waiting:
        folder = waiting.pop()
        manifest = runs.manifest_of(folder)
        if folder in done or manifest is None or manifest["stage"] in ONCE:
            continue
        done.add(folder)
        if manifest.get("wall_seconds") is None:
            return None
        minutes[_kind(manifest["stage"])] += manifest["wall_seconds"] * provenance.cores(manifest) / 60
        if manifest["stage"] != "judge":  # whose parents are answers of models that the pair may not need
            addresses = [parent["address"] for parent in manifest["parents"].values()]
            waiting += [results / folders[address] for address in addresses if address in folders]
    return minutes


def _kind(stage):
    if stages.ALL[stage].trains_policy:
        return "training"
    return stage if stage in ("landscape", "respond", "judge") else "replicate"
