"""When does a soup reference help? A regression over SFT pairs that were made by different recipes."""

import math

import numpy as np
import pandas as pd

from salsa.evaluate import regression
from salsa.report import selection, style
from salsa.report.sections import Section
from salsa.report.sections import pairs as pairs_section

POINTS = (0.2, 0.6, 2.0)  # KL(sft0 ‖ soup), nats per response, at which the line is read
GRID = 401  # places at which the band is held against 0 and the smallest effect
LABELS = {  # response -> (words, unit)
    "gold_reward": ("gold reward", "gold's unit"),
    "reward": ("proxy reward", "standard deviations"),
    pairs_section.TRAINING: ("KL(policy ‖ sft0) in training", "nats per response"),
}
CLAIMED = {pairs_section.TRAINING: "kl_to_sft0"}  # response -> measure of claims, where they differ
MAIN = "salsa"
MEAN, INTERCEPT, DISTANCE, KL_COEF = "mean", "at 0 nats", "per √nat", "per kl_coef"
LINE = (INTERCEPT, DISTANCE)
COVARIATES = {
    "gain_per_kl_coef": "per nat that the soup's reward pays for",
    "gold_agreement": "per agreement with gold",
}
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")  # of kl_coefs, from the smallest on
COLUMNS = [
    *("response", "candidate", "baseline", "model", "term", "estimate", "estimate_low", "estimate_high"),
    *("degrees_of_freedom", "between_pairs", "within_pairs", "pairs", "effects"),
]


def table(study):
    """One row per response × arm × model × term: `regression.fit` of the arm minus its plain anchor, over SFT pairs.

    Models: mean, of all pairs; distance, on √KL(sft0 ‖ soup); read off, its line at some distances, with bounds that
    hold at all distances at once; covariates, on what else was known before training, too; beside, the mean of another
    arm's difference minus salsa's on the same pairs. between_pairs and within_pairs are the deviations τ and ω beyond
    prompts and responses. kl_coef stands in all models, from its mean, and so does the agreement with gold.
    """
    frame, rows = pairs_section.table(study), []
    main = main_contrast(frame)
    for response in LABELS:
        for contrast in contrasts(frame):
            effects = effects_of(frame, contrast, response)
            models = {"mean": _fit(effects, response, [MEAN])}
            if contrast == main:
                models["distance"] = distance(effects, response)
                models["covariates"] = _fit(effects, response, [*LINE, *COVARIATES])
            else:
                models[f"beside {' − '.join(main)}"] = _fit(_beside(frame, effects, main, response), response, [MEAN])
            shared = {"response": response, "candidate": contrast[0], "baseline": contrast[1]}
            for model, made in models.items():
                rows += [shared | row for row in _rows(model, made)]
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


def distance(effects, response):
    """The `regression.Fit` of a response on √KL(sft0 ‖ soup); None where it is not determined."""
    return _fit(effects, response, LINE)


def _fit(effects, response, terms):
    """The `regression.Fit` of a response on some columns, and on kl_coef where it differs; None: not determined.

    √KL, because a distance of weights is proportional to it near sft0, and a difference at no distance is none: there,
    both arms are one. A covariate that is the same for all pairs, or isn't known of one, is left out.
    """
    columns = {name: column for name in terms if (column := _column(effects, name)) is not None}
    if effects["kl_coef"].nunique() > 1:
        columns[KL_COEF] = _centred(effects["kl_coef"])
    variances = effects.get(f"{response}_variance", pd.Series(0.0, effects.index))
    try:
        return regression.fit(effects[response], columns, variances, effects["replicate"])
    except ValueError:
        return None


def _column(effects, name):
    """The column of a term; None for a covariate that says nothing of these effects."""
    if name in (MEAN, INTERCEPT):
        return np.ones(len(effects))
    if name == DISTANCE:
        return np.sqrt(effects["kl_sft0_soup"].clip(lower=0))
    values = effects[name]
    if values.isna().any() or values.nunique() == 1:
        return None
    return _centred(values) if name == "gold_agreement" else values


def _centred(values):
    return values - values.mean()


def _beside(pairs, effects, main, response):
    """Effects minus those of the main contrast at the same pair and kl_coef.

    Their sampling variances add up, though a shared plain anchor cancels: the sum is at least the variance.
    """
    key, variance = ["replicate", "kl_coef"], f"{response}_variance"
    others = effects_of(pairs, main, response).set_index(key)
    both = effects.set_index(key)
    both = both[both.index.isin(others.index)]
    others = others.loc[both.index]
    changes = {response: both[response] - others[response]}
    if variance in both:
        changes[variance] = both[variance] + others[variance]
    return both.assign(**changes).reset_index()


def _rows(model, made):
    """A row for each term of a fitted model; none where it is not determined."""
    if made is None:
        return []
    return [
        _row(model, COVARIATES.get(name, name), made.interval(name), made, left)
        for name, left in zip(made.names, made.degrees_of_freedom, strict=True)
    ]


def _row(model, term, interval, made, left):
    row = {"model": model, "term": term} | dict(
        zip(("estimate", "estimate_low", "estimate_high"), interval, strict=True)
    )
    deviations = {"between_pairs": math.sqrt(made.between), "within_pairs": math.sqrt(made.within)}
    return row | deviations | {"degrees_of_freedom": int(left), "pairs": made.groups, "effects": made.effects}


def _points(made, effects):
    """A row for each of POINTS that lies among the pairs' distances: beyond them, a line is a guess."""
    if made is None:
        return []
    low, high = effects["kl_sft0_soup"].min(), effects["kl_sft0_soup"].max()
    left = min(made.degrees_of_freedom[[made.names.index(name) for name in LINE]])
    return [_row("read off", f"at {kl:g} nats", _at(made, kl), made, left) for kl in POINTS if low <= kl <= high]


def _at(made, kl):
    """(value, low, high) of the line at a KL(sft0 ‖ soup), at the mean kl_coef, by bounds that hold at all at once."""
    return made.line({INTERCEPT: 1.0, DISTANCE: math.sqrt(max(kl, 0))}, LINE)


def smallest_effect(study, response):
    """The smallest difference that would matter, as the study's claims say of salsa; nan where none does."""
    measure = CLAIMED.get(response, response)
    sizes = (claim.smallest_effect for claim in study.config.claims.values() if claim.measure == measure)
    return next(sizes, math.nan)


def figure(study, tables):
    """The map: the difference of each SFT pair against its KL(sft0 ‖ soup), the line, its band, and ±δ."""
    frame = style.measured(tables, "pairs", "kl_sft0_soup")
    main = main_contrast(frame) if len(frame) else None
    responses = [name for name in LABELS if main and len(effects_of(frame, main, name))]
    if not responses:
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
    for kl_coef, colour in _colours(effects).items():
        rows = effects[effects["kl_coef"] == kl_coef]
        axis.scatter(rows["kl_sft0_soup"], rows[response], s=14, color=colour, alpha=0.8, linewidths=0, zorder=3)
    places, line = _band(effects, response)
    if line is not None:
        axis.plot(places, line[:, 0], color="black", linewidth=1.3, zorder=4)
        axis.fill_between(places, line[:, 1], line[:, 2], color="black", alpha=0.12, linewidth=0, zorder=2)
    style.sqrt_axis(axis, effects["kl_sft0_soup"], gap=0.2)
    shown = [] if line is None else line[~np.isnan(line)]
    axis.set_ylim(style.limits([*effects[response], *shown, 0.0]))
    axis.set_xlabel("KL(sft0 ‖ soup), nats  (√ scale)")


def _band(effects, response):
    """(KL (GRID,), value, low and high of the line there (GRID, 3)), between the nearest and the farthest pair."""
    made = distance(effects, response)
    if made is None:
        return None, None
    ends = np.sqrt([max(effects["kl_sft0_soup"].min(), 0), effects["kl_sft0_soup"].max()])
    places = np.linspace(*ends, GRID) ** 2
    return places, np.array([_at(made, kl) for kl in places])


def _colours(frame):
    kl_coefs = sorted(frame["kl_coef"].unique())
    return {kl_coef: COLOURS[place % len(COLOURS)] for place, kl_coef in enumerate(kl_coefs)}


def _legend(figure, frame, main):
    rows = frame[frame["candidate"] == main[0]]
    entries = [style.mark(f"a pair, kl_coef {k:g}", size=4, color=colour) for k, colour in _colours(rows).items()]
    entries.append(style.mark("line and its 95 % band", None, color="black", linestyle="-"))
    entries.append(style.mark("±δ: too small to matter", "s", 7, color="#ececec"))
    style.below(figure, entries)


def caption(study, tables):
    frame, rows = tables["pairs"], tables["regimes"]
    main = main_contrast(frame)
    number = frame["replicate"].nunique()
    text = f"{' minus '.join(main)} over {number} SFT pairs of {len(study.config.regimes)} recipes."
    others, response = rows[rows["model"].str.startswith("beside")], _first_response(rows)
    for row in others[others["response"] == response].to_dict("records"):
        if row["term"] == MEAN:
            bounds = _interval((row["estimate"], row["estimate_low"], row["estimate_high"]))
            pair = f"{row['candidate']} minus {row['baseline']}"
            text += f" On the same {row['pairs']} pairs {pair} differs from that by {bounds} in {LABELS[response][0]}."
    return text


def _first_response(rows):
    return next((name for name in LABELS if name in set(rows["response"])), None)


def reading(study, tables):
    """What the map supports: the slope of each response, and where its band lies."""
    frame = style.measured(tables, "pairs", "kl_sft0_soup")
    if frame.empty:
        return ""
    main = main_contrast(frame)
    texts = [
        verdict(effects_of(frame, main, response), response, smallest_effect(study, response))
        for response in LABELS
        if len(effects_of(frame, main, response))
    ]
    return " ".join(["A dot is an SFT pair at a kl_coef; the band holds for the whole line at once.", *texts])


def verdict(effects, response, smallest):
    """A sentence on the slope of a response over SFT pairs, and on where its band decides something."""
    made, words = distance(effects, response), LABELS[response]
    name = words[0][0].upper() + words[0][1:]
    if made is None or not math.isfinite(made.interval(DISTANCE)[1]):
        return f"{name}: too few pairs for a line."
    slope = made.interval(DISTANCE)
    rises = "rises with" if slope[1] > 0 else "falls with" if slope[2] < 0 else "shows no slope over"
    places, band = _band(effects, response)
    parts = [f"{where} {_ranges(places, mask)}" for where, mask in _regions(band, smallest)]
    ends = f"{selection.number(places[0])} and {selection.number(places[-1])} nats"
    decided = f"its band lies {', '.join(parts)}" if parts else f"its band decides nothing between {ends}"
    return f"{name}: the difference {rises} the soup's distance ({_interval(slope)} per √nat); {decided}."


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
