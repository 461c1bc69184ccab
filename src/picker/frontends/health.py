"""gRPC's health service (grpc.health.v1) for the names that gateways and probes of llm-d's endpoint picker ask for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2

from picker.frontends.grpc_server import Call, Code, Handler
from picker.wire.extproc import SERVICE

LIVENESS = "liveness"
READINESS = ("", "readiness", SERVICE)

_STATUS = health_pb2.HealthCheckResponse
_SERVICE = "/grpc.health.v1.Health"


class Health:
    """Liveness holds as long as the loop turns; readiness is what `set_serving` says, and off to begin with."""

    def __init__(self) -> None:
        self._serving = False
        self._watchers: set[asyncio.Future[None]] = set()

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {f"{_SERVICE}/Check": self._check, f"{_SERVICE}/Watch": self._watch}

    def set_serving(self, serving: bool) -> None:
        self._serving = serving
        for watcher in self._watchers:
            if not watcher.done():
                watcher.set_result(None)

    async def _check(self, call: Call) -> None:
        name = await _asked(call)
        if name is None:
            return
        status = self._status(name)
        if status == _STATUS.SERVICE_UNKNOWN:
            call.end(Code.NOT_FOUND, "unknown service")
            return
        await call.write(_STATUS(status=status).SerializeToString())

    async def _watch(self, call: Call) -> None:
        """Tell the status, and then every change, until the call is cancelled. An unknown name may become known."""
        name = await _asked(call)
        if name is None:
            return
        told = None
        while True:
            status = self._status(name)
            if status != told:
                told = status
                await call.write(_STATUS(status=status).SerializeToString())
            else:
                await self._change()

    async def _change(self) -> None:
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watchers.add(watcher)
        try:
            await watcher
        finally:
            self._watchers.discard(watcher)

    def _status(self, name: str) -> int:
        if name == LIVENESS:
            return int(_STATUS.SERVING)
        if name not in READINESS:
            return int(_STATUS.SERVICE_UNKNOWN)
        return int(_STATUS.SERVING if self._serving else _STATUS.NOT_SERVING)


async def _asked(call: Call) -> str | None:
    """The name that is asked for; None when the call has been ended for bytes that are no question."""
    try:
        return str(health_pb2.HealthCheckRequest.FromString(await call.read() or b"").service)
    except DecodeError:
        call.end(Code.INVALID_ARGUMENT, "no health check request")
        return None
