"""What `picker proxy --data-plane envoy` runs: an Envoy of its own for the bytes, and picker for where they go."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from picker import rewrites
from picker.access_log import RequestLog
from picker.app import App
from picker.commands.proxy_control import Doors
from picker.data_plane import Asking, Door, Folder, Serving, certificate, gateway, write_whole
from picker.data_plane_usage import trial
from picker.envoy import find_envoy, validate
from picker.envoy_process import KeptEnvoy, Running
from picker.errors import ConfigError
from picker.exchange import OBJECTIVE_HEADERS, SESSION_HEADERS, Respond, Submit
from picker.frontends import collector, loops
from picker.frontends.als import predicted_seconds
from picker.frontends.extproc import Bounds, ExtProc
from picker.frontends.grpc_server import GrpcServer
from picker.frontends.keys import FIELDS
from picker.frontends.models import ModelsPage, pool_page
from picker.frontends.own_extproc import OwnExtProc
from picker.frontends.own_feedback import OwnFeedback, OwnPorter, RetryWatch
from picker.frontends.serving import listen
from picker.frontends.trust import Trust
from picker.frontends.upstream import Upstream
from picker.pool_file import PoolFile
from picker.runtime import Runtime
from picker.types import Outcome, Queued

# Seconds that a decision may take beside waiting in the queue, whose own limit answers first.
BEYOND_THE_QUEUE = 5.0
_UNBOUNDED = 1_000_000
# Of Debian and its kin, and of Red Hat and its kin.
_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


@dataclass(slots=True)
class Plane:
    """Envoy, and picker's side of it."""

    app: App
    door: Door
    folder: Folder
    envoy: KeptEnvoy
    pool: PoolFile
    extproc: ExtProc
    models: PoolModels

    async def serve(self, leaving: asyncio.Event, stop: asyncio.Event, announce: Callable[[Running], None]) -> None:
        """Serve until told to leave, then let running requests end; `stop` is set when they have.

        Raises ConfigError when Envoy does not come up at first.
        """
        with collector.seldom():
            await self._serve(leaving, stop, announce)

    async def _serve(self, leaving: asyncio.Event, stop: asyncio.Event, announce: Callable[[Running], None]) -> None:
        async with asyncio.TaskGroup() as group:
            deciding = group.create_task(self.extproc.serve_by(self._begin, grace=self.app.config.drain_timeout_s))
            following = group.create_task(self.pool.run())
            await self.pool.written.wait()
            keeping = group.create_task(self.envoy.run(announce))
            await leaving.wait()
            await asyncio.sleep(self.app.config.proxy.drain_delay_s)
            await self.envoy.drain(self.app.config.drain_timeout_s)
            stop.set()
            self.extproc.shutdown()
            await deciding
            await self.models.close()
            for task in (keeping, following):
                task.cancel()

    async def _begin(self, server: GrpcServer, probes: GrpcServer) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.folder.ext_proc))
        listener.listen(1024)
        listener.setblocking(False)
        await server.serve(listener)
        self.extproc.set_serving(True)


def build(app: App, path: Path, doors: Doors, journal: RequestLog | None) -> Plane:
    """path: a folder for their files, which nobody else may enter. Raises ConfigError for what cannot be had."""
    config, folder = app.config, Folder(path)
    binary = find_envoy() if config.proxy.envoy_binary is None else _executable(Path(config.proxy.envoy_binary))
    host, port = _free(config.proxy.host, config.proxy.port)
    if config.record is not None:
        _require_reading(binary)
    if config.connections.tls_cert is not None:
        secret = SecretFile(folder, Path(config.connections.tls_cert), Path(config.connections.tls_key or ""))
        doors.refreshers["Envoy's certificate"] = secret.refresh
        secret.refresh()
    via = loops.Via()
    door = _door(app, host, doors, via, journal=journal is not None)
    pool = PoolFile(folder, shown=doors.trust.authorization)
    doors.trust.listen(pool.look_again)
    app.runtime.listen(pool.observe)  # before any source speaks
    porter = OwnPorter(doors.keys, journal)
    models = PoolModels(app, doors.trust, via)
    retries = RetryWatch(lambda: (app.config.retry.ratio, app.config.retry.floor))
    feedback = OwnFeedback(app.runtime, partial(predicted_seconds, app.runtime.scheduler), pool.names, porter, retries)
    unheard = "Requests that Envoy has and has not told the end of yet."
    app.telemetry.gauge("picker_unheard_requests", unheard, lambda: len(feedback))
    extproc = OwnExtProc(
        app.runtime,
        feedback,
        bounds=Bounds(config.connections.body_timeout_s, config.queue.timeout_s + BEYOND_THE_QUEUE),
        max_message_bytes=config.epp.max_message_bytes,
        addresses=pool.addresses,
        porter=porter,
        retries=retries,
        models=models.answer,
        via=via,
        desk=None if door.asked is None else OwnDesk(app.runtime),
    )
    envoy = KeptEnvoy(
        lambda port: gateway(door, port, folder),
        folder,
        port=port,
        threads=config.proxy.envoy_threads or os.cpu_count() or 1,
        binary=binary,
    )
    app.telemetry.gauge("picker_envoy_restarts", "Times that Envoy has been started again.", lambda: envoy.restarts)
    return Plane(app, door, folder, envoy, pool, extproc, models)


class PoolModels:
    """The models of all endpoints, which picker itself asks. See `ModelsPage`."""

    def __init__(self, app: App, trust: Trust, via: loops.Via) -> None:
        self._app = app
        self._trust = trust
        self._via = via
        self._upstream: Upstream | None = None
        self._page: ModelsPage | None = None

    async def answer(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Respond:
        """The list, or an entry of it. headers: of the client."""
        if self._page is None:
            timeout = self._app.config.proxy.connect_timeout_s
            self._upstream = Upstream(connect_timeout=timeout, trust=self._trust)
            self._page = pool_page(self._app.runtime, self._upstream, self._trust, self._via)
        return await self._page.answer(path, headers)

    async def close(self) -> None:
        if self._upstream is not None:
            await self._upstream.close()


class OwnDesk:
    """See `Desk`."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.wait = runtime.wait

    def place(self, request_id: int, submit: Submit) -> Outcome | Queued:
        return self._runtime.place(self._runtime.prepare(request_id, submit, self._runtime.clock()))


def _asked(app: App, doors: Doors, *, journal: bool) -> tuple[str, ...] | None:
    """The headers that a request is told with in one message; None where its head is to come first.

    That is where keys are asked for, and where prompts are read for longer than the loop can wait.
    """
    if not doors.keys.open or app.exact is not None:
        return None
    credentials = (field.decode() for field in FIELDS)  # keys may be asked for from some moment on
    known = (*SESSION_HEADERS, *OBJECTIVE_HEADERS, *rewrites.HEADERS, loops.NAME, *credentials)
    known = (*known, *sorted(app.runtime.headers))
    return tuple(dict.fromkeys((*known, *(("x-forwarded-for",) if journal else ()))))


def _door(app: App, host: str, doors: Doors, via: loops.Via, *, journal: bool) -> Door:
    config, trust = app.config, doors.trust
    told, limits, upstream = config.connections, config.limits, config.upstream
    return Door(
        host=host,
        connect_timeout=config.proxy.connect_timeout_s,
        silence=max(config.proxy.first_byte_timeout_s, config.proxy.idle_timeout_s),
        attempts=limits.max_attempts,
        elsewhere=config.retry.statuses,
        max_body_bytes=limits.max_body_bytes,
        # Each needs another towards its endpoint.
        connections=told.max_connections or max(_files() // 2, 100),
        decision=config.queue.timeout_s + 2 * BEYOND_THE_QUEUE,
        head_timeout=told.head_timeout_s,
        body_timeout=told.body_timeout_s,
        idle_timeout=told.idle_timeout_s,
        max_head_bytes=told.max_head_bytes,
        max_headers=told.max_headers,
        name_endpoint=limits.name_endpoint,
        serving=None if told.tls_cert is None else Serving(told.tls_client_ca, told.tls_min_version),
        asking=Asking(
            upstream.ca or _authorities(), upstream.cert, upstream.key, upstream.server_name, upstream.insecure
        ),
        pass_on=trust.pass_on,
        usage=config.record is not None,
        asked=_asked(app, doors, journal=journal),
        via=via.mark[1].decode(),
    )


def _require_reading(binary: Path) -> None:
    """Raises ConfigError for an Envoy that cannot read the tokens of answers, without which a recording is none."""
    try:
        validate(trial(), binary=binary)
    except ConfigError:
        raise ConfigError(
            "record: --data-plane envoy needs an Envoy that reads tokens in answers, as 1.40 does; this one does not"
        ) from None


class SecretFile:
    """The certificate that Envoy shows to clients, written again when its files change."""

    def __init__(self, folder: Folder, chain: Path, key: Path) -> None:
        self._folder = folder
        self._chain = chain
        self._key = key
        self._seen: tuple[str, str] | None = None

    def refresh(self) -> bool:
        """Whether there is another one. Raises ConfigError for files that cannot be read."""
        try:
            told = self._chain.read_text(encoding="ascii"), self._key.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            if self._seen is None:
                reason = error.strerror if isinstance(error, OSError) else "they are not ASCII text"
                raise ConfigError(f"connections.tls_cert, tls_key: cannot be read: {reason}") from None
            return False  # half of an exchange; the old one stays
        if told == self._seen:
            return False
        write_whole(self._folder.secret, certificate(*told))
        self._seen = told
        return True


def _executable(path: Path) -> Path:
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise ConfigError(f"--envoy-binary: {path} is no program that can be run")
    return path


def _free(host: str, port: int) -> tuple[str, int]:
    """The IP address and port to listen on, once found free: Envoy itself would share a port with another Envoy."""
    with listen(host, port) as probe:
        return probe.getsockname()[0], port


def _files() -> int:
    """How many files and sockets a process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else _UNBOUNDED


def _authorities() -> str | None:
    """The file of the authorities that this machine trusts, as Python's own TLS does; None where there is none."""
    places = (ssl.get_default_verify_paths().cafile, *_AUTHORITIES)
    return next((place for place in places if place is not None and os.path.exists(place)), None)
