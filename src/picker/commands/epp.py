"""`picker epp`: the Envoy ext-proc service."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import click

from picker.app import App, Serve, stopping_on_signals
from picker.commands.options import routing_config, routing_options, run
from picker.config import Config
from picker.errors import ConfigError
from picker.frontends.admin import Admin
from picker.frontends.extproc import ExtProc
from picker.frontends.serving import listen, port_of


@click.command()
@routing_options
@click.option("--host", metavar="ADDR", help="Address of the gRPC ports.  [default: 0.0.0.0]")
@click.option("--grpc-port", type=int, metavar="N", help="ext-proc.  [default: 9002]")
@click.option("--grpc-health-port", type=int, metavar="N", help="gRPC health.  [default: 9003]")
@click.option("--metrics-host", metavar="ADDR", help="Address of metrics, health and debug routes.  [127.0.0.1]")
@click.option("--metrics-port", type=int, metavar="N", help="Their port.  [default: 9090]")
@click.option("--secure-serving", type=bool, default=None, metavar="BOOL", help="TLS; needs --cert-path.  [false]")
@click.option(
    "--fallbacks", type=bool, metavar="BOOL", help="Name endpoints to retry on; false for ORIGINAL_DST.  [true]"
)
@click.option("--cert-path", metavar="DIR", help="Folder with tls.crt and tls.key.")
def command(
    host: str | None,
    grpc_port: int | None,
    grpc_health_port: int | None,
    metrics_host: str | None,
    metrics_port: int | None,
    secure_serving: bool | None,
    fallbacks: bool | None,
    cert_path: str | None,
    **routing: Any,
) -> None:
    """Envoy ext-proc service: the endpoint picker behind a Gateway API Inference Extension gateway or a bare Envoy."""
    if secure_serving and not cert_path:
        raise click.UsageError("--secure-serving true needs --cert-path DIR with tls.crt and tls.key")
    config = routing_config(
        {
            "epp.host": host,
            "epp.grpc_port": grpc_port,
            "epp.grpc_health_port": grpc_health_port,
            "epp.fallbacks": fallbacks,
            "epp.cert_path": None if secure_serving is False else cert_path,
            "admin.host": metrics_host,
            "admin.port": metrics_port,
        },
        **routing,
    )
    run(serve(config))


async def serve(config: Config) -> None:
    app = App(config)
    epp = ExtProc(app.runtime, fallbacks=config.epp.fallbacks)

    async def ext_proc(stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_shut_down_on(stop, epp))
            await epp.serve(
                config.epp.host,
                config.epp.grpc_port,
                health_port=config.epp.grpc_health_port,
                tls=_tls(config.epp.cert_path),
                grace=config.drain_timeout_s,
                ready=lambda port, health: click.echo(
                    f"picker epp: ext-proc on {config.epp.host}:{port}, health on :{health}", err=True
                ),
            )

    frontends: list[Serve] = [ext_proc]
    if config.admin.port is not None:
        admin, socket = Admin(app.runtime, token=config.admin.token), listen(config.admin.host, config.admin.port)
        frontends.append(lambda stop: admin.serve(socket, stop))
        click.echo(f"metrics, health and debug on http://{config.admin.host}:{port_of(socket)}", err=True)
    stop = asyncio.Event()
    with stopping_on_signals(stop):
        await app.run(frontends, stop)


async def _shut_down_on(stop: asyncio.Event, epp: ExtProc) -> None:
    await stop.wait()
    epp.shutdown()


def _tls(folder: str | None) -> ssl.SSLContext | None:
    """TLS from tls.crt and tls.key, the names of a Kubernetes TLS secret."""
    if folder is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(Path(folder) / "tls.crt", Path(folder) / "tls.key")
    except OSError as error:
        raise ConfigError(f"--cert-path: cannot read tls.crt and tls.key in {folder}: {error.strerror}") from None
    return context
