"""What the tests of checks are played on: endpoints, a picker in the test's process and, on demand, its TLS twin."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from picker.check import certificate, pods, reference
from picker.check.gateway import Gateway, Target
from picker.check.prompts import Prompts
from picker.check.reference import Reference
from picker.check.subject import Subject
from picker.check.verdict import Trace

MODEL = "check"
MAX_BODY = 400_000
OVERLOAD = 40
# Two of one host and one of another.
ADDRESSES = ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.2:0")

Maker = Callable[[pods.Pods, Path], Reference]


def honest(endpoints: pods.Pods, log: Path) -> Reference:
    return Reference(lambda: endpoints.up, max_inflight=8, max_body=MAX_BODY)


@asynccontextmanager
async def subject(make: Maker = honest, *, patience: float = 2.0, tls: bool = True) -> AsyncIterator[Subject]:
    """A picker of this make under test, with everything known that its checks may want to know."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = folder / "picker.log"
        log.touch()
        endpoints = await stack.enter_async_context(pods.running(ADDRESSES, MODEL))
        picker = make(endpoints, log)
        target = await stack.enter_async_context(reference.serving(picker))
        trace = Trace()
        gateway = Gateway(target, patience=patience, trace=trace)
        stack.push_async_callback(gateway.close)
        yield Subject(
            gateway,
            health=gateway,
            prompts=Prompts(MODEL, seed=1),
            trace=trace,
            pool=endpoints.addresses,
            declared=True,
            pods=endpoints,
            bound=1.5,
            settle=1.0,
            overload=OVERLOAD,
            max_body=MAX_BODY,
            sinks=(log,),
            secure=await _secure(stack, picker, folder) if tls else None,
        )


async def _secure(stack: AsyncExitStack, picker: Reference, folder: Path) -> Target | None:
    if not certificate.available():
        return None
    ca = certificate.write(folder)
    credentials = grpc.ssl_server_credentials([((folder / "tls.key").read_bytes(), ca.read_bytes())])
    served = await stack.enter_async_context(reference.serving(picker, credentials=credentials))
    return Target(served.address, tls=True, ca=ca)
