"""Puts the gRPC API together as a configuration asks for it: socket, certificate, key. Used by `app` alone."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from functools import partial
from pathlib import Path

from picker.config import Config
from picker.frontends.als import predicted_seconds
from picker.frontends.api import Api
from picker.frontends.certificates import Certificates
from picker.frontends.serving import listen, port_of
from picker.runtime import Runtime

log = logging.getLogger("picker.api")

_BEYOND_THE_QUEUE = 5.0  # seconds that a pick may take beside waiting in the queue, whose own limit answers first


async def serve_api(config: Config, runtime: Runtime, stop: asyncio.Event) -> None:
    """Serve the API until `stop` is set and its picks have ended; at once where no port is given.

    Raises ConfigError for an address or a certificate that cannot be used.
    """
    if config.api.port is None:
        return
    certificates = _certificates(config)
    listener = listen(config.api.host, config.api.port)
    _say(config, port_of(listener), secure=certificates is not None)
    async with asyncio.TaskGroup() as group:
        following = None if certificates is None else group.create_task(certificates.follow())
        tls = None if certificates is None else certificates.context
        await build_api(config, runtime).serve(listener, stop, tls=tls, grace=config.drain_timeout_s)
        if following is not None:
            following.cancel()


def build_api(config: Config, runtime: Runtime) -> Api:
    """The service that a configuration describes, and its figures."""
    made = Api(
        runtime,
        predict=partial(predicted_seconds, runtime.scheduler),
        block_bytes=config.index.block_bytes,
        key=config.api.key,
        decision=config.queue.timeout_s + _BEYOND_THE_QUEUE,
        max_message_bytes=config.api.max_message_bytes,
    )
    runtime.telemetry.gauge("picker_api_picks", "Picks of the gRPC API that have not ended.", lambda: len(made.picks))
    return made


def _certificates(config: Config) -> Certificates | None:
    api = config.api
    if not api.secure:
        return None
    folder, client_ca = (None if name is None else Path(name) for name in (api.cert_path, api.client_ca_path))
    return Certificates(folder, client_ca=client_ca)


def _say(config: Config, port: int, *, secure: bool) -> None:
    host = config.api.host
    log.info("the gRPC API is on %s:%d, %s", host, port, "by TLS" if secure else "in clear text")
    if not (_is_loopback(host) or config.api.key or config.api.client_ca_path):
        log.warning("api.host: everybody who reaches %s may ask and report; set api.key or api.client_ca_path", host)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
