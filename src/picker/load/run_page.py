"""The page of a load run, and the one of several runs at different rates: which figures and plots stand on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from picker.load import plots
from picker.load.ladder import Rung, quantile, rungs
from picker.load.measured import Floats, Measured, Requests, hit_ratio, statistics
from picker.load.page import Cell, Page, Row, Section, Table, html, origin_lines, origins, row
from picker.load.plots import Line, courses, distribution
from picker.load.report import in_words
from picker.load.slo import Slo, goodput, knee
from picker.load.windows import Windows

_TILES = (
    ("TTFT mean", "ttft_mean_s"),
    ("TTFT P95", "ttft_p95_s"),
    ("TTFT P99", "ttft_p99_s"),
    ("time per token", "tpot_mean_s"),
    ("end to end mean", "e2e_mean_s"),
    ("hit ratio", "hit_ratio"),
    ("requests/s", "requests_per_s"),
    ("output tokens/s", "output_tokens_per_s"),
)
_QUANTILES = ("mean", "min", "p50", "p75", "p90", "p95", "p99", "p99p9", "max")
_END = (
    "Latency counts from the time at which a request was meant to be sent. Means, distributions and quantiles of the "
    "table leave failed requests out; the percentiles on top and over rates count them as infinitely late."
)


def render(measured: Measured, slo: Slo | None = None) -> str:
    """The page of one run."""
    requests = measured.requests
    sections = [_percentiles(measured)]
    if len(requests):
        ladder = rungs([measured], slo) if measured.stages else []
        sections = [
            *([_goodput(measured, slo)] if slo is not None else []),
            _distributions(requests, slo),
            *([_ladder(ladder, slo)] if ladder else []),
            _over_time(measured, slo),
            _endpoints(requests),
            _errors(measured),
            *sections,
        ]
    return html(
        Page(
            title=f"{measured.workload} on {measured.origin.url}",
            lines=origin_lines(measured),
            notes=measured.notes,
            tiles=_tiles(measured),
            sections=sections,
            end=_END,
        )
    )


def render_ladder(runs: Sequence[tuple[str, Measured]], slo: Slo | None = None) -> str:
    """The page of several named runs, which differ in their rates."""
    ladder = rungs([run for _, run in runs], slo)
    return html(
        Page(
            title=f"{runs[0][1].workload}: latency against rate",
            lines=origins(runs),
            notes=[f"{name}: {note}" for name, run in runs for note in run.notes],
            sections=[_ladder(ladder, slo)],
            end=_END,
        )
    )


def _tiles(measured: Measured) -> list[tuple[str, str]]:
    figures = measured.figures
    counted = ("requests", f"{figures['requests']:,}"), ("failed", f"{figures['failed']:,}")
    return [*counted, *((label, _tile(name, figures)) for label, name in _TILES)]


def _tile(name: str, figures: Mapping[str, Any]) -> str:
    """A percentile without a figure falls among the failures."""
    late = figures[name] is None and "_p9" in name and figures["failed"]
    return "∞" if late else in_words(name, figures[name])


def _seconds(value: float | None) -> str:
    if value is None or np.isnan(value):
        return "–"
    return "∞" if np.isinf(value) else in_words("_s", float(value))


# --- sections ------------------------------------------------------------------------------------------------


def _percentiles(measured: Measured) -> Section:
    requests = measured.requests
    found = [
        ("TTFT", statistics(requests.ttft)),
        ("time per output token", statistics(requests.tpot)),
        ("gap between tokens", measured.gaps),
        ("end to end", statistics(requests.e2e)),
        ("schedule delay", statistics(requests.delay)),
    ]
    rows = [
        row(name, Cell(f"{stats['count']:,.0f}"), *(Cell(_seconds(stats[q])) for q in _QUANTILES))
        for name, stats in found
        if stats is not None
    ]
    headings = ["", "values", "mean", "least", *(f"P{q[1:].replace('p', '.')}" for q in _QUANTILES[2:-1]), "most"]
    return Section("percentiles", "Quantiles", tables=[Table(headings, rows)])


def _goodput(measured: Measured, slo: Slo) -> Section:
    found = goodput(measured.requests, slo, measured.duration)
    assert found is not None
    texts = [
        f"{found.share:.1%} of the requests met {slo}: {found.requests_per_s:,.2f} good requests/s, "
        f"{found.output_tokens_per_s:,.1f} output tokens/s in good answers."
    ]
    limits = dict(slo.objectives())
    rows = [
        row(f"{name.upper()} ≤ {limits[name]:g} s", Cell(f"{share:.1%}")) for name, share in found.by_objective.items()
    ]
    return Section("goodput", "Goodput", texts, [Table(["objective", "requests that met it"], rows)])


def _distributions(requests: Requests, slo: Slo | None) -> Section:
    drawn = [
        distribution(values[np.isfinite(values)], title=title, limit=getattr(slo, name) if slo else None)
        for title, name, values in (
            ("Time to first token", "ttft", requests.ttft),
            ("End to end", "e2e", requests.e2e),
            ("Time per output token", "tpot", requests.tpot),
        )
        if np.isfinite(values).any()
    ]
    text = "Bars: how many requests. Line, right axis: share of the answered requests that took at most so long."
    return Section("distributions", "Distributions", [text], plots=drawn)


def _over_time(measured: Measured, slo: Slo | None) -> Section:
    requests = measured.requests
    windows = Windows.over(requests)
    at, x, ok = requests.intended, windows.middles, requests.ok
    marks = [(stage.start, f"{stage.rate:g}/s") for stage in measured.stages]
    ttft = [
        Line("mean", x, windows.means(at, requests.ttft)),
        Line("P95", x, windows.quantiles(at, requests.ttft, 0.95)),
    ]
    rates = [Line("sent", x, windows.rates(requests.sent)), Line("answered", x, windows.rates(requests.ended[ok]))]
    if not ok.all():
        rates.append(Line("failed", x, windows.rates(requests.ended[~ok])))
    delays = [Line("P99", x, windows.quantiles(at, requests.delay * 1e3, 0.99))]
    drawn = [
        courses(ttft, title="TTFT, seconds", limit=slo.ttft if slo else None, marks=marks),
        *_hits(requests, windows),
        courses(rates, title="Requests a second", marks=marks),
        courses(in_flight(requests, windows), title="Requests in flight, by endpoint", marks=marks),
        courses(delays, title="Schedule delay P99, milliseconds", marks=marks),
    ]
    text = f"Windows of {windows.width:g} s, by the time at which requests were meant to be sent."
    return Section("time", "Over time", [text], plots=drawn)


def _hits(requests: Requests, windows: Windows) -> Iterator[str]:
    ratios = windows.hit_ratio(requests)
    if np.isfinite(ratios).any():
        yield courses([Line("hit ratio", windows.middles, ratios)], title="Hit ratio of prompt tokens", percent=True)


def in_flight(requests: Requests, windows: Windows) -> list[Line]:
    """A line for each endpoint; of very many only the range, with all of them faint behind it."""
    names = np.array(requests.endpoint)
    each = {name: windows.in_flight(requests, names == name) for name in sorted(set(requests.endpoint))}
    if len(each) <= plots.MOST_LINES:
        return [Line(name, windows.middles, values) for name, values in each.items()]
    stacked = np.stack(list(each.values()))
    bounds = (("most", stacked.max(axis=0)), ("mean", stacked.mean(axis=0)), ("least", stacked.min(axis=0)))
    return [
        *(Line(name, windows.middles, values, faint=True) for name, values in each.items()),
        *(Line(name, windows.middles, values) for name, values in bounds),
    ]


def _endpoints(requests: Requests) -> Section:
    names = np.array(requests.endpoint)
    rows = [_endpoint(name, requests.where(names == name)) for name in sorted(set(requests.endpoint))]
    counts = [int((names == name).sum()) for name in set(requests.endpoint)]
    text = f"Most requests of an endpoint over the mean: {max(counts) / (sum(counts) / len(counts)):.2f}."
    headings = [
        "endpoint",
        "requests",
        "failed",
        "TTFT mean",
        "TTFT P95",
        "hit ratio",
        "prompt tokens",
        "output tokens",
    ]
    return Section("endpoints", "By endpoint", [text], [Table(headings, rows)])


def _endpoint(name: str, requests: Requests) -> Row:
    ratio, ok = hit_ratio(requests), requests.ok
    stats = statistics(requests.ttft)
    return row(
        name,
        Cell(f"{len(requests):,}"),
        Cell(f"{int((~ok).sum()):,}", "" if ok.all() else "loss"),
        Cell(_seconds(stats["mean"] if stats else None)),
        Cell(_seconds(quantile(requests.ttft, 0.95))),
        Cell("–" if ratio is None else f"{ratio:.1%}"),
        Cell(f"{int(requests.prompt_tokens[ok].sum()):,}"),
        Cell(f"{int(requests.output_tokens[ok].sum()):,}"),
    )


def _errors(measured: Measured) -> Section:
    if not measured.errors:
        return Section("errors", "Errors", ["No request failed."])
    where = Counter(zip(measured.requests.error, measured.requests.endpoint, strict=True))
    rows = [
        row(kind, Cell(f"{count:,}"), Cell(_most(kind, where), "words"), Cell(words or "–", "words"))
        for kind, (count, words) in measured.errors.items()
    ]
    return Section("errors", "Errors", tables=[Table(["class", "requests", "at", "words of the first"], rows)])


def _most(kind: str, where: Counter[tuple[str | None, str]]) -> str:
    """The endpoints that failed most often in this way."""
    found = sorted(((n, endpoint) for (error, endpoint), n in where.items() if error == kind), reverse=True)
    return ", ".join(f"{endpoint} ({n})" for n, endpoint in found[:3]) + (", …" if len(found) > 3 else "")


# --- latency against rate ------------------------------------------------------------------------------------


def _ladder(ladder: Sequence[Rung], slo: Slo | None) -> Section:
    found = knee([(rung.rate, rung.share) for rung in ladder if rung.share is not None])
    texts = [f"Objectives {slo}: {found}." if found else "Give --slo to see up to which rate objectives are kept."]
    return Section("ladder", "Latency against rate", texts, [_rungs(ladder)], _ladder_plots(ladder, slo, found))


def _ladder_plots(ladder: Sequence[Rung], slo: Slo | None, found: object) -> list[str]:
    if not ladder:
        return []
    rates = np.array([rung.rate for rung in ladder])

    def line(name: str, values: Sequence[float | None]) -> Line:
        known: Floats = np.array([np.nan if v is None or not np.isfinite(v) else v for v in values], dtype=float)
        return Line(name, rates, known, points=True)

    held = getattr(found, "held", None)
    marks = [(held, "knee")] if held is not None and getattr(found, "missed", None) is not None else []
    latency = [
        line("mean", [rung.ttft_mean for rung in ladder]),
        line("P50", [rung.ttft_p50 for rung in ladder]),
        line("P95", [rung.ttft_p95 for rung in ladder]),
        line("P99", [rung.ttft_p99 for rung in ladder]),
    ]
    x = "arrivals a second"
    drawn = [courses(latency, title="TTFT, seconds", x=x, limit=slo.ttft if slo else None, marks=marks, log=True)]
    if slo is not None:
        shares = [line("good", [rung.share for rung in ladder])]
        drawn.append(courses(shares, title="Requests that met every objective", x=x, percent=True, marks=marks))
    ends = [line("P95", [rung.e2e_p95 for rung in ladder])]
    drawn.append(courses(ends, title="End to end P95, seconds", x=x, limit=slo.e2e if slo else None, marks=marks))
    tokens = [line("tokens", [rung.output_tokens_per_s for rung in ladder])]
    drawn.append(courses(tokens, title="Output tokens a second", x=x, marks=marks))
    return drawn


def _rungs(ladder: Sequence[Rung]) -> Table:
    headings = ["rate", "requests", "failed", "TTFT mean", "P50", "P95", "P99", "E2E P95", "hit ratio", "good"]
    rows = [
        row(
            f"{rung.rate:g}/s",
            Cell(f"{rung.requests:,}"),
            Cell(f"{rung.failed:,}", "loss" if rung.failed else ""),
            *(Cell(_seconds(v)) for v in (rung.ttft_mean, rung.ttft_p50, rung.ttft_p95, rung.ttft_p99, rung.e2e_p95)),
            Cell("–" if rung.hit_ratio is None else f"{rung.hit_ratio:.1%}"),
            Cell("–" if rung.share is None else f"{rung.share:.1%}"),
        )
        for rung in ladder
    ]
    return Table(headings, rows)
