"""The studies of a sweep side by side: tables/comparison.*, tables/against_ppo.*, figures/comparison.*, comparison.md.

It reads what the studies wrote (their manifests, tables/rewards.csv and tables/win_rates.csv) and computes nothing
anew but counts: intervals are those of the studies, and are not corrected for how many points were looked at.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from salsa.report import formats, style
from salsa.report import words as wording
from salsa.report.frames import BOUNDS
from salsa.report.sections import COLLAPSED
from salsa.workflow import config, runs, stages

VERSION = 3
MEASURES = {"gold_reward": style.GOLD, "reward": style.PROXY, "kl_to_sft0": style.KL_SFT0}
SFT0 = "sft0"
WIN_RATE = "win_rate"
ONE_COLUMN = 3  # panels that stand below each other
AGAINST = (
    "Adjusted win rates against plain PPO at the same kl_coef, with 95 % intervals over prompts, conditional on the "
    "models; none is corrected for how many there are."
)


def build(settings, parents, output, execution):
    """The stage. Parents: study/<i>, the study of the point i of the settings; two points may have one study."""
    settings = config.ComparisonSettings(wording.cleaned(settings.points))
    studies = [parents[f"study/{place}"] for place in range(len(settings.points))]
    frame = comparison(settings.points, studies)
    duels = [row for study in dict.fromkeys(studies) for row in head_to_head(study)]
    against = against_plain(settings.points, studies)
    looks = {arm: look for study in studies for arm, look in arm_looks(study).items()}
    caption = _caption(settings.points, frame)
    shown = frame.drop(columns=[_column(key) for key in _keys(settings.points)])  # `point` says them to a reader
    shown = shown[sorted(shown, key=lambda column: column != COLLAPSED)]  # first, where no reader misses it
    shown, duel = formats.readable(shown), formats.readable(against.drop(columns="study"))
    formats.write(frame, shown, output / "tables", "comparison", caption)
    formats.write(against, duel, output / "tables", "against_ppo", AGAINST)
    style.save(figure(settings.points, frame, looks), output / "figures", "comparison")
    said = collapsed(frame) + statements(settings.points, frame, duels, plain_arms(studies))
    lines = "\n".join(f"- {wording.markdown(line)}" for line in said)
    parts = [
        "# Comparison of the points of a sweep",
        lines,
        "## Table",
        wording.markdown(caption),
        formats.markdown(shown),
        "## Against plain PPO",
        AGAINST,
        formats.markdown(duel),
        "## Figure",
        "Bars are 95 % intervals: over replicates, for rewards and KL; over prompts, for win rates.",
        "![Comparison](figures/comparison.png)",
        " · ".join(["[PDF](figures/comparison.pdf)", "[CSV](tables/comparison.csv)", "[TeX](tables/comparison.tex)"]),
    ]
    runs.write_atomically(output / "comparison.md", "\n\n".join(parts) + "\n")
    return {"points": len(settings.points), "studies": len(set(studies))}


def label(point):
    """A point in words: ppo.learning_rate=1e-4, sft.epochs=2."""
    return ", ".join(f"{key}={value}" for key, value in point.items())


def _keys(points):
    return list(dict.fromkeys(key for point in points for key in point))


def comparison(points, studies):
    """One row a point x (sft0, sft1, their soup, and each arm at each of its kl_coefs).

    Columns: point; each swept key; arm, kl_coef, replicates; gold_reward, reward and kl_to_sft0, each with its bounds
    over replicates (_low, _high); win_rate_<judge>_<benchmark>, the adjusted win rate against sft0, with its bounds
    over prompts; collapsed, where a policy has; study, the path of the study below the results.
    """
    keys = _keys(points)
    rows = []
    for point, study in zip(points, studies, strict=True):
        rates = _table(study, "win_rates")
        for _, line in _table(study, "rewards").iterrows():
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
    if COLLAPSED not in frame:
        return []
    own = frame[frame[COLLAPSED] != ""]
    return [
        f"Warning: {row['point']}: {row[COLLAPSED]} at kl_coef {row['kl_coef']:g}" for row in own.to_dict("records")
    ]


def _column(key):
    """A swept key as the name of a column: the group `arm` and the axis `replicates` are not what those names say."""
    return f"{key} (swept)" if key in ("arm", "replicates", "study", "point") else key


def _win_rates(rates):
    found = {}
    for _, line in rates[rates["baseline"] == SFT0].iterrows():
        name = f"{WIN_RATE}_{line['judge']}_{line['benchmark']}"
        found |= {name: line["adjusted_win_rate"], f"{name}_low": line["ci_low"], f"{name}_high": line["ci_high"]}
    return found


def panels(frame):
    """Column -> the label of its axis, of every measure that some row has."""
    names = [name for name in frame if name.startswith(WIN_RATE) and not name.endswith(("_low", "_high"))]
    rates = {name: f"win rate against sft0\n{name.removeprefix(WIN_RATE + '_').replace('_', ' ')}" for name in names}
    return {name: text for name, text in (MEASURES | rates).items() if frame[name].notna().any()}


def head_to_head(study):
    """The rows of a study's win rates against plain PPO, as dictionaries."""
    rates = _table(study, "win_rates")
    return rates[rates["baseline"].isin(plain_arms([study]))].to_dict("records")


def against_plain(points, studies):
    """One row a point, judge, benchmark, arm and kl_coef: the adjusted win rate against plain PPO, with its bounds.

    Columns: point, judge, benchmark, arm, kl_coef, adjusted_win_rate, ci_low, ci_high, prompts, replicates, study.
    """
    names = ["point", "judge", "benchmark", "arm", "kl_coef", "adjusted_win_rate", "ci_low", "ci_high"]
    names += ["prompts", "replicates", "study"]
    rows = [
        row | {"point": label(point), "arm": row["candidate"], "study": f"{study.parent.name}/{study.name}"}
        for point, study in zip(points, studies, strict=True)
        for row in head_to_head(study)
    ]
    return pd.DataFrame(rows, columns=names)


def plain_arms(studies):
    """The names of the arms that are plain PPO: sft0 is their start and their reference."""
    return {policy["arm"] for study in studies for policy in _policies(study) if policy["alpha"] == "0"}


def _policies(study):
    return runs.manifest_of(study)["settings"]["policies"]


def arm_looks(study):
    """Arm -> how it is drawn, in the study's order."""
    alphas = {policy["arm"]: policy["alpha"] for policy in _policies(study)}
    return {arm: style.look(arm, None if alpha is None else float(Fraction(alpha))) for arm, alpha in alphas.items()}


def statements(points, frame, duels, plain):
    """Sentences that the numbers support, as a list."""
    measure = "gold_reward" if frame["gold_reward"].notna().any() else "reward"
    words = measure.replace("_", " ") if measure == "gold_reward" else "proxy reward"
    trained = frame[frame["kl_coef"].notna()]
    lines = []
    for arm in dict.fromkeys(trained["arm"]):
        if arm not in plain:
            lines += _against_plain(arm, trained, measure, words, plain)
            lines += _won(arm, [row for row in duels if row["candidate"] == arm])
    known = trained.dropna(subset=measure)
    if len(known):
        best = known.loc[known[measure].idxmax()]
        lines.append(
            f"The highest {words} is {formats.number(best[measure])}, of {best['arm']} at {best['point']} (kl_coef "
            f"{best['kl_coef']:g}): the best of {len(known)}, chosen by the numbers that it is shown with, so expect "
            "less of it in new replicates."
        )
    return lines


def _against_plain(arm, trained, measure, words, plain):
    """At how many points an arm's mean is above plain PPO's, and by how much."""
    keys = ["point", "kl_coef"]
    own, theirs = trained[trained["arm"] == arm], trained[trained["arm"].isin(plain)]
    both = own.merge(theirs, on=keys, suffixes=("", "_plain")).dropna(subset=[measure, f"{measure}_plain"])
    if both.empty:
        return []
    gains = both[measure] - both[f"{measure}_plain"]
    return [
        f"{arm}: mean {words} above plain PPO's in {int((gains > 0).sum())} of {len(both)} pairs of one point and "
        f"kl_coef, by {formats.number(gains.min())} to {formats.number(gains.max())}; whether one of these differences "
        "is more than chance, its study's claims.md says."
    ]


def _won(arm, duels):
    known = [row for row in duels if not math.isnan(row["adjusted_win_rate"])]
    if not known:
        return []
    above, below = sum(row["ci_low"] > 0.5 for row in known), sum(row["ci_high"] < 0.5 for row in known)
    return [
        f"{arm} judged against plain PPO: the interval of the adjusted win rate lies above ½ in {above} and below ½ in "
        f"{below} of {len(known)} comparisons (of a point, kl_coef, judge and benchmark); each is conditional on its "
        f"models, and about {0.05 * len(known):.1g} of {len(known)} would exclude ½ by chance."
    ]


def _caption(points, frame):
    keys = _keys(points)
    return (
        f"{len(points)} points of a sweep over {', '.join(keys)}: means over replicates with 95 % t intervals, and "
        "adjusted win rates against sft0 with 95 % intervals over prompts, conditional on the models; none is "
        "corrected for the number of points."
    )


def figure(points, frame, looks):
    """One panel a measure, the points along x in their order; arms by colour, kl_coefs by size, sft0 as a star."""
    with style.own_style():
        shown = panels(frame)
        columns = 1 if len(shown) <= ONE_COLUMN else 2
        rows = max(math.ceil(len(shown) / columns), 1)
        drawn = Figure(figsize=(style.WIDTH, min(1.9 * rows + 1.0, style.TALLEST)), layout="constrained")
        axes = drawn.subplots(rows, columns, squeeze=False, sharex=True).flatten()
        order = [label(point) for point in points]
        kl_coefs = sorted(frame["kl_coef"].dropna().unique())
        sizes = dict(zip(kl_coefs, np.linspace(0.65, 1.5, len(kl_coefs)) if len(kl_coefs) > 1 else [1.0], strict=True))
        for axis, (name, text) in itertools.zip_longest(axes, shown.items(), fillvalue=(None, None)):
            if name is None:
                axis.set_visible(False)
                continue
            _panel(axis, frame.dropna(subset=name), name, order, looks, sizes)
            axis.set_ylabel(text)
        for axis in axes[max(len(shown) - columns, 0) : len(shown)]:
            _name_points(axis, points)
        _legend(drawn, frame, looks, sizes)
        return drawn


def _panel(axis, frame, name, order, looks, sizes):
    series = [(arm, kl_coef) for arm in looks for kl_coef in sizes]
    series = [key for key in series if ((frame["arm"] == key[0]) & (frame["kl_coef"] == key[1])).any()]
    places = {key: 0.0 if len(series) == 1 else 0.6 * (i / (len(series) - 1) - 0.5) for i, key in enumerate(series)}
    for (arm, kl_coef), offset in places.items():
        rows = frame[(frame["arm"] == arm) & (frame["kl_coef"] == kl_coef)]
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


def _legend(drawn, frame, looks, sizes):
    handles = [
        Line2D([], [], linestyle="none", marker=look.marker, color=look.colour, label=arm)
        for arm, look in looks.items()
    ]
    if len(sizes) > 1:
        handles += [
            Line2D([], [], linestyle="none", marker="o", markersize=5 * size, color=style.DARK, label=f"kl_coef {kl:g}")
            for kl, size in sizes.items()
        ]
    if (frame["arm"] == SFT0).any():
        handles.append(Line2D([], [], linestyle="none", marker="*", markersize=8, color="black", label=SFT0))
    drawn.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))


if __name__ == "__main__":
    runs.command(stages.COMPARISON, build, VERSION, __doc__)
