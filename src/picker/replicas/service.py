"""What a configuration says about other replicas, made to run: the secret, the circle and the bus that it names."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path

from picker.config import ReplicasConfig
from picker.errors import ConfigError
from picker.replicas.circle import Circle
from picker.replicas.direct import Address, Direct
from picker.replicas.relay import Owner, Relay
from picker.replicas.seal import LEAST, derive
from picker.runtime import Runtime

log = logging.getLogger("picker.replicas")

SECRET = "PICKER_REPLICAS_SECRET"


class Replicas:
    """listen: makes the socket on which peers call. ready: whether the endpoints are known.

    hashing: what prefix hashes are keyed by: the same for all, and nobody else's.
    """

    def __init__(self, config: ReplicasConfig, *, listen: Callable[[str, int], socket.socket]) -> None:
        self._config = config
        self._listen = listen
        self._secret = read_secret(config)
        self._peers = [parse_peer(peer, config.port) for peer in config.peers]
        self.circle: Circle | None = None

    @property
    def settled(self) -> asyncio.Event:
        """See `Circle`."""
        assert self.circle is not None
        return self.circle.settled

    @property
    def hashing(self) -> bytes:
        return derive(self._secret, "hashes")

    def join(self, runtime: Runtime, block_bytes: int, ready: Callable[[], bool]) -> Circle:
        """Have the runtime's decisions told and the others' learned, once `run`."""
        name = self._config.name or os.environ.get("POD_NAME") or socket.gethostname()
        self.circle = Circle(runtime, name=name, block_bytes=block_bytes, ready=ready)
        return self.circle

    def relay_for(self, owner: Owner) -> Relay:
        """Where access-log entries go that are not of the owner's requests; from where it gets those that are."""
        assert self.circle is not None
        self.circle.relay.serve(owner)
        return self.circle.relay

    async def run(self, rng: random.Random) -> None:
        """Serve the bus until cancelled."""
        assert self.circle is not None
        if self._config.redis is not None:
            from picker.replicas.redis_bus import RedisBus

            await RedisBus(self.circle, self._config.redis, self._config.group, self._secret, rng=rng).run()
            return
        listener = self._listen(self._config.host, self._config.port)
        log.info("replicas may call on port %d", listener.getsockname()[1])
        await Direct(self.circle, listener, self._peers, self._secret, rng=rng).run()


def read_secret(config: ReplicasConfig) -> bytes:
    """What all replicas know and nobody else; raises ConfigError where there is none, or too little of it."""
    text = config.secret
    if text is None and config.secret_file is not None:
        try:
            text = Path(config.secret_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"replicas.secret_file: cannot read {config.secret_file}: {reason}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"replicas.secret_file: {config.secret_file} is not UTF-8 text") from None
    text = text or os.environ.get(SECRET)
    if not text:
        raise ConfigError(
            f"replicas: they need a secret in common: replicas.secret_file, or {SECRET} in the environment "
            "(openssl rand -hex 32)"
        )
    if len(text.encode()) < LEAST:
        raise ConfigError(f"replicas: a secret of less than {LEAST} characters can be guessed")
    return text.encode()


def parse_peer(text: str, port: int) -> Address:
    """HOST, HOST:PORT or [IPv6]:PORT. port: where none is given."""
    host, colon, number = text.rpartition(":")
    if not colon or host.endswith(":") or (text.startswith("[") and text.endswith("]")):
        host, number = text, str(port)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (number.isdecimal() and 0 < int(number) < 65536):
        raise ConfigError(f"replicas.peers: {text!r} is not HOST:PORT")
    return host, int(number)
