"""Command lines of production-stack's router (`vllm-router` of the Python package), read as configurations.

Flags are those of its argument parser, `src/vllm_router/parsers/parser.py`, at commit a6c01db0 of August 2026.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from picker.errors import ConfigError
from picker.imports.flags import (
    Draft,
    Flag,
    Meaning,
    Program,
    is_here,
    is_missing,
    is_partly,
    log_level,
    number,
    policy,
    to,
)
from picker.imports.report import Fate

_BY_COST = "requests go where their prefix is cached unless waiting there costs more"
_POLICIES: Mapping[str, tuple[str, Fate, str]] = {
    "roundrobin": ("round-robin", Fate.SAME, "as there"),
    "session": ("picker", Fate.PARTLY, "requests of a session meet by their common prefix, not by a header"),
    "prefixaware": ("picker", Fate.REPLACED, _BY_COST),
    "kvaware": ("picker", Fate.REPLACED, f"{_BY_COST}; exact.tokenizer matches by KV events instead of LMCache"),
    "disaggregated_prefill": ("picker", Fate.MISSING, "prefill and decode on different endpoints: not in the proxy"),
    "disaggregated_prefill_orchestrated": ("picker", Fate.MISSING, "prefill and decode on different endpoints"),
}


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _whole(text: str) -> int:
    return int(number(text))


def _backends(draft: Draft, name: str, values: Sequence[str]) -> None:
    found = draft.endpoints(_listed(values[0]), name)
    draft.say(name, Fate.SAME, f"endpoints: {len(found)}")


def _models(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("static-models", _listed(values[0]))  # taken out again by `_finish`
    draft.say(name, Fate.SAME, "endpoints: models, in the order of the endpoints")


def _aliases(draft: Draft, name: str, values: Sequence[str]) -> None:
    for pair in _listed(values[0]):
        alias, colon, model = pair.partition(":")
        if not (alias and colon and model):
            draft.say(name, Fate.MISSING, f"{pair!r} is not alias:model")
            continue
        draft.rewrite(alias, [model])
        draft.say(name, Fate.SAME, f"models.rewrites: {alias} becomes {model}")


def _discovery(draft: Draft, name: str, values: Sequence[str]) -> None:
    known = {"static": Fate.SAME, "k8s": Fate.SAME, "external-only": Fate.MISSING}
    if values[0] not in known:
        raise ConfigError(f"{name}: {values[0]!r} is not one of {', '.join(known)}")
    says = {"static": "endpoints", "k8s": "kubernetes: pods by selector"}.get(
        values[0], "picker routes to engines only"
    )
    draft.say(name, known[values[0]], says)


def _finish(draft: Draft) -> None:
    urls, models = draft.values.get("endpoints", []), draft.values.pop("static-models", [])
    if models and len(models) != len(urls):
        raise ConfigError(f"--static-models: {len(models)} models for {len(urls)} backends")
    if models:
        pairs = zip(urls, models, strict=True)
        draft.values["endpoints"] = [{"address": url, "models": [model]} for url, model in pairs]
    if not urls and "kubernetes" not in draft.values:
        draft.say("--static-backends", Fate.MISSING, "there are no endpoints: give --endpoint URL")


_LMCACHE = is_here("KV events of the engines tell what they cache")
_CHECKS = is_here("endpoints are healthy as long as their metrics are had, which is asked every second")
_FILES = is_missing("picker keeps no files and batches")
_SENTRY = is_missing("there is no Sentry")
_TRACES = is_missing("there are no traces; traceparent is passed on")
_PHASES = is_missing("prefill and decode on different endpoints: not in the proxy")
_STATS = is_here("metrics on the admin port have it")

# name -> what it means; those that take no value are in `_SWITCHES`
_MEANINGS: Mapping[str, Meaning] = {
    "host": to("proxy.host"),
    "port": to("proxy.port", _whole),
    "root-path": is_missing("paths are passed on as they are"),
    "service-discovery": _discovery,
    "k8s-service-discovery-type": is_partly("pods by selector, or kubernetes.services by name"),
    "k8s-port": to("kubernetes.target_ports", lambda text: [_whole(text)]),
    "k8s-namespace": to("kubernetes.namespace"),
    "k8s-label-selector": to("kubernetes.selector"),
    "k8s-watcher-timeout-seconds": is_here("watches are begun anew when they are silent (kubernetes.silence_s)"),
    "static-backends": _backends,
    "static-models": _models,
    "static-aliases": _aliases,
    "static-model-types": is_here("every path is passed on"),
    "static-model-labels": is_partly("endpoints take labels (endpoints: labels), which filters and profiles use"),
    "static-backend-health-checks": _CHECKS,
    "static-backend-health-check-interval": _CHECKS,
    "static-backend-health-check-timeout-seconds": _CHECKS,
    "backend-health-check-timeout-seconds": _CHECKS,
    "routing-logic": policy(_POLICIES),
    "session-key": is_missing("no header binds a session to an endpoint"),
    "kv-aware-threshold": is_here("cache and load are weighed in seconds"),
    "prefix-min-match-length": is_here("a prefix counts by what computing it would cost"),
    "lmcache-controller-port": _LMCACHE,
    "lmcache-controller-reply-port": _LMCACHE,
    "lmcache-controller-heartbeat-port": _LMCACHE,
    "lmcache-health-check-interval": _LMCACHE,
    "lmcache-worker-timeout": _LMCACHE,
    "callbacks": is_missing("there are no callbacks"),
    "request-rewriter": is_missing("requests are never rewritten"),
    "enable-batch-api": _FILES,
    "file-storage-class": _FILES,
    "file-storage-path": _FILES,
    "batch-processor": _FILES,
    "engine-stats-interval": is_here("metrics are read every second (scrape.interval_s)"),
    "request-stats-window": _STATS,
    "log-stats": _STATS,
    "log-stats-interval": _STATS,
    "dynamic-config-yaml": is_partly("endpoints_file is watched for changes, in picker's own words"),
    "dynamic-config-json": is_partly("endpoints_file is watched for changes, in picker's own words"),
    "feature-gates": is_missing("semantic cache and PII filters are not picker's"),
    "log-level": log_level,
    "log-format": is_missing("log lines are text; --access-log has one JSON line a request"),
    "sentry-dsn": _SENTRY,
    "sentry-traces-sample-rate": _SENTRY,
    "sentry-profile-session-sample-rate": _SENTRY,
    "otel-endpoint": _TRACES,
    "otel-service-name": _TRACES,
    "otel-secure": _TRACES,
    "prefill-model-labels": _PHASES,
    "decode-model-labels": _PHASES,
    "max-instance-failover-reroute-attempts": to(
        "limits.max_attempts", lambda text: _whole(text) + 1, Fate.SAME, "also for connections that break"
    ),
    "external-providers-config": is_missing("picker routes to engines only"),
    "version": is_missing("asks for a version"),
}
_SWITCHES = ("static-backend-health-checks", "enable-batch-api", "log-stats", "otel-secure", "version")

PROGRAM = Program(
    "production-stack",
    "of August 2026",
    (("-m", "vllm_router.app"), ("vllm_router.app",)),
    {f"--{name}": Flag(0 if name in _SWITCHES else 1, meaning) for name, meaning in _MEANINGS.items()},
    _finish,
)
# Both projects call their command `vllm-router`; these flags only this one has.
OWN_FLAGS = frozenset(("--static-backends", "--routing-logic", "--k8s-label-selector", "--static-models"))
