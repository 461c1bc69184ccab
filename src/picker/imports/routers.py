"""Command lines of `sglang-router`, and of `vllm-router` and `smg`, which come of it, read as configurations.

Flags and their arities are those of the wheels sglang-router 0.3.2, vllm-router 0.1.17 and smg 1.13.0, read from their
argument parsers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

# name, or name:arity where it is not 1
_ALL = """
    host port worker-urls:* policy prefill-policy decode-policy prefill:+ decode worker-startup-timeout-secs
    worker-startup-check-interval cache-threshold balance-abs-threshold balance-rel-threshold eviction-interval-secs
    max-tree-size max-payload-size enable-igw:0 api-key log-dir log-level service-discovery:0 selector:+
    service-discovery-port service-discovery-namespace prefill-selector:+ decode-selector:+ prometheus-port
    prometheus-host request-id-headers:* request-timeout-secs retry-max-retries retry-initial-backoff-ms
    retry-max-backoff-ms retry-backoff-multiplier retry-jitter-factor disable-retries:0 cb-failure-threshold
    cb-success-threshold cb-timeout-duration-secs cb-window-duration-secs disable-circuit-breaker:0
    health-failure-threshold health-success-threshold health-check-timeout-secs health-check-interval-secs
    health-check-endpoint max-concurrent-requests queue-size queue-timeout-secs rate-limit-tokens-per-second
    cors-allowed-origins:*
"""
_VLLM_ROUTER = """
    enable-program-scheduling:0 program-scheduling-config-json router-temperature kv-penalty-host
    kv-penalty-external kv-penalty-disk kv-aware-session-affinity-ttl-secs kv-event-source kv-event-replay-source
    kv-event-block-size kv-event-model pd-kv-events mini-lb:0 vllm-pd-disaggregation:0 wasm-middleware
    wasm-middleware-sha256 wasm-middleware-route intra-node-data-parallel-size vllm-discovery-address kv-connector
"""
_SGLANG_ROUTER = """
    bucket-adjust-interval-secs max-idle-secs assignment-mode dp-aware:0 mini-lb:0 pd-disaggregation:0
    prometheus-duration-buckets:+ shutdown-grace-period-secs disable-health-check:0 model-path tokenizer-path
    chat-template tokenizer-cache-enable-l0:0 tokenizer-cache-l0-max-entries tokenizer-cache-enable-l1:0
    tokenizer-cache-l1-max-memory reasoning-parser tool-call-parser mcp-config-path backend history-backend
    oracle-wallet-path oracle-tns-alias oracle-connect-descriptor oracle-username oracle-password oracle-pool-min
    oracle-pool-max oracle-pool-timeout-secs postgres-db-url postgres-pool-max redis-url redis-pool-max
    redis-retention-days client-cert-path client-key-path ca-cert-paths:* tls-cert-path tls-key-path enable-trace:0
    otlp-traces-endpoint control-plane-api-keys:* control-plane-audit-enabled:0 jwt-issuer jwt-audience jwt-jwks-uri
    jwt-role-mapping:*
"""
_SMG = """
    upstream-http2:0 upstream-pool-idle-timeout-secs health-check-port encode-policy cache-match-threshold
    prefix-token-count prefix-hash-load-factor prefix-hash-balance-abs-threshold least-load-kv-pressure-weight
    least-load-default-throughput least-load-mean-prefill-tokens least-load-max-waiting-requests
    power-of-two-load-metric spill-abs-threshold spill-rel-threshold balance-token-usage-threshold
    overload-token-usage-threshold worker-overload-waiting-requests worker-overload-token-usage
    worker-overload-protection:0 disable-worker-overload-protection:0 worker-overload-shed:0 kv-index
    worker-stall-secs worker-wedge-secs worker-stale-secs worker-warmup-secs worker-warmup-share
    worker-warmup-blocks worker-warmup-thin-ratio worker-warmup-divert-every selection-policy
    selection-accounting-ttl-ms overlap-decay selection-temperature bucket-adjust-interval-secs block-size
    cache-boundaries cache-index cache-ttl-secs max-idle-secs sticky-key-idle-secs assignment-mode
    max-buffered-request-bytes pd-admission-wait-secs stream-body-stall-timeout-secs sse-keepalive-secs dp-aware:0
    routing-key-override:0 sticky-sessions:0 routing-key-headers:* dp-minimum-tokens-scheduler:0 enable-rl:0
    rl-control-timeout-secs rl-fanout-concurrency pd-disaggregation:0 epd-disaggregation:0 encode:+
    prefill-max-inflight-requests-per-worker prefill-queue-size prefill-queue-timeout-secs worker-startup-delay
    job-queue-capacity job-queue-concurrency load-monitor-interval disable-load-monitoring:0
    multimodal-tensor-transport multimodal-shm-min-bytes multimodal-max-inflight-bytes mm-per-request-image-limit
    mm-processing mm-pixel-cache-mb mm-pixel-rdma:0 mm-allowed-media-domains mm-allow-private-media-hosts:0
    rdma-listen-ip rdma-slot-ttl-s log-mm-timing:0 log-json:0 discovery-provider discovery-file
    discovery-check-interval-secs kv-connector-annotation kv-engine-id-annotation encode-selector:+
    router-selector:+ model-id-from model-alias prometheus-duration-buckets:+ jemalloc-prof-dir
    storage-context-headers:* shutdown-grace-period-secs header-read-timeout-secs idle-connection-timeout-secs
    trust-tenant-header:0 tenant-header-name max-background-responses priority-scheduler-enabled:0
    priority-scheduler-default-max-class priority-scheduler-config priority-scheduler-tenant-metric-top-n
    tenant-rate-limit-enabled:0 tenant-rate-limit-config disable-health-check:0 remove-unhealthy-workers:0
    no-remove-unhealthy-workers:0 worker-auto-recovery:0 no-worker-auto-recovery:0 model-path model tokenizer-path
    chat-template disable-tokenizer-autoload:0 parser tokenizer-cache-enable-l0:0 tokenizer-cache-l0-max-entries
    tokenizer-cache-enable-l1:0 tokenizer-cache-l0-max-memory tokenizer-cache-l1-max-memory reasoning-parser
    tool-call-parser mcp-config-path backend zmq-engine-count enable-wasm:0 storage-hook-wasm-path history-backend
    history-memory-max-responses history-memory-max-items history-memory-retention-secs oracle-wallet-path
    oracle-tns-alias oracle-connect-descriptor oracle-username oracle-password oracle-external-auth:0
    oracle-pool-min oracle-pool-max oracle-pool-timeout-secs postgres-db-url postgres-pool-max
    postgres-op-timeout-secs redis-url redis-pool-max redis-retention-days redis-op-timeout-secs schema-config
    client-cert-path client-key-path ca-cert-paths:* tls-cert-path tls-key-path enable-trace:0 otlp-traces-endpoint
    tenant-api-key control-plane-api-keys:* control-plane-audit-enabled:0 jwt-issuer jwt-audience jwt-jwks-uri
    jwt-role-mapping:* enable-mesh:0 mesh-server-name mesh-host mesh-advertise-host mesh-port mesh-peer-urls:*
    mesh-tls-ca-cert mesh-tls-cert mesh-tls-key
"""

_BY_COST = "requests go where their prefix is cached unless waiting there costs more; nothing is to be set"
_STICKY = "requests of a session meet by their common prefix; no session is held to an endpoint at any price"
_POLICIES: Mapping[str, tuple[str, Fate, str]] = {
    "random": ("random", Fate.SAME, "as there"),
    "round_robin": ("round-robin", Fate.SAME, "as there"),
    "power_of_two": ("least-request", Fate.REPLACED, "the least busy of all, not of two"),
    "cache_aware": ("picker", Fate.REPLACED, _BY_COST),
    "kv_aware": ("picker", Fate.REPLACED, f"{_BY_COST}; exact.tokenizer matches by KV events"),
    "prefix_hash": ("picker", Fate.REPLACED, _BY_COST),
    "least_load": ("picker", Fate.REPLACED, "the cost in seconds counts queued tokens and the KV cache, too"),
    "consistent_hash": ("picker", Fate.PARTLY, _STICKY),
    "consistent_hashing": ("picker", Fate.PARTLY, _STICKY),
    "sticky_least_loaded": ("picker", Fate.PARTLY, _STICKY),
    "manual": ("picker", Fate.PARTLY, _STICKY),
    "bucket": ("picker", Fate.PARTLY, "the length of a prompt is a part of its cost"),
    "passthrough": ("round-robin", Fate.PARTLY, "every endpoint is used, not one"),
}
_THRESHOLDS = is_here("cache and load are weighed against each other in seconds: there is no threshold to set")
_MEMORY = is_here("the memory of prefixes is bounded in bytes (index.budget_bytes), the least recent leave first")
_AT_ONCE = is_here("another endpoint is tried at once: there is nothing to wait for between two")
_SCRAPES = is_here("endpoints are healthy as long as their metrics are had, which is asked every second (scrape)")
_TWO_PHASES = is_missing("prefill and decode on different endpoints: not in the standalone proxy")
_NO_LIMIT = is_missing("requests are limited by key (keys.max_concurrent) or by endpoint (queue.max_inflight)")
_TOKENIZER = is_partly(
    "give exact.tokenizer a folder with tokenizer.json: prompts are matched by the engines' KV events"
)


def _max_attempts(text: str) -> int:
    return int(number(text)) + 1


def _endpoints(draft: Draft, name: str, values: Sequence[str]) -> None:
    found = draft.endpoints(values, name)
    draft.say(name, Fate.SAME, f"endpoints: {len(found)}")


def _selector(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("kubernetes.selector", ",".join(values))
    draft.say(name, Fate.SAME, f"kubernetes.selector: {','.join(values)}; pods are watched")


def _port_of_pods(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("kubernetes.target_ports", [int(number(values[0]))])
    draft.say(name, Fate.SAME, f"kubernetes.target_ports: {values[0]}")


def _discovery(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.say(name, Fate.SAME, "kubernetes: pods by selector")


def _no_retries(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("limits.max_attempts", 1)
    draft.say(name, Fate.SAME, "limits.max_attempts: 1")


def _no_breaker(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("health.eject_s", 0.0)
    draft.set("health.eject_max_s", 0.0)
    draft.say(name, Fate.SAME, "health.eject_s: 0; endpoints that fail are still found out by their metrics")


def _concurrency(draft: Draft, name: str, values: Sequence[str]) -> None:
    if number(values[0]) < 0:
        draft.say(name, Fate.SAME, "no limit, as without the flag")
    else:
        draft.say(name, Fate.MISSING, "the limit is by endpoint: set queue.max_inflight to its share of it")


def _health_path(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("health.path", values[0])
    draft.say(name, Fate.SAME, f"health.path: {values[0]}; without it, metrics tell")


def _metrics_host(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("admin.host", values[0])
    if values[0] in ("127.0.0.1", "localhost", "::1"):
        draft.say(name, Fate.SAME, f"admin.host: {values[0]}")
        return
    draft.set("admin.read_only", True)
    draft.say(name, Fate.PARTLY, f"admin.host: {values[0]}; the admin API is there, too: read-only, as there is no key")


def _request_ids(draft: Draft, name: str, values: Sequence[str]) -> None:
    others = [value for value in values if value.lower() != "x-request-id"]
    if others:
        draft.say(
            name, Fate.PARTLY, f"ids are taken from x-request-id alone; {', '.join(others)}: passed on as any field"
        )
    else:
        draft.say(name, Fate.SAME, "x-request-id is kept, or made")


def _alias(draft: Draft, name: str, values: Sequence[str]) -> None:
    alias, equals, model = values[0].partition("=")
    if not (alias and equals and model):
        draft.say(name, Fate.MISSING, f"{values[0]!r} is not alias=model")
        return
    draft.rewrite(alias, [model])
    draft.say(name, Fate.SAME, f"models.rewrites: {alias} becomes {model}")


def _ranks(draft: Draft, name: str, values: Sequence[str]) -> None:
    draft.set("ranks", int(number(values[0])))  # taken out again by `_finish`
    draft.say(name, Fate.SAME, f"each endpoint as {values[0]} ranks")


def _finish(draft: Draft) -> None:
    """What depends on several flags."""
    ranks = draft.values.pop("ranks", 1)
    urls = draft.values.get("endpoints", [])
    if ranks > 1:
        draft.values["endpoints"] = [{"address": url, "rank": rank} for url in urls for rank in range(ranks)]
    if not urls and "kubernetes" not in draft.values:
        draft.say("--worker-urls", Fate.MISSING, "there are no endpoints: give --endpoint URL")


# Here and there, or by what they begin with; the longest that fits counts.
_MEANINGS: Mapping[str, Meaning] = {
    "host": to("proxy.host"),
    "port": to("proxy.port", lambda text: int(number(text))),
    "worker-urls": _endpoints,
    "policy": policy(_POLICIES),
    "prefill": _TWO_PHASES,
    "decode": _TWO_PHASES,
    "encode": _TWO_PHASES,
    "pd-": _TWO_PHASES,
    "epd-": _TWO_PHASES,
    "vllm-pd-disaggregation": _TWO_PHASES,
    "vllm-discovery-address": _TWO_PHASES,
    "kv-connector": _TWO_PHASES,
    "kv-engine-id-annotation": _TWO_PHASES,
    "mini-lb": _TWO_PHASES,
    "worker-startup": is_here("nothing waits for endpoints: those that do not answer are asked again until they do"),
    "cache-": _THRESHOLDS,
    "balance-": _THRESHOLDS,
    "spill-": _THRESHOLDS,
    "overload-": _THRESHOLDS,
    "least-load-": _THRESHOLDS,
    "power-of-two-": _THRESHOLDS,
    "prefix-": _THRESHOLDS,
    "bucket-": _THRESHOLDS,
    "overlap-decay": _THRESHOLDS,
    "selection-": _THRESHOLDS,
    "router-temperature": _THRESHOLDS,
    "kv-penalty-": _THRESHOLDS,
    "assignment-mode": is_missing(_STICKY),
    "max-idle-secs": is_missing(_STICKY),
    "sticky-": is_missing(_STICKY),
    "routing-key-": is_missing(_STICKY),
    "kv-aware-session": is_missing(_STICKY),
    "eviction-interval-secs": _MEMORY,
    "max-tree-size": _MEMORY,
    "cache-ttl-secs": _MEMORY,
    "cache-index": _MEMORY,
    "kv-index": _MEMORY,
    "block-size": is_here("the block size is asked of the engines"),
    "kv-event": is_partly("engines tell where they publish, or exact.events does; exact.tokenizer switches it on"),
    "max-payload-size": to("limits.max_body_bytes", lambda text: int(number(text))),
    "max-buffered-request-bytes": is_here("a request is kept whole until its response begins"),
    "dp-aware": is_partly("name the ranks of each endpoint (endpoints: rank), or let discovery do it"),
    "intra-node-data-parallel-size": _ranks,
    "enable-igw": is_here("several models behind one gateway need no switch"),
    "api-key": is_partly("it is for the engines: put it into a file and name it in upstream.api_key_file"),
    "tenant-api-key": is_partly("put it into a file as a line name:key, and name the file in keys.file"),
    "control-plane-": is_partly("the admin port asks for admin.token_file, or for keys of admin.keys_file"),
    "jwt-": is_missing("keys are the only credentials"),
    "log-level": log_level,
    "log-json": is_missing("log lines are text; --access-log has one JSON line a request"),
    "log-dir": is_missing("picker logs to stderr; --access-log FILE has a line for each request"),
    "log-mm-timing": is_missing("there is no such log"),
    "service-discovery": _discovery,
    "service-discovery-port": _port_of_pods,
    "service-discovery-namespace": to("kubernetes.namespace"),
    "selector": _selector,
    "discovery-": is_partly("endpoints_file is a file of endpoints that is watched, in picker's own words"),
    "router-selector": is_missing("replicas find each other by replicas.peers"),
    "prometheus-port": to("admin.port", lambda text: int(number(text)), Fate.PARTLY, "metrics have other names"),
    "prometheus-host": _metrics_host,
    "prometheus-duration-buckets": is_missing("buckets are fixed"),
    "health-check-port": is_here("health is on the admin port"),
    "request-id-headers": _request_ids,
    "request-timeout-secs": to(
        "proxy.first_byte_timeout_s", number, Fate.PARTLY, "until a response begins; a response that flows has no limit"
    ),
    "stream-body-stall-timeout-secs": to("proxy.idle_timeout_s", number),
    "shutdown-grace-period-secs": to("drain_timeout_s", number),
    "header-read-timeout-secs": to("connections.head_timeout_s", number),
    "idle-connection-timeout-secs": to("connections.idle_timeout_s", number),
    "upstream-pool-idle-timeout-secs": is_here("idle connections to engines are closed after 4 s"),
    "sse-keepalive-secs": is_missing("streams pass as engines send them"),
    "retry-max-retries": to("limits.max_attempts", _max_attempts, Fate.PARTLY, "each on another endpoint"),
    "retry-": _AT_ONCE,
    "disable-retries": _no_retries,
    "cb-failure-threshold": to("health.eject_after", lambda text: int(number(text)), Fate.PARTLY, "in a row"),
    "cb-timeout-duration-secs": to(
        "health.eject_max_s", number, Fate.PARTLY, "the rest begins with a second and doubles"
    ),
    "cb-": is_here("one request in a while goes to an endpoint that rests; when it succeeds, all do"),
    "disable-circuit-breaker": _no_breaker,
    "health-check-endpoint": _health_path,
    "health-": _SCRAPES,
    "disable-health-check": is_missing("health is known by the metrics, which are read anyway"),
    "remove-unhealthy-workers": _SCRAPES,
    "no-remove-unhealthy-workers": _SCRAPES,
    "worker-auto-recovery": _SCRAPES,
    "no-worker-auto-recovery": _SCRAPES,
    "load-monitor-interval": is_here("metrics are read every second (scrape.interval_s)"),
    "disable-load-monitoring": is_missing("metrics are read always; what goes through here is counted besides"),
    "worker-warmup-secs": to("health.slow_start_s", number),
    "worker-warmup-": is_here("an endpoint that comes gets more from second to second (health.slow_start_s)"),
    "worker-stall-secs": is_here("an endpoint that hangs is found by what was predicted (health.hang_factor)"),
    "worker-wedge-secs": is_here("an endpoint that hangs is found by what was predicted (health.hang_factor)"),
    "worker-stale-secs": is_here("values that are old are taken for unknown"),
    "worker-overload-": _THRESHOLDS,
    "disable-worker-overload-protection": _THRESHOLDS,
    "max-concurrent-requests": _concurrency,
    "queue-size": to("queue.size", lambda text: int(number(text)), Fate.PARTLY, "used with queue.max_inflight"),
    "queue-timeout-secs": to("queue.timeout_s", number),
    "rate-limit-tokens-per-second": _NO_LIMIT,
    "tenant-": _NO_LIMIT,
    "trust-tenant-header": _NO_LIMIT,
    "priority-scheduler-": is_partly("objectives give requests priorities in the queue"),
    "cors-allowed-origins": is_missing("browsers' CORS is not answered"),
    "model-path": _TOKENIZER,
    "model": _TOKENIZER,
    "model-alias": _alias,
    "model-id-from": is_missing("models are called as engines call them"),
    "tokenizer-path": _TOKENIZER,
    "chat-template": _TOKENIZER,
    "tokenizer-cache-": is_here("tokenised beginnings are kept"),
    "disable-tokenizer-autoload": is_here("no tokenizer is fetched"),
    "tls-cert-path": to("connections.tls_cert"),
    "tls-key-path": to("connections.tls_key"),
    "ca-cert-paths": to("upstream.ca"),
    "client-cert-path": to("upstream.cert"),
    "client-key-path": to("upstream.key"),
    "enable-trace": is_missing("there are no traces; traceparent is passed on"),
    "otlp-": is_missing("there are no traces; traceparent is passed on"),
    "mesh-": is_partly("replicas tell each other what they decide: replicas.peers"),
    "enable-mesh": is_partly("replicas tell each other what they decide: replicas.peers"),
    "backend": is_here("the kind of engine is found out"),
}
_ELSE = is_missing("picker has nothing of the kind")


def _meaning(name: str) -> Meaning:
    found = max((known for known in _MEANINGS if name == known or _begins(name, known)), key=len, default=None)
    return _ELSE if found is None else _MEANINGS[found]


def _begins(name: str, known: str) -> bool:
    return name.startswith(known if known.endswith("-") else f"{known}-")


def _flags(*tables: str) -> dict[str, Flag]:
    flags = {}
    for entry in " ".join(tables).split():
        name, _, arity = entry.partition(":")
        flags[f"--{name}"] = Flag(arity if arity in ("*", "+") else int(arity or 1), _meaning(name))
    return flags


VLLM_ROUTER = Program(
    "vllm-router",
    "0.1.17",
    (("vllm-router",), ("-m", "vllm_router.launch_router")),
    _flags(_ALL, _VLLM_ROUTER),
    _finish,
)
SGLANG_ROUTER = Program(
    "sglang-router",
    "0.3.2",
    (("sglang-router", "launch"), ("-m", "sglang_router.launch_router"), ("sglang-router",)),
    _flags(_ALL, _SGLANG_ROUTER),
    _finish,
)
SMG = Program(
    "smg",
    "1.13.0",
    (("smg", "launch"), ("amg", "launch"), ("-m", "smg.launch_router"), ("smg",)),
    _flags(_ALL, _SMG),
    _finish,
)
