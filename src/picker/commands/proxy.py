"""`picker proxy`: the standalone reverse proxy."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from picker.app import App, Serve, stopping_on_signals
from picker.commands.options import routing_config, routing_options, run
from picker.config import Config
from picker.frontends.admin import Admin
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of


@click.command()
@routing_options
@click.option("--host", metavar="ADDR", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, metavar="N", help="Port; 0 takes a free one.  [default: 8080]")
@click.option("--admin-host", metavar="ADDR", help="Address of metrics, health and debug routes.  [default: 127.0.0.1]")
@click.option("--admin-port", type=int, metavar="N", help="Their port.  [default: 9090]")
@click.option("--first-byte-timeout", type=float, metavar="S", help="Longest wait for a response to begin.  [600]")
@click.option("--api-key", envvar="PICKER_API_KEY", metavar="KEY", help="Ask clients for this key (or PICKER_API_KEY).")
def command(
    host: str | None,
    port: int | None,
    admin_host: str | None,
    admin_port: int | None,
    first_byte_timeout: float | None,
    api_key: str | None,
    **routing: Any,
) -> None:
    """Standalone reverse proxy: sends each request to the vLLM server where it costs least.

    Example: picker proxy --endpoint http://10.0.0.1:8000 --endpoint http://10.0.0.2:8000
    """
    config = routing_config(
        {
            "proxy.host": host,
            "proxy.port": port,
            "proxy.first_byte_timeout_s": first_byte_timeout,
            "admin.host": admin_host,
            "admin.port": admin_port,
        },
        **routing,
    )
    run(serve(config, api_key))


async def serve(config: Config, api_key: str | None) -> None:
    app = App(config)
    proxy = Proxy(
        app.runtime,
        connect_timeout=config.proxy.connect_timeout_s,
        first_byte_timeout=config.proxy.first_byte_timeout_s,
        idle_timeout=config.proxy.idle_timeout_s,
        api_key=api_key,
        grace=config.drain_timeout_s,
    )
    traffic = listen(config.proxy.host, config.proxy.port)
    frontends: list[Serve] = [lambda stop: proxy.serve(traffic, stop)]
    lines = [f"picker proxy on http://{config.proxy.host}:{port_of(traffic)}/v1"]
    if config.admin.port is not None:
        admin, socket = Admin(app.runtime, token=config.admin.token), listen(config.admin.host, config.admin.port)
        frontends.append(lambda stop: admin.serve(socket, stop))
        lines.append(f"metrics, health and debug on http://{config.admin.host}:{port_of(socket)}")
    for line in lines:
        click.echo(line, err=True)
    stop = asyncio.Event()
    with stopping_on_signals(stop):
        await app.run(frontends, stop)
