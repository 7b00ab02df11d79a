"""What happened over training: curves of every measure, and lengths and ends."""

import math

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from salsa.report import selection, style, tables, words
from salsa.report.sections import Section

BANDS = 6  # curves whose bands one panel can hold


def training_curves(study, frames):
    """Curves of training by arm: mean over replicates, and their range; kl_coef where it changes over a run."""
    shown = [
        ("score", style.PROXY),
        ("gold", "gold reward of kept rollouts"),
        ("kl_to_sft0", "KL(policy ‖ sft0), nats"),
        ("kl_to_reference", "KL(policy ‖ own reference), nats"),
        ("eos_rate", "end-of-sequence rate"),
        ("entropy", "entropy, nats a token"),
    ]
    drawn = style.drawn_kl_coefs(study)
    curves = style.groups(study, drawn)
    if any(len({row.get("kl_coef") for row in p.metrics}) > 1 for group in curves.values() for p in group):
        shown.append(("kl_coef", "kl_coef"))
    figure, axes = style.panels(math.ceil(len(shown) / 3), 3, height=2.2, sharex=True)
    for axis in axes.flat[len(shown) :]:
        axis.remove()
    for axis, (name, label) in zip(axes.flat, shown, strict=False):
        _curves(axis, study, curves, name)
        axis.set_title(label, loc="left")
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=style.GREY)
    for axis in axes.flat[max(len(shown) - 3, 0) : len(shown)]:  # the lowest of each column
        _iterations(axis)
    style.legend(figure, study, arms={arm for arm, _ in curves}, kl_coefs=drawn, markers=False, lines=True)
    return figure


def banded(study, curves):
    """The arms whose bands are drawn: all, or where they would hide each other, plain PPO and salsa."""
    return set(study.arms) if len(curves) <= BANDS else {study.plain, "salsa"}


def _curves(axis, study, curves, name):
    shaded = banded(study, curves)
    for (arm, kl_coef), policies in curves.items():
        own = [_gold_curve(p) if name == "gold" else _curve(p, name) for p in policies]
        _band(axis, own, style.look(arm, policies[0].alpha), style.sizes(study)[kl_coef], shaded=arm in shaded)


def _curve(policy, name):
    return {row["iteration"]: row[name] for row in policy.metrics if row.get(name) is not None}


def _gold_curve(policy):
    return {iteration: score for iteration, score in policy.gold.items() if score == score}


def _band(axis, curves, shown, size, shaded):
    """Mean line and range of curves (x -> y) over the x that all have."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if shared:
        values = np.array([[curve[x] for x in shared] for curve in curves])  # (replicates, x)
        axis.plot(shared, values.mean(axis=0), color=shown.colour, linestyle=shown.line, linewidth=1.4 * size)
        if len(curves) > 1 and shaded:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(shared, low, high, color=shown.colour, alpha=0.14, linewidth=0)


def _iterations(axis):
    axis.set_xlabel("PPO iteration")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.tick_params(labelbottom=True)


def lengths_and_ends(study, frames):
    """Response length and end-of-sequence rate: in training, of final policies by kl_coef, and lengths by benchmark.

    A policy that starts away from its reference can lower its summed KL by ending early: at a high kl_coef, lengths
    may go to zero. So the largest kl_coef is always drawn, and lengths begin at 0.
    """
    kl_coefs = style.spread_kl_coefs(study)
    figure = style.blank(style.WIDTH, 6.2 if study.benchmarks else 4.2)
    columns = len(kl_coefs) + 1
    grid = figure.add_gridspec(3 if study.benchmarks else 2, columns)
    measures = (("response_length", "tokens a response"), ("eos_rate", "share that ends"))
    for row, (name, label) in enumerate(measures):
        first = None
        for column in range(columns):
            axis = first = figure.add_subplot(grid[row, column], sharey=first)
            axis.tick_params(labelleft=column == 0)
            if column < len(kl_coefs):
                _curves(axis, study, style.groups(study, [kl_coefs[column]]), name)
                axis.set_title(f"training, kl_coef {kl_coefs[column]:g}" if row == 0 else "")
                _iterations(axis)
            else:
                _finals(axis, study, frames, name)
                axis.set_title("final policies" if row == 0 else "")
            if column == 0:
                axis.set_ylabel(label)
        first.set_ylim(bottom=0, top=1.03 if name == "eos_rate" else None)
    if study.benchmarks:
        _benchmark_lengths(figure.add_subplot(grid[2, :]), study)
    line = Line2D([], [], color="black", linewidth=1, label="sft0")
    style.legend(figure, study, kl_coefs=kl_coefs, lines=True, extra=(line,))
    return figure


def _finals(axis, study, frames, name):
    """A measure of final policies by kl_coef: mean of each arm, its line, and every replicate; sft0 across."""
    places = {kl_coef: place for place, kl_coef in enumerate(sorted(study.kl_coefs))}
    start = style.measured(frames, "rewards", name)
    for level in start[start["arm"] == "sft0"][name] if len(start) else ():
        axis.axhline(level, color="black", linewidth=1)
    count = len(study.arms)
    for slot, (arm, shown) in enumerate(style.looks(study).items()):
        x, means = [], []
        for kl_coef, policies in ((k, study.of(arm=arm, kl_coef=k)) for k in places):
            values = [p.evaluation[name] for p in policies if p.evaluation.get(name) is not None]
            if values:
                x.append(places[kl_coef] + ((slot + 0.5) / count - 0.5) * 0.7)
                means.append(np.mean(values))
                axis.scatter([x[-1]] * len(values), values, s=7, color=shown.colour, marker=shown.marker, alpha=0.35,
                             linewidths=0)  # fmt: skip
        small = 4.5 if count <= style.FEW else 3
        axis.plot(x, means, color=shown.colour, marker=shown.marker, markersize=small, linestyle=shown.line,
                  linewidth=0.8)  # fmt: skip
    axis.set_xticks(list(places.values()), [f"{kl_coef:g}" for kl_coef in places])
    axis.set_xlim(-0.6, len(places) - 0.4)
    axis.set_xlabel("kl_coef")
    axis.grid(axis="x", visible=False)


def _benchmark_lengths(axis, study):
    """Mean tokens of final policies' responses on each benchmark, at the kl_coefs that curves show; sft0 across."""
    found, width = style.groups(study, style.drawn_kl_coefs(study)), 0.74
    for place, benchmark in enumerate(study.benchmarks):
        rows = [row for k in study.replicates for row in study.landscape(k).responses if row["model"] == "sft0"]
        sft0 = _mean_tokens(rows, benchmark)
        axis.plot([place - width / 2 - 0.04, place + width / 2 + 0.04], [sft0, sft0], color="black", linewidth=1)
        for slot, ((arm, kl_coef), policies) in enumerate(found.items()):
            x = place + ((slot + 0.5) / len(found) - 0.5) * width
            lengths = [_mean_tokens(policy.responses, benchmark) for policy in policies]
            shown, size = style.look(arm, policies[0].alpha), style.sizes(study)[kl_coef]
            axis.scatter([x] * len(lengths), lengths, s=12 * size**2, color=shown.colour, marker=shown.marker,
                         alpha=0.4, linewidths=0)  # fmt: skip
            axis.plot(x, np.mean(lengths), marker=shown.marker, markersize=5.5 * size, color=shown.colour,
                      markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axis.set_xticks(range(len(study.benchmarks)), [name.replace("_", " ") for name in study.benchmarks])
    coefs = ", ".join(f"{kl_coef:g}" for kl_coef in style.drawn_kl_coefs(study))
    axis.set_title(f"final policies, by benchmark (kl_coef {coefs})")
    axis.set_ylabel("tokens a response")
    axis.set_ylim(bottom=0)
    axis.grid(axis="x", visible=False)
    axis.set_xlim(-0.6, len(study.benchmarks) - 0.4)


def _mean_tokens(rows, benchmark):
    tokens = [count for row in rows if row["benchmark"] == benchmark for count in row["tokens"]]
    return float(np.mean(tokens)) if tokens else math.nan


def curves_caption(study, frames):
    kl_coefs = style.drawn_kl_coefs(study)
    drawn = [policy for policy in study.policies if policy.kl_coef in kl_coefs]
    return (
        f"Training of {len(drawn)} policies (kl_coef {words.listed(kl_coefs)}), sampled before each iteration's "
        f"update: line the mean, band the range over {words.replicates(study)}; gold reward is that of the kept "
        "rollouts."
    )


def curves_reading(study, frames):
    curves = style.groups(study, style.drawn_kl_coefs(study))
    shaded = [arm for arm in study.arms if arm in banded(study, curves)]
    if len(study.replicates) == 1 or len(shaded) == len(study.arms):
        return ""
    return f"Of {len(curves)} curves, the ranges of {' and '.join(shaded)} alone are shown."


def lengths_caption(study, frames):
    last = tables.final(frames["frontier"])
    return (
        f"Response length in tokens (kl_coef {words.listed(style.drawn_kl_coefs(study))}), in training and on "
        f"{len(study.benchmarks)} benchmarks; final policies answer the evaluation prompts in "
        f"{words.spread(last['response_length'])} tokens on average."
    )


def lengths_reading(study, frames):
    frame = style.measured(frames, "rewards", "response_length")
    policies = frame[frame["arm"].isin(study.arms)] if len(frame) else frame
    if policies.empty:
        return ""
    shortest = policies.loc[policies["response_length"].idxmin()]
    start = frame[frame["arm"] == "sft0"]["response_length"]
    text = (
        f"Training at kl_coef {words.listed(style.spread_kl_coefs(study))}; the shortest mean responses are those of "
        f"{shortest['arm']} at kl_coef {shortest['kl_coef']:g}, {selection.number(shortest['response_length'])} tokens"
    )
    return text + (f", where sft0 writes {selection.number(start.iloc[0])}." if len(start) else ".")


CURVES = Section(
    name="training_curves",
    heading="Training and stability",
    place=1,
    figure=training_curves,
    caption=curves_caption,
    reading=curves_reading,
)
LENGTHS = Section(
    name="lengths_and_ends",
    heading="Training and stability",
    place=3,
    figure=lengths_and_ends,
    caption=lengths_caption,
    reading=lengths_reading,
)
