"""The studies of a sweep side by side: tables/comparison.*, tables/against_ppo.*, figures/comparison.*, comparison.md.

It reads what the studies wrote (their manifests, tables/rewards.csv and tables/win_rates.csv) and computes nothing
anew but counts: intervals are those of the studies, and are not corrected for how many points were looked at.
"""

import math
from fractions import Fraction

import pandas as pd

from salsa.report import formats, style, words
from salsa.report.frames import BOUNDS
from salsa.report.sections import COLLAPSED
from salsa.workflow import config, policies, runs, schema, stages

VERSION = 4
MEASURES = {"gold_reward": style.GOLD, "reward": style.PROXY, "kl_to_sft0": style.KL_SFT0}
SFT0 = "sft0"
WIN_RATE = "win_rate"
ONE_COLUMN = 3  # panels that stand below each other
AGAINST_PLAIN = ["point", "judge", "benchmark", "arm", "kl_coef", "adjusted_win_rate", "ci_low", "ci_high", "prompts",
                 "replicates", "study"]  # fmt: skip
CAPTION = (
    "Adjusted win rates against the plain anchor at the same kl_coef, with 95 % intervals over prompts, conditional on "
    "the models; none is corrected for how many there are."
)


def build(settings, parents, output, execution):
    """The stage. Parents: study/<i>, the study of the point i of the settings; two points may have one study."""
    settings = config.ComparisonSettings(words.cleaned(settings.points))
    points, studies = settings.points, [parents[f"study/{place}"] for place in range(len(settings.points))]
    frame, against = comparison(points, studies), against_plain(points, studies)
    duels = [row for study in dict.fromkeys(studies) for row in head_to_head(study)]
    caption = _caption(points)
    readable = frame.drop(columns=[_column(key) for key in _keys(points)])  # `point` says them to a reader
    readable = readable[sorted(readable, key=lambda column: column != COLLAPSED)]  # first, where no reader misses it
    readable, readable_duels = formats.readable(readable), formats.readable(against.drop(columns="study"))
    formats.write(frame, readable, output / "tables", "comparison", caption)
    formats.write(against, readable_duels, output / "tables", "against_ppo", CAPTION)
    looks = {arm: look for study in studies for arm, look in arm_looks(study).items()}
    style.save(figure(points, frame, looks), output / "figures", "comparison")
    text = words.template("comparison.md.jinja", autoescape=False).render(
        statements=collapsed(frame) + statements(frame, duels, plain_arms(studies)),
        caption=caption,
        points=formats.markdown(readable),
        against=CAPTION,
        duels=formats.markdown(readable_duels),
        reports=[(label(point), study.name) for point, study in zip(points, studies, strict=True)],
    )
    runs.write_atomically(output / "comparison.md", text)
    return {"points": len(points), "studies": len(set(studies))}


def label(point):
    """A point in words: ppo.learning_rate=1e-4, sft.epochs=2."""
    return ", ".join(f"{key}={value}" for key, value in point.items())


def _keys(points):
    return list(dict.fromkeys(key for point in points for key in point))


def comparison(points, studies):
    """One row per point × (sft0, sft1, their soup, and each arm at each of its kl_coefs).

    Columns: point; each swept key; arm, kl_coef, replicates; gold_reward, reward and kl_to_sft0, each with its bounds
    over replicates (_low, _high); win_rate_<judge>_<benchmark>, the adjusted win rate against sft0, with its bounds
    over prompts; collapsed, where a policy has; study, the path of the study below the results.
    """
    keys, rows = _keys(points), []
    for point, study in zip(points, studies, strict=True):
        rates = _table(study, "win_rates")
        for line in _table(study, "rewards").to_dict("records"):
            row = {"point": label(point)} | {_column(key): point.get(key, "") for key in keys}
            row |= {name: line[name] for name in ("arm", "kl_coef", "replicates")}
            row |= {name + bound: line[name + bound] for name in MEASURES for bound in BOUNDS}
            row |= _win_rates(rates[(rates["candidate"] == line["arm"]) & (rates["kl_coef"] == line["kl_coef"])])
            if isinstance(line.get(COLLAPSED), str):
                row[COLLAPSED] = line[COLLAPSED]
            rows.append(row | {"study": f"{study.parent.name}/{study.name}"})
    frame = pd.DataFrame(rows)
    if COLLAPSED in frame:
        frame[COLLAPSED] = frame[COLLAPSED].fillna("")
    return frame[[name for name in frame if name != "study"] + ["study"]]


def _table(study, name):
    return formats.read_csv(study / "tables" / f"{name}.csv")


def collapsed(frame):
    """A sentence for each point, arm and kl_coef of which a policy has collapsed."""
    rows = frame[frame[COLLAPSED] != ""].to_dict("records") if COLLAPSED in frame else []
    return [f"Warning: {row['point']}: {row[COLLAPSED]} at kl_coef {row['kl_coef']:g}" for row in rows]


def _column(key):
    """The column of a swept key: the group `arm` and the axis `replicates` are not what columns of these names hold."""
    return f"{key} (swept)" if key in ("arm", "replicates", "study", "point") else key


def _win_rates(rates):
    columns = {}
    for line in rates[rates["baseline"] == SFT0].to_dict("records"):
        name = f"{WIN_RATE}_{line['judge']}_{line['benchmark']}"
        columns |= {name: line["adjusted_win_rate"], f"{name}_low": line["ci_low"], f"{name}_high": line["ci_high"]}
    return columns


def panels(frame):
    """Column -> the label of its axis, of every measure that some row has."""
    names = [name for name in frame if name.startswith(WIN_RATE) and not name.endswith(("_low", "_high"))]
    rates = {name: f"win rate against sft0\n{name.removeprefix(WIN_RATE + '_').replace('_', ' ')}" for name in names}
    return {name: text for name, text in (MEASURES | rates).items() if frame[name].notna().any()}


def head_to_head(study):
    """The rows of a study's win rates against the plain anchor, as dictionaries."""
    plain = plain_arms([study])
    return [row for row in _table(study, "win_rates").to_dict("records") if row["baseline"] == plain[row["candidate"]]]


def against_plain(points, studies):
    """One row per point, judge, benchmark, arm and kl_coef: its rate against the plain anchor, and bounds."""
    rows = [
        row | {"point": label(point), "arm": row["candidate"], "study": f"{study.parent.name}/{study.name}"}
        for point, study in zip(points, studies, strict=True)
        for row in head_to_head(study)
    ]
    return pd.DataFrame(rows, columns=AGAINST_PLAIN)


def plain_arms(studies):
    """Arm -> the arm of its plain anchor, or None; see `policies.plain_arms`."""
    arms = {}
    for study in studies:
        values = schema.from_dict(config.Config, runs.manifest_of(study)["settings"]["config"])
        arms |= policies.plain_arms(policies.Composed(values, policies.expanded_arms(values)))
    return arms


def _policies(study):
    return runs.manifest_of(study)["settings"]["policies"]


def arm_looks(study):
    """Arm -> how it is drawn, in the study's order."""
    alphas = {policy["arm"]: policy["alpha"] for policy in _policies(study)}
    return {arm: style.look(arm, None if alpha is None else float(Fraction(alpha))) for arm, alpha in alphas.items()}


def statements(frame, duels, plain):
    """Sentences that the numbers support, as a list."""
    gold = frame["gold_reward"].notna().any()
    measure, name = ("gold_reward", "gold reward") if gold else ("reward", "proxy reward")
    trained = frame[frame["kl_coef"].notna()]
    sentences = []
    for arm in dict.fromkeys(trained["arm"]):
        if plain.get(arm) not in (None, arm):
            sentences += _means_against_plain(arm, trained, measure, name, plain)
            sentences += _duels_against_plain(arm, [row for row in duels if row["candidate"] == arm])
    measured = trained.dropna(subset=measure)
    if len(measured):
        best = measured.loc[measured[measure].idxmax()]
        sentences.append(
            f"The highest {name} is {formats.number(best[measure])}, of {best['arm']} at {best['point']} (kl_coef "
            f"{best['kl_coef']:g}): the best of {len(measured)}, chosen by the numbers that it is shown with, so "
            "expect less of it in new replicates."
        )
    return sentences


def _means_against_plain(arm, trained, measure, name, plain):
    """A sentence that says at how many points an arm's mean is above the plain anchor's, and by how much."""
    rows, plain_rows = trained[trained["arm"] == arm], trained[trained["arm"] == plain[arm]]
    pairs = rows.merge(plain_rows, on=["point", "kl_coef"], suffixes=("", "_plain"))
    gains = (pairs[measure] - pairs[f"{measure}_plain"]).dropna()
    if gains.empty:
        return []
    return [
        f"{arm}: mean {name} above the plain anchor's in {int((gains > 0).sum())} of {len(gains)} pairs of one point "
        f"and kl_coef, by {formats.number(gains.min())} to {formats.number(gains.max())}; whether one of these "
        "differences is more than chance, its study's claims.md says."
    ]


def _duels_against_plain(arm, duels):
    """A sentence that counts the intervals above and below ½ of an arm's win rates against the plain anchor."""
    rated = [row for row in duels if not math.isnan(row["adjusted_win_rate"])]
    if not rated:
        return []
    above, below = sum(row["ci_low"] > 0.5 for row in rated), sum(row["ci_high"] < 0.5 for row in rated)
    return [
        f"{arm} judged against the plain anchor: the interval of the adjusted win rate lies above ½ in {above} "
        f"and below ½ in {below} of {len(rated)} comparisons (of a point, kl_coef, judge and benchmark); each is "
        f"conditional on its models, and about {0.05 * len(rated):.1g} of {len(rated)} would exclude ½ by chance."
    ]


def _caption(points):
    return (
        f"{len(points)} points of a sweep over {', '.join(_keys(points))}: means over replicates with 95 % t "
        "intervals, and adjusted win rates against sft0 with 95 % intervals over prompts, conditional on the models; "
        "none is corrected for the number of points."
    )


def figure(points, frame, looks):
    """One panel per measure, the points along x in their order; arms by colour, kl_coefs by size, sft0 as a star."""
    measures = panels(frame)
    columns = 1 if len(measures) <= ONE_COLUMN else 2
    rows = max(math.ceil(len(measures) / columns), 1)
    sizes = style.sizes(frame["kl_coef"].dropna().unique())
    with style.own_style():
        figure = style.blank(style.WIDTH, min(1.9 * rows + 1.0, style.TALLEST))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        for axis in axes[len(measures) :]:
            axis.set_visible(False)
        for axis, (name, text) in zip(axes, measures.items(), strict=False):
            _draw_panel(axis, frame.dropna(subset=name), name, [label(point) for point in points], looks, sizes)
            axis.set_ylabel(text)
        for axis in axes[max(len(measures) - columns, 0) : len(measures)]:
            _name_points(axis, points)
        handles = [style.mark(arm, look.marker, 6, color=look.colour) for arm, look in looks.items()]
        if len(sizes) > 1:
            handles += [style.mark(f"kl_coef {kl_coef:g}", size=5 * size) for kl_coef, size in sizes.items()]
        if (frame["arm"] == SFT0).any():
            handles.append(style.mark(SFT0, "*", 8, color="black"))
        style.below(figure, handles)
        return figure


def _draw_panel(axis, frame, name, order, looks, sizes):
    series = list(frame.dropna(subset="kl_coef").groupby(["arm", "kl_coef"]))
    series.sort(key=lambda item: (list(looks).index(item[0][0]), item[0][1]))
    for place, ((arm, kl_coef), rows) in enumerate(series):
        offset = 0.0 if len(series) == 1 else 0.6 * (place / (len(series) - 1) - 0.5)
        x = [order.index(point) + offset for point in rows["point"]]
        look, size = looks[arm], sizes[kl_coef]
        axis.plot(x, rows[name], linestyle="none", marker=look.marker, markersize=5 * size, color=look.colour)
        axis.vlines(x, rows[f"{name}_low"], rows[f"{name}_high"], color=look.colour, linewidth=1.2 * size)
    start = frame[frame["arm"] == SFT0]
    axis.plot([order.index(point) for point in start["point"]], start[name], linestyle="none", marker="*",
              markersize=8, color="black")  # fmt: skip
    if name.startswith(WIN_RATE):
        axis.axhline(0.5, color=style.GREY, linewidth=0.8)
    axis.set_xlim(-0.5, len(order) - 0.5)


def _name_points(axis, points):
    keys = _keys(points)
    names = ["\n".join(point.get(key, "–") for key in keys) for point in points]
    axis.set_xticks(range(len(points)), names)
    axis.tick_params(labelbottom=True)
    if max(len(part) for name in names for part in name.split("\n")) * len(points) > 80:
        axis.tick_params(axis="x", labelrotation=45)
    axis.set_xlabel("\n".join(keys))


if __name__ == "__main__":
    stages.COMPARISON.command(build, VERSION, __doc__)
