"""When does a soup reference help? A regression over SFT pairs that were made by different recipes."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from salsa.evaluate import regression
from salsa.report import selection, style
from salsa.report.outcomes import SHORT
from salsa.report.sections import Section
from salsa.report.sections import pairs as pairs_section

POINTS = (0.2, 0.6, 2.0)  # KL(sft0 ‖ soup), nats per response, at which the lines are read
GRID = 401  # places at which a band is held against 0 and the smallest effect
LABELS = {  # response -> (words, unit)
    "gold_reward": (SHORT["gold_reward"], "gold's unit"),
    "reward": (SHORT["reward"], "standard deviations"),
    pairs_section.TRAINING: (SHORT["training_kl_to_sft0"], "nats per response"),
}
CLAIMED = {  # response -> measures of claims that have its unit, and so say which difference of it would matter
    "gold_reward": ("gold_reward",),
    "reward": ("reward", "training_reward"),
    pairs_section.TRAINING: ("training_kl_to_sft0", "kl_to_sft0"),
}
MAIN = "salsa"
MEAN, INTERCEPT, DISTANCE = "mean", "at 0 nats", "per √nat"
COVARIATES = {  # column of pairs -> term
    "gain_per_kl_coef": "per nat that the soup's reward pays for",
    "gold_agreement": "per √nat and agreement with gold",
}
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # of kl_coefs, from the smallest on
COLUMNS = [
    *("response", "candidate", "baseline", "model", "term", "kl_coef", "estimate", "estimate_low", "estimate_high"),
    *("degrees_of_freedom", "between_pairs", "within_pairs", "pairs", "effects"),
]


@dataclass(frozen=True)
class Model:
    """A fitted regression whose first column, the mean or the slope, has a coefficient for each kl_coef.

    Attributes:
        fit: its columns are `by_kl_coef` of that name, after the intercept where there is one, and covariates.
        name: MEAN or DISTANCE.
        kl_coefs: ascending.
    """

    fit: regression.Fit
    name: str
    kl_coefs: tuple[float, ...]

    def weights(self, kl_coef, times=1.0):
        """column -> weight, of the mean or slope at a kl_coef, so many times."""
        names = [self.name] if kl_coef == self.kl_coefs[0] else [self.name, more(self.name, kl_coef)]
        return dict.fromkeys(names, times)

    def at(self, kl_coef, kl):
        """(value, low, high) of a kl_coef's line at a KL(sft0 ‖ soup), by bounds that hold on all lines at once."""
        weights = {INTERCEPT: 1.0} | self.weights(kl_coef, math.sqrt(max(kl, 0)))
        return self.fit.line(weights, self.columns)

    @property
    def columns(self):
        """The columns that the lines are made of."""
        return (INTERCEPT, self.name, *(more(self.name, kl_coef) for kl_coef in self.kl_coefs[1:]))


def table(study):
    """One row per response × arm × model × term: `regression.fit` of the arm minus its plain anchor, over SFT pairs.

    Models: mean, of all pairs; distance, on √KL(sft0 ‖ soup); read off, its lines at some distances, with bounds that
    hold at all distances and kl_coefs at once; covariates, on what else was known before training, too; beside, the
    mean of another arm's difference minus salsa's on the same pairs. Each has a mean or a slope for each kl_coef, and
    how much more it is than at the smallest one. between_pairs and within_pairs are the deviations τ and ω beyond
    prompts and responses.
    """
    frame, rows = pairs_section.table(study), []
    main = main_contrast(frame)
    for response in LABELS:
        for contrast in contrasts(frame):
            effects = effects_of(frame, contrast, response)
            models = {"mean": mean(effects, response)}
            if contrast == main:
                models["distance"] = distance(effects, response)
                models["covariates"] = distance(effects, response, COVARIATES)
            else:
                others = pairs_section.beside(study, frame, contrast, main)
                models[f"beside {' − '.join(main)}"] = mean(effects_of(others, contrast, response), response)
            shared = {"response": response, "candidate": contrast[0], "baseline": contrast[1]}
            for name, model in models.items():
                rows += [shared | row for row in _rows(name, model)]
            rows += [shared | row for row in _points(models.get("distance"), effects)]
    return pd.DataFrame(rows, columns=COLUMNS)


def contrasts(pairs):
    """(arm, plain anchor) of each arm in the table of pairs."""
    return list(pairs[["candidate", "baseline"]].drop_duplicates().itertuples(index=False, name=None))


def main_contrast(pairs):
    """The contrast that the regression is of: salsa's, or that of the first arm where there is no such."""
    return next((contrast for contrast in contrasts(pairs) if contrast[0] == MAIN), contrasts(pairs)[0])


def effects_of(pairs, contrast, response):
    """The rows of a contrast in which a response and the soup's distance are known."""
    rows = pairs[(pairs["candidate"] == contrast[0]) & (pairs["baseline"] == contrast[1])]
    return rows.dropna(subset=[response, "kl_sft0_soup"])


def mean(effects, response):
    """The `Model` of a response's mean over pairs, at each kl_coef; None where it is not determined."""
    return _fit(effects, response, MEAN, by_kl_coef(effects, MEAN, pd.Series(1.0, effects.index)))


def distance(effects, response, covariates=()):
    """The `Model` of a response on √KL(sft0 ‖ soup), with a slope for each kl_coef; None where it is not determined.

    √KL, because a distance of weights is proportional to it near sft0. A difference at no distance is none, since both
    arms are one there. So the lines of all kl_coefs meet in one intercept, and the reward model's agreement with gold
    changes the slope. A covariate that is the same for all pairs, or isn't known of one, is left out.
    """
    root = np.sqrt(effects["kl_sft0_soup"].clip(lower=0))
    columns = {INTERCEPT: pd.Series(1.0, effects.index)} | by_kl_coef(effects, DISTANCE, root)
    for name in covariates:
        values = effects[name]
        if values.notna().all() and values.nunique() > 1:
            columns[COVARIATES[name]] = root * (values - values.mean()) if name == "gold_agreement" else values
    return _fit(effects, response, DISTANCE, columns)


def by_kl_coef(effects, name, values):
    """name -> column: the values, whose coefficient is that at the smallest kl_coef; and how much more it is at others.

    The first column is held against the number of pairs, and what differs within a pair against the effects in it
    (`regression`): a column for each kl_coef alone would take two kl_coefs of a pair for two pairs.
    """
    others = sorted(effects["kl_coef"].unique())[1:]
    return {name: values} | {more(name, kl_coef): values * (effects["kl_coef"] == kl_coef) for kl_coef in others}


def more(name, kl_coef):
    """The column of how much more a mean or slope is at a kl_coef than at the smallest."""
    return f"{name}, more at kl_coef {kl_coef:g}"


def _fit(effects, response, name, columns):
    variances = effects.get(f"{response}_variance", pd.Series(0.0, effects.index))
    try:
        fit = regression.fit(effects[response], columns, variances, effects["replicate"])
    except ValueError:
        return None
    return Model(fit, name, tuple(sorted(effects["kl_coef"].unique())))


def _rows(name, model):
    """A row for each mean or slope of a model, and for each other column; none where it is not determined."""
    if model is None:
        return []
    fit = model.fit
    at_kl_coefs = [
        _row(name, model.name, fit.combination(weights), fit, weights, kl_coef)
        for kl_coef in model.kl_coefs
        for weights in [model.weights(kl_coef)]
    ]
    others = [column for column in fit.names if column != model.name]
    return at_kl_coefs + [_row(name, column, fit.interval(column), fit, [column]) for column in others]


def _row(model, term, interval, fit, columns, kl_coef=math.nan):
    """A row of the table; the degrees of freedom are the least of some columns."""
    row = {"model": model, "term": term, "kl_coef": kl_coef}
    row |= dict(zip(("estimate", "estimate_low", "estimate_high"), interval, strict=True))
    row |= {"between_pairs": math.sqrt(fit.between), "within_pairs": math.sqrt(fit.within)}
    left = min(fit.degrees_of_freedom[fit.names.index(column)] for column in columns)
    return row | {"degrees_of_freedom": int(left), "pairs": fit.groups, "effects": fit.effects}


def _points(model, effects):
    """A row for each kl_coef and those of POINTS that lie among its pairs' distances: beyond, a line is a guess."""
    rows = []
    for kl_coef in model.kl_coefs if model else ():
        distances = effects.loc[effects["kl_coef"] == kl_coef, "kl_sft0_soup"]
        for kl in POINTS:
            if distances.min() <= kl <= distances.max():
                interval = model.at(kl_coef, kl)
                rows.append(_row("read off", f"at {kl:g} nats", interval, model.fit, model.columns, kl_coef))
    return rows


def smallest_effect(study, response):
    """The smallest difference that would matter, as the study's claims say of salsa; nan where none does."""
    claims = [claim for claim in study.config.claims.values() if claim.candidate == MAIN]
    sizes = (claim.smallest_effect for name in CLAIMED[response] for claim in claims if claim.measure == name)
    return next(sizes, math.nan)


def figure(study, tables):
    """The map: the difference of each SFT pair against its KL(sft0 ‖ soup), the line, its band, and ±δ."""
    frame = style.measured(tables, "pairs", "kl_sft0_soup")
    main = main_contrast(frame) if len(frame) else None
    responses = [name for name in LABELS if main and len(effects_of(frame, main, name))]
    if not responses or tables["regimes"].empty:  # a pair or two make no map
        return None
    figure, axes = style.panels(1, len(responses), height=2.6, width=max(3.5, 2.4 * len(responses)))
    for axis, response in zip(axes[0], responses, strict=True):
        _draw(axis, effects_of(frame, main, response), response, smallest_effect(study, response))
        axis.set_title(f"{LABELS[response][0]},\n{' − '.join(main)}", loc="left")
        axis.set_ylabel(LABELS[response][1])
    _legend(figure, frame, main)
    return figure


def _draw(axis, effects, response, smallest):
    if smallest == smallest:
        axis.axhspan(-smallest, smallest, color="#ececec", zorder=0)
    axis.axhline(0, color=style.DARK, linewidth=0.9, linestyle="--")
    model, drawn = distance(effects, response), [0.0, *effects[response]]
    for kl_coef, colour in _colours(effects).items():
        rows = effects[effects["kl_coef"] == kl_coef]
        axis.scatter(rows["kl_sft0_soup"], rows[response], s=14, color=colour, alpha=0.8, linewidths=0, zorder=3)
        if model:
            places, line = _band(model, rows, kl_coef)
            axis.plot(places, line[:, 0], color=colour, linewidth=1.3, zorder=4)
            axis.fill_between(places, line[:, 1], line[:, 2], color=colour, alpha=0.15, linewidth=0, zorder=2)
            drawn += [*line[~np.isnan(line)]]
    style.sqrt_axis(axis, effects["kl_sft0_soup"], gap=0.2)
    axis.set_ylim(style.limits(drawn))
    axis.set_xlabel("KL(sft0 ‖ soup), nats  (√ scale)")


def _band(model, effects, kl_coef):
    """(KL (GRID,), value, low and high of a kl_coef's line there (GRID, 3)), from the nearest to the farthest pair."""
    ends = np.sqrt([max(effects["kl_sft0_soup"].min(), 0), effects["kl_sft0_soup"].max()])
    places = np.linspace(*ends, GRID) ** 2
    return places, np.array([model.at(kl_coef, kl) for kl in places])


def _colours(frame):
    kl_coefs = sorted(frame["kl_coef"].unique())
    return {kl_coef: COLOURS[place % len(COLOURS)] for place, kl_coef in enumerate(kl_coefs)}


def _legend(figure, frame, main):
    rows = frame[frame["candidate"] == main[0]]
    entries = [style.mark(f"a pair, kl_coef {k:g}", size=4, color=colour) for k, colour in _colours(rows).items()]
    entries.append(style.mark("line and its 95 % band", None, color=style.DARK, linestyle="-"))
    entries.append(style.mark("±δ: too small to matter", "s", 7, color="#ececec"))
    style.below(figure, entries)


def caption(study, tables):
    frame, rows = tables["pairs"], tables["regimes"]
    main = main_contrast(frame)
    number = frame["replicate"].nunique()
    text = f"{' minus '.join(main)} over {number} SFT pairs of {len(study.config.regimes)} recipes."
    others, response = rows[rows["model"].str.startswith("beside")], _first_response(rows)
    others = others[(others["response"] == response) & (others["term"] == MEAN)]
    for contrast, means in others.groupby(["candidate", "baseline"], sort=False):
        differences = " and ".join(f"{_bounds(row)} at kl_coef {row['kl_coef']:g}" for row in means.to_dict("records"))
        on = f" On the same {means['pairs'].iloc[0]} pairs {' minus '.join(contrast)}"
        text += f"{on} differs from that by {differences} in {LABELS[response][0]}."
    return text


def _bounds(row):
    return _interval((row["estimate"], row["estimate_low"], row["estimate_high"]))


def _first_response(rows):
    return next((name for name in LABELS if name in set(rows["response"])), None)


def reading(study, tables):
    """What the map supports: the slopes of each response, and where their bands lie."""
    frame = style.measured(tables, "pairs", "kl_sft0_soup")
    if frame.empty or tables["regimes"].empty:
        return ""
    main = main_contrast(frame)
    texts = [
        verdict(effects_of(frame, main, response), response, smallest_effect(study, response))
        for response in LABELS
        if len(effects_of(frame, main, response))
    ]
    opening = (
        "A dot is an SFT pair at a kl_coef, each of which has a line; the bands of a panel hold everywhere at once."
    )
    return " ".join([opening, *texts])


def verdict(effects, response, smallest):
    """A sentence on the slopes of a response over SFT pairs, by kl_coef, and on where their bands decide something."""
    model, words = distance(effects, response), LABELS[response]
    name = words[0][0].upper() + words[0][1:]
    if model is None or not math.isfinite(model.fit.interval(DISTANCE)[1]):
        return f"{name}: too few pairs for a line."
    texts = [
        _of_kl_coef(model, effects[effects["kl_coef"] == kl_coef], kl_coef, smallest) for kl_coef in model.kl_coefs
    ]
    return f"{name}: {'; '.join(texts)}."


def _of_kl_coef(model, effects, kl_coef, smallest):
    """What the line of one kl_coef says."""
    slope = model.fit.combination(model.weights(kl_coef))
    rises = "rises with" if slope[1] > 0 else "falls with" if slope[2] < 0 else "shows no slope over"
    places, band = _band(model, effects, kl_coef)
    parts = [f"{where} {_ranges(places, mask)}" for where, mask in _regions(band, smallest)]
    ends = f"{selection.number(places[0])} and {selection.number(places[-1])} nats"
    decided = f"its band lies {', '.join(parts)}" if parts else f"its band decides nothing between {ends}"
    says = f"the difference {rises} the soup's distance ({_interval(slope)} per √nat), and {decided}"
    return f"at kl_coef {kl_coef:g} {says}"


def _regions(band, smallest):
    """(words, mask over the band's places) of what is shown somewhere; what a narrower one says already is left out."""
    _, low, high = band.T
    above, below = low > 0, high < 0
    if math.isnan(smallest):
        return [(words, mask) for words, mask in (("above 0", above), ("below 0", below)) if mask.any()]
    delta = selection.number(smallest)
    larger, within, excluded = low > smallest, (low > -smallest) & (high < smallest), high < smallest
    regions = {
        f"above δ = {delta}": larger,
        "above 0": above & ~larger,
        f"within ±{delta}": within,
        "below 0": below,
        f"below δ = {delta} (an effect that would matter is excluded)": excluded & ~within & ~below,
    }
    return [(words, mask) for words, mask in regions.items() if mask.any()]


def _ranges(places, mask):
    """ "at all distances", or "from 0.1 to 0.5 nats and …": the runs of places in which a mask holds."""
    if mask.all():
        return "at all distances"
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    starts, ends = edges[::2], edges[1::2] - 1
    runs = [
        f"from {selection.number(places[i])} to {selection.number(places[j])}"
        for i, j in zip(starts, ends, strict=True)
    ]
    return " and ".join(runs) + " nats"


def _interval(values):
    value, low, high = map(selection.number, values)
    return f"{value} [{low}, {high}]"


SECTION = Section(
    name="regimes",
    heading="Claims",
    place=90,
    table=table,
    left_out=("effects",),
    figure=figure,
    caption=caption,
    reading=reading,
    present=pairs_section.present,
)
