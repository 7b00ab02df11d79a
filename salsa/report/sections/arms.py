"""The arms of a study: start, reference and strength of the penalty."""

import math

import pandas as pd

from salsa import algorithms, anchors
from salsa.report.sections import Section, sides_at_all_kl_coefs
from salsa.workflow import policies
from salsa.workflow.weights import soup_words

SCHEDULES = {
    "fixed": "fixed",
    "linear": "falls linearly to {final:g} × kl_coef",
    "adaptive": "adapts to a KL of {target:g} nats, over {horizon:g} responses",
}


def table(study):
    """One row per arm: where the policy starts, what its penalty is measured from, and how strong that is.

    A column says what trains the policy, where that is not PPO in all arms, and one for how long, where they differ.
    """
    rows, order, specs = [], study.arms, policies.specs(study.composed)
    differ = {spec.algorithm for spec in specs} != {algorithms.DEFAULT}
    for spec, (names, _) in specs.items():
        first = next(arm for arm in order if arm in names)  # the configuration of a plan is sorted by name
        row = {"algorithm": algorithms.kinds()[spec.algorithm].title} if differ else {}
        row |= {
            "start": soup_words(spec.start),
            "reference": anchors.kinds()[spec.kind].words(spec.reference),
            "kl_scale": spec.kl_scale,
            "kl_schedule": SCHEDULES[spec.kl_schedule.kind].format(**spec.kl_schedule.own_settings()),
        }
        if any(other.iterations_scale != 1 for other in specs):
            row["iterations_scale"] = spec.iterations_scale
        if not spec.penalised:
            row |= {"reference": "none", "kl_scale": math.nan, "kl_schedule": "none"}
        written = study.config.arms.get(first)
        for name in names:
            description = f"the same as {first}, and shown under that name"
            if name == first:
                description = written.description if written else "on the line from sft0 to sft1"
            rows.append({"arm": name} | row | {"description": description})
    return pd.DataFrame(sorted(rows, key=lambda row: order.index(row["arm"]) if row["arm"] in order else len(order)))


def caption(study, tables):
    text = (
        f"{len(tables['arms'])} arms: where the policy starts, what its KL penalty is measured from, and the "
        "penalty's strength, kl_scale times the study's kl_coef, over the run as the schedule says. The kl_coef in "
        "tables and figures is the study's, before the scale."
    )
    fixed = [kind for kind in study.config.algorithms if getattr(study.config, kind).kl_schedule is None]
    changing = [name for name, arm in study.config.arms.items() if arm.kl_schedule and not arm.algorithm]
    if fixed and changing:
        titles = " and ".join(algorithms.kinds()[kind].title for kind in fixed)
        text += f" No arm of {titles}, whose penalty can't change over a run, stands beside {', '.join(changing)}."
    untrained = [arm for arm in study.arms if not study.penalised(arm)]
    if untrained:
        text += f" Without a penalty: {', '.join(untrained)}; such an arm has one policy, shown at one kl_coef."
        specs = policies.specs(study.composed)
        merged = [arm for spec, (names, _) in specs.items() if spec.of_policies for arm in names if arm in untrained]
        if merged:
            text += f" Made of policies with a penalty, and another at each of their kl_coefs: {', '.join(merged)}."
    return text


SECTION = Section(name="arms", heading="Arms", table=table, caption=caption, sides=sides_at_all_kl_coefs)
