"""The objective of a study: the number that a sweeper maximises, chosen while planning and read when it is finished."""

import csv
import math

from salsa import data
from salsa.workflow import bounds, policies, schema
from salsa.workflow.messages import UserError


def listed(items):
    """Items as a list is written on the command line."""
    return "[" + ",".join(map(str, items)) + "]"


def resolve(composed):
    """What of a finished study is its objective, as a dictionary of `config.Objective` with every choice made.

    `composed` is a configuration that `compose` returned; the dictionary names the judge, too.

    Raises:
        UserError: the study will not have the number.
    """
    study = composed.config
    objective = schema.dump(study.objective)
    specs = policies.specs(composed).values()  # a policy has the first of its specification's names
    arms = [name for names, _ in specs for name in names]
    wanted = objective["arm"] or ("salsa" if "salsa" in arms else arms[-1])
    names, kl_coefs = next(spec for spec in specs if wanted in spec[0])
    objective["arm"] = names[0]
    if objective["kl_coef"] is None:
        objective["kl_coef"] = kl_coefs[0]
    elif objective["kl_coef"] not in kl_coefs:
        raise UserError(
            f"objective.kl_coef={objective['kl_coef']}: {wanted} is not run at it; choose among {listed(kl_coefs)}"
        )
    objective["judge"] = next(iter(study.judges), None)
    gold = data.world_kinds()[study.data.task.kind].gold
    if not objective["measure"]:
        objective["measure"] = "gold_reward" if gold else "win_rate"
    if objective["measure"] == "gold_reward" and not gold:
        raise UserError(f"objective.measure=gold_reward: data={study.data.name} has no gold; use win_rate")
    if objective["measure"] == "win_rate" and not objective["judge"]:
        raise UserError("objective.measure=win_rate: the study has no judge; choose judge=[…], or measure=reward")
    if study.sft.models < 2:
        raise UserError("objective: is measured against sft0, which is evaluated beside sft1; set sft.models=2")
    return objective


def read(folder, objective):
    """A finished study's objective, and what it is made of, as a dictionary.

    objective = value - kl_penalty * max(0, kl_to_sft0 - kl_budget), where value is the arm's mean reward minus sft0's
    (gold_reward, reward), or its adjusted win rate against sft0 by the first judge, mean over benchmarks (win_rate).

    Args:
        folder: the study's.
        objective: what `resolve` returned.

    Raises:
        UserError: the study's tables lack the number.
    """
    arm, kl_coef, measure = objective["arm"], objective["kl_coef"], objective["measure"]
    rewards = _rows(folder / "tables" / "rewards.csv")
    trained = [row for row in rewards if row["arm"] == arm and row["kl_coef"] and float(row["kl_coef"]) == kl_coef]
    kl = _mean(trained, "kl_to_sft0")
    if measure == "win_rate":
        key = {"judge": objective["judge"], "candidate": arm, "baseline": "sft0"}
        lines = [
            row
            for row in _rows(folder / "tables" / "win_rates.csv")
            if all(row[name] == wanted for name, wanted in key.items()) and float(row["kl_coef"]) == kl_coef
        ]
        value = _mean(lines, "adjusted_win_rate")
    else:
        value = _mean(trained, measure) - _mean([row for row in rewards if row["arm"] == "sft0"], measure)
    if math.isnan(value):
        raise UserError(f"{folder}: its tables have no {measure} of {arm} at kl_coef {kl_coef:g}; see objective")
    penalty = 0.0
    if objective["kl_budget"] is not None:
        if math.isnan(kl):
            raise UserError(f"{folder}: its tables have no KL to sft0 of {arm}; leave out objective.kl_budget")
        penalty = objective["kl_penalty"] * max(0.0, kl - objective["kl_budget"])
    parts = {"value": value, "kl_to_sft0": None if math.isnan(kl) else kl, "penalty": penalty}
    return {"objective": value - penalty} | parts | objective


def trial_line(number, point, value, best, failure=None):
    """What a trial of a search has come to, in a line.

    Args:
        point: the overrides that it tried.
        value: its objective, or None.
        best: the best trial so far, with `number` and `value`; None where none has an objective.
        failure: why there is none.
    """
    came = f"objective {value:.6g}" if value is not None else f"no objective ({failure})"
    so_far = f"; the best so far: {best.value:.6g}, of trial {best.number}" if best else ""
    return bounds.printable(f"trial {number}: {came} at {' '.join(point)}{so_far}")


def _rows(path):
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; remove {path.parent.parent} and run again") from None


def _mean(rows, column):
    """The mean of a column; nan where there is no row, or a row without a number."""
    values = [float(row[column] or "nan") for row in rows]
    return sum(values) / len(values) if values else math.nan
