"""`picker epp`: the Envoy ext-proc service."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import click

from picker import imports
from picker.commands.epp_flags import configured, epp_flags, given_flags, log_level, warnings
from picker.commands.epp_serving import serve
from picker.commands.options import Size, require_own_ports, routing_config, routing_options, run
from picker.config import EPP_MODES, MOST_WORKERS, Config, from_values
from picker.errors import ConfigError
from picker.imports.report import Fate, Imported

log = logging.getLogger("picker.epp")

_PORTS = {
    "epp.grpc_port": "--grpc-port",
    "epp.grpc_health_port": "--grpc-health-port",
    "admin.port": "--metrics-port",
    "api.port": "--api-port",
}


@click.command(
    epilog="All flags of the Gateway API Inference Extension's endpoint picker are accepted, and those without a "
    "counterpart say so. Its configuration files are read as they are."
)
@routing_options
@click.option("--config-file", "epp_config_file", type=click.Path(path_type=Path), help="The same as --config.")
@click.option("--config-text", metavar="YAML", help="The configuration itself.")
@epp_flags
@click.option("--pool", "pools", multiple=True, metavar="NAME", help="As --pool-name; repeat for several.")
@click.option("--kubeconfig", metavar="FILE", help="How to reach Kubernetes.  [the pod's service account]")
@click.option("--host", metavar="ADDR", help="Address of the gRPC ports.  [default: 0.0.0.0]")
@click.option("--grpc-port", type=int, metavar="N", help="ext-proc.  [default: 9002]")
@click.option("--grpc-health-port", type=int, metavar="N", help="gRPC health.  [default: 9003]")
@click.option("--metrics-host", metavar="ADDR", help="Address of metrics, health and debug routes.  [127.0.0.1]")
@click.option("--metrics-port", type=int, metavar="N", help="Their port.  [default: 9090]")
@click.option(
    "--mode",
    type=click.Choice(EPP_MODES),
    help="full: responses pass through; lean: only requests do, Envoy's access log tells the rest.  [full]",
)
@click.option("--metrics-compat", is_flag=True, default=None, help="Metrics under the EPP's names, too.")
@click.option(
    "--secure-serving", type=bool, is_flag=False, flag_value=True, default=None, metavar="BOOL", help="TLS.  [true]"
)
@click.option("--cert-path", metavar="DIR", help="Folder with tls.crt and tls.key, followed as they change.")
@click.option("--client-ca-path", metavar="FILE", help="Serve only clients with a certificate of these (PEM).")
@click.option(
    "--fallbacks", type=bool, metavar="BOOL", help="Name endpoints to retry on; false for ORIGINAL_DST.  [true]"
)
@click.option("--grpc-max-recv-msg-size", type=Size(), metavar="SIZE", help="Of one gRPC message.  [64MiB]")
@click.option(
    "--peer", "peers", multiple=True, metavar="HOST[:PORT]", help="Another replica, or a name of all; repeat."
)
@click.option("--peer-port", type=int, metavar="N", help="Where replicas call this one.  [9005]")
@click.option("--peer-redis", metavar="URL", help="A Redis or Valkey between replicas instead.")
@click.option("--peer-secret-file", metavar="FILE", help="What all replicas know.  [$PICKER_REPLICAS_SECRET]")
@click.option("--drain-delay", type=float, metavar="S", help="Serve on after SIGTERM until gateways know.  [5]")
@click.option(
    "--workers",
    type=click.IntRange(1, MOST_WORKERS),
    metavar="N",
    help="Processes that read requests; from 2 on, one more decides.  [1]",
)
def command(
    epp_config_file: Path | None,
    config_text: str | None,
    metrics_compat: bool | None,
    pools: tuple[str, ...],
    kubeconfig: str | None,
    host: str | None,
    grpc_port: int | None,
    grpc_health_port: int | None,
    metrics_host: str | None,
    metrics_port: int | None,
    mode: str | None,
    secure_serving: bool | None,
    cert_path: str | None,
    client_ca_path: str | None,
    fallbacks: bool | None,
    grpc_max_recv_msg_size: int | None,
    drain_delay: float | None,
    peers: tuple[str, ...],
    peer_port: int | None,
    peer_redis: str | None,
    peer_secret_file: str | None,
    workers: int | None,
    **routing: Any,
) -> None:
    """Envoy ext-proc service: the endpoint picker behind a Gateway API Inference Extension gateway or a bare Envoy."""
    given = given_flags(routing)
    routing["log_level"] = log_level(routing) or routing["log_level"]
    routing["config_file"] = one_file(routing["config_file"], epp_config_file, config_text)
    config = routing_config(
        {
            **configured(given, pools),
            "kubernetes.kubeconfig": kubeconfig,
            "epp.metrics_compat": metrics_compat,
            "epp.host": host,
            "epp.grpc_port": grpc_port,
            "epp.grpc_health_port": grpc_health_port,
            "epp.mode": mode,
            "epp.secure_serving": secure_serving,
            "epp.cert_path": cert_path,
            "epp.client_ca_path": client_ca_path,
            "epp.fallbacks": fallbacks,
            "epp.max_message_bytes": grpc_max_recv_msg_size,
            "epp.drain_delay_s": drain_delay,
            "epp.workers": workers,
            "replicas.peers": list(peers) or None,
            "replicas.port": peer_port,
            "replicas.redis": peer_redis,
            "replicas.secret_file": peer_secret_file,
            "admin.host": metrics_host,
            "admin.port": metrics_port,
        },
        load=partial(load_any, text=config_text, policy=routing["policy"]),
        **routing,
    )
    for warning in warnings(given):
        log.warning("%s", warning)
    if config.record is not None and config.epp.mode == "lean":
        raise ConfigError("record: in lean mode nobody tells how long answers are; take --mode full")
    require_own_ports(config, _PORTS | ({"replicas.port": "--peer-port"} if config.replicas.peers else {}))
    if config.epp.workers > 1:
        from picker.commands.epp_workers import serve_with_workers

        run(serve_with_workers(config))
    else:
        run(serve(config))


def one_file(config: Path | None, config_file: Path | None, text: str | None) -> Path | None:
    """The configuration file, under either of its flags."""
    if sum(source is not None for source in (config, config_file, text)) > 1:
        raise ConfigError("give one of --config, --config-file and --config-text")
    return config or config_file


def load_any(path: Path | None, *, text: str | None = None, policy: str | None = None) -> Config:
    """A configuration of picker's own, or of the endpoint picker, which is told by its kind.

    policy: the one asked for on the command line; another than `weighted` takes the place of the profiles.
    """
    if text is None and path is None:
        return Config()
    try:
        text = path.read_text(encoding="utf-8") if path is not None else text or ""
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    try:
        return _from_text(text, policy)
    except ConfigError as error:
        raise ConfigError(f"{path or '--config-text'}: {error}") from None


def _from_text(text: str, policy: str | None) -> Config:
    document = imports.parse(text)
    if imports.recognise(document) is None:
        return from_values({} if document is None else document)
    imported = imports.import_text(text)
    values = dict(imported.values)
    if policy not in (None, "weighted"):
        dropped = [values.pop(key, None) for key in ("profiles", "profile", "profile_header", "prefill_profile")]
        log.warning("--policy %s takes the place of %d imported profiles", policy, len(dropped[0] or ()))
        values["policy"] = policy
    _tell(imported)
    return from_values(values)


def _tell(imported: Imported) -> None:
    """What does not work as it did goes to the log; `picker config import` has the whole report."""
    for line in imported.troubles:
        write = log.warning if line.fate is Fate.MISSING else log.info
        write("imported configuration, %s: %s: %s", line.fate.value, line.where, line.says)
