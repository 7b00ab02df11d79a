"""What a study says of each claim that its configuration makes, and no more.

A claim (`config.Claim`) is a hypothesis fixed before the run: candidate minus baseline is above 0, and by how much it
would matter. Its primary outcome (`outcomes`), paired by replicate (the same SFT models, reward model and training
seeds), is decided by `decisions.decide`, whose words are the only verdicts there are.

**Families.** The claims of one origin that a study tests are one family: each has an interval at the level of
`decisions.family_level`, so that all verdicts of the family are right at once with 95 %. The claims of all algorithms
belong to it. Secondary outcomes have intervals at that level too, and no verdict.

Nothing is read from a judge that can't measure (`judging`): its verdicts pull every win rate towards ½. One that
measures in part shows a part of an effect, and so excludes one only by an interval below that part of the smallest
effect. A study with looks decides by what the intervals of all looks until then have in common.
"""

import math
from dataclasses import dataclass, replace

import pandas as pd

from salsa.evaluate import decisions, power, sequential
from salsa.report import outcomes, selection
from salsa.report.frames import BOUNDS
from salsa.report.outcomes import PRIMARY, NotTested
from salsa.workflow import config

ORIGINS = {
    "positive_control": "Whether the study can see a better reference",
    "abstract": "What the paper's abstract claims",
    "control": "What would tell an explanation from a coincidence",
}
COLUMNS = ["claim", "origin", "claim_verdict", "text", "outcome", "measure", "benchmark", "judge", "candidate",
           "baseline", "candidate_kl_coef", "baseline_kl_coef", "how", "effect", "effect_low", "effect_high", "level",
           "smallest_effect", "smallest_effect_shown", "critical", "deviation", "sampling_deviation", "floored", "p",
           "replicates", "needed_80", "needed_80_low", "needed_80_high", "needed_90", "needed_90_low", "needed_90_high",
           "equivalent", "verdict", "why"]  # fmt: skip
POWERS = {"needed_80": 0.8, "needed_90": 0.9}  # column -> probability of a verdict at δ, and at 0


@dataclass(frozen=True)
class Test:
    """A claim that the study tests.

    Attributes:
        claim: as `outcomes.resolved` makes it.
        outcomes: of `outcomes.measured`, the primary one first.
        look: the `sequential.Look` that its arms have reached; None where the number of replicates was fixed.
    """

    claim: config.Claim
    pair: selection.Pair
    outcomes: list[outcomes.Outcome]
    look: sequential.Look | None


def frame(study):
    """One row per claim × outcome, the primary one first; a claim that is not tested has one row, which says why.

    `claim_verdict` is the claim's, the same in each of its rows; `verdict` is that of the primary outcome, and empty in
    the rows of others. `p` is two-sided, and decides nothing. `needed_80` is how many replicates a power of 80 % takes,
    to support an effect of the smallest size, and to exclude one where there is none (`power.needed`); its bounds are
    those of the deviation. It is infinite where the study's last look has less.
    """
    levels = family_levels(study)
    rows = [row for name, claim in ordered(study.config.claims).items() for row in _rows(study, name, claim, levels)]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"replicates": "Int64"})


def ordered(claims):
    """The claims by origin (the positive control comes first), then by measure, then by name, as a plan sorts them."""
    origins = list(ORIGINS)
    return dict(sorted(claims.items(), key=lambda c: (origins.index(c[1].origin), config.MEASURES.index(c[1].measure))))


def tests(study):
    """Claim's name -> its `Test`, or the `NotTested` that says why there is none; found once and kept."""
    if not study.known_tests:
        study.known_tests |= {name: _test(study, claim) for name, claim in study.config.claims.items()}
    return study.known_tests


def _test(study, claim):
    claim = outcomes.resolved(study, claim)
    try:
        pair = outcomes.compared(study, claim)
        look = reached(study, pair)
        measured = [_until(study, look, outcome) for outcome in outcomes.measured(study, claim, pair)]
    except NotTested as reason:
        return reason
    if not measured[0].values["effect"].map(math.isfinite).any():
        return NotTested("no replicate has a finite number to compare")
    return Test(claim, pair, measured, look)


def reached(study, pair):
    """The latest `sequential.Look` that a pair's replicates have reached, None where the study has no looks.

    An arm that is run on the first replicates alone has its last look there.
    """
    looks = study.config.looks
    if not looks:
        return None
    limits = [_most_replicates(study, arm) for arm in (pair.candidate, pair.baseline)]
    most = min([looks[-1], *(limit for limit in limits if limit is not None)])
    looks = tuple(dict.fromkeys(min(look, most) for look in looks))
    return sequential.latest(looks, len(study.replicates)) or sequential.Look(looks, 0)


def _most_replicates(study, arm):
    """On how many replicates an arm is run, None: on all, which the study's own looks end with."""
    limit = getattr(study.composed.arms[arm], "replicates", None)
    return len(limit) if isinstance(limit, list) else limit


def _until(study, look, outcome):
    """An outcome over the replicates that belong to a look; later ones are looked at with those of the next."""
    if look is None:
        return outcome
    present = [k for k in study.config.replicates if k in study.replicates]
    counted = [k for k in present[: look.replicates] if k in outcome.values.index]
    return replace(outcome, values=outcome.values.loc[counted])


def family_levels(study):
    """Origin -> level of the intervals of its claims, by how many of them the study tests; none tested: left out."""
    tested = [test.claim.origin for test in tests(study).values() if isinstance(test, Test)]
    return {origin: decisions.family_level(tested.count(origin)) for origin in ORIGINS if origin in tested}


def _rows(study, name, claim, levels):
    test = tests(study)[name]
    if isinstance(test, NotTested):
        row = {"claim": name, "outcome": PRIMARY, "benchmark": "", "judge": "", "why": str(test)}
        row |= {key: getattr(claim, key) for key in ("origin", "text", "measure", "smallest_effect")}
        row |= {"candidate": claim.candidate, "baseline": claim.baseline}
        return [row | dict.fromkeys(("claim_verdict", "verdict"), decisions.NOT_TESTED)]
    level = levels[claim.origin]
    first = decision(test, test.outcomes[0], level)
    row = {"claim": name, "claim_verdict": first.verdict, "origin": claim.origin, "text": claim.text}
    row |= {"candidate": test.pair.candidate, "baseline": test.pair.baseline}
    if not test.claim.measure.startswith("matched"):  # which is over all of an arm's kl_coefs
        row |= {f"{side}_kl_coef": getattr(test.pair, f"{side}_kl_coef") for side in ("candidate", "baseline")}
    notes = _notes(study, test, first)
    rows = [row | _columns(test, outcome, decision(test, outcome, level)) for outcome in test.outcomes]
    rows[0] |= {"verdict": first.verdict, "why": "; ".join(notes)} | needed(test, first)
    return rows


def needed(test, found):
    """How many replicates the powers take, as columns; none where the deviation is not known."""
    primary, columns = test.outcomes[0], {}
    if found.replicates < 2 or not found.deviation > 0:
        return columns
    looks = test.look.looks if test.look else None
    for name, wanted in POWERS.items():
        smallest = test.claim.smallest_effect * primary.seen
        numbers = power.needed(
            found.deviation, found.replicates - 1, smallest, found.level, wanted, looks, floor(primary)
        )
        columns |= dict(zip((name, f"{name}_low", f"{name}_high"), map(float, numbers), strict=True))
    return columns


def decision(test, outcome, level):
    """The `decisions.Decision` of an outcome. Stability that is known in some replicates alone is undecided."""
    smallest = test.claim.smallest_effect * outcome.seen
    effects, sampling = outcome.values["effect"], floor(outcome)
    if test.look:
        result = decisions.decide_through_looks(effects, smallest, level, test.look, sampling)
    else:
        result = decisions.decide(effects, smallest, level, sampling_variance=sampling)
    if outcome.measure == "stable" and result.replicates < len(outcome.values):  # the others may have diverged
        return replace(result, verdict=decisions.UNDECIDED)
    return result


def floor(outcome):
    """The variance that no replicate's effect is taken to lie below; 0 where it is not known."""
    return outcome.sampling_variance if math.isfinite(outcome.sampling_variance) else 0.0


def _columns(test, outcome, found):
    columns = {"outcome": outcome.kind, "measure": outcome.measure, "benchmark": outcome.benchmark}
    columns |= {"judge": outcome.judge, "how": outcome.how, "sampling_deviation": math.sqrt(outcome.sampling_variance)}
    columns |= {name: getattr(found, name) for name in ("level", "critical", "deviation", "floored", "p")}
    columns |= {"replicates": found.replicates, "equivalent": found.equivalent, "verdict": "", "why": ""}
    columns |= {f"effect{bound}": getattr(found, bound[1:] or "mean") for bound in BOUNDS}
    if outcome.measure == test.claim.measure:  # a win rate beside gold scores has another unit
        smallest = test.claim.smallest_effect
        columns |= {"smallest_effect": smallest, "smallest_effect_shown": smallest * outcome.seen}
    return columns


def _notes(study, test, found):
    """What a reader of a claim's verdict has to know beside its numbers."""
    notes = ["one replicate: conditional on one SFT pair"] if len(study.replicates) == 1 else []
    notes += _collapsed(study, test) + _bounded(study, test)
    lost = len(test.outcomes[0].values) - found.replicates
    if lost:
        notes.append(f"{lost} of {len(test.outcomes[0].values)} replicates have no finite number")
    if found.replicates > 1 and math.isnan(found.low):
        notes.append(f"the {found.replicates} replicates are equal, so that there is no interval")
    if found.floored:
        notes.append("the replicates differ by less than sampling alone makes them, which is taken instead")
    return notes


def _collapsed(study, test):
    """Notes on which of the policies that a claim compares have collapsed, and how."""
    matched, notes = test.claim.measure.startswith("matched"), []
    for arm, kl_coef in outcomes.sides(test.pair):
        policies = [p for p in study.of(arm=arm) if matched or p.kl_coef == kl_coef]
        reasons = [reason for reason in (selection.collapse(study, p) for p in policies) if reason]
        if reasons:
            notes.append(
                f"{arm} has collapsed in {len(reasons)} of its {len(policies)} policies compared here: {reasons[0]}"
            )
    return notes


def _bounded(study, test):
    """Notes on the arms of a claim about KL whose KL is an upper bound."""
    about_kl = test.claim.measure == "kl_to_sft0" or test.claim.measure.startswith("matched")
    arms = [arm for arm in (test.pair.candidate, test.pair.baseline) if about_kl and selection.kl_bounded(study, arm)]
    return [f"KL of {arm} is an upper bound" for arm in arms]


def tested_rows(frame):
    """The rows of claims that are tested."""
    return frame[frame["claim_verdict"] != decisions.NOT_TESTED]


def primary_rows(frame):
    """The rows that decide, one a claim."""
    return frame[frame["outcome"] == PRIMARY]


def replicates(study):
    """One row per claim × outcome × replicate: what every verdict is decided on, as a table (tables/replicates.csv)."""
    parts = [pd.DataFrame(columns=REPLICATE_COLUMNS)]
    for name in ordered(study.config.claims):
        test = tests(study)[name]
        if isinstance(test, Test):
            parts += [_replicate_rows(name, test, outcome) for outcome in test.outcomes]
    return pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)


def _replicate_rows(name, test, outcome):
    pair = test.pair
    columns = {"claim": name, "outcome": outcome.kind, "measure": outcome.measure, "benchmark": outcome.benchmark}
    columns |= {"judge": outcome.judge, "candidate": pair.candidate, "baseline": pair.baseline}
    if not test.claim.measure.startswith("matched"):
        columns |= {"candidate_kl_coef": pair.candidate_kl_coef, "baseline_kl_coef": pair.baseline_kl_coef}
    values = outcome.values.rename_axis("replicate").reset_index()
    rows = values.assign(**columns, sampling_variance=outcome.sampling_variance)
    return rows.reindex(columns=REPLICATE_COLUMNS)


REPLICATE_COLUMNS = ["claim", "outcome", "measure", "benchmark", "judge", "replicate", "candidate", "baseline",
                     "candidate_kl_coef", "baseline_kl_coef", *outcomes.VALUES, "sampling_variance"]  # fmt: skip
