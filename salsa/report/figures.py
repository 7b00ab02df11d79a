"""The figures of a study. Each function takes (study, frames) and returns a Figure; `save` writes PNG and PDF.

An arm has one colour, marker and line style everywhere, so that nothing hangs on colour alone (and colours are safe
for colour-blind readers); an alpha that is no arm has the colour of its place in viridis. kl_coefs differ in size: the
larger, the larger the marker and the thicker the line. Bands and bars are named in the captions.
"""

import math
import random
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, MultipleLocator

from salsa.report import tables

NAMES = ("frontier", "alpha_curve", "training_curves", "response_lengths", "loss_line", "win_rates")


class Look(NamedTuple):
    colour: str
    marker: str
    line: str


LOOKS = {  # Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) but for noise and the last four
    "ppo": Look("#0072B2", "o", "-"),
    "salsa": Look("#D55E00", "s", "-"),
    "other": Look("#009E73", "^", "--"),
    "noise": Look("#565656", "X", ":"),
    "soup_start": Look("#CC79A7", "D", "-."),
    "soup_start_ppo": Look("#56B4E9", "v", ":"),
    "n_soup": Look("#E69F00", "P", "--"),
    "multi_kl": Look("#000000", ">", "-."),
    "ema": Look("#702500", "<", "-"),
    "reset": Look("#9E3DFF", "p", "--"),
    "smaller_beta": Look("#1D0057", "d", "--"),
    "decaying_beta": Look("#9CC45A", "H", "-."),
}
SPARE = ("#6A3D9A", "#B15928", "#1B7837", "#762A83", "#4D4D4D", "#A6761D")
MARKERS = "os^Dv<>P"
LINES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "pdf.fonttype": 42,
}
KL_SFT0 = "KL(policy ‖ sft0), nats a response"
KL_OWN = "KL(policy ‖ own reference), nats a response"
PROXY = "proxy reward (normalised)"
GOLD = "gold reward"


def styled(function):
    """Draw with the project's style, whatever the user's own is."""

    def draw(study, frames):
        with matplotlib.rc_context(STYLE):
            return function(study, frames)

    draw.__doc__ = function.__doc__
    return draw


def save(figure, folder, name):
    """Write <name>.png and .pdf; equal figures give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out once is enough
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def look(arm, alpha=None):
    """How an arm is drawn: fixed where its name is known, by alpha in viridis where it is only an alpha."""
    if arm in LOOKS:
        return LOOKS[arm]
    if alpha is not None and arm.startswith("alpha"):
        place = min(max(alpha, 0), 1)
        place = place**2 * (3 - 2 * place)  # towards the ends, away from the blue of ppo and the green of other
        return Look(matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](place)), "8", "-")
    chosen = random.Random(arm)  # by the name alone, so that other arms change nothing
    return Look(chosen.choice(SPARE), chosen.choice(MARKERS), chosen.choice(LINES))


def _looks(study):
    return {arm: look(arm, study.of(arm=arm)[0].alpha) for arm in study.arms}


def _sizes(study):
    """kl_coef -> how large its markers are and how thick its lines, 1 where it is the only one."""
    ordered = sorted(study.kl_coefs)
    return dict(zip(ordered, np.linspace(0.65, 1.5, len(ordered)) if len(ordered) > 1 else [1.0], strict=True))


def _figure(rows, columns, width=7.0, height=2.6, **options):
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _legend(figure, study, markers=True, lines=False, extra=()):
    """One legend below all panels: colours, markers and line styles say the arm, sizes the kl_coef."""

    def handle(label, shown, size):
        own = {"marker": shown.marker if markers else None, "markersize": 5 * size}
        own |= {"linestyle": shown.line if lines else "none", "linewidth": 1.4 * size}
        return Line2D([], [], color=shown.colour, label=label, **own)

    handles = [handle(arm, shown, 1) for arm, shown in _looks(study).items()]
    drawn = drawn_kl_coefs(study) if lines else study.kl_coefs
    if len(study.kl_coefs) > 1:
        grey = Look("#444444", "o", "-")
        handles += [handle(f"kl_coef {kl_coef:g}", grey, _sizes(study)[kl_coef]) for kl_coef in drawn]
    handles += extra
    columns = min(len(handles), int(figure.get_figwidth() / 1.15))
    length = 2.6 if lines else 1.8  # font sizes
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=length, columnspacing=1.4)


def _known(frame, name):
    return name in frame and frame[name].notna().any()


def _sqrt_axis(axis, values):
    """x as sqrt(KL), from 0: reward gained grows roughly linearly in it (Gao et al. 2023, scaling laws)."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    top = max([float(v) for v in values if v == v], default=1.0) or 1.0
    axis.set_xlim(0, top * 1.12)
    step = _step(top)
    ticks = [step * share for share in (0, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10) if step * share <= top * 1.12]
    axis.set_xticks(_spread(ticks, top), minor=False)
    axis.xaxis.set_major_formatter("{x:g}")


def _step(top):
    return 10 ** math.floor(math.log10(top))


def _spread(ticks, top):
    """Leave out ticks that would stand too close to their left neighbour on the square-root axis."""
    kept = []
    for tick in ticks:
        if not kept or math.sqrt(tick / top) - math.sqrt(kept[-1] / top) > 0.13:
            kept.append(tick)
    return kept


@styled
def frontier(study, frames):
    """Final policies: gold and proxy reward against KL to sft0, and beside it against KL to the own reference."""
    last = tables.final(frames["frontier"])
    rewards = [(name, label) for name, label in (("gold_reward", GOLD), ("reward", PROXY)) if _known(last, name)]
    figure, axes = _figure(len(rewards), 2, sharey="row")
    for row, (reward, label) in enumerate(rewards):
        for column, (kl, kl_label) in enumerate((("kl_to_sft0", KL_SFT0), ("kl_to_reference", KL_OWN))):
            axis = axes[row, column]
            for arm, shown in _looks(study).items():
                _frontier_arm(axis, study, last[last["arm"] == arm], kl, reward, shown)
            if kl == "kl_to_sft0":
                _start_point(axis, study, reward)
            _sqrt_axis(axis, last[kl])
            axis.set_xlabel(kl_label + "  (√ scale)")
        axes[row, 0].set_ylabel(label)
    star = Line2D([], [], marker="*", markersize=9, color="black", linestyle="none", label="sft0")
    single = Line2D([], [], marker="o", markersize=4, alpha=0.4, color="#444444", linestyle="none", label="a replicate")
    mean = Line2D([], [], marker="o", markersize=7, markeredgecolor="white", color="#444444", linestyle="none",
                  label="their mean")  # fmt: skip
    _legend(figure, study, extra=(star, single, mean))
    return figure


def _frontier_arm(axis, study, frame, kl, reward, shown):
    means = []
    for kl_coef, size in _sizes(study).items():
        some = frame[frame["kl_coef"] == kl_coef]
        if len(some):
            axis.scatter(some[kl], some[reward], s=13 * size**2, color=shown.colour, marker=shown.marker, alpha=0.4,
                         linewidths=0)  # fmt: skip
            means.append((some[kl].mean(), some[reward].mean(), size))
    means.sort(key=lambda point: point[0])
    axis.plot([m[0] for m in means], [m[1] for m in means], color=shown.colour, linestyle=shown.line, linewidth=1.1,
              zorder=3)  # fmt: skip
    for x, y, size in means:
        axis.plot(x, y, marker=shown.marker, markersize=7 * size, color=shown.colour, markeredgecolor="white",
                  markeredgewidth=0.8, zorder=4)  # fmt: skip


def _start_point(axis, study, reward):
    values = [line[reward] for line in tables.line_rows(study, 0.0) if line[reward] == line[reward]]
    if values:
        axis.plot(0, np.mean(values), marker="*", markersize=9, color="black", clip_on=False, zorder=5)


@styled
def alpha_curve(study, frames):
    """Proxy reward, gold reward and win rate against sft0 by alpha: SFT soups before PPO, policies after it."""
    frame = frames["alpha_curve"]
    wanted = (("reward", PROXY), ("gold_reward", GOLD), ("win_rate_vs_sft0", "win rate against sft0"))
    panels = [(name, label) for name, label in wanted if _known(frame, name)]
    figure, axes = _figure(1, max(len(panels), 1), height=2.5)
    for axis, (name, label) in zip(axes[0], panels, strict=False):
        soups = frame[frame["kind"] == "sft_soup"].dropna(subset=name)
        axis.plot(soups["alpha"], soups[name], color="#444444", linestyle="-", marker=".", markersize=6)
        axis.fill_between(
            soups["alpha"], soups[f"{name}_low"], soups[f"{name}_high"], color="#444444", alpha=0.15, lw=0
        )
        for index, kl_coef in enumerate(study.kl_coefs):
            _alpha_policies(
                axis, study, frame[(frame["kind"] == "policy") & (frame["kl_coef"] == kl_coef)], name, index
            )
        if name == "win_rate_vs_sft0":
            axis.axhline(0.5, color="#444444", linewidth=0.9, linestyle="--")
            axis.set_ylim(0, 1)  # an interval over few replicates may reach beyond what a rate can be
        axis.set_xlabel("alpha (0: sft0, 1: sft1)")
        axis.set_ylabel(label)
        axis.set_xlim(-0.08, 1.08)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    soup = Line2D([], [], color="#444444", marker=".", markersize=6, label="SFT soup, before PPO")
    policy = Line2D([], [], color="#777777", marker="o", markersize=5, linewidth=0.9, label="policy, after PPO")
    _legend(figure, _OnTheLine(study), extra=(soup, policy))
    return figure


class _OnTheLine:
    """The arms of a study that have an alpha: what a legend of an alpha curve lists."""

    def __init__(self, study):
        self.kl_coefs, self.of = study.kl_coefs, study.of
        self.arms = [arm for arm in study.arms if study.of(arm=arm)[0].alpha is not None]


def _alpha_policies(axis, study, frame, name, index):
    frame = frame.dropna(subset=name)
    count = len(study.kl_coefs)
    x = frame["alpha"] + (index - (count - 1) / 2) * 0.03  # so that bars of several kl_coefs stay apart
    size = _sizes(study)[study.kl_coefs[index]]
    axis.plot(x, frame[name], color="#777777", linewidth=0.9 * size, zorder=2)
    for place, row in zip(x, frame.to_dict("records"), strict=True):
        arm = next(p.arm for p in study.of(alpha=row["alpha"], kl_coef=row["kl_coef"]))
        shown, low, high = look(arm, row["alpha"]), row[f"{name}_low"], row[f"{name}_high"]
        if low == low:
            axis.plot([place, place], [low, high], color=shown.colour, linewidth=1.2 * size, zorder=3)
        axis.plot(place, row[name], color=shown.colour, marker=shown.marker, markersize=5 * size, zorder=4)


@styled
def training_curves(study, frames):
    """Curves of training by arm: mean over replicates, and their range; kl_coef where it changes over a run."""
    panels = [
        ("score", PROXY),
        ("gold", "gold reward of kept rollouts"),
        ("kl_to_sft0", "KL(policy ‖ sft0), nats"),
        ("kl_to_reference", "KL(policy ‖ own reference), nats"),
        ("eos_rate", "end-of-sequence rate"),
        ("entropy", "entropy, nats a token"),
    ]
    if any(len({row.get("kl_coef") for row in p.metrics}) > 1 for group in _groups(study).values() for p in group):
        panels.append(("kl_coef", "kl_coef"))
    figure, axes = _figure(math.ceil(len(panels) / 3), 3, height=2.2, sharex=True)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (name, label) in zip(axes.flat, panels, strict=False):
        for (arm, kl_coef), runs_ in _groups(study).items():
            curves = [_gold_curve(p) if name == "gold" else _curve(p, name) for p in runs_]
            _band(axis, curves, look(arm, runs_[0].alpha), _sizes(study)[kl_coef])
        axis.set_title(label, loc="left")
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="#777777")
    for axis in axes.flat[max(len(panels) - 3, 0) : len(panels)]:  # the lowest of each column
        axis.set_xlabel("PPO iteration")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelbottom=True)
    _legend(figure, study, markers=False, lines=True)
    return figure


def drawn_kl_coefs(study):
    """The kl_coefs that curves show: all, or the first where they would be too many to tell apart."""
    return study.kl_coefs if len(study.kl_coefs) * len(study.arms) <= 6 else study.kl_coefs[:1]


def _groups(study):
    """(arm, kl_coef) -> its replicates' policies, for the kl_coefs that are drawn."""
    found = {(arm, k): study.of(arm=arm, kl_coef=k) for arm in study.arms for k in drawn_kl_coefs(study)}
    return {key: policies for key, policies in found.items() if policies}


def _curve(policy, name):
    return {row["iteration"]: row[name] for row in policy.metrics if row.get(name) is not None}


def _gold_curve(policy):
    return {iteration: score for iteration, score in policy.gold.items() if score == score}


def _band(axis, curves, shown, size):
    """Mean line and range of curves (x -> y) over the x that all have."""
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    if shared:
        values = np.array([[curve[x] for x in shared] for curve in curves])  # (replicates, x)
        axis.plot(shared, values.mean(axis=0), color=shown.colour, linestyle=shown.line, linewidth=1.4 * size)
        if len(curves) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(shared, low, high, color=shown.colour, alpha=0.14, linewidth=0)


@styled
def response_lengths(study, frames):
    """Response length during training, and of final policies on each benchmark."""
    figure, axes = _figure(1, 2, height=2.7, sharey=True)
    for (arm, kl_coef), policies in _groups(study).items():
        curves = [_curve(policy, "response_length") for policy in policies]
        _band(axes[0, 0], curves, look(arm, policies[0].alpha), _sizes(study)[kl_coef])
    axes[0, 0].set_xlabel("PPO iteration")
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0, 0].set_ylabel("tokens a response")
    axes[0, 0].set_title("training", loc="left")
    _final_lengths(axes[0, 1], study)
    line = Line2D([], [], color="black", linestyle="none", marker="_", markersize=14, label="sft0")
    _legend(figure, study, markers=True, lines=True, extra=(line,))
    axes[0, 0].set_ylim(bottom=0)
    return figure


def _final_lengths(axis, study):
    groups, width = _groups(study), 0.74
    for place, benchmark in enumerate(study.benchmarks):
        rows = [row for k in study.replicates for row in study.landscape(k).responses if row["model"] == "sft0"]
        sft0 = _mean_tokens(rows, benchmark)
        axis.plot([place - width / 2 - 0.04, place + width / 2 + 0.04], [sft0, sft0], color="black", linewidth=1)
        for slot, ((arm, kl_coef), policies) in enumerate(groups.items()):
            x = place + ((slot + 0.5) / len(groups) - 0.5) * width
            lengths = [_mean_tokens(policy.responses, benchmark) for policy in policies]
            shown, size = look(arm, policies[0].alpha), _sizes(study)[kl_coef]
            axis.scatter([x] * len(lengths), lengths, s=12 * size**2, color=shown.colour, marker=shown.marker,
                         alpha=0.4, linewidths=0)  # fmt: skip
            axis.plot(x, np.mean(lengths), marker=shown.marker, markersize=5.5 * size, color=shown.colour,
                      markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
    axis.set_xticks(range(len(study.benchmarks)), [_two_lines(name) for name in study.benchmarks])
    axis.set_title("final policies, by benchmark", loc="left")
    axis.grid(axis="x", visible=False)
    axis.set_xlim(-0.6, len(study.benchmarks) - 0.4)


def _two_lines(name):
    """A benchmark's name broken near its middle, so that neighbours do not run into each other."""
    words = name.split("_")
    half = (len(words) + 1) // 2
    return "\n".join(" ".join(part) for part in (words[:half], words[half:]) if part)


def _mean_tokens(rows, benchmark):
    tokens = [count for row in rows if row["benchmark"] == benchmark for count in row["tokens"]]
    return float(np.mean(tokens)) if tokens else math.nan


@styled
def loss_line(study, frames):
    """Validation loss along the line between the SFT models, with the straight line that a barrier rises above."""
    figure, axes = _figure(1, 1, width=3.5, height=2.4)
    axis, count = axes[0, 0], len(study.replicates)
    for index, replicate in enumerate(study.replicates):
        line = study.landscape(replicate).line
        c = matplotlib.colormaps["cividis"](0.1 + 0.75 * index / max(count - 1, 1))
        alphas = [row["alpha"] for row in line]
        axis.plot(alphas, [row["loss"] for row in line], color=c, marker=MARKERS[index % len(MARKERS)], markersize=4,
                  label=f"replicate {replicate}")  # fmt: skip
        axis.plot(alphas, [row["loss_interpolated"] for row in line], color=c, linestyle="--", linewidth=0.9)
    axis.plot([], [], color="#777777", linestyle="--", linewidth=0.9, label="interpolated")
    barriers = frames["gates"]["barrier"].dropna()
    title = (
        f"{'largest ' * (count > 1)}barrier: {barriers.max():.2g} nats a token" if len(barriers) else "no barrier known"
    )
    axis.set_title(title, loc="left")
    axis.set_xlabel("alpha (0: sft0, 1: sft1)")
    axis.set_ylabel("validation loss, nats a token")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.2)
    return figure


@styled
def win_rates(study, frames):
    """Adjusted win rates of arms, a panel a benchmark and baseline, with bootstrap intervals and a line at ½."""
    frame = frames["win_rates"]
    rows = list(dict.fromkeys(zip(frame["judge"], frame["baseline"], strict=True)))
    names = [name for name in study.benchmarks if name in set(frame["benchmark"])]
    if not rows:
        figure, axes = _figure(1, 1, width=3.5, height=1.5)
        axes[0, 0].text(0.5, 0.5, "no verdicts", ha="center", transform=axes[0, 0].transAxes)
        axes[0, 0].set_axis_off()
        return figure
    height = max(1.0, 0.55 + max(0.2, 0.1 * len(study.kl_coefs)) * len(study.arms))
    figure, axes = _figure(len(rows), len(names), width=max(3.5, min(7.0, 1.2 + 2.1 * len(names))), height=height,
                           sharex=True, sharey="row")  # fmt: skip
    for row, (judge, baseline) in enumerate(rows):
        some = frame[(frame["judge"] == judge) & (frame["baseline"] == baseline)]
        arms = [arm for arm in study.arms if arm in set(some["candidate"])]
        for column, benchmark in enumerate(names):
            _win_panel(axes[row, column], study, some[some["benchmark"] == benchmark], arms)
            if row == 0:
                axes[row, column].set_title(benchmark.replace("_", " "))
        axes[row, 0].set_ylabel(f"against {baseline}\n(judge: {judge})")
    for axis in axes[-1]:
        axis.set_xlabel("adjusted win rate")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(MultipleLocator(0.2 if high - low > 0.5 else 0.1 if high - low > 0.2 else 0.05))
    _legend(figure, study)
    return figure


def _win_panel(axis, study, frame, arms):
    offsets = (np.arange(len(study.kl_coefs)) - (len(study.kl_coefs) - 1) / 2) * 0.24
    axis.axvline(0.5, color="#444444", linewidth=0.9, linestyle="--")
    for record in frame.to_dict("records"):
        index = study.kl_coefs.index(record["kl_coef"])
        y = arms.index(record["candidate"]) + offsets[index]
        shown, size = _looks(study)[record["candidate"]], _sizes(study)[record["kl_coef"]]
        axis.plot([record["ci_low"], record["ci_high"]], [y, y], color=shown.colour, linewidth=1.4,
                  solid_capstyle="butt")  # fmt: skip
        axis.plot(record["adjusted_win_rate"], y, color=shown.colour, marker=shown.marker, markersize=3.5 * size)
    axis.set_yticks(range(len(arms)), arms)
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
