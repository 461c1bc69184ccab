"""What `picker epp` runs in one process, and the pieces of it that several processes share."""

from __future__ import annotations

import asyncio
import ssl
from functools import partial
from pathlib import Path

import click

from picker.app import App, Serve
from picker.config import Config
from picker.deciders import build_saturation
from picker.frontends import collector
from picker.frontends.admin import Admin
from picker.frontends.als import AccessLog, Feedback, predicted_seconds
from picker.frontends.certificates import Certificates
from picker.frontends.extproc import Bounds, ExtProc, Mode
from picker.frontends.serving import listen, port_of
from picker.gate import Gate
from picker.metrics_compat import CompatMetrics
from picker.signals import stopping_on_signals
from picker.sources.kubernetes.election import Election

# Seconds that a decision may take beside waiting in the queue, whose own limit answers first.
_BEYOND_THE_QUEUE = 5.0


async def serve(config: Config) -> None:
    app = App(config)
    epp, certificates = build(app), build_certificates(config)
    stop, leaving = asyncio.Event(), asyncio.Event()

    async def ext_proc(stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as group:
            leave = group.create_task(leave_on(leaving, stop, app, epp))
            following = group.create_task(follow(certificates))
            knowing = group.create_task(serve_once_known(app, epp, leaving))
            await epp.serve(
                config.epp.host,
                config.epp.grpc_port,
                health_port=config.epp.grpc_health_port,
                tls=None if certificates is None else certificates.context,
                grace=config.drain_timeout_s,
                ready=partial(begun, app, epp),
            )
            for task in (leave, following, knowing):
                task.cancel()

    frontends: list[Serve] = [ext_proc]
    if config.admin.port is not None:
        admin = Admin(app.runtime, token=config.admin.token, guard_metrics=config.admin.guard_metrics)
        socket = listen(config.admin.host, config.admin.port)
        frontends.append(lambda stop: admin.serve(socket, stop))
        click.echo(f"metrics, health and debug on http://{config.admin.host}:{port_of(socket)}", err=True)
    with stopping_on_signals(leaving), collector.seldom():
        await app.run(frontends, stop)


def build(app: App) -> ExtProc:
    """The ext-proc service that the app's configuration describes."""
    feedback = build_feedback(app)
    epp = build_extproc(app.config, app.runtime, feedback)
    app.telemetry.gauge("picker_extproc_streams", "Open ext-proc streams.", lambda: epp.open_streams)
    return epp


def build_extproc(config: Config, gate: Gate, feedback: AccessLog | None) -> ExtProc:
    """The service around whoever decides."""
    decision = config.queue.timeout_s + _BEYOND_THE_QUEUE
    return ExtProc(
        gate,
        mode=Mode(config.epp.mode),
        feedback=feedback,
        fallbacks=config.epp.fallbacks,
        bounds=Bounds(config.epp.request_timeout_s, decision, config.epp.idle_timeout_s),
        max_message_bytes=config.epp.max_message_bytes,
    )


def build_feedback(app: App, secret: str | None = None) -> Feedback | None:
    """Where lean mode keeps what has left, and the metrics that are told on the side. secret: of marks."""
    if app.config.epp.metrics_compat:
        _add_compat(app)
    if Mode(app.config.epp.mode) is not Mode.LEAN:
        return None
    feedback = Feedback(app.runtime, partial(predicted_seconds, app.runtime.scheduler), secret=secret)
    unheard = "Requests routed in lean mode whose end nobody has told yet."
    app.telemetry.gauge("picker_unheard_requests", unheard, lambda: len(feedback))
    if app.replicas is not None:
        feedback.elsewhere = app.replicas.relay_for(feedback)
    return feedback


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


def begun(app: App, epp: ExtProc, port: int, health: int | None) -> None:
    """It listens, but is not ready to serve before it knows the endpoints: a new replica must refuse nobody."""
    if not (app.informed and app.leads):
        epp.set_serving(False)
    announce(app.config, port, health)


async def serve_once_known(app: App, epp: ExtProc, leaving: asyncio.Event) -> None:
    if not app.informed:
        await app.get_informed()
        epp.set_serving(app.leads and not leaving.is_set())
    if app.election is not None:
        await _serve_while_leading(app.election, epp, leaving)


async def _serve_while_leading(election: Election, epp: ExtProc, leaving: asyncio.Event) -> None:
    """Ready as long as this replica leads. What it is asked without is answered all the same: nobody is refused."""
    moved = asyncio.Event()
    election.on_change = lambda leading: moved.set()
    while not leaving.is_set():
        moved.clear()
        if election.leading:
            epp.set_serving(True)
        else:
            await epp.part(0.0)  # gateways that have gone on with their connections find the leader on new ones
        await moved.wait()


def announce(config: Config, port: int, health: int | None) -> None:
    click.echo(f"picker epp: ext-proc on {config.epp.host}:{port}, health on :{health}", err=True)


async def leave_on(leaving: asyncio.Event, stop: asyncio.Event, app: App, epp: ExtProc) -> None:
    """Told to go: nobody is refused before gateways have had time to notice, and another may lead at once."""
    await leaving.wait()
    epp.set_serving(False)
    if app.election is not None:
        app.election.resign()
    await epp.part(app.config.epp.drain_delay_s)
    stop.set()
    epp.shutdown()


def build_certificates(config: Config) -> Certificates | None:
    if not config.epp.secure_serving:
        return None
    oldest = ssl.TLSVersion.TLSv1_3 if config.epp.tls_min_version == "1.3" else ssl.TLSVersion.TLSv1_2
    return Certificates(_path(config.epp.cert_path), client_ca=_path(config.epp.client_ca_path), oldest=oldest)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


async def follow(certificates: Certificates | None) -> None:
    if certificates is not None:
        await certificates.follow()
