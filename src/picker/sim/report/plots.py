"""Plots as SVG to stand in a page: curves over load, and bars where there is one load. Text stays text.

Every drawing is of the same width, for a column of a page that may be narrow; legends are the page's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from picker.sim.report.palette import INK, RULE, Palette

# Inches; the SVG has 72 units each and is scaled to its column.
_WIDTH, HEIGHT, _BAR = 6.0, 3.7, 0.27
# A bar this many times the shortest is cut off, so that the others can be told apart.
_CUT = 8.0
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "picker",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True)
class Point:
    """A value at `x` and the interval it lies in."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Series:
    policy: str
    points: tuple[Point, ...]


def curves(
    series: Sequence[Series], palette: Palette, *, x: str, y: str, log: bool = False, top: float | None = None
) -> str:
    """One line for each policy with its intervals. x, y: what the axes show. top: the axis goes from 0 to it."""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(HEIGHT)
        for one in sorted(series, key=lambda one: palette[one.policy].strong):
            _curve(axes, one, palette)
        axes.set_xlabel(x)
        axes.set_title(y, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        loads = sorted({point.x for one in series for point in one.points})
        if len(loads) <= 8:
            axes.set_xticks(loads, [f"{load:g}" for load in loads])
        if log:
            _logarithmic(axes)
        else:
            axes.set_ylim(0.0, top)
            axes.yaxis.set_major_formatter(FuncFormatter(short_number))
        return as_svg(figure, palette, y)


def bars(points: Sequence[tuple[str, Point]], palette: Palette, *, x: str, ascending: bool = True) -> str:
    """One bar for each policy, the best on top, with its value written at its end. x: what the lengths show."""
    ordered = sorted(points, key=lambda item: item[1].y, reverse=not ascending)
    shortest = min(point.y for _, point in ordered)
    limit = min(max(point.high for _, point in ordered), max(shortest, 1e-9) * _CUT)
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(0.9 + _BAR * len(ordered))
        for row, (policy, point) in enumerate(ordered):
            _bar(axes, row, point, palette, policy, limit)
        axes.set_yticks(range(len(ordered)), [policy for policy, _ in ordered])
        for label, (policy, _) in zip(axes.get_yticklabels(), ordered, strict=True):
            label.set_fontweight("bold" if palette[policy].strong else "normal")
        axes.invert_yaxis()
        axes.set_xlim(0.0, limit * 1.22)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_title(x, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        return as_svg(figure, palette, x)


def swatch(policy: str, palette: Palette) -> str:
    """What stands for a policy in a legend."""
    with mpl.rc_context({**STYLE, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(0.5, 0.2))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        _line(axes, [0.0, 0.5, 1.0], [0.0] * 3, policy, palette, markevery=[1])
        return as_svg(figure, palette, policy)


def new_axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _curve(axes: Axes, one: Series, palette: Palette) -> None:
    look, colour = palette[one.policy], palette.stand_in(one.policy)
    x, y = [point.x for point in one.points], [point.y for point in one.points]
    low, high = [point.low for point in one.points], [point.high for point in one.points]
    if look.strong:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, zorder=1)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=0.9, alpha=0.6, zorder=1.5)
    _line(axes, x, y, one.policy, palette)


def _line(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    policy: str,
    palette: Palette,
    markevery: Sequence[int] | None = None,
) -> None:
    look = palette[policy]
    width, size = (2.6, 6.0) if look.strong else (1.2, 4.5)
    axes.plot(
        x,
        y,
        look.dash,
        color=palette.stand_in(policy),
        marker=look.marker or None,
        markevery=markevery,
        linewidth=width,
        markersize=size,
        zorder=3.0 if look.strong else 2.0,
    )


def _bar(axes: Axes, row: int, point: Point, palette: Palette, policy: str, limit: float) -> None:
    strong, cut = palette[policy].strong, point.y > limit
    axes.barh(row, min(point.y, limit), 0.68, color=palette.stand_in(policy), alpha=1.0 if strong else 0.6)
    end = limit if cut else min(max(point.high, point.y), limit)
    if point.low < point.high and not cut:
        axes.hlines(row, point.low, end, color=INK, linewidth=1.0)
    text = f"{'›› ' if cut else ''}{short_number(point.y)}"
    axes.annotate(
        text, (end, row), (4, 0), textcoords="offset points", va="center", fontweight="bold" if strong else "normal"
    )


def _logarithmic(axes: Axes) -> None:
    """Ticks with plain numbers: the more decades the axis spans, the fewer in each."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    span = high / low
    ticks = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if span < 12 else (1.0, 2.0, 5.0) if span < 500 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def short_number(value: float, position: int | None = None) -> str:
    """Three digits, without an exponent."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def as_svg(figure: Figure, palette: Palette, name: str) -> str:
    """The drawing without what only a file of its own needs, and without names that another one has too.

    name: what a screen reader says of it.
    """
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', rf'\1role="img" aria-label="{escape(name)}"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "inherit", svg)
    return palette.coloured(re.sub(r"\n\s*", "\n", svg))
