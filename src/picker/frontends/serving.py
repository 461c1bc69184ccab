"""Runs uvicorn's HTTP protocol inside our own event loop: no signal handlers, no exit of its own, stopped by an event.

`uvicorn.Server` is left out: it takes over signals, ends the process when it cannot bind, and polls ten times a second.
Owns the listening socket; connections are `client_connection`'s.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from picker.errors import cannot_listen
from picker.frontends.client_connection import ClientConnection
from picker.frontends.limits import ConnectionLimits, Door

_BACKLOG = 2048
_HANDSHAKE_SECONDS = 10.0
LAST_CALL_SECONDS = 0.2  # for the first request of a connection that was made just before the end
_KEEPALIVE_SECONDS = 120.0  # where no door says otherwise


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one (`port_of` tells which).

    host: a name or address; "" means every IPv4 address, "::" every address.
    Raises `ConfigError` when the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        dual = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise cannot_listen(host, port, error) from error


def port_of(listener: socket.socket) -> int:
    """The port a socket is bound to."""
    return int(listener.getsockname()[1])


async def serve(
    app: Any,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    grace: float | Callable[[], float],
    door: Door | None = None,
) -> None:
    """Serve an ASGI app on a bound socket until `stop` is set, then let running requests end within `grace` seconds.

    door: what is asked of connections, and TLS.

    What still runs after that is cancelled and its connection closed, as it is when this call is cancelled. The socket
    is closed on return. HTTP/1.1 only; a WebSocket handshake arrives as the plain HTTP request that it is.
    """
    config, state, asked = _config(app), ServerState(), door or _default_door()
    loop = asyncio.get_running_loop()

    def accept() -> ClientConnection:
        made = ClientConnection(config, state, {}, loop)
        made.door = asked
        return made

    tls: dict[str, Any] = {"ssl": asked.tls, "ssl_handshake_timeout": _HANDSHAKE_SECONDS} if asked.tls else {}
    server = await loop.create_server(accept, sock=listener, backlog=_BACKLOG, **tls)
    try:
        await stop.wait()
        await _shut(server, listener, state)
        await _end(state.tasks, grace() if callable(grace) else grace)
    finally:
        server.close()
        listener.close()
        for connection in list(state.connections):
            connection.transport.abort()


async def _shut(server: asyncio.Server, listener: socket.socket, state: ServerState) -> None:
    """Take no further connections, and close those that nobody uses.

    The kernel resets those that wait to be accepted when their socket closes: so none is let in any more, those that
    are in are accepted, and they have a moment to say what they have come for.
    """
    listener.listen(0)
    for _ in range(3):  # turns of the loop, which accept
        await asyncio.sleep(0)
    server.close()
    connections = cast("set[ClientConnection]", state.connections)
    new = [connection for connection in connections if connection.cycle is None]
    for connection in list(connections):
        if connection.cycle is not None:
            connection.shutdown()
    if new:
        await asyncio.sleep(LAST_CALL_SECONDS)
    for connection in new:
        connection.shutdown()


def _default_door() -> Door:
    usual = ConnectionLimits()
    patience = min(usual.head_timeout, _KEEPALIVE_SECONDS)
    return Door(ConnectionLimits(idle_timeout=_KEEPALIVE_SECONDS, head_timeout=patience))


def _config(app: Any) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http=ClientConnection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,  # handlers are the application's business
        log_level="error",  # its warnings tell of odd clients: one line for each request that somebody makes up
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
    )
    config.load()
    return config


async def _end(tasks: set[asyncio.Task[None]], grace: float) -> None:
    """Wait for tasks, cancel those that take longer than `grace`, and see them end."""
    if not tasks:
        return
    _, late = await asyncio.wait(set(tasks), timeout=grace)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late)
