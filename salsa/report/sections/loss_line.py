"""Validation loss along the line between the first two SFT models."""

import matplotlib
import pandas as pd

from salsa.report import style, words
from salsa.report.sections import Section

FEW = 5  # replicates that have a colour of their own


def figure(study, tables):
    """Validation loss along the line between the SFT models, with the straight line that a barrier rises above."""
    figure, axes = style.panels(1, 1, width=3.5, height=2.4)
    axis, count = axes[0, 0], len(study.replicates)
    if count > FEW:
        _draw_mean(axis, study.frames.soups)
    else:
        _draw_each(axis, study.frames.soups, count)
    axis.plot([], [], color=style.GREY, linestyle="--", linewidth=0.9, label="interpolated")
    barriers = style.measured(tables, "gates", "barrier").get("barrier", pd.Series(dtype=float))
    largest = f"{'largest ' * (count > 1)}barrier: {barriers.max():.2g} nats per token"
    axis.set_title(largest if len(barriers) else "no barrier known", loc="left")
    axis.set_xlabel("alpha (0: sft0, 1: sft1)")
    axis.set_ylabel("validation loss, nats per token")
    figure.legend(loc="outside lower center", ncols=3, handlelength=1.8, columnspacing=1.2)
    return figure


def _draw_each(axis, soups, count):
    for index, (replicate, line) in enumerate(soups.groupby("replicate")):
        colour = matplotlib.colormaps["cividis"](0.1 + 0.75 * index / max(count - 1, 1))
        marker, name = style.MARKERS[index % len(style.MARKERS)], f"replicate {replicate}"
        axis.plot(line["alpha"], line["loss"], color=colour, marker=marker, markersize=4, label=name)
        axis.plot(line["alpha"], line["loss_interpolated"], color=colour, linestyle="--", linewidth=0.9)


def _draw_mean(axis, soups):
    """Each replicate's line, faintly, and their mean: of many replicates no one is to be found by its number."""
    for place, (_, line) in enumerate(soups.groupby("replicate")):
        axis.plot(line["alpha"], line["loss"], color=style.GREY, linewidth=0.8, alpha=0.5,
                  label="" if place else "a replicate")  # fmt: skip
    mean = soups.groupby("alpha")[["loss", "loss_interpolated"]].mean().reset_index()
    axis.plot(mean["alpha"], mean["loss"], color=style.DARK, marker="o", markersize=4, label="their mean")
    axis.plot(mean["alpha"], mean["loss_interpolated"], color=style.GREY, linestyle="--", linewidth=0.9)


def caption(study, tables):
    return (
        "Validation loss along the line between the first two SFT models: the barrier is "
        f"{words.spread(tables['gates']['barrier'])} nats per token over {words.replicates(study)}"
        + ("; grey lines are replicates, the dark one their mean." if len(study.replicates) > FEW else ".")
    )


SECTION = Section(name="loss_line", heading="The space of weights", place=4, figure=figure, caption=caption)
