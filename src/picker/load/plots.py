"""What the page of a load run draws: distributions, courses over time, latency against rate. SVG to stand in a page.

Style and colours are those of `sim.report`; colours go to lines in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, PercentFormatter

from picker.load.measured import Floats
from picker.sim.report.palette import INK, Palette
from picker.sim.report.plots import HEIGHT, STYLE, as_svg, new_axes, short_number

COLOURS = (
    *("picker", "sglang-cache-aware", "llm-d-legacy", "lmetric", "dynamo", "llm-d-affinity", "consistent-hash"),
    *("least-request", "longest-prefix", "round-robin"),
)
PALETTE = Palette(COLOURS)
# More lines than this cannot be told apart.
MOST_LINES = len(COLOURS)
# A distribution that spans more than this is drawn on a logarithmic axis.
_WIDE = 20.0
_BINS = 48
_CDF_POINTS = 240


@dataclass(frozen=True, slots=True)
class Line:
    """faint: one of many, without a name in the legend. points: marked, as measured ones are."""

    name: str
    x: Floats
    y: Floats
    faint: bool = False
    points: bool = False


def distribution(values: Floats, *, title: str, limit: float | None = None) -> str:
    """Histogram of finite `values` in seconds, and the share that is below each. limit: an objective to mark."""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(HEIGHT)
        log = _wide(values)
        axes.hist(values, bins=_edges(values, log).tolist(), color=_colour(1), alpha=0.55, linewidth=0)
        axes.set_ylabel("requests")
        _seconds_axis(axes, log)
        shares = axes.twinx()
        shares.plot(*_cdf(values), color=_colour(0), linewidth=2.2)
        _share_axis(shares)
        shares.grid(visible=False)
        _limit(shares, limit, float(values.max()))
        _title(axes, title)
        return as_svg(figure, PALETTE, title)


def cdfs(named: Sequence[tuple[str, Floats]], *, title: str, limit: float | None = None) -> str:
    """Share of finite values below each, a line for each of `named`."""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(HEIGHT)
        for number, (name, values) in enumerate(named):
            axes.plot(*_cdf(values), color=_colour(number), linewidth=2.0, label=name)
        _seconds_axis(axes, _wide(np.concatenate([values for _, values in named])))
        _share_axis(axes)
        _limit(axes, limit, max(float(values.max()) for _, values in named))
        _legend(axes)
        _title(axes, title)
        return as_svg(figure, PALETTE, title)


def courses(
    lines: Sequence[Line],
    *,
    title: str,
    x: str = "seconds of the run",
    percent: bool = False,
    limit: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
    log: bool = False,
) -> str:
    """Lines from zero. limit: a height to mark. marks: (x, words) of what happened there."""
    with mpl.rc_context(STYLE):
        figure, axes = new_axes(HEIGHT)
        strong = iter(range(len(lines)))
        for line in (line for line in lines if np.isfinite(line.y).any()):
            colour = _colour(1) if line.faint else _colour(next(strong))
            _draw(axes, line, colour)
        axes.set_xlabel(x)
        if log:
            _log_axis(axes)
        else:
            axes.set_ylim(0.0, 1.02 if percent else _top(axes, limit))
            formatter = PercentFormatter(1.0, decimals=0) if percent else FuncFormatter(short_number)
            axes.yaxis.set_major_formatter(formatter)
        if limit is not None and (log or limit < axes.get_ylim()[1]):
            axes.axhline(limit, color=INK, linewidth=1.0, linestyle="--")
        for at, words in marks:
            axes.axvline(at, color=INK, linewidth=1.0, linestyle=":")
            axes.annotate(
                words,
                (at, 1.0),
                (3, -3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=9,
            )
        _legend(axes)
        _title(axes, title)
        return as_svg(figure, PALETTE, title)


# --- parts ---------------------------------------------------------------------------------------------------


def _colour(number: int) -> str:
    return PALETTE.stand_in(COLOURS[number % len(COLOURS)])


def _draw(axes: Axes, line: Line, colour: str) -> None:
    axes.plot(
        line.x,
        line.y,
        color=colour,
        linewidth=0.7 if line.faint else 1.8,
        alpha=0.35 if line.faint else 1.0,
        # A window beside empty ones has no line to show it.
        marker="o" if line.points or np.isnan(line.y).any() else None,
        markersize=6.0 if line.points else 2.2,
        label=None if line.faint else line.name,
    )


def _wide(values: Floats) -> bool:
    positive = values[values > 0]
    return bool(len(positive)) and float(positive.max() / positive.min()) > _WIDE


def _edges(values: Floats, log: bool) -> Floats:
    low, high = float(values.min()), float(values.max())
    if not high > low:
        low, high = low * 0.99 - 1e-6, high * 1.01 + 1e-6
    if log:
        low = float(values[values > 0].min())
        return np.geomspace(low, high, _BINS)
    return np.linspace(low, high, _BINS)


def _cdf(values: Floats) -> tuple[Floats, Floats]:
    """At most some hundred points: a line cannot show more, and a page should stay small."""
    ordered = np.sort(values)
    ranks = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), _CDF_POINTS)).astype(int))
    return ordered[ranks], (ranks + 1) / len(ordered)


def _seconds_axis(axes: Axes, log: bool) -> None:
    axes.set_xlabel("seconds")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))


def _log_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))


def _share_axis(axes: Axes) -> None:
    axes.set_ylim(0.0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _top(axes: Axes, limit: float | None) -> float:
    """The upper end of an axis from 0: room above the highest point, and for a limit that is near."""
    heights = [y for line in axes.get_lines() for y in np.asarray(line.get_ydata(), dtype=float) if np.isfinite(y)]
    highest = max(heights, default=0.0)
    return 1.06 * (limit if limit is not None and highest < limit < 1.5 * highest else highest) or 1.0


def _limit(axes: Axes, limit: float | None, longest: float) -> None:
    """Marks an objective, unless it is so far off that it would squeeze the rest."""
    if limit is not None and limit < 1.5 * longest:
        axes.axvline(limit, color=INK, linewidth=1.2, linestyle="--")
        axes.annotate("objective", (limit, 0.04), (3, 0), textcoords="offset points", fontsize=9)


def _legend(axes: Axes) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(
            frameon=False,
            fontsize=9,
            ncols=min(4, len(handles)),
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.1),
            borderaxespad=0.0,
            handlelength=1.4,
            columnspacing=1.2,
        )


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK)
