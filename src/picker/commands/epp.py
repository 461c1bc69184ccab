"""`picker epp`: the Envoy ext-proc service."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from pathlib import Path
from typing import Any

import click

from picker import imports
from picker.app import App, Serve, build_saturation, stopping_on_signals
from picker.commands.epp_flags import configured, epp_flags, given_flags, log_level, warnings
from picker.commands.options import Size, routing_config, routing_options, run
from picker.config import EPP_MODES, Config, from_values
from picker.errors import ConfigError
from picker.frontends.admin import Admin
from picker.frontends.als import predicted_seconds
from picker.frontends.certificates import Certificates
from picker.frontends.extproc import Bounds, ExtProc, Mode
from picker.frontends.serving import listen, port_of
from picker.imports.report import Fate, Imported
from picker.metrics_compat import CompatMetrics

log = logging.getLogger("picker.epp")

# Seconds that a decision may take beside waiting in the queue, whose own limit answers first.
_BEYOND_THE_QUEUE = 5.0


@click.command(
    epilog="All flags of the Gateway API Inference Extension's endpoint picker are accepted, and those without a "
    "counterpart say so. Its configuration files are read as they are."
)
@routing_options
@click.option("--config-file", "epp_config_file", type=click.Path(path_type=Path), help="The same as --config.")
@click.option("--config-text", metavar="YAML", help="The configuration itself.")
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
@click.option("--drain-delay", type=float, metavar="S", help="Serve on after SIGTERM until gateways know.  [5]")
@epp_flags
def command(
    epp_config_file: Path | None,
    config_text: str | None,
    metrics_compat: bool | None,
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
    **routing: Any,
) -> None:
    """Envoy ext-proc service: the endpoint picker behind a Gateway API Inference Extension gateway or a bare Envoy."""
    given = given_flags(routing)
    routing["log_level"] = log_level(routing) or routing["log_level"]
    routing["config_file"] = one_file(routing["config_file"], epp_config_file, config_text)
    config = routing_config(
        {
            **configured(given),
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
            "admin.host": metrics_host,
            "admin.port": metrics_port,
        },
        load=partial(load_any, text=config_text, policy=routing["policy"]),
        **routing,
    )
    for warning in warnings(given):
        log.warning("%s", warning)
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
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
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


async def serve(config: Config) -> None:
    app = App(config)
    epp, certificates = build(app), _certificates(config)
    stop, leaving = asyncio.Event(), asyncio.Event()

    async def ext_proc(stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            leave = group.create_task(_leave_on(leaving, stop, epp, config.epp.drain_delay_s))
            follow = group.create_task(_follow(certificates))
            await epp.serve(
                config.epp.host,
                config.epp.grpc_port,
                health_port=config.epp.grpc_health_port,
                tls=None if certificates is None else certificates.context,
                grace=config.drain_timeout_s,
                ready=partial(_announce, config),
            )
            leave.cancel()
            follow.cancel()

    frontends: list[Serve] = [ext_proc]
    if config.admin.port is not None:
        admin, socket = Admin(app.runtime, token=config.admin.token), listen(config.admin.host, config.admin.port)
        frontends.append(lambda stop: admin.serve(socket, stop))
        click.echo(f"metrics, health and debug on http://{config.admin.host}:{port_of(socket)}", err=True)
    with stopping_on_signals(leaving):
        await app.run(frontends, stop)


def build(app: App) -> ExtProc:
    """The ext-proc service that the app's configuration describes."""
    config = app.config
    decision = config.queue.timeout_s + _BEYOND_THE_QUEUE
    epp = ExtProc(
        app.runtime,
        mode=Mode(config.epp.mode),
        predict=partial(predicted_seconds, app.runtime.scheduler),
        fallbacks=config.epp.fallbacks,
        bounds=Bounds(config.epp.request_timeout_s, decision, config.epp.idle_timeout_s),
        max_message_bytes=config.epp.max_message_bytes,
    )
    if config.epp.metrics_compat:
        _add_compat(app)
    app.telemetry.gauge("picker_extproc_streams", "Open ext-proc streams.", lambda: epp.open_streams)
    if (feedback := epp.feedback) is not None:
        unheard = "Requests routed in lean mode whose end nobody has told yet."
        app.telemetry.gauge("picker_unheard_requests", unheard, lambda: len(feedback))
    return epp


def _add_compat(app: App) -> None:
    """The endpoint picker's metrics beside ours."""
    config, runtime = app.config, app.runtime
    compat = CompatMetrics(
        runtime.scheduler,
        runtime.clock,
        pool=config.epp.pool_name,
        namespace=config.epp.pool_namespace,
        detector=build_saturation(config),
    )
    app.telemetry.watch(compat)
    app.telemetry.registry.register(compat)


def _announce(config: Config, port: int, health: int | None) -> None:
    click.echo(f"picker epp: ext-proc on {config.epp.host}:{port}, health on :{health}", err=True)


async def _leave_on(leaving: asyncio.Event, stop: asyncio.Event, epp: ExtProc, delay: float) -> None:
    """Told to go: nobody is refused before gateways have had time to notice."""
    await leaving.wait()
    await epp.part(delay)
    stop.set()
    epp.shutdown()


def _certificates(config: Config) -> Certificates | None:
    if not config.epp.secure_serving:
        return None
    return Certificates(_path(config.epp.cert_path), client_ca=_path(config.epp.client_ca_path))


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


async def _follow(certificates: Certificates | None) -> None:
    if certificates is not None:
        await certificates.follow()
