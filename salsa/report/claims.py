"""What a study says of each claim that its configuration makes, and no more.

A claim (`config.Claim`) is a hypothesis fixed before the run: candidate minus baseline is above 0, and by how much it
would matter. Its primary outcome (`outcomes`), paired by replicate (the same SFT models, reward model and training
seeds), is decided by `decisions.decide`, whose words are the only verdicts there are.

**The family.** All claims that a study plans to test (`families.planned`), of whatever origin and algorithm, are one
family: each has an interval at the level of `decisions.family_level`, so that all verdicts of the study are right at
once with 95 %. Secondary outcomes have intervals at that level too, and no verdict.

**Stability** has no δ: an effect of 0 is the loss of a whole margin, and one near 0 of nearly all of it, so that
neither "too small to matter" nor "excluded" nor "equivalent" would mean what it says. It is supported, reversed or
undecided.

Nothing is read from a judge that can't measure (`judging`): its verdicts pull every win rate towards ½. One that
measures in part shows a part of an effect, and so excludes one only by an interval below that part of the smallest
effect. A study with looks decides by what the intervals of all looks until then have in common, each computed again
from the replicates that it had.
"""

import math
from dataclasses import dataclass

import pandas as pd

from salsa.evaluate import decisions, power, sequential
from salsa.report import outcomes, selection
from salsa.report.frames import BOUNDS
from salsa.report.outcomes import PRIMARY, NotTested
from salsa.workflow import config, families

ORIGINS = {
    "positive_control": "Whether the study can see a better reference",
    "abstract": "What the paper's abstract claims",
    "control": "What would tell an explanation from a coincidence",
}
COLUMNS = ["claim", "origin", "claim_verdict", "text", "outcome", "measure", "benchmark", "judge", "candidate",
           "baseline", "candidate_kl_coef", "baseline_kl_coef", "how", "effect", "effect_low", "effect_high", "level",
           "smallest_effect", "smallest_effect_shown", "critical", "deviation", "sampling_deviation", "floored", "p",
           "replicates", "lost", "contradictory", "needed_80", "needed_80_low", "needed_80_high", "needed_90",
           "needed_90_low", "needed_90_high", "equivalent", "verdict", "why"]  # fmt: skip
POWERS = {"needed_80": 0.8, "needed_90": 0.9}  # column -> probability of a verdict at δ, and at 0


@dataclass(frozen=True)
class Test:
    """A claim that the study tests.

    Attributes:
        claim: as `families.resolved` makes it.
        outcomes: of `outcomes.measured`, the primary one first, of the replicates that belong to the look.
        look: the `sequential.Look` that its arms have reached; None where the number of replicates was fixed.
        replicates: in which both arms are run, in the order in which looks take them.
    """

    claim: config.Claim
    pair: selection.Pair
    outcomes: list[outcomes.Outcome]
    look: sequential.Look | None
    replicates: tuple = ()


def frame(study):
    """One row per claim × outcome, the primary one first; a claim that is not tested has one row, which says why.

    `claim_verdict` is the claim's, the same in each of its rows; `verdict` is that of the primary outcome, and empty in
    the rows of others. `p` is two-sided, and decides nothing. `needed_80` is how many replicates a power of 80 % takes,
    to support an effect of the smallest size, and to exclude one where there is none (`power.needed`); its bounds are
    those of the deviation. It is infinite where the study's last look has less.
    """
    level = family_level(study)
    rows = [row for name, claim in ordered(study.config.claims).items() for row in _rows(study, name, claim, level)]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"replicates": "Int64", "lost": "Int64"})


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
    claim = families.resolved(study.config, claim)
    try:
        pair = outcomes.compared(study, claim)
        replicates = outcomes.replicates_of(study, pair)
        grid = study.config.grid_replicates if outcomes.at_all_kl_coefs(claim.measure) else None
        look = reached(study, pair, len(replicates[:grid]), grid)
        replicates = replicates[:grid]
        counted = replicates if look is None else replicates[: look.replicates]
        measured = [outcomes.of_replicates(each, counted) for each in outcomes.measured(study, claim, pair)]
    except NotTested as reason:
        return reason
    if not measured[0].values["effect"].map(math.isfinite).any():
        return NotTested("no replicate has a finite number to compare")
    return Test(claim, pair, measured, look, tuple(replicates))


def reached(study, pair, count, grid=None):
    """The latest `sequential.Look` that so many replicates of a pair have reached, None where the study has no looks.

    An arm that is run on the first replicates alone has its last look there, and so has what is compared on a `grid` of
    kl_coefs that the first replicates alone have.
    """
    looks = study.config.looks
    if not looks:
        return None
    limits = [grid] + [_most_replicates(study, arm) for arm in (pair.candidate, pair.baseline)]
    most = min([looks[-1], *(limit for limit in limits if limit is not None)])
    looks = tuple(dict.fromkeys(min(look, most) for look in looks))
    return sequential.latest(looks, count) or sequential.Look(looks, 0)


def _most_replicates(study, arm):
    """On how many replicates an arm is run, None: on all, which the study's own looks end with."""
    limit = getattr(study.composed.arms[arm], "replicates", None)
    return len(limit) if isinstance(limit, list) else limit


def family(study):
    """The names of the claims that the study plans to test, whose verdicts hold at once."""
    return families.planned(study.composed)


def family_level(study):
    """The level of the intervals of all claims."""
    return decisions.family_level(max(1, len(family(study))))


def _rows(study, name, claim, level):
    test = tests(study)[name]
    if isinstance(test, NotTested):
        row = {"claim": name, "outcome": PRIMARY, "benchmark": "", "judge": "", "why": str(test)}
        row |= {key: getattr(claim, key) for key in ("origin", "text", "measure", "smallest_effect")}
        row |= {"candidate": claim.candidate, "baseline": claim.baseline}
        return [row | dict.fromkeys(("claim_verdict", "verdict"), decisions.NOT_TESTED)]
    first = decision(test, test.outcomes[0], level)
    row = {"claim": name, "claim_verdict": first.verdict, "origin": claim.origin, "text": claim.text}
    row |= {"candidate": test.pair.candidate, "baseline": test.pair.baseline}
    if not outcomes.at_all_kl_coefs(test.claim.measure):  # which is over all of an arm's kl_coefs
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
    """The `decisions.Decision` of an outcome, by the looks until now."""
    return decisions.intersected([found for _, found in at_looks(test, outcome, level)], smallest_shown(test, outcome))


def at_looks(test, outcome, level):
    """(the outcome as it was, its `decisions.Decision`) of each look until now; of one where the study has no looks."""
    looks, parts, smallest = [None], [outcome], smallest_shown(test, outcome)
    if test.look is not None:
        looks = [sequential.Look(test.look.looks, place) for place in range(test.look.place + 1)]
        parts = [outcomes.of_replicates(outcome, test.replicates[: look.replicates]) for look in looks]
    return [
        (part, decisions.decide(part.values["effect"], smallest, level, look, floor(part)))
        for look, part in zip(looks, parts, strict=True)
    ]


def smallest_shown(test, outcome):
    """The smallest effect that would matter, as far as the outcome shows one; 0 for stability, which has none."""
    return 0.0 if test.claim.measure == "stable" else test.claim.smallest_effect * outcome.seen


def floor(outcome):
    """The variance that no replicate's effect is taken to lie below; 0 where it is not known."""
    return outcome.sampling_variance if math.isfinite(outcome.sampling_variance) else 0.0


def _columns(test, outcome, found):
    columns = {"outcome": outcome.kind, "measure": outcome.measure, "benchmark": outcome.benchmark}
    columns |= {"judge": outcome.judge, "how": outcome.how, "sampling_deviation": math.sqrt(outcome.sampling_variance)}
    columns |= {name: getattr(found, name) for name in ("level", "critical", "deviation", "floored", "p")}
    columns |= {name: getattr(found, name) for name in ("replicates", "lost", "contradictory")}
    columns |= {"verdict": "", "why": ""}
    columns |= {f"effect{bound}": getattr(found, bound[1:] or "mean") for bound in BOUNDS}
    if outcome.measure == test.claim.measure:  # a win rate beside gold scores has another unit
        columns |= {"smallest_effect": test.claim.smallest_effect, "equivalent": found.equivalent}
        columns |= {"smallest_effect_shown": smallest_shown(test, outcome)}
    return columns


def _notes(study, test, found):
    """What a reader of a claim's verdict has to know beside its numbers."""
    primary = test.outcomes[0]
    notes = ["one replicate: conditional on one SFT pair"] if len(study.replicates) == 1 else []
    notes += _collapsed(study, test) + _bounded(study, test) + _of_measure(study, test)
    if found.lost:
        notes.append(f"{found.lost} of {len(primary.values)} replicates have no finite number, so nothing is decided")
    if found.contradictory:
        notes.append("the intervals of its looks have nothing in common, so nothing is decided")
    if found.replicates > 1 and not found.has_interval and found.can_decide:
        notes.append(f"the {found.replicates} replicates are equal, so that there is no interval")
    if found.floored:
        notes.append("the replicates differ by less than sampling alone makes them, which is taken instead")
    if math.isnan(primary.sampling_variance):
        notes.append("no floor of the deviation is known")
    return notes


def _of_measure(study, test):
    """Notes on what a claim's measure leaves out, or says twice."""
    primary, notes = test.outcomes[0], []
    if primary.apart:
        count = len(primary.apart) + len(primary.values)
        notes.append(f"in {len(primary.apart)} of {count} replicates the two reach no common KL, and are left out")
    if primary.measure == "stable":
        beyond = int((primary.values["effect"] < 0).sum())
        notes.append(f"in {beyond} of {len(primary.values)} replicates more than a margin is lost")
        notes += [primary.how] * bool(primary.how)
    if primary.judge and selection.kind_of(study, primary.judge).is_gold:
        notes.append(f"judge {primary.judge} scores as gold rewards do, so that this says again what they say")
    return notes


def _collapsed(study, test):
    """Notes on which of the policies that a claim compares have collapsed, and how."""
    matched, notes = outcomes.at_all_kl_coefs(test.claim.measure), []
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
    about_kl = test.claim.measure == "kl_to_sft0" or outcomes.at_all_kl_coefs(test.claim.measure)
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
    if not outcomes.at_all_kl_coefs(test.claim.measure):
        columns |= {"candidate_kl_coef": pair.candidate_kl_coef, "baseline_kl_coef": pair.baseline_kl_coef}
    values = outcome.values.rename_axis("replicate").reset_index()
    columns["look"] = [_first_look(test, replicate) for replicate in values["replicate"]]
    rows = values.assign(**columns, sampling_variance=outcome.sampling_variance)
    return rows.reindex(columns=REPLICATE_COLUMNS)


def _first_look(test, replicate):
    """The first look, counted from 1, that has a replicate; None in a study without looks."""
    if test.look is None:
        return None
    place = test.replicates.index(replicate)
    return next(number for number, look in enumerate(test.look.looks, start=1) if place < look)


def looks(study):
    """One row per tested claim × look until now: the interval of its primary outcome then, by which it is decided.

    `look` counts the claim's own looks from 1; `n` is the number of finite values. `deviation` makes the interval, and
    `floor` is what sampling alone gives (nan: not known), which it never lies below. Where the latest interval of a
    claim and those before it have nothing in common, claims.csv has none.
    """
    rows, level = [], family_level(study)
    for name in ordered(study.config.claims):
        test = tests(study)[name]
        if isinstance(test, Test):
            by_look = at_looks(test, test.outcomes[0], level)
            rows += [_look_row(name, place, *part) for place, part in enumerate(by_look, start=1)]
    return pd.DataFrame(rows, columns=LOOK_COLUMNS)


def _look_row(name, place, outcome, found):
    row = {"claim": name, "look": place, "n": found.replicates, "floor": math.sqrt(outcome.sampling_variance)}
    return row | {column: getattr(found, column) for column in LOOK_COLUMNS if column not in row}


LOOK_COLUMNS = ["claim", "look", "n", "level", "critical", "mean", "deviation", "floor", "low", "high"]
REPLICATE_COLUMNS = ["claim", "outcome", "measure", "benchmark", "judge", "replicate", "look", "candidate", "baseline",
                     "candidate_kl_coef", "baseline_kl_coef", *outcomes.VALUES, "sampling_variance"]  # fmt: skip
