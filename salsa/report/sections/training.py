"""What happened over training: curves of every measure, and lengths and ends."""

import functools
import math

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from salsa.evaluate import flat, statistics
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
MAIN = ("reward", "gold_reward", "kl_to_sft0")  # what is drawn where arms need several panels


def training_curves(study, tables):
    """Curves of training at the claims' kl_coef: means over replicates, and below them, differences to plain PPO.

    At most `style.PANEL` arms stand in a panel. Of more arms, MAIN alone are drawn, in further rows.
    """
    groups = curve_groups(study)
    if not groups:
        return None
    measures = drawn_measures(study, groups)
    with_differences = style.has_intervals(study) and any(_compared(study, arms) for arms in groups)
    blocks = [(arms, names) for arms in groups for names in _threes(list(measures))]
    rows = len(blocks) * (1 + with_differences)
    figure, axes = style.panels(rows, 3, height=min(1.75, (style.TALLEST - 1) / rows))
    for place, (arms, names) in enumerate(blocks):
        own = axes[place * rows // len(blocks) : (place + 1) * rows // len(blocks)]
        for column, name in enumerate(names):
            _draw_measure(own[:, column], study, arms, name, measures[name])
        for axis in own[:, len(names) :].flat:
            axis.remove()
    drawn = {arm for arms in groups for arm in arms}
    shade = Patch(color=style.PALE, alpha=0.35, label="the flat part, over which claims average")
    style.legend(figure, study, arms=drawn, kl_coefs=(), markers=False, lines=True, extra=(shade,))
    return figure


def _threes(names):
    return [names[start : start + 3] for start in range(0, len(names), 3)]


def curve_groups(study):
    """The arms that are sampled in training, in groups that a panel can show."""
    arms = [arm for arm in study.arms if arm not in unsampled(study)]
    return style.arm_panels(arms, {*study.plain_arms.values()}) if arms else []


def drawn_measures(study, groups):
    """Column -> words of the measures that are known: all, or of many arms the main ones."""
    frame, measures = study.frames.trajectories, dict(MEASURES)
    changes = (
        frame.groupby(["name", "replicate"])["current_kl_coef"].nunique() > 1 if "current_kl_coef" in frame else ()
    )
    if any(changes):
        measures["current_kl_coef"] = "kl_coef"
    wanted = MAIN if len(groups) > 1 else measures
    return {name: label for name, label in measures.items() if name in wanted and style.known(frame, name)}


def _draw_measure(axes, study, arms, name, label):
    """The means of arms in the first axis, and in the second, if there is one, their differences to plain PPO."""
    for arm in arms:
        _draw_band(axes[0], style.looks(study)[arm], curves_of(study, arm, name))
    axes[0].set_title(label, loc="left")
    for arm, plain in _compared(study, arms).items() if len(axes) > 1 else ():
        difference = (curves_of(study, arm, name) - curves_of(study, plain, name)).dropna(how="all", axis=1)
        _draw_band(axes[1], style.looks(study)[arm], difference.dropna())
    if len(axes) > 1:
        axes[1].axhline(0, color=style.DARK, linewidth=0.8)
        axes[1].set_title("minus plain PPO's", loc="left", fontsize=7.5, color=style.GREY)
    for axis in axes:
        _shade_flat(axis, study)
        axis.yaxis.set_major_locator(MaxNLocator(4))
        _iterations(axis)
        axis.set_xlabel("iteration of training" if axis is axes[-1] else "")


def _compared(study, arms):
    """Arm -> its plain anchor, of the arms that have another one which is sampled in training."""
    missing = unsampled(study)
    anchors = {arm: study.plain_of(arm) for arm in arms}
    return {arm: plain for arm, plain in anchors.items() if plain not in (None, arm) and plain not in missing}


def curves_of(study, arm, name):
    """A measure of an arm at the claims' kl_coef (iterations × replicates): the iterations that all replicates have."""
    rows, kl_coef = study.frames.trajectories, style.claim_kl_coefs(study)[arm]
    rows = selection.seed_means(rows[(rows["arm"] == arm) & (rows["kl_coef"] == kl_coef)], ["iteration"], [name])
    return rows.pivot(index="iteration", columns="replicate", values=name).dropna()


def _draw_band(axis, look, curves):
    """The mean over replicates (iterations × replicates), and the 95 % t interval of it where there are three."""
    if curves.empty:
        return
    axis.plot(curves.mean(axis=1), color=look.colour, linestyle=look.line, linewidth=1.3)
    if len(curves.columns) > 2:
        bounds = [statistics.replicate_interval(row)[1:] for row in curves.to_numpy()]
        axis.fill_between(curves.index, *zip(*bounds, strict=True), color=look.colour, alpha=0.16, linewidth=0)


def _shade_flat(axis, study):
    """The part of training over which claims average."""
    iterations = sorted(study.frames.trajectories["iteration"].unique())
    part = flat.last(iterations, study.config.evaluate.flat_share)
    if part:
        axis.axvspan(part[0], iterations[-1], color=style.PALE, alpha=0.35, linewidth=0, zorder=0)


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
        first.set_ylim(bottom=0 if name == "response_length" else None)
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
    kl_coefs = style.claim_kl_coefs(study)
    drawn = [arm for arms in curve_groups(study) for arm in arms]
    used = sorted({kl_coefs[arm] for arm in drawn})
    return (
        f"Training of {len(set(drawn))} arms at the kl_coef of the claims ({words.listed(used)}), sampled before each "
        f"iteration's update: means over {words.replicates_by_arm(study)}; gold reward is that of the kept "
        f"rollouts.{_without_curves(study)}"
    )


def curves_reading(study, tables):
    groups = curve_groups(study)
    if not groups:
        return ""
    bands = "no bands, which take three replicates"
    if style.has_intervals(study):
        bands = "bands are 95 % t intervals over replicates"
        if any(_compared(study, arms) for arms in groups):
            bands += "; below stand the differences to plain PPO, paired by replicate"
    share = f"{study.config.evaluate.flat_share:.0%}"
    return f"Lines are means, {bands}; shaded is the last {share} of training, over which claims average."


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
