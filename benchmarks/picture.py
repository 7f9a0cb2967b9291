"""One picture of the figures: a panel a measure, a bar for everybody, with the spread over the rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measures
from benchmarks.measures import Measure
from benchmarks.report import Result, summary

# Okabe and Ito's colours, which people tell apart whatever their eyes.
BLUE, SKY, GREY, VERMILION = "#0072B2", "#56B4E9", "#B8B8B8", "#D55E00"
COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Panel:
    """One measure of one workload."""

    title: str
    workload: str
    measure: Measure


PANELS = (
    Panel("Durable save, {size}", "gpt2", measures.SAVE),
    Panel("Cold load, {size}", "gpt2", measures.COLD),
    Panel("Hot load, {size}", "gpt2", measures.HOT),
    Panel("Stall of a background save, {size}", "gpt2", measures.STALL),
    Panel("Training lost per background save, {size}", "training", measures.LOST),
    Panel("Second save, 1% changed, {size}", "lora", measures.SECOND_SAVE),
    Panel("Small tensors, {size}: durable save", "many", measures.SAVE),
    Panel("Small tensors, {size}: hot load", "many", measures.HOT),
    Panel("Peak memory of a load beside {size}", "gpt2", measures.PEAK_LOAD),
)


def draw(results: Mapping[str, Result], path: Path) -> None:
    """Write the picture of those panels that were measured, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [
        panel for panel in PANELS if panel.workload in results and panel.measure.name in results[panel.workload].samples
    ]
    if not panels:
        return
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(4.8 * COLUMNS, 3.1 * rows + 0.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.10))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index < len(panels):
            _draw_panel(axes, panels[index], results[panels[index].workload])
        else:
            axes.set_axis_off()
    _draw_legend(figure)
    figure.savefig(path, dpi=110, facecolor="white")


def _draw_panel(axes: Any, panel: Panel, result: Result) -> None:
    """Bars from the least median downwards; the best that the machine itself gives is a line."""
    unit = panel.measure.unit
    rows = summary(result.samples)[panel.measure.name]
    names = sorted((name for name in rows if name not in measures.BOUNDS), key=lambda name: rows[name]["median"])
    medians, least, greatest = (
        [rows[name][key] * unit.factor for name in names] for key in ("median", "least", "greatest")
    )
    places = range(len(names))
    axes.barh(places, medians, color=[_colour(name) for name in names], height=0.72, zorder=2)
    axes.hlines(places, least, greatest, color="#333333", linewidth=1.2, zorder=3)
    start, end = min(0.0, *least), max(*greatest, 0.0)
    axes.set_xlim(start, end + 0.2 * (end - start))
    for place, median, above in zip(places, medians, greatest, strict=True):
        place_of_label = (max(median, above, 0.0), place)
        axes.annotate(
            _label(median),
            place_of_label,
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},  # over the line of the bare machine
            zorder=5,
        )
    bound = min((rows[name]["median"] for name in rows if name in measures.BOUNDS), default=None)
    if bound is not None and panel.measure is not measures.LOST:
        axes.axvline(bound * unit.factor, color=VERMILION, linestyle="--", linewidth=1.3, zorder=4)
    axes.set_yticks(places, names, fontsize=9)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in measures.OWN else "normal")
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8, length=0, labelcolor="#555555")
    axes.tick_params(axis="y", length=0)
    size = f"{result.nbytes / 1e9:.1f} GB" if result.nbytes >= 1e9 else f"{result.nbytes / 1e6:.0f} MB"
    axes.set_title(f"{panel.title.format(size=size)} ({unit.symbol})", fontsize=10, loc="left")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis="x", color="#E4E4E4", zorder=0)


def _draw_legend(figure: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=BLUE, label="Holdfast"),
        Patch(color=SKY, label="Holdfast, other ways to save"),
        Patch(color=GREY, label="peers"),
        Line2D([], [], color="#333333", linewidth=1.2, label="least to greatest"),
        Line2D([], [], color=VERMILION, linestyle="--", linewidth=1.3, label="the bare disk or memory"),
    ]
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=9.5,
        title="Medians; shorter is better",
        alignment="left",
        title_fontproperties={"weight": "bold", "size": 11},
    )


def _colour(name: str) -> str:
    if name == measures.HOLDFAST:
        return BLUE
    return SKY if name in measures.OWN else GREY


def _label(figure: float) -> str:
    """Three digits where they say something."""
    if abs(figure) >= 100:
        return f"{figure:,.0f}"
    return f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.2f}" if abs(figure) >= 0.095 else f"{figure:.3f}"
