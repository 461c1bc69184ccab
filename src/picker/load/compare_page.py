"""The page of runs beside the first of them: tables of ratios with intervals, and the distributions of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from picker.load.compare import Compared, Line, Verdict
from picker.load.measured import Measured
from picker.load.page import Cell, Page, Row, Section, Table, html, origins, row
from picker.load.plots import Line as Curve
from picker.load.plots import cdfs, courses
from picker.load.slo import Slo
from picker.load.windows import Windows
from picker.load.words import figure, interval

_END = (
    "Means leave failed requests out; percentiles count them as infinitely late. Intervals are 95 % bootstrap "
    "intervals over blocks of neighbouring arrivals. They cover chance within these runs, not what differs from run to "
    "run: repeat them to see that. Of many metrics one in twenty misses its interval by chance."
)
_LOOKS = {Verdict.BETTER: "win", Verdict.WORSE: "loss"}


def render(
    runs: Sequence[tuple[str, Measured]], compared: Sequence[Compared], rivals: Sequence[str], slo: Slo | None
) -> str:
    """compared: each run but the first beside the first. rivals: their names, in the same order."""
    base = runs[0][0]
    sections = [_section(base, name, one) for name, one in zip(rivals, compared, strict=True)]
    return html(
        Page(
            title=f"{' and '.join(rivals)} beside {base}",
            lines=origins(runs),
            notes=[f"{name}: {note}" for name, run in runs for note in run.notes],
            sections=[*sections, _distributions(runs, slo), _over_time(runs)],
            end=_END,
        )
    )


def how(base: str, name: str, compared: Compared) -> str:
    """How the requests of two runs were put beside each other, in a sentence."""
    if compared.paired is None:
        return f"A is {base}, B is {name}: not paired, each resampled on its own."
    return f"A is {base}, B is {name}: {compared.paired:,} requests of the same plan, paired."


def _section(base: str, name: str, compared: Compared) -> Section:
    headings = ["metric", "A", "B", "B / A", "95 % interval", "verdict"]
    texts = [how(base, name, compared), *(f"{note[:1].upper()}{note[1:]}." for note in compared.notes)]
    return Section(
        f"compare-{name}", f"{name} beside {base}", texts, [Table(headings, [_row(x) for x in compared.lines])]
    )


def _row(line: Line) -> Row:
    look = _LOOKS.get(line.verdict, "")
    return row(
        line.metric,
        Cell(figure(line.a, line.unit)),
        Cell(figure(line.b, line.unit)),
        Cell("–" if line.ratio is None else f"{line.ratio:.3f}", look),
        Cell(interval(line.low, line.high)),
        Cell(line.verdict.value, f"words {look}".strip()),
    )


def _distributions(runs: Sequence[tuple[str, Measured]], slo: Slo | None) -> Section:
    drawn = []
    for title, name in (("Time to first token", "ttft"), ("End to end", "e2e"), ("Time per output token", "tpot")):
        values = [(label, getattr(run.requests, name)) for label, run in runs]
        known = [(label, found) for label, column in values if len(found := column[np.isfinite(column)])]
        if known:
            drawn.append(cdfs(known, title=title, limit=getattr(slo, name) if slo else None))
    return Section(
        "distributions", "Distributions", ["Share of the answered requests that took at most so long."], plots=drawn
    )


def _over_time(runs: Sequence[tuple[str, Measured]]) -> Section:
    ttft, hits = [], []
    for name, run in runs:
        if len(run.requests):
            windows = Windows.over(run.requests)
            ttft.append(Curve(name, windows.middles, windows.means(run.requests.intended, run.requests.ttft)))
            hits.append(Curve(name, windows.middles, windows.hit_ratio(run.requests)))
    drawn = [courses(ttft, title="TTFT mean, seconds")] if ttft else []
    if any(np.isfinite(line.y).any() for line in hits):
        drawn.append(courses(hits, title="Hit ratio of prompt tokens", percent=True))
    return Section("time", "Over time", plots=drawn)
