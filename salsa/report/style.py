"""What all figures share: an arm's look, sizes, axes, legends, intervals, and how a figure is saved.

An arm has one colour, marker and line style everywhere, so that nothing hangs on colour alone (and colours are safe
for colour-blind readers); an alpha that is no arm has the colour of its place in viridis. kl_coefs differ in size: the
larger, the larger the marker and the thicker the line. A figure of which nothing was measured is not drawn. It is drawn
under matplotlib's own defaults and `STYLE`, never under a user's matplotlibrc, language or time zone.
"""

import contextlib
import itertools
import math
import random
import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from salsa.evaluate import statistics
from salsa.report import selection
from salsa.workflow import config


class Look(NamedTuple):
    colour: str
    marker: str | tuple  # as matplotlib takes them
    line: str | tuple


LOOKS = {  # Okabe and Ito's colours (https://jfly.uni-koeln.de/color/) but for noise and the last seven
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
    "strong_soup": Look("#762A83", "*", "-."),
}
CROSSED = {  # algorithm -> marker and line of an arm that it trains; the colour is that of PPO's arm
    "rloo": ((3, 1, 0), (0, (6, 1.5))),
    "grpo": ((4, 1, 0), (0, (1, 1))),
    "dpo": ((8, 1, 0), (0, (4, 1, 1, 1, 1, 1))),
}
SPARE = ("#6A3D9A", "#B15928", "#1B7837", "#762A83", "#4D4D4D", "#A6761D")
MARKERS = "os^Dv<>P"
LINES = ("-", "--", ":", "-.")
ALARM = "#B00020"
DARK, GREY, PALE = "#444444", "#777777", "#c8c8c8"  # what is no arm: marks, words, the other arms in one's panel
NEUTRAL = Look(DARK, "o", "-")
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
    "text.parse_math": False,  # a name with two dollar signs is a name
}
WIDTH = 7.0  # inches: the text of a printed page
TALLEST = 9.0  # inches
CUT = "a bar that reaches the frame goes on beyond it"
FEW = 5  # arms that one panel can show with all their replicates
PANEL = 6  # arms that one panel can show
KL_SFT0 = "KL(policy ‖ sft0), nats per response"
KL_OWN = "KL(policy ‖ own reference), nats per response"
PROXY = "proxy reward (normalised)"
GOLD = "gold reward"


@contextlib.contextmanager
def own_style():
    """A context in which figures have the project's style, whatever the user's is."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def drawn(function, study, tables):
    """A figure in the project's style, None where nothing was measured; above all panels, which policies collapsed."""
    with own_style():
        figure, marks = function(study, tables), collapsed_policies(study)
        if figure is not None and marks:
            text = textwrap.fill(f"Collapsed policies: {'; '.join(marks)}", int(20 * figure.get_figwidth()))
            figure.suptitle(text, fontsize=7.5, color=ALARM)
        return figure


def save(figure, folder, name):
    """Write <name>.png and .pdf; equal figures give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    with own_style():
        figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
        figure.set_layout_engine("none")  # laid out once is enough
        figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})


def look(arm, alpha=None):
    """How an arm is drawn: fixed where its name is known, by alpha in viridis where it is only an alpha."""
    if arm in LOOKS:
        return LOOKS[arm]
    if alpha is not None and arm.startswith("alpha"):
        place = min(max(alpha, 0), 1)
        place = place**2 * (3 - 2 * place)  # towards the ends, away from the arms' blue and green
        return Look(matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](place)), "8", "-")
    algorithm, _, other = arm.partition("_")  # as arms are called that are crossed with algorithms
    if algorithm in CROSSED:
        return Look(look(other or config.PLAIN).colour, *CROSSED[algorithm])
    generator = random.Random(arm)  # by the name alone, so that other arms change nothing
    return Look(*map(generator.choice, (SPARE, MARKERS, LINES)))


def looks(study):
    """arm -> look, in the study's order; no two of them have one colour and one line."""
    drawn = {}
    for arm in study.arms:
        drawn[arm] = look(arm, study.of(arm=arm)[0].alpha)
        others = {(other.colour, other.line) for name, other in drawn.items() if name != arm}
        if (drawn[arm].colour, drawn[arm].line) in others:
            free = (pair for pair in itertools.product(SPARE, LINES) if pair not in others)
            colour, line = next(free, drawn[arm][::2])  # of more arms than there are, some are alike
            drawn[arm] = Look(colour, drawn[arm].marker, line)
    return drawn


def collapsed_policies(study):
    """The arms and kl_coefs whose policies have collapsed, each with how many of how many."""
    marks = []
    for arm, kl_coef in study.groups():
        count, total = selection.collapses(study, arm, kl_coef)
        if count:
            marks.append(f"{arm} at kl_coef {kl_coef:g}" + (f" ({count} of {total})" if count < total else ""))
    return marks


def arm_label(study, arm, kl_coef=None):
    """An arm's name, and whether its policies have collapsed: at one kl_coef, or any."""
    return arm + selection.collapsed(study, arm, kl_coef)


def sizes(kl_coefs):
    """kl_coef -> how large its markers are and how thick its lines, 1 where it is the only one."""
    ordered = sorted(kl_coefs)
    return dict(zip(ordered, np.linspace(0.65, 1.5, len(ordered)) if len(ordered) > 1 else [1.0], strict=True))


def drawn_kl_coefs(study):
    """The kl_coefs that curves show: all, or where they would be too many to tell apart, the one that most arms have
    (of several such, the study's first)."""
    if len({(policy.arm, policy.kl_coef) for policy in study.policies}) <= 6:
        return study.kl_coefs
    arms = {kl_coef: {policy.arm for policy in study.of(kl_coef=kl_coef)} for kl_coef in study.kl_coefs}
    return [max(arms, key=lambda kl_coef: len(arms[kl_coef]))]


def claim_kl_coefs(study):
    """Arm -> the kl_coef at which claims compare it: the one fixed in advance, or else its best on development."""
    return {arm: selection.of_claims(study, arm) for arm in study.arms}


def arm_panels(arms, plain=()):
    """The arms in groups of at most PANEL; where there are several groups, the plain anchors stand in each."""
    if len(arms) <= PANEL:
        return [list(arms)]
    repeated = [arm for arm in arms if arm in plain][: PANEL - 2]
    others = [arm for arm in arms if arm not in repeated]
    count = math.ceil(len(others) / (PANEL - len(repeated)))
    return [repeated + [str(arm) for arm in part] for part in np.array_split(others, count)]


def spread_kl_coefs(study):
    """At most three kl_coefs, by size: the smallest, what curves show, and the largest, where a collapse would be."""
    ordered = sorted(study.kl_coefs)
    return ordered if len(ordered) <= 3 else sorted({ordered[0], drawn_kl_coefs(study)[0], ordered[-1]})


def measured(tables, name, *columns):
    """The rows of a table in which all these columns are known; empty where the table or a column is missing."""
    frame = tables.get(name)
    if frame is None or not set(columns) <= set(frame.columns):
        return pd.DataFrame()
    return frame.dropna(subset=list(columns))


def known(frame, name):
    return name in frame and frame[name].notna().any()


def panels(rows, columns, width=WIDTH, height=2.6, **options):
    """(figure, axes (rows, columns)); `height` of one row, in inches."""
    figure = blank(width, height * rows + 0.5)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def blank(width, height):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def say_nothing(axis, text="not measured"):
    """Words instead of data."""
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", color=GREY)
    axis.set_axis_off()


def wrapped(text, width):
    """The lines of a text, of at most `width` characters each."""
    return textwrap.wrap(text, width, break_long_words=False)


def legend(figure, study, arms=None, kl_coefs=None, markers=True, lines=False, extra=()):
    """One legend below all panels: colours, markers and line styles say the arm, sizes the kl_coef."""

    def handle(label, look, size=1):
        marker, line = look.marker if markers else None, look.line if lines else "none"
        return mark(label, marker, 5 * size, color=look.colour, linestyle=line, linewidth=1.4 * size)

    names = study.arms if arms is None else [arm for arm in study.arms if arm in arms]
    handles = [handle(arm_label(study, arm), looks(study)[arm]) for arm in names]
    if len(study.kl_coefs) > 1:
        kl_coefs, size = study.kl_coefs if kl_coefs is None else kl_coefs, sizes(study.kl_coefs)
        handles += [handle(f"kl_coef {kl_coef:g}", NEUTRAL, size[kl_coef]) for kl_coef in sorted(kl_coefs)]
    if handles or extra:
        below(figure, [*handles, *extra], handlelength=2.6 if lines else 1.8)


def below(figure, handles, **options):
    """A legend below all panels, in rows of about equal length that are no wider than the figure."""
    lengths = [len(handle.get_label()) for handle in handles]
    rows = math.ceil(len(handles) / max(1, int(figure.get_figwidth() / 1.15)))
    while rows < len(handles) and _width(lengths, rows) > figure.get_figwidth():
        rows += 1
    options = {"handlelength": 1.8, "columnspacing": 1.4} | options
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / rows), **options)


def _width(lengths, rows):
    """About the width of a legend in inches, whose entries of so many characters fill one column after another."""
    columns = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(0.42 + 0.07 * max(column) for column in columns)


def mark(label, marker="o", size=5, **options):
    """A legend's entry for a mark."""
    return Line2D([], [], marker=marker, markersize=size, label=label, **{"color": DARK, "linestyle": "none"} | options)


def arm_grid(figure, grid, arms, columns, labels):
    """arm -> an axis of its own in the cells of a GridSpec (rows, columns), titled with the arm's name.

    All are to have the same limits: the numbers and `labels` (x, y) stand below the last row and beside the first
    column alone.
    """
    axes, last = {}, (len(arms) - 1) // columns
    for place, arm in enumerate(arms):
        axes[arm] = figure.add_subplot(grid[place // columns, place % columns])
        axes[arm].set_title(arm, fontsize=8, pad=3)
        below, beside = place // columns == last, place % columns == 0
        axes[arm].tick_params(labelbottom=below, labelleft=beside)
        axes[arm].set_xlabel(labels[0] if below else "", fontsize=7.5)
        axes[arm].set_ylabel(labels[1] if beside else "", fontsize=7.5)
    return axes


def sqrt_axis(axis, values, gap=0.13, low=False):
    """x as sqrt(KL), from 0: reward gained grows roughly linearly in it (Gao et al. 2023, scaling laws).

    Args:
        gap: the least distance of two ticks, in shares of the axis.
        low: whether the axis begins before the smallest value instead, where that is more than a third of the largest.
    """
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    finite = [float(v) for v in values if math.isfinite(v)]
    top = max(finite, default=1.0)
    top = top if top > 0 else 1.0
    if low and min(finite, default=0.0) > top / 3:
        axis.set_xlim(limits(finite, margin=0.12))
        axis.xaxis.set_major_locator(MaxNLocator(5))
        return
    axis.set_xlim(0, top * 1.12)
    step = 10 ** math.floor(math.log10(top))
    ticks = [step * share for share in (0, 0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10) if step * share <= top * 1.12]
    axis.set_xticks(_spread(ticks, top, gap), minor=False)
    axis.xaxis.set_major_formatter("{x:g}")


def _spread(ticks, top, gap):
    """Leave out ticks that would stand too close to their left neighbour on the square-root axis."""
    kept = []
    for tick in ticks:
        if not kept or math.sqrt(tick / top) - math.sqrt(kept[-1] / top) > gap:
            kept.append(tick)
    return kept


def limits(values, margin=0.08):
    """(low, high) around values, so that no interval, however wide, decides what is seen; None where none is known."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    room, size = margin * (high - low), max(abs(low), abs(high))
    if room <= 1e-9 * size:  # no spread beyond rounding
        room = 0.05 * size or 0.05
    return low - room, high + room


def has_intervals(study):
    """Whether t intervals over replicates are drawn: those of two are 13 standard errors wide, and would hide all."""
    return len(study.replicates) > 2


def cross(axis, x, y, colour, **options):
    """Bars of the 95 % t intervals of the means of replicates' x and y, each (R,); none for one replicate."""
    (x_mean, *x_bounds), (y_mean, *y_bounds) = statistics.replicate_interval(x), statistics.replicate_interval(y)
    bars(axis, (x_mean, *x_bounds), (y_mean, *y_bounds), colour, **options)


def bars(axis, x, y, colour, **options):
    """Bars through a point, of its intervals (value, low, high) in x and in y; unknown bounds draw nothing."""
    options = {"linewidth": 1.0, "solid_capstyle": "butt"} | options
    if x[1] == x[1]:
        axis.plot(x[1:], [y[0]] * 2, color=colour, **options)
    if y[1] == y[1]:
        axis.plot([x[0]] * 2, y[1:], color=colour, **options)


def whisker(axis, x, y, colour, **options):
    """A bar of the interval (value, low, high) along x, at height y."""
    bars(axis, x, (y, math.nan, math.nan), colour, **options)


def triple(row, name):
    """(value, low, high) of a row; bounds nan where it has none."""
    return row[name], row.get(f"{name}_low", math.nan), row.get(f"{name}_high", math.nan)
