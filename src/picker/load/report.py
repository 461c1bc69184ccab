"""The figures of a load run: the row that `--json` prints, and the table for people.

Failed requests are left out of means and counted in `failed`; in percentiles they are infinitely late, so a
percentile that falls among them is null. Times are seconds of the pods: measured ones times `Pace.time_scale`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean

from rich.table import Table

from picker.load.client import Record
from picker.load.schedule import Run

Row = dict[str, object]


def row(run: Run) -> Row:
    """The figures by the names of `picker load --json`; None where there is nothing to say."""
    scale = run.pace.time_scale
    good = [record for record in run.records if record.error is None]
    duration = (run.ended_at - run.started_at) * scale
    ttfts = [record.ttft for record in run.records]
    e2es = [record.e2e for record in run.records]
    return {
        "requests": len(run.records),
        "failed": run.failed,
        "duration_s": _rounded(duration),
        "schedule_delay_p99_s": _rounded(_scaled(run.schedule_delay_p99, scale)),
        "ttft_mean_s": _rounded(mean_ttft(run)),
        "ttft_p50_s": _rounded(_scaled(_percentile(ttfts, 0.50), scale)),
        "ttft_p95_s": _rounded(_scaled(_percentile(ttfts, 0.95), scale)),
        "ttft_p99_s": _rounded(_scaled(_percentile(ttfts, 0.99), scale)),
        "tpot_mean_s": _rounded(_scaled(_mean(record.tpot for record in good), scale)),
        "e2e_mean_s": _rounded(_scaled(_mean(e2es), scale)),
        "e2e_p95_s": _rounded(_scaled(_percentile(e2es, 0.95), scale)),
        "hit_ratio": _rounded(hit_ratio(good)),
        "output_tokens_per_s": _rounded(sum(record.output_tokens for record in good) / duration if duration else None),
        "requests_per_s": _rounded(len(good) / duration if duration else None),
        "by_endpoint": dict(sorted(Counter(record.endpoint for record in run.records).items())),
    }


def mean_ttft(run: Run) -> float | None:
    """Mean time to first token of the answered requests, in seconds of the pods."""
    return _scaled(_mean(record.ttft for record in run.records), run.pace.time_scale)


def hit_ratio(records: Iterable[Record]) -> float | None:
    """Cached prompt tokens over prompt tokens, of the answers that say; None if none does."""
    told = [(record.cached_tokens, record.prompt_tokens) for record in records if record.cached_tokens is not None]
    prompts = sum(prompt for _, prompt in told)
    return sum(cached for cached, _ in told) / prompts if prompts else None


def errors(run: Run) -> list[str]:
    """One line for each class of failure: how many, and the words of the first."""
    failures = [record for record in run.records if record.error is not None]
    first = {record.error: record.detail for record in reversed(failures)}
    counts = Counter(record.error for record in failures)
    return [f"{count} x {kind}: {first[kind]}".rstrip(": ") for kind, count in counts.most_common()]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _percentile(values: Sequence[float | None], fraction: float) -> float | None:
    """Nearest rank; None counts as infinity, and infinity is None."""
    if not values:
        return None
    ordered = sorted(math.inf if value is None else value for value in values)
    value = ordered[max(0, math.ceil(fraction * len(ordered)) - 1)]
    return None if math.isinf(value) else value


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


# --- for people ----------------------------------------------------------------------------------------------

_LINES = (
    ("requests", "requests"),
    ("failed", "failed"),
    ("duration", "duration_s"),
    ("TTFT mean", "ttft_mean_s"),
    ("TTFT P50", "ttft_p50_s"),
    ("TTFT P95", "ttft_p95_s"),
    ("TTFT P99", "ttft_p99_s"),
    ("time per output token", "tpot_mean_s"),
    ("end to end mean", "e2e_mean_s"),
    ("end to end P95", "e2e_p95_s"),
    ("prefix-cache hit ratio", "hit_ratio"),
    ("output tokens/s", "output_tokens_per_s"),
    ("requests/s", "requests_per_s"),
    ("schedule delay P99", "schedule_delay_p99_s"),
)


def table(figures: Row, *, title: str) -> Table:
    """The row as two columns, with one line for each endpoint."""
    result = Table(title=title, title_justify="left")
    result.add_column("")
    result.add_column("measured", justify="right")
    for label, name in _LINES:
        result.add_row(label, in_words(name, figures[name]))
    goodput = figures.get("goodput")
    if isinstance(goodput, dict):
        result.add_row("goodput", f"{goodput['share']:.1%}, {goodput['requests_per_s']:,.2f}/s")
    endpoints = figures["by_endpoint"]
    assert isinstance(endpoints, dict)
    for endpoint, count in endpoints.items():
        result.add_row(f"  {endpoint}", str(count))
    return result


def in_words(name: str, value: object) -> str:
    """A figure as people read it: milliseconds below a second, percent for ratios, a dash for nothing."""
    match value:
        case None:
            return "-"
        case float() if name.endswith("_per_s"):
            return f"{value:,.1f}"
        case float() if name.endswith("_s"):
            return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"
        case float():
            return f"{value:.1%}"
        case _:
            return f"{value:,}"
