"""A run in llm-d-benchmark's benchmark report v0.2.1, which that project's own analysis loads.

Source of every name and unit: `llmdbenchmark/analysis/benchmark_report/schema_v0_2_1.py` and the modules it extends,
of github.com/llm-d/llm-d-benchmark. Failed requests are counted and left out of statistics, as inference-perf does.
What the format has no place for stands under `observability`, the part that it keeps open.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from picker import __version__
from picker.load.measured import Floats, Ints, Measured, Requests, hit_ratio, statistics
from picker.load.windows import Windows

VERSION = "0.2.1"
Json = dict[str, Any]


def benchmark_report(measured: Measured) -> Json:
    """The whole report, without keys of which nothing is known."""
    return {
        "version": VERSION,
        "run": _run(measured),
        "scenario": {"stack": [_server(measured)], "load": _load(measured)},
        "results": _known(
            request_performance={"aggregate": _aggregate(measured), "time_series": _time_series(measured)},
            session_performance=_sessions(measured.requests, measured.duration),
            observability=_observability(measured.requests),
        ),
    }


def _known(**parts: Any) -> Json:
    return {name: part for name, part in parts.items() if part is not None}


def _identity(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _stats(values: Floats | Ints, units: str) -> Json | None:
    """A `Statistics` object; the format knows no count."""
    found = statistics(np.asarray(values, dtype=float))
    return None if found is None else {"units": units} | {name: v for name, v in found.items() if name != "count"}


# --- what was run --------------------------------------------------------------------------------------------


def _run(measured: Measured) -> Json:
    origin = measured.origin
    return _known(
        uid=_identity(origin.started, origin.command, origin.url, dict(measured.figures)),
        time=_time(measured),
        description=f"{measured.workload}: {origin.command}" if origin.command else measured.workload,
        keywords=["picker", measured.workload, *(["pods-seconds"] if measured.time_scale != 1 else [])],
    )


def _time(measured: Measured) -> Json | None:
    """By the clock, however fast simulated pods ran."""
    begun = _begun(measured)
    seconds = measured.duration / measured.time_scale
    if begun is None:
        return {"duration": f"PT{seconds:.6f}S"}
    end = begun + timedelta(seconds=seconds)
    return {"start": begun.isoformat(), "end": end.isoformat(), "duration": f"PT{seconds:.6f}S"}


def _begun(measured: Measured) -> datetime | None:
    try:
        return datetime.fromisoformat(measured.origin.started).astimezone(UTC)
    except ValueError:
        return None


def _server(measured: Measured) -> Json:
    """Known from outside only, so of the kind that promises nothing."""
    origin = measured.origin
    standardized = {"kind": "generic", "tool": "openai-compatible server", "tool_version": "unknown"}
    endpoints = sorted(set(measured.requests.endpoint))
    return {
        "metadata": {"label": "server", "cfg_id": _identity(origin.url, origin.model)},
        "standardized": standardized | _known(url=origin.url, model=origin.model, endpoints=endpoints),
        "native": {},
    }


def _load(measured: Measured) -> Json:
    requests, origin = measured.requests, measured.origin
    several = bool(len(requests)) and int(requests.turn.max()) > 0
    concurrency = origin.shape.get("concurrency")
    return {
        "metadata": {"cfg_id": _identity(measured.plan), "description": measured.workload},
        "standardized": _known(
            tool="picker load",
            tool_version=__version__,
            parallelism=max(1, measured.processes),
            source="sampled" if origin.shape.get("trace_file") else "random",
            input_seq_len=_lengths(requests.prompt_tokens[requests.ok]),
            output_seq_len=_lengths(requests.output_tokens[requests.ok]),
            multi_turn={"enabled": True} if several else None,
            rate_qps=measured.rate if measured.rate and measured.rate > 0 else None,
            concurrency=concurrency if isinstance(concurrency, int) else None,
        ),
        "native": {
            "args": {"command": origin.command},
            "config": {"shape": dict(origin.shape), "seed": origin.seed, "machine": dict(origin.machine)},
        },
    }


def _lengths(tokens: Ints) -> Json:
    """As the server counted them: the plan's own lengths need a tokenizer that we may not have."""
    if not len(tokens):
        return {"distribution": "other", "value": 0}
    least, most = int(tokens.min()), int(tokens.max())
    if least == most:
        return {"distribution": "fixed", "value": least}
    return {"distribution": "other", "value": float(tokens.mean()), "min": least, "max": most}


# --- what came of it -----------------------------------------------------------------------------------------


def _aggregate(measured: Measured) -> Json:
    requests = measured.requests
    ok = requests.ok
    counts = _known(
        total=len(requests) + measured.cancelled,
        failures=int((~ok).sum()),
        incomplete=measured.cancelled,
        input_length=_stats(requests.prompt_tokens[ok], "count"),
        output_length=_stats(requests.output_tokens[ok], "count"),
    )
    latency = _known(
        time_to_first_token=_stats(requests.ttft, "s"),
        normalized_time_per_output_token=_stats(requests.ntpot, "s/token"),
        time_per_output_token=_stats(requests.tpot, "s/token"),
        inter_token_latency=_gaps(measured.gaps),
        request_latency=_stats(requests.e2e, "s"),
    )
    return {"requests": counts, "latency": latency, "throughput": _throughput(requests, measured.duration)}


def _gaps(gaps: Mapping[str, float] | None) -> Json | None:
    if gaps is None:
        return None
    return {"units": "s/token"} | {name: value for name, value in gaps.items() if name != "count"}


def _throughput(requests: Requests, duration: float) -> Json:
    if duration <= 0:
        return {}
    ok = requests.ok
    prompts, outputs = int(requests.prompt_tokens[ok].sum()), int(requests.output_tokens[ok].sum())
    return {
        "input_token_rate": {"units": "tokens/s", "mean": prompts / duration},
        "output_token_rate": {"units": "tokens/s", "mean": outputs / duration},
        "total_token_rate": {"units": "tokens/s", "mean": (prompts + outputs) / duration},
        "request_rate": {"units": "queries/s", "mean": float(ok.sum()) / duration},
    }


def _time_series(measured: Measured) -> Json | None:
    """Means by window of the intended times; rates by window of the answers' ends."""
    begun, requests = _begun(measured), measured.requests
    if begun is None or not len(requests):
        return None
    windows = Windows.over(requests)
    stamps = [
        (begun + timedelta(seconds=float(middle) / measured.time_scale)).isoformat() for middle in windows.middles
    ]

    def series(values: Floats, units: str, key: str) -> Json:
        points = zip(stamps, values, strict=True)
        return {"units": units, "series": [{"ts": ts, key: float(v)} for ts, v in points if np.isfinite(v)]}

    ok, at = requests.ok, requests.intended
    outputs = windows.sums(requests.ended[ok], requests.output_tokens[ok].astype(float)) / windows.width
    return {
        "latency": {
            "time_to_first_token": series(windows.means(at, requests.ttft), "s", "mean"),
            "time_per_output_token": series(windows.means(at, requests.tpot), "s/token", "mean"),
            "request_latency": series(windows.means(at, requests.e2e), "s", "mean"),
        },
        "throughput": {
            "output_token_rate": series(outputs, "tokens/s", "value"),
            "request_rate": series(windows.rates(requests.ended[ok]), "queries/s", "value"),
        },
    }


def _sessions(requests: Requests, duration: float) -> Json | None:
    """None for runs of single requests. A session of which a turn failed is failed."""
    known = requests.where(requests.conversation >= 0)
    if not len(known) or int(known.turn.max()) == 0:
        return None
    _, number = np.unique(known.conversation, return_inverse=True)
    count = int(number.max()) + 1
    failed = np.bincount(number, weights=~known.ok, minlength=count) > 0
    begun, ended = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(begun, number, known.intended)
    np.maximum.at(ended, number, known.ended)
    sessions = _known(
        total=count,
        succeeded=int((~failed).sum()),
        failed=int(failed.sum()),
        total_events=len(known),
        total_events_completed=int(known.ok.sum()),
        session_rate={"units": "queries/s", "mean": float((~failed).sum()) / duration} if duration > 0 else None,
        session_duration=_stats((ended - begun)[~failed], "s"),
        events_per_session=_stats(np.bincount(number, minlength=count), "count"),
        input_tokens_per_session=_stats(np.bincount(number, weights=known.prompt_tokens, minlength=count), "count"),
        output_tokens_per_session=_stats(np.bincount(number, weights=known.output_tokens, minlength=count), "count"),
    )
    return {"sessions": sessions}


def _observability(requests: Requests) -> Json | None:
    ratio, delay = hit_ratio(requests), _stats(requests.delay, "s")
    found = _known(
        load_prefix_cache_hit_rate={"statistics": {"units": "fraction", "mean": ratio}} if ratio is not None else None,
        load_schedule_delay={"statistics": delay} if delay is not None else None,
    )
    return found or None
