"""The Grafana dashboard as code: what picker decides, what comes of it, what it costs. Knows no cluster and no folder.

Every panel is one or more queries of Prometheus, by the names that picker's registry has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_SOURCE: Json = {"type": "prometheus", "uid": "${source}"}
_MINE = 'namespace=~"$namespace",pod=~"$pod"'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """One graph. queries: (PromQL with MINE for the labels asked for, legend). unit: Grafana's name of it."""

    title: str
    says: str
    queries: Sequence[tuple[str, str]]
    unit: str = "short"
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: Sequence[Panel]


def _rate(metric: str, by: str = "") -> str:
    grouped = f"sum by ({by}) " if by else "sum"
    return f"{grouped}(rate({metric}{{MINE}}[$__rate_interval]))"


def _quantile(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, {_rate(metric + '_bucket', 'le')})"


def _quantiles(metric: str) -> list[tuple[str, str]]:
    return [(_quantile(share, metric), f"P{share * 100:g}") for share in (0.5, 0.95, 0.99)]


ROWS = (
    Row(
        "Traffic",
        (
            Panel(
                "Decisions",
                "By outcome: picked, or why not.",
                [(_rate("picker_decisions_total", "outcome"), "{{outcome}}")],
                "reqps",
                stacked=True,
            ),
            Panel(
                "Requests ended",
                "By how they ended.",
                [(_rate("picker_requests_ended_total", "how"), "{{how}}")],
                "reqps",
                stacked=True,
            ),
            Panel(
                "In flight",
                "Routed and not ended, and waiting in picker's queue. With several replicas each knows of all.",
                [
                    ("max(picker_inflight_requests{MINE})", "in flight"),
                    ("sum(picker_queued_requests{MINE})", "queued"),
                ],
            ),
            Panel(
                "Time to first token",
                "As picker sees it, at the gateway.",
                _quantiles("llm_d_epp_request_ttft_seconds"),
                "s",
            ),
            Panel(
                "Request duration", "From arrival to the end.", _quantiles("llm_d_epp_request_duration_seconds"), "s"
            ),
            Panel(
                "Wait in picker's queue", "Before anything was picked.", _quantiles("picker_queue_wait_seconds"), "s"
            ),
        ),
    ),
    Row(
        "Caches",
        (
            Panel(
                "Prompt tokens cached",
                "Share of all prompt tokens: what was predicted, and what the engines reported.",
                [
                    (
                        f"{_rate('picker_predicted_cached_tokens_total')} / {_rate('picker_prompt_tokens_total')}",
                        "predicted",
                    ),
                    (f"{_rate('picker_cached_tokens_total')} / {_rate('picker_prompt_tokens_total')}", "reported"),
                ],
                "percentunit",
            ),
            Panel(
                "Tokens",
                "Of prompts and of answers.",
                [
                    (_rate("picker_prompt_tokens_total"), "prompt"),
                    (_rate("picker_output_tokens_total"), "output"),
                ],
                "short",
            ),
            Panel(
                "Memory of the index",
                "Prefixes by what was sent; by KV events where engines publish them.",
                [
                    ("picker_index_bytes{MINE}", "{{pod}}"),
                    ("picker_exact_index_bytes{MINE}", "{{pod}}, KV events"),
                ],
                "bytes",
            ),
            Panel(
                "State of KV events",
                "Endpoints in each state; docs/exact.md says what they mean.",
                [("sum by (state) (picker_kv_events_state{MINE})", "{{state}}")],
                stacked=True,
            ),
            Panel(
                "Predictions from KV events",
                "Compared with what the engine reported.",
                [(_rate("picker_cached_token_predictions_total", "verdict"), "{{verdict}}")],
                "ops",
                stacked=True,
            ),
        ),
    ),
    Row(
        "Endpoints",
        (
            Panel(
                "Endpoints",
                "Known, and of these ready to serve.",
                [
                    ("max(picker_endpoints{MINE})", "known"),
                    ("max by (name) (llm_d_epp_ready_endpoints{MINE})", "ready in {{name}}"),
                ],
            ),
            Panel(
                "Requests by endpoint",
                "Where they were routed to.",
                [(_rate("picker_picks_total", "endpoint"), "{{endpoint}}")],
                "reqps",
                stacked=True,
            ),
            Panel(
                "Requests waiting in engines",
                "As scraped last.",
                [
                    (
                        "max by (model_server_endpoint) (llm_d_epp_per_endpoint_queue_size{MINE})",
                        "{{model_server_endpoint}}",
                    )
                ],
            ),
            Panel(
                "Cache in use",
                "Mean over the endpoints.",
                [("avg(llm_d_epp_average_kv_cache_utilization{MINE})", "mean")],
                "percentunit",
            ),
            Panel(
                "Failed scrapes",
                "By endpoint.",
                [(_rate("picker_scrape_errors_total", "endpoint"), "{{endpoint}}")],
                "ops",
            ),
        ),
    ),
    Row(
        "picker itself",
        (
            Panel("Time of a decision", "Hash, match, score, book.", _quantiles("picker_decision_seconds"), "s"),
            Panel("Open ext-proc streams", "By replica.", [("picker_extproc_streams{MINE}", "{{pod}}")]),
            Panel(
                "Internal errors",
                "Errors of picker's own; requests went on.",
                [(_rate("picker_internal_errors_total", "where"), "{{where}}")],
                "ops",
            ),
            Panel(
                "Since the API server was lost",
                "Seconds; routing goes on by what is known.",
                [("picker_kubernetes_age_seconds{MINE}", "{{pod}}")],
                "s",
            ),
        ),
    ),
)


def dashboard() -> Json:
    """The whole of it, as Grafana takes it."""
    return {
        "uid": "picker",
        "title": "picker",
        "tags": ["llm", "picker"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable("namespace"), _variable("pod", 'namespace=~"$namespace"')]},
        "panels": list(_laid_out()),
    }


def _source() -> Json:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str, among: str = "") -> Json:
    query = f"label_values(picker_endpoints{{{among}}}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": _SOURCE,
        "query": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _laid_out() -> Iterator[Json]:
    """Rows below each other, panels side by side."""
    number, y = 0, 0
    for row in ROWS:
        number += 1
        yield {"id": number, "type": "row", "title": row.title, "gridPos": {"x": 0, "y": y, "w": _COLUMNS, "h": 1}}
        y += 1
        for place, panel in enumerate(row.panels):
            number += 1
            line, column = divmod(place, _COLUMNS // _WIDTH)
            at = {"x": column * _WIDTH, "y": y + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
            yield _drawn(panel) | {"id": number, "gridPos": at}
        y += -(-len(row.panels) // (_COLUMNS // _WIDTH)) * _HEIGHT


def _drawn(panel: Panel) -> Json:
    stacking = {"mode": "normal" if panel.stacked else "none"}
    custom = {"stacking": stacking, "fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": chr(ord("A") + place),
                "datasource": _SOURCE,
                "expr": query.replace("MINE", _MINE),
                "legendFormat": legend,
            }
            for place, (query, legend) in enumerate(panel.queries)
        ],
    }
