"""Where the noise is: what the replicates of a comparison differ by, and in which part."""

import math

import pandas as pd
from matplotlib.patches import Patch

from salsa.evaluate import power, variance
from salsa.report import formats, noise, selection, style
from salsa.report.frames import BOUNDS
from salsa.report.outcomes import SHORT
from salsa.report.sections import Section

ARMS = ["candidate", "baseline", "candidate_kl_coef", "baseline_kl_coef"]
OUTCOME = [*ARMS, "of", "measure", "benchmark"]
COLUMNS = [*OUTCOME, "component", "varies", "variance", "variance_low", "variance_high", "share",
           "share_low", "share_high", "note", "deviation", "deviation_low", "deviation_high", *variance.FACTORS,
           "benchmarks", "prompts_left_out"]  # fmt: skip
COLOURS = {  # of Paul Tol's muted palette, safe for colour-blind readers (https://sronpersonalpages.nl/~pault/)
    "replicate": "#332288",
    "seed": "#88CCEE",
    "prompt_replicate": "#999933",
    "prompt_seed": "#DDCC77",
    "response": "#CC6677",
}


def table(study):
    """One row per outcome × component: of each pair of arms that claims compare, and of the first one's arms alone."""
    rows = []
    for place, pair in enumerate(noise.pairs(study)):
        arms = {name: getattr(pair, name) for name in ARMS}
        for outcome in noise.outcomes(study, pair, alone=place == 0):
            rows += [arms | row for row in _rows(outcome)]
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(outcome):
    design, shares = variance.design_of(outcome.tables), variance.shares(outcome.tables)
    row = {"of": outcome.of, "measure": outcome.measure, "benchmark": outcome.benchmark}
    row |= {name: getattr(design, name) for name in variance.FACTORS} | _deviation(outcome, design)
    row |= {"benchmarks": len(outcome.tables), "prompts_left_out": outcome.left_out}
    for name, component in variance.components(outcome.tables).items():
        share = shares.get(name, (math.nan,) * 3)
        yield row | {
            "component": name,
            "varies": " + ".join(variance.COMPONENTS[part] for part in component.holds),
            "variance": component.variance,
            "variance_low": component.low,
            "variance_high": component.high,
            "note": "estimated below 0, taken as 0" if component.below_zero else "",
            **{f"share{bound}": value for bound, value in zip(BOUNDS, share, strict=True)},
        }


def _deviation(outcome, design):
    """Columns: the deviation that the replicates of an outcome show, with its interval."""
    deviation, bounds = variance.deviation(outcome.tables), (math.nan, math.nan)
    if deviation > 0:
        bounds = power.deviation_interval(deviation, design.replicates - 1)
    return {f"deviation{bound}": value for bound, value in zip(BOUNDS, (deviation, *bounds), strict=True)}


def shown(frame):
    """The rows that readers see: the difference of the first pair of arms, over all benchmarks."""
    if frame.empty:
        return frame
    first = (frame[ARMS[:2]] == frame[ARMS[:2]].iloc[0]).all(axis=1)
    return frame[first & (frame["of"] == noise.DIFFERENCE) & primary(frame)]


def primary(frame):
    """Which rows are not of one benchmark among several."""
    several = set(frame[frame["benchmark"] == noise.MEAN]["measure"])
    return (frame["benchmark"] == noise.MEAN) | ~frame["measure"].isin(several)


def figure(study, tables):
    """A bar for each outcome: how the variance between replicates of the two arms' difference is made up."""
    frame = style.measured(tables, "variance", "share")
    frame = shown(frame)
    if frame.empty:
        return None
    measures = list(dict.fromkeys(frame["measure"]))
    figure, axes = style.panels(1, 1, height=0.5 + 0.26 * len(measures))
    axis = axes[0, 0]
    for y, measure in enumerate(measures):
        _bar(axis, frame[frame["measure"] == measure], y)
    axis.set_yticks(range(len(measures)), [SHORT[measure] for measure in measures])
    axis.set_ylim(len(measures) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    axis.grid(axis="y", visible=False)
    row = frame.iloc[0]
    axis.set_xlabel(f"share of the variance between replicates of {row['candidate']} − {row['baseline']}")
    labels = {name: min(rows["varies"], key=len) for name, rows in frame.groupby("component")}
    style.below(figure, [Patch(color=COLOURS[name], label=labels[name]) for name in COLOURS if name in labels])
    return figure


def _bar(axis, rows, y):
    left = 0.0
    for row in rows.to_dict("records"):
        axis.barh(y, row["share"], left=left, height=0.62, color=COLOURS[row["component"]])
        left += row["share"]
    deviation = f"deviation {selection.number(rows['deviation'].iloc[0])}"
    axis.annotate(deviation, (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=7, color=style.DARK)


def estimates(rows):
    """(component -> variance, `variance.Design`) of an outcome, from its rows of the table."""
    design = variance.Design(*(int(rows[name].iloc[0]) for name in variance.FACTORS))
    return dict(zip(rows["component"], rows["variance"], strict=True)), design


def caption(study, tables):
    frame = shown(tables["variance"])
    if frame["share"].isna().all():
        return "What replicates differ by is not known: it takes two of them, of two arms that a claim compares."
    varying = frame.dropna(subset="share")  # an outcome in which no two replicates differ has no shares
    rows = varying[varying["measure"] == varying["measure"].iloc[0]]
    parts = ", ".join(f"{_in_percent(row)} is from {row['varies']}" for row in rows.to_dict("records"))
    row = rows.iloc[0]
    return (
        f"The difference of {row['candidate']} and {row['baseline']} in {SHORT[row['measure']]} deviates by "
        f"{formats.number(*(row[f'deviation{bound}'] for bound in BOUNDS))} between {row['replicates']} replicates; of "
        f"this variance, {parts}. Variances in the table are of single values (balanced ANOVA). Brackets hold 95 % "
        "intervals; those of variances and shares are generalised ones. What a study with one training seed or one "
        "response can't tell apart is one number, of a sum."
    )


def _in_percent(row):
    """ "62 % [20, 91]": a share and its interval."""
    share, low, high = (f"{100 * row[f'share{bound}']:.0f}" for bound in BOUNDS)
    return f"{share} % [{low}, {high}]"


def reading(study, tables):
    if shown(style.measured(tables, "variance", "share")).empty:
        return ""
    return (
        "Bars show estimated shares of the variance of one replicate's difference as it was measured; the table has "
        "their ranges. The prompts' own variance is no part of it, since all replicates have the same prompts. A "
        "colour may hold more in one bar than in another: the table says what could not be told apart."
    )


SECTION = Section(
    name="variance",
    heading="Where the noise is",
    place=1,
    table=table,
    left_out=(*ARMS, "of", "component", "benchmarks"),
    rows=shown,
    figure=figure,
    caption=caption,
    reading=reading,
    sides=None,
)
