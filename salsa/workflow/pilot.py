"""What a pilot says of a planned study: how many replicates its claims need, what they cost, and the best design.

A pilot is a finished study of the same arms with two replicates or more. Its tables `variance` and `allocation` are
all that is read of it, so that a published copy will do. What it found to be larger is never used: only what replicates
differ by, and the smallest effects of the planned claims.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from salsa import data
from salsa.evaluate import decisions, power, variance
from salsa.report import formats, noise, outcomes
from salsa.report.frames import BOUNDS
from salsa.report.sections import allocation
from salsa.report.sections import variance as section
from salsa.workflow import families, policies, runs
from salsa.workflow.messages import UserError

POWERS = (80, 90)  # %
COLUMNS = ["claim", "of", "smallest_effect", "deviation", "degrees_of_freedom", "level", "planned"]
COLUMNS += [f"replicates_{wanted}{bound}" for wanted in POWERS for bound in BOUNDS]
COLUMNS += ["core_hours_80", "core_hours_90"]
ONCE = {f"{name}_{wanted}": f"{name}_{wanted}_once" for name in ("replicates", "core_hours") for wanted in POWERS}
COLUMNS += ONCE.values()  # where the planned looks have less power: of a study that is looked at once


@dataclass(frozen=True)
class Pilot:
    """A pilot's tables.

    Attributes:
        variances: the table of that name, of differences alone.
        cost: `variance.Cost` of the first pair of arms that its claims compare.
    """

    variances: pd.DataFrame
    cost: variance.Cost

    def rows(self, claim, measure):
        """The variances of what a claim is about; empty where the pilot did not measure that."""
        frame = self.variances
        frame = frame[(frame["candidate"] == claim.candidate) & (frame["baseline"] == claim.baseline)]
        frame = frame[frame["measure"] == measure]
        if claim.benchmarks:
            return frame[frame["benchmark"] == claim.benchmarks[0]] if len(claim.benchmarks) == 1 else frame[:0]
        return frame[section.primary(frame)]


def read(folder):
    """The `Pilot` in a study's folder. UserError, in one line, where there is none or it says nothing."""
    folder = Path(folder)
    if (runs.manifest_of(folder) or {}).get("stage") != "study":
        raise UserError(f"{folder}: no finished study; give a pilot's folder, such as results/studies/pilot")
    variances, costs = (formats.read_csv(folder / "tables" / f"{name}.csv") for name in ("variance", "allocation"))
    variances["benchmark"] = variances["benchmark"].fillna("")
    if costs.empty:
        raise UserError(f"{folder}: a pilot needs two replicates of two arms that a claim compares, and has none such")
    paid = {name: float(costs[column].iloc[0]) for name, column in allocation.COSTS.items()}
    return Pilot(variances[variances["of"] == noise.DIFFERENCE], variance.Cost(**paid))


@dataclass(frozen=True)
class Forecast:
    """What a pilot says of a planned study.

    Attributes:
        name: of the planned study.
        needs: a row for each claim that the pilot measured: see COLUMNS.
        lines: sentences on the best designs, and the claims that the pilot says nothing of.
    """

    name: str
    needs: pd.DataFrame
    lines: list[str]

    def table(self):
        """A rich table of the needs."""
        from rich.table import Table

        table = Table(title=f"{self.name}: replicates that decide, by the pilot's deviation and its uncertainty")
        for name in ("claim", "of", "matters", "deviation", "80 % power", "90 % power", "core-hours"):
            words = name in ("claim", "of")
            table.add_column(name, justify="left" if words else "right", no_wrap=name == "claim")
        for row in self.needs.to_dict("records"):
            numbers = [formats.number(row[name]) for name in ("smallest_effect", "deviation")]
            numbers += [_range(row, f"replicates_{wanted}") for wanted in POWERS]
            numbers.append(" and ".join(_hours(row[f"core_hours_{wanted}"]) for wanted in POWERS))
            table.add_row(row["claim"], outcomes.SHORT[row["of"]], *numbers)
        return table

    def as_dict(self):
        """The forecast as JSON holds it: a number that is unknown, or not finite, is null."""
        finite = self.needs.replace([math.inf, -math.inf], math.nan).astype(object)
        needs = finite.where(finite.notna(), None).to_dict("records")
        return {"study": self.name, "needs": needs, "lines": self.lines}


def _range(row, name):
    """A number of replicates with its range; nothing where replicates do not differ."""
    number, low, high = (_count(row[name + bound], row["planned"]) for bound in BOUNDS)
    if math.isnan(row[name]):
        return ""
    return number if math.isinf(row[f"{name}_low"]) else f"{number} [{low}, {high}]"


def _count(number, most):
    """A number of replicates; > 48 where even so many, which is all that there are, have less power."""
    return f"> {most:.0f}" if math.isinf(number) else f"{number:.0f}"


def _hours(hours):
    return formats.number(hours) if math.isfinite(hours) else "?"


def forecast(folder, composed, budget=None):
    """The `Forecast` of a planned study (`policies.Composed`) from a pilot's folder.

    Args:
        budget: core-minutes of two arms, for the best design; None: what the planned study takes.

    UserError, in one line, where the folder holds no pilot of the study's claims.
    """
    pilot, claims, rows = read(folder), composed.config.claims, []
    for name, claim in claims.items():
        claim = _measured(pilot, claim)
        known = pilot.rows(claim, claim.measure)
        if not known.empty and known["replicates"].iloc[0] > 1:
            rows.append({"claim": name, "of": claim.measure} | _needs(pilot, composed, claim, known))
    if not rows:
        raise UserError(f"{folder}: measured none of the study's claims; give a pilot that has its arms")
    needs = pd.DataFrame(rows, columns=COLUMNS)
    missing = [name for name in claims if name not in set(needs["claim"])]
    lines = [f"the pilot says nothing of {', '.join(missing)}"] if missing else []
    lines += [_once(row) for row in needs[needs["replicates_90_once"].notna()].to_dict("records")]
    everywhere = needs[[not claims[name].benchmarks for name in needs["claim"]]]  # costs are of all benchmarks
    for name in everywhere.drop_duplicates("of")["claim"]:
        lines.append(advice(pilot, composed, _measured(pilot, claims[name]), budget))
    return Forecast(composed.config.name, needs, lines)


def _measured(pilot, claim):
    """The claim as data without gold test it: by win rates, where it says how large an effect of these would matter."""
    without_gold = claim.measure == "gold_reward" and pilot.rows(claim, "gold_reward").empty
    if without_gold and claim.win_rate_without_gold is not None:
        return replace(claim, measure="win_rate", smallest_effect=claim.win_rate_without_gold)
    return claim


def _needs(pilot, composed, claim, known):
    variances, measured = section.estimates(known)
    design = planned(composed, claim, measured)
    cost = pilot.cost.fixed(_answers(composed, claim, measured))
    deviation = math.sqrt(variance.replicate_variance(variances, design))
    row = {"smallest_effect": claim.smallest_effect, "deviation": deviation}
    freedom, level, looks = measured.replicates - 1, _level(composed), _looks(composed, claim)
    row |= {"degrees_of_freedom": freedom, "level": level, "planned": looks[-1] if looks else power.MOST}
    for wanted in POWERS if deviation else ():
        needed = power.needed(deviation, freedom, claim.smallest_effect, level, wanted / 100, looks)
        row |= dict(zip((f"replicates_{wanted}{bound}" for bound in BOUNDS), needed, strict=True))
        row[f"core_hours_{wanted}"] = cost.of(replace(design, replicates=needed.replicates)) / 60
        if looks and math.isinf(needed.replicates):
            once = power.needed(deviation, freedom, claim.smallest_effect, level, wanted / 100).replicates
            row[f"replicates_{wanted}_once"] = once
            row[f"core_hours_{wanted}_once"] = cost.of(replace(design, replicates=once)) / 60
    return row


def _once(row):
    """What a claim takes that the planned looks leave with too little power: a sentence."""
    wanted = [each for each in POWERS if not math.isnan(row[ONCE[f"replicates_{each}"]])]
    counts = [_count(row[ONCE[f"replicates_{each}"]], power.MOST) for each in wanted]
    hours = [_hours(row[ONCE[f"core_hours_{each}"]]) for each in wanted]
    parts = [f"{n} for {p} % ({h} core-hours)" for n, p, h in zip(counts, wanted, hours, strict=True)]
    return (
        f"{row['claim']}: no planned look has {wanted[0]} % power; a study that is looked at once takes "
        f"{' and '.join(parts)}"
    )


def _looks(composed, claim):
    """The planned looks at a claim, whose arms may be run on the first replicates alone; None: there are none."""
    looks = composed.config.looks
    limits = [composed.arms[name].replicates for name in (claim.candidate, claim.baseline)]
    counts = [len(limit) if isinstance(limit, list) else limit for limit in limits if limit is not None]
    most = min([*counts, *looks[-1:]], default=None)
    return list(dict.fromkeys(min(look, most) for look in looks)) or None


def planned(composed, claim, measured):
    """The `Design` that a planned study gives to what a claim is about.

    Where its benchmarks do not say how many prompts they have, these are as many as in the pilot, whose `Design` is
    `measured`.
    """
    config = composed.config
    seeds = getattr(config, policies.algorithm_of(composed.arms[claim.candidate])).seeds
    design = variance.Design(len(config.replicates), seeds, measured.prompts, config.evaluate.samples)
    if claim.measure in allocation.MEASURED_IN_ANSWERS:
        return replace(design, prompts=_prompts(config, claim) or measured.prompts)
    if claim.measure in outcomes.FLAT:
        return replace(design, responses=1)
    return replace(design, prompts=config.data.task.evaluation or measured.prompts)


def _prompts(config, claim):
    """The prompts of a claim's benchmarks; 0 where one of them takes all that there are."""
    kinds = data.benchmark_kinds()
    named = claim.benchmarks or [name for name, each in config.benchmarks.items() if kinds[each.kind].compared]
    counts = [config.benchmarks[name].prompts for name in named if name in config.benchmarks]
    return sum(counts) if all(counts) else 0


def _answers(composed, claim, measured):
    """The answers that each policy of the planned study gives to its benchmarks."""
    everywhere = replace(claim, measure="gold_reward", benchmarks=[])
    design = planned(composed, everywhere, measured)
    return design.prompts * design.responses


def _level(composed):
    """The level of the interval of each claim: that of all that the study plans to test."""
    return decisions.family_level(max(1, len(families.planned(composed))))


def advice(pilot, composed, claim, budget=None):
    """A sentence: the best design for what the planned study spends on two arms, or for a budget of core-minutes."""
    known = pilot.rows(claim, claim.measure)
    variances, measured = section.estimates(known)
    design, cost = planned(composed, claim, measured), pilot.cost
    ranges = variance.choices(measured, int(known["benchmarks"].iloc[0]))
    if claim.measure not in allocation.MEASURED_IN_ANSWERS:
        cost, ranges = cost.fixed(_answers(composed, claim, measured)), ranges | allocation.unchanged(design)
    decides = {"level": _level(composed), "looks": composed.config.looks}
    rows = allocation.designs(variances, cost, design, ranges, budget, **decides)
    return allocation.sentence(pd.DataFrame(rows).assign(measure=claim.measure))
