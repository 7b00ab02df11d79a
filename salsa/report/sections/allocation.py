"""What a further hour of computing would buy: replicates, training seeds, prompts or responses."""

import math
from dataclasses import asdict

import pandas as pd

from salsa.evaluate import power, variance
from salsa.report import claims, formats, noise
from salsa.report.outcomes import SHORT
from salsa.report.sections import Section
from salsa.report.sections.variance import ARMS, primary
from salsa.report.selection import number

AS_RUN, BEST = "as it is", "the best for as much"
HOUR = "an hour more of "
UNITS = {"replicates": "replicate", "seeds": "training seed", "prompts": "prompt", "responses": "response"}
MEASURED_IN_ANSWERS = ("gold_reward", "reward", "win_rate")  # to benchmarks, of which there can be more
COSTS = {"replicate": "replicate_minutes", "seed": "seed_minutes", "before": "before_minutes",
         "response": "response_minutes"}  # fmt: skip
COLUMNS = ["measure", "benchmark", "design", *variance.FACTORS, "core_minutes", "half_width", "half_width_new_prompts",
           "narrower_by_an_hour", "level", "answers", *COSTS.values(), *ARMS]  # fmt: skip


def table(study):
    """Of the first pair of arms, for each outcome: the design as it was run, the best for as much, an hour more."""
    pair, rows = next(iter(noise.pairs(study)), None), []
    decides = {"level": claims.family_level(study), "looks": study.config.looks}
    paid = noise.cost(study, pair) if pair else None
    for outcome in noise.outcomes(study, pair) if paid else ():
        row = {"measure": outcome.measure, "benchmark": outcome.benchmark, "answers": paid[1]}
        row |= {COSTS[name]: value for name, value in asdict(paid[0]).items()}
        row |= {name: getattr(pair, name) for name in ARMS}
        rows += [row | more for more in _rows(outcome, *paid, decides)]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    return frame[primary(frame)]


def _rows(outcome, cost, answers, decides):
    design = variance.design_of(outcome.tables)
    variances = {name: component.variance for name, component in variance.components(outcome.tables).items()}
    if design.replicates > 1:
        ranges = variance.choices(design, len(outcome.tables))
        if outcome.measure not in MEASURED_IN_ANSWERS:
            cost, ranges = cost.fixed(answers), ranges | unchanged(design)
        yield from designs(variances, cost, design, ranges, **decides)


def unchanged(design):
    """The choices of an outcome that answers to benchmarks say nothing of: its prompts and responses stay."""
    return {name: (getattr(design, name),) * 2 for name in ("prompts", "responses")}


def designs(variances, cost, design, ranges, budget=None, level=0.95, looks=None):
    """Yield rows: the design as it was run, the best for as much (or for a budget), and an hour more of each factor.

    Args:
        level: of the intervals of claims.
        looks: of the study, whose last one widens every interval; None: it has none.
    """
    best = variance.best(variances, cost, cost.of(design) if budget is None else budget, ranges, level)
    further = variance.an_hour_more(variances, cost, design, ranges, level)
    named = {AS_RUN: (design, math.nan)} | ({BEST: (best, math.nan)} if best else {})
    named |= {HOUR + UNITS[factor] + "s": more for factor, more in further.items()}
    wider = power.widening(looks, level)
    for name, (each, gain) in named.items():
        yield asdict(each) | {
            "design": name,
            "core_minutes": cost.of(each),
            "half_width": wider * variance.half_width(variances, each, level),
            "half_width_new_prompts": wider * variance.half_width(variances, each, level, new_prompts=True),
            "narrower_by_an_hour": wider * gain,
            "level": level,
        }


def caption(study, tables):
    frame = tables["allocation"]
    if frame.empty:
        return "What a further hour would buy is not known: it takes two replicates of two arms that a claim compares."
    rows = frame[frame["measure"] == frame["measure"].iloc[0]]
    looked = " and at the last look" if study.config.looks else ""
    return (
        f"{sentence(rows)} Half-widths are those that claims' intervals over replicates are expected to have, at their "
        f"level of {formats.number(100 * rows['level'].iloc[0])} %{looked}; those for new prompts allow for others, "
        "too. Where the study has one seed or response, their number is not varied."
    )


def sentence(rows):
    """What an hour more buys of one outcome, and what is the best for as much; of the rows of `designs`."""
    rows = rows.set_index("design")
    run, text = rows.loc[AS_RUN], f"For {SHORT[rows['measure'].iloc[0]]}, "
    text += f"the next hour of a core buys most as {buys_most(rows)}; "
    if BEST not in rows.index:
        return text + "the budget buys no two replicates."
    best = rows.loc[BEST]
    change = f"±{number(best['half_width'])}, and not ±{number(run['half_width'])} as with {in_words(run)}"
    if best["half_width"] >= run["half_width"]:
        change = f"±{number(best['half_width'])}"
    return text + (
        f"for the {number(best['core_minutes'])} core-minutes of the two arms, the narrowest interval has "
        f"{in_words(best)}: {change}."
    )


def buys_most(rows):
    """What an hour may be spent on, by how much it narrows the interval, the largest first."""
    gains = rows["narrower_by_an_hour"].dropna().sort_values(ascending=False, kind="stable")
    return ", then as ".join(f"{name.removeprefix(HOUR)} (narrower by {number(gain)})" for name, gain in gains.items())


def in_words(design):
    """ "12 replicates of 1 training seed, 600 prompts and 1 response"."""
    counts = {name: int(design[name]) for name in variance.FACTORS}
    words = {name: f"{count} {UNITS[name]}" + "s" * (count != 1) for name, count in counts.items()}
    return f"{words['replicates']} of {words['seeds']}, {words['prompts']} and {words['responses']} to each"


SECTION = Section(
    name="allocation",
    heading="Where the noise is",
    place=2,
    table=table,
    left_out=("benchmark", "level", "answers", *COSTS.values(), *ARMS),
    caption=caption,
    sides=None,
)
