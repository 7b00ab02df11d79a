"""What happened over training: curves of every measure, and lengths and ends."""

import functools
import math

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from salsa.report import selection, style, words
from salsa.report.sections import Section
from salsa.report.sections.frontier import final

BANDS = 6  # curves whose bands one panel can hold
MEASURES = {  # column of the frame of trajectories -> words
    "reward": style.PROXY,
    "gold_reward": "gold reward of kept rollouts",
    "kl_to_sft0": "KL(policy ‖ sft0), nats",
    "kl_to_reference": "KL(policy ‖ own reference), nats",
    "eos_rate": "end-of-sequence rate",
    "entropy": "entropy, nats per token",
}


def training_curves(study, tables):
    """Curves of training by arm: mean over replicates, and their range; kl_coef where it changes over a run."""
    kl_coefs, measures = style.drawn_kl_coefs(study), dict(MEASURES)
    rows = study.frames.trajectories
    rows = rows[rows["kl_coef"].isin(kl_coefs)]
    if "current_kl_coef" in rows and (rows.groupby(["name", "replicate"])["current_kl_coef"].nunique() > 1).any():
        measures["current_kl_coef"] = "kl_coef"
    figure, axes = style.panels(math.ceil(len(measures) / 3), 3, height=2.2, sharex=True)
    for axis in axes.flat[len(measures) :]:
        axis.remove()
    for axis, (name, label) in zip(axes.flat, measures.items(), strict=False):
        _draw_curves(axis, study, kl_coefs, name)
        axis.set_title(label, loc="left")
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=style.GREY)
    for axis in axes.flat[len(measures) - 3 : len(measures)]:  # the lowest of each column
        _iterations(axis)
    sampled = set(rows["arm"]) - set(unsampled(study))
    style.legend(figure, study, arms=sampled, kl_coefs=kl_coefs, markers=False, lines=True)
    return figure


def unsampled(study):
    """The arms that sample nothing while they are trained, so that no curve can show them."""
    sampled = set(study.frames.trajectories.dropna(subset="kl_to_sft0")["arm"])
    return [arm for arm in study.arms if arm not in sampled]


def _without_curves(study):
    """Why some arms have no curves: a sentence that begins with a space, or ""."""
    arms = ", ".join(unsampled(study))
    return f" Arms that sample nothing while they are trained have no curve: {arms}." if arms else ""


def banded(study, kl_coefs):
    """The arms whose bands are drawn: all, or where they would hide each other, the plain anchors and salsa."""
    return set(study.arms) if len(study.groups(kl_coefs)) <= BANDS else {*study.plain_arms.values(), "salsa"}


def _draw_curves(axis, study, kl_coefs, name):
    """For each arm and kl_coef the mean line over replicates, and their range, over the iterations that all have."""
    rows, shaded = study.frames.trajectories, banded(study, kl_coefs)
    for arm, kl_coef in study.groups(kl_coefs) if name in rows else ():
        curves = rows[(rows["arm"] == arm) & (rows["kl_coef"] == kl_coef)]
        curves = selection.seed_means(curves, ["iteration"], [name])
        curves = curves.pivot(index="iteration", columns="replicate", values=name).dropna()
        if curves.empty:
            continue
        look, width = style.looks(study)[arm], 1.4 * style.sizes(study.kl_coefs)[kl_coef]
        axis.plot(curves.mean(axis=1), color=look.colour, linestyle=look.line, linewidth=width)
        if len(curves.columns) > 1 and arm in shaded:
            low, high = curves.min(axis=1), curves.max(axis=1)
            axis.fill_between(curves.index, low, high, color=look.colour, alpha=0.14, linewidth=0)


def _iterations(axis):
    axis.set_xlabel("iteration of training")
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.tick_params(labelbottom=True)


def lengths_and_ends(study, tables):
    """Response length and end-of-sequence rate: in training, of final policies by kl_coef, and lengths by benchmark.

    A policy that starts away from its reference can lower its summed KL by ending early: at a high kl_coef, lengths
    may go to zero. So the largest kl_coef is always drawn, and lengths begin at 0.
    """
    kl_coefs = style.spread_kl_coefs(study)
    figure = style.blank(style.WIDTH, 6.2 if study.benchmarks else 4.2)
    columns = len(kl_coefs) + 1
    grid = figure.add_gridspec(3 if study.benchmarks else 2, columns)
    measures = (("response_length", "tokens per response"), ("eos_rate", "share that ends"))
    for row, (name, label) in enumerate(measures):
        first = None
        for column in range(columns):
            axis = first = figure.add_subplot(grid[row, column], sharey=first)
            axis.tick_params(labelleft=column == 0)
            if column < len(kl_coefs):
                _draw_curves(axis, study, [kl_coefs[column]], name)
                axis.set_title(f"training, kl_coef {kl_coefs[column]:g}" if row == 0 else "")
                _iterations(axis)
            else:
                _draw_finals(axis, study, tables, name)
                axis.set_title("final policies" if row == 0 else "")
            if column == 0:
                axis.set_ylabel(label)
        first.set_ylim(bottom=0, top=1.03 if name == "eos_rate" else None)
    if study.benchmarks:
        _draw_benchmark_lengths(figure.add_subplot(grid[2, :]), study)
    line = Line2D([], [], color="black", linewidth=1, label="sft0")
    style.legend(figure, study, kl_coefs=kl_coefs, lines=True, extra=(line,))
    return figure


def _draw_finals(axis, study, tables, name):
    """A measure of final policies by kl_coef: mean of each arm, its line, and every replicate; sft0 across."""
    places = {kl_coef: place for place, kl_coef in enumerate(sorted(study.kl_coefs))}
    start = style.measured(tables, "rewards", name)
    for level in start[start["arm"] == "sft0"][name] if len(start) else ():
        axis.axhline(level, color="black", linewidth=1)
    policies = selection.seed_means(study.frames.policies, ["arm", "kl_coef"], [name]).dropna(subset=name)
    count = len(study.arms)
    markersize = 4.5 if count <= style.FEW else 3
    for slot, (arm, look) in enumerate(style.looks(study).items()):
        rows = policies[policies["arm"] == arm]
        rows = rows.assign(x=rows["kl_coef"].map(places) + ((slot + 0.5) / count - 0.5) * 0.7)
        axis.scatter(rows["x"], rows[name], s=7, color=look.colour, marker=look.marker, alpha=0.35, linewidths=0)
        axis.plot(rows.groupby("x")[name].mean(), color=look.colour, marker=look.marker, markersize=markersize,
                  linestyle=look.line, linewidth=0.8)  # fmt: skip
    axis.set_xticks(list(places.values()), [f"{kl_coef:g}" for kl_coef in places])
    axis.set_xlim(-0.6, len(places) - 0.4)
    axis.set_xlabel("kl_coef")
    axis.grid(axis="x", visible=False)


def _draw_benchmark_lengths(axis, study):
    """Mean tokens of final policies' responses on each benchmark, at the kl_coefs that curves show; sft0 across."""
    kl_coefs, width = style.drawn_kl_coefs(study), 0.74
    groups = study.groups(kl_coefs)
    for place, benchmark in enumerate(study.benchmarks):
        sft0 = _mean_tokens([row for k in study.replicates for row in selection.sft0_responses(study, k)], benchmark)
        axis.plot([place - width / 2 - 0.04, place + width / 2 + 0.04], [sft0, sft0], color="black", linewidth=1)
        for slot, ((arm, kl_coef), policies) in enumerate(groups.items()):
            x = place + ((slot + 0.5) / len(groups) - 0.5) * width
            tokens = functools.partial(_policy_tokens, benchmark)
            lengths = list(selection.over_seeds(policies, tokens).values())
            look, size = style.looks(study)[arm], style.sizes(study.kl_coefs)[kl_coef]
            axis.scatter([x] * len(lengths), lengths, s=12 * size**2, color=look.colour, marker=look.marker,
                         alpha=0.4, linewidths=0)  # fmt: skip
            axis.plot(x, np.mean(lengths), marker=look.marker, markersize=5.5 * size, color=look.colour,
                      markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axis.set_xticks(range(len(study.benchmarks)), [name.replace("_", " ") for name in study.benchmarks])
    axis.set_title(f"final policies, by benchmark (kl_coef {words.listed(kl_coefs)})")
    axis.set_ylabel("tokens per response")
    axis.set_ylim(bottom=0)
    axis.grid(axis="x", visible=False)
    axis.set_xlim(-0.6, len(study.benchmarks) - 0.4)


def _policy_tokens(benchmark, policy):
    return _mean_tokens(policy.responses, benchmark)


def _mean_tokens(rows, benchmark):
    tokens = [count for row in rows if row["benchmark"] == benchmark for count in row["tokens"]]
    return float(np.mean(tokens)) if tokens else math.nan


def curves_caption(study, tables):
    kl_coefs, without = style.drawn_kl_coefs(study), unsampled(study)
    drawn = [policy for policy in study.policies if policy.kl_coef in kl_coefs and policy.arm not in without]
    return (
        f"Training of {len(drawn)} policies (kl_coef {words.listed(kl_coefs)}), sampled before each iteration's "
        f"update: line the mean, band the range over {words.replicates_by_arm(study)}; gold reward is that of the kept "
        f"rollouts.{_without_curves(study)}"
    )


def curves_reading(study, tables):
    kl_coefs = style.drawn_kl_coefs(study)
    shaded = [arm for arm in study.arms if arm in banded(study, kl_coefs)]
    if len(study.replicates) == 1 or len(shaded) == len(study.arms):
        return ""
    return f"Of {len(study.groups(kl_coefs))} curves, the ranges of {' and '.join(shaded)} alone are shown."


def lengths_caption(study, tables):
    last = final(tables["frontier"])
    return (
        f"Response length in tokens (kl_coef {words.listed(style.drawn_kl_coefs(study))}), in training and on "
        f"{len(study.benchmarks)} benchmarks; final policies answer the evaluation prompts in "
        f"{words.spread(last['response_length'])} tokens on average.{_without_curves(study)}"
    )


def lengths_reading(study, tables):
    frame = style.measured(tables, "rewards", "response_length")
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
