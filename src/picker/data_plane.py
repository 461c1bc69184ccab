"""The Envoy of `picker proxy --data-plane envoy`: what it is told to do, and who is in its pool.

Owns the wiring of a gateway that belongs to one picker: everything between the two goes over sockets in a folder of
their own, and the pool is a file there that Envoy follows, so that endpoints come and go without a restart of it.
Starts nothing (`envoy_process` does) and decides nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from picker.data_plane_keys import AUTHORIZATION, METADATA, of_each_try, put_aside
from picker.data_plane_usage import reading
from picker.envoy import (
    EXT_PROC_FILTER,
    EXTENSIONS,
    GATEWAY,
    POOL,
    POOL_IDLE,
    UNLIMITED,
    Json,
    balancing,
    ext_proc_cluster,
    ext_proc_filter,
    feedback_log,
    http_options,
    router_filter,
    socket_address,
    typed,
)
from picker.exchange import ENDPOINT_HEADER, REQUEST_HEADER
from picker.types import Endpoint
from picker.wire.extproc import CONTROL_HEADERS, DESTINATION, LOAD_BALANCING
from picker.wire.own_envoy import CARRIED, attributes, carried

_TLS_MATCH = "envoy.transport_socket_match"
_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_API = "type.googleapis.com/envoy.config."
_BEYOND = 64 * 1024
_CERTIFICATE = "certificate"
_MODE = 0o600
# As old as what picker knows of an endpoint may be by it; twice as seldom saves less than a hundredth of its work.
_FLUSH = "0.05s"
_BUFFER = "envoy.filters.http.buffer"
_ORDER_PREFIXES = (DESTINATION, "x-picker-", "x-envoy-")
# Headers that decisions may depend on, and no engine is meant to hear.
WORDS_TO_PICKER = tuple(
    name
    for name in CONTROL_HEADERS
    if name.startswith(("x-llm-d-", "x-gateway-inference-", "x-gateway-model-", "x-slo-"))
)
# Of what went wrong before an endpoint answered, or with a request that Envoy cannot read.
_FLAGS = ("UH", "UF", "UO", "NR", "UR", "UC", "UT", "LR", "SI", "DPE", "UPE", "UMSDR", "NC", "OM")


@dataclass(frozen=True, slots=True)
class Folder:
    """Where picker and its Envoy meet: a folder that nobody else may enter."""

    path: Path

    @property
    def ext_proc(self) -> Path:
        return self.path / "picker.sock"

    @property
    def admin(self) -> Path:
        return self.path / "admin.sock"

    @property
    def pool(self) -> Path:
        return self.path / "pool.json"

    @property
    def secret(self) -> Path:
        return self.path / "certificate.json"

    @property
    def config(self) -> Path:
        return self.path / "envoy.json"

    @property
    def log(self) -> Path:
        return self.path / "envoy.log"


@dataclass(frozen=True, slots=True)
class Serving:
    """TLS towards clients; its certificate and key are in the folder's `secret`. oldest: "1.2" or "1.3".

    client_ca: a file; only clients with a certificate of these are served.
    """

    client_ca: str | None = None
    oldest: str = "1.2"


@dataclass(frozen=True, slots=True)
class Asking:
    """TLS towards https endpoints, by files. ca: whom their certificates must be of; None: there can be none of them.

    cert, key: shown to them. server_name: theirs, where it is not that of the address. insecure: take any certificate.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True)
class Door:
    """What clients and endpoints may expect.

    host: IP address to listen on. connect_timeout: seconds an endpoint has to accept a connection. silence: seconds
    without a byte, from an endpoint before or amid its response and from a client amid its request: Envoy has one timer
    for all of them. attempts: endpoints tried before the first byte; elsewhere: answers that another may better.
    max_body_bytes: as much of a request is kept for another try. head_timeout, body_timeout: seconds for the head and
    for the whole of a request; idle_timeout: without one. max_head_bytes, max_headers: of a head. connections: of
    clients at one time. name_endpoint: tell clients who served them. serving: None for plain HTTP. decision: seconds
    that picker may take. pass_on: endpoints without a key of their own get the clients'. usage: answers are read for
    the tokens that engines tell. asked: headers that decisions depend on, in lower case, for picker to be told of a
    request in one message as soon as its body is there; None: in two, its head first, so that nobody without a key has
    a body kept. via: what requests are sent on with to be known if they come back.
    """

    host: str
    connect_timeout: float
    silence: float
    attempts: int
    elsewhere: tuple[int, ...]
    max_body_bytes: int
    connections: int
    decision: float = 120.0
    head_timeout: float = 30.0
    body_timeout: float = 300.0
    idle_timeout: float = 120.0
    max_head_bytes: int = 64 * 1024
    max_headers: int = 100
    name_endpoint: bool = True
    serving: Serving | None = None
    asking: Asking = Asking()
    pass_on: bool = True
    usage: bool = False
    asked: tuple[str, ...] | None = None
    via: str | None = None


# --- configuration -----------------------------------------------------------------------------------------


def gateway(door: Door, port: int, folder: Folder) -> Json:
    """The whole configuration of the gateway's Envoy, which listens on that port; 0 takes a free one."""
    return {
        "node": {"id": "picker", "cluster": "picker"},
        "admin": {"address": socket_address(f"unix:{folder.admin}")},
        "overload_manager": {"resource_monitors": [_connections(door.connections)]},
        "static_resources": {
            "listeners": [_listener(door, port, folder)],
            "clusters": [_pool(door, folder), ext_proc_cluster(f"unix:{folder.ext_proc}")],
        },
    }


def _connections(most: int) -> Json:
    message = "resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig"
    name = "envoy.resource_monitors.global_downstream_max_connections"
    return typed(name, message, max_active_downstream_connections=most)


def _listener(door: Door, port: int, folder: Folder) -> Json:
    manager = typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=GATEWAY,
        codec_type="AUTO",
        normalize_path=True,
        # Who the client is, for picker and for the endpoints: its address is put behind what it says itself.
        use_remote_address=True,
        stream_idle_timeout=_seconds(door.silence),
        request_headers_timeout=_seconds(door.head_timeout),
        request_timeout=_seconds(door.body_timeout),
        max_request_headers_kb=-(-door.max_head_bytes // 1024),
        common_http_protocol_options={
            "idle_timeout": _seconds(door.idle_timeout),
            "max_headers_count": door.max_headers,
            # A name that one side reads as another's: Envoy forwards it, and WSGI-like servers fold it.
            "headers_with_underscores_action": "DROP_HEADER",
        },
        server_header_transformation="PASS_THROUGH",
        # Clients that Envoy takes for internal ones could set its retries and timeouts by header.
        early_header_mutation_extensions=[_strip_orders()],
        preserve_external_request_id=True,
        route_config={"name": GATEWAY, "virtual_hosts": [_virtual_host(door)]},
        http_filters=[
            *(_ask(door), _hold(door)),
            *([put_aside()] if door.pass_on else []),
            *(reading(door.max_body_bytes + _BEYOND) if door.usage else []),
            router_filter(suppress_envoy_headers=True),
        ],
        local_reply_config=_own_words(),
        access_log=[feedback_log(_FLUSH)],
    )
    chain: Json = {"filters": [manager]}
    if door.serving is not None:
        chain["transport_socket"] = _serving_tls(door.serving, folder)
    host = f"[{door.host}]" if ":" in door.host else door.host
    address = socket_address(f"{host}:{port}")
    if door.host == "::":  # every address, as the standalone proxy takes it
        address["socket_address"]["ipv4_compat"] = True
    return {"name": GATEWAY, "address": address, "filter_chains": [chain]}


def _ask(door: Door) -> Json:
    """Bodies stay here and are shown to picker in one piece: nothing of them has to come back."""
    asking = ext_proc_filter(failure_mode_allow=False, lean=True)
    options = asking["typed_config"]
    options["processing_mode"] |= {"request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}
    if door.asked is not None:
        options["request_attributes"] = attributes(door.asked)  # for all: routes cannot say it
    options["mutation_rules"] = {"allow_envoy": True}  # for the number of retries
    # How long picker may take to decide, in its queue above all; it answers before.
    options["message_timeout"] = _seconds(door.decision)
    return asking


def _strip_orders() -> Json:
    """Clients do not say where a request goes, or how Envoy is to serve it."""
    prefixes = [{"key_matcher": {"prefix": prefix, "ignore_case": True}} for prefix in _ORDER_PREFIXES]
    mutations: list[Json] = [{"remove": name} for name in CONTROL_HEADERS if name not in WORDS_TO_PICKER]
    mutations += [{"remove_on_match": prefix} for prefix in prefixes]
    return typed(
        "envoy.http.early_header_mutation.header_mutation",
        "http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=mutations,
    )


def _hold(door: Door) -> Json:
    """Keeps the head of a request from being sent on until picker has seen the body, where it is not shown the head."""
    limit = door.max_body_bytes + _BEYOND
    return {**typed(_BUFFER, "filters.http.buffer.v3.Buffer", max_request_bytes=limit), "disabled": True}


def _in_one_message(door: Door) -> Json:
    """For a route of requests that are sure to have a body, and none that is too large."""
    mode = {"request_header_mode": "SKIP", "request_body_mode": "BUFFERED", "request_trailer_mode": "SKIP"}
    mode |= {"response_header_mode": "SKIP", "response_body_mode": "NONE", "response_trailer_mode": "SKIP"}
    overrides = {"processing_mode": mode}
    asking = {"@type": EXTENSIONS + "filters.http.ext_proc.v3.ExtProcPerRoute", "overrides": overrides}
    limit = {"max_request_bytes": door.max_body_bytes + _BEYOND}
    holding = {"@type": EXTENSIONS + "filters.http.buffer.v3.BufferPerRoute", "buffer": limit}
    return {EXT_PROC_FILTER: asking, _BUFFER: holding}


def _own_words() -> Json:
    """Envoy's own answers in the form of OpenAI's errors; picker's, which raise no flag, have it."""
    error = {"message": "%LOCAL_REPLY_BODY%", "type": "gateway_error", "param": None, "code": "%RESPONSE_CODE%"}
    mapper = {
        "filter": {"response_flag_filter": {"flags": list(_FLAGS)}},
        "body_format_override": {"json_format": {"error": error}, "content_type": "application/json"},
    }
    return {"mappers": [mapper]}


def _virtual_host(door: Door) -> Json:
    retry: Json = {
        "retry_on": "connect-failure,refused-stream,reset,retriable-status-codes",
        "retriable_status_codes": list(door.elsewhere),
        "num_retries": door.attempts - 1,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
        # Past the end of picker's list the fallback policy chooses, and may choose who has failed already.
        "retry_host_predicate": [
            typed("envoy.retry_host_predicates.previous_hosts", "retry.host.previous_hosts.v3.PreviousHostsPredicate")
        ],
        "host_selection_retry_max_attempts": 5,
    }
    # A generation has no natural upper bound; what stands still is ended by the idle timer.
    action: Json = {"cluster": POOL, "timeout": "0s", "idle_timeout": _seconds(door.silence)}
    if door.attempts > 1:
        action["retry_policy"] = retry
    host: Json = {
        "name": POOL,
        "domains": ["*"],
        "routes": _routes(door, action),
        "request_headers_to_remove": list(WORDS_TO_PICKER),
        # Somewhat more: what is too large by little is refused by picker, in the form of OpenAI's errors.
        "request_body_buffer_limit": door.max_body_bytes + _BEYOND,
    }
    host["request_headers_to_add"] = [_header(name, carried(name)) for name in CARRIED]
    if door.via is not None:
        another = {"header": {"key": "via", "value": door.via}, "append_action": "APPEND_IF_EXISTS_OR_ADD"}
        host["request_headers_to_add"].append(another)
    if door.name_endpoint:
        host["response_headers_to_add"] = [
            _header(ENDPOINT_HEADER, f"%UPSTREAM_METADATA({METADATA}:name)%"),
            _header(REQUEST_HEADER, f"%REQ({REQUEST_HEADER})%"),
        ]
    return host


def _routes(door: Door, action: Json) -> list[Json]:
    everything: Json = {"match": {"prefix": "/"}, "route": action}
    if door.asked is None:
        return [everything]
    size = {"name": "content-length", "range_match": {"start": 1, "end": door.max_body_bytes + 1}}
    post = {"name": ":method", "string_match": {"exact": "POST"}}
    whole = {"match": {"prefix": "/", "headers": [post, size]}, "route": action}
    return [whole | {"typed_per_filter_config": _in_one_message(door)}, everything]


def _header(name: str, value: str) -> Json:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _pool(door: Door, folder: Folder) -> Json:
    verdict = {"key": LOAD_BALANCING, "path": [{"key": DESTINATION}]}
    override = typed(
        "envoy.load_balancing_policies.override_host",
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": verdict}],
        fallback_policy=balancing("least_request", "LeastRequest"),
    )
    file = {"path": str(folder.pool), "watched_directory": {"path": str(folder.path)}}
    return {
        "name": POOL,
        "type": "EDS",
        "connect_timeout": _seconds(door.connect_timeout),
        "eds_cluster_config": {"eds_config": {"resource_api_version": "V3", "path_config_source": file}},
        "load_balancing_policy": {"policies": [{"typed_extension_config": override}]},
        "circuit_breakers": UNLIMITED,
        "transport_socket_matches": [_to_https(door.asking)] if door.asking.ca or door.asking.insecure else [],
    } | http_options(
        explicit_http_config={"http_protocol_options": {}},
        common_http_protocol_options={"idle_timeout": POOL_IDLE},
        http_filters=of_each_try(pass_on=door.pass_on),
    )


# --- TLS ---------------------------------------------------------------------------------------------------


def _serving_tls(serving: Serving, folder: Folder) -> Json:
    """The certificate comes from a file that Envoy follows: a renewed one needs no restart."""
    source = {"path": str(folder.secret), "watched_directory": {"path": str(folder.path)}}
    secret = {"name": _CERTIFICATE, "sds_config": {"resource_api_version": "V3", "path_config_source": source}}
    common: Json = {"alpn_protocols": ["h2", "http/1.1"], "tls_certificate_sds_secret_configs": [secret]}
    common["tls_params"] = {"tls_minimum_protocol_version": f"TLSv{serving.oldest.replace('.', '_')}"}
    more: Json = {}
    if serving.client_ca is not None:
        common["validation_context"] = {"trusted_ca": {"filename": serving.client_ca}}
        more["require_client_certificate"] = True
    message = "transport_sockets.tls.v3.DownstreamTlsContext"
    return typed("envoy.transport_sockets.tls", message, common_tls_context=common, **more)


def _to_https(asking: Asking) -> Json:
    """Each endpoint by its own name, which its certificate must have."""
    common: Json = {}
    if asking.ca is not None and not asking.insecure:
        common["validation_context"] = {"trusted_ca": {"filename": asking.ca}}
    if asking.cert is not None:
        pair = {"certificate_chain": {"filename": asking.cert}, "private_key": {"filename": asking.key or asking.cert}}
        common["tls_certificates"] = [pair]
    own: Json = {"auto_host_sni": True, "auto_sni_san_validation": not asking.insecure}
    if asking.server_name is not None:
        own = {"sni": asking.server_name}
        if not asking.insecure:
            matcher = {"san_type": "DNS", "matcher": {"exact": asking.server_name}}
            common["validation_context"]["match_typed_subject_alt_names"] = [matcher]
    message = "transport_sockets.tls.v3.UpstreamTlsContext"
    socket = typed("envoy.transport_sockets.tls", message, common_tls_context=common, **own)
    return {"name": "tls", "match": {"tls": True}, "transport_socket": socket}


def _seconds(value: float) -> str:
    return f"{value:.3f}s"


# --- the pool ----------------------------------------------------------------------------------------------


def members(endpoints: Iterable[Endpoint], hosts: Mapping[str, str], shown: Mapping[str, str]) -> Json:
    """The pool as Envoy reads it from the file. By name of an endpoint:

    hosts: names that certificates are to be of; shown: values of `authorization`, none for what clients say.

    Ranks of one engine share its address, and are one member, which is called by the address and has what the first
    of them has, or the first that is shown a key: a client's never goes where there is one.
    """
    by_address: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        by_address.setdefault(endpoint.address, []).append(endpoint)
    found = [_member(address, ranks, hosts, shown) for address, ranks in sorted(by_address.items())]
    assignment = {
        "@type": _API + "endpoint.v3.ClusterLoadAssignment",
        "cluster_name": POOL,
        "endpoints": [{"lb_endpoints": found}],
    }
    return {"resources": [assignment]}  # a DiscoveryResponse, which must not say so itself


def _member(address: str, ranks: list[Endpoint], hosts: Mapping[str, str], shown: Mapping[str, str]) -> Json:
    first = next((each for each in ranks if each.name in shown), ranks[0])
    metadata: Json = {METADATA: {"name": first.name if len(ranks) == 1 else address}}
    if first.name in shown:
        metadata[METADATA][AUTHORIZATION] = shown[first.name]
    if first.scheme == "https":
        metadata[_TLS_MATCH] = {"tls": True}
    hostname = {"hostname": hosts[first.name]} if first.name in hosts else {}
    endpoint = {"address": socket_address(address), **hostname}
    return {"endpoint": endpoint, "metadata": {"filter_metadata": metadata}}


def certificate(chain: str, key: str) -> Json:
    """A certificate and its key (PEM) as Envoy reads them from the file."""
    pair = {"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}
    secret = {"@type": _TLS + "Secret", "name": _CERTIFICATE, "tls_certificate": pair}
    return {"resources": [secret]}


def write_whole(path: Path, content: Json) -> None:
    """Replace a file by another in one step: whoever follows it never reads half of it, and nobody else any."""
    beside = path.with_name(path.name + ".new")
    beside.unlink(missing_ok=True)  # its mode would stay
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE), "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.replace(beside, path)
