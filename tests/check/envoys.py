"""A rig for tests: endpoints, an honest or a wrong picker in the test's process, and a real Envoy."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from check.stage import MODEL, OVERLOAD
from picker.check import certificate, pods, reference
from picker.check.gateway import Target
from picker.check.pods import Pods
from picker.check.prompts import Prompts
from picker.check.reference import Reference
from picker.check.rig import Rig, Setup, standing
from picker.check.verdict import Trace
from picker.envoy import Json, Topology

# Requests that an endpoint gets: what the checks have under way at once, though a slow machine is late to see them end;
# and not so many that there were room for `OVERLOAD`.
ROOM = 12

Maker = Callable[[Pods], Reference]


def honest(topology: Topology) -> Maker:
    """ORIGINAL_DST takes a list of endpoints for one address."""
    fallbacks = topology is Topology.OVERRIDE_HOST
    return lambda endpoints: Reference(Late(endpoints), max_inflight=ROOM, fallbacks=fallbacks)


class Late:
    """Learns after some questions that an endpoint has gone, as real pickers do."""

    def __init__(self, endpoints: Pods, questions: int = 12) -> None:
        self.endpoints = endpoints
        self.missing: dict[str, int] = {}
        self.questions = questions

    def __call__(self) -> list[str]:
        for address in self.endpoints.addresses:
            gone = address not in self.endpoints.up
            self.missing[address] = self.missing.get(address, 0) + 1 if gone else 0
        return [address for address, missing in self.missing.items() if missing < self.questions]


@asynccontextmanager
async def rig(
    topology: Topology,
    make: Maker | None = None,
    change: Callable[[Json], None] = lambda config: None,
    *,
    tls: bool = True,
    binary: Path | None = None,
) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoints = await stack.enter_async_context(pods.running(["127.0.0.1:0"] * 3, MODEL))
        picker = (make or honest(topology))(endpoints)
        target = await stack.enter_async_context(reference.serving(picker))
        tls = tls and certificate.available()
        setup = Setup(
            topology,
            target,
            endpoints,
            Prompts(MODEL, seed=2),
            Trace(),
            overload=OVERLOAD,
            settle=3.0,
            secure=await _secure(stack, picker, folder) if tls else None,
            stranger=certificate.write(folder / "stranger") if tls else None,
            binary=binary,
            change=change,
        )
        yield await stack.enter_async_context(standing(setup, folder))


async def _secure(stack: AsyncExitStack, picker: Reference, folder: Path) -> Target:
    ca = certificate.write(folder)
    credentials = grpc.ssl_server_credentials([((folder / "tls.key").read_bytes(), ca.read_bytes())])
    served = await stack.enter_async_context(reference.serving(picker, credentials=credentials))
    return Target(served.address, tls=True, ca=ca)
