"""What the demo runs: simulated pods, and two ways to them, one that knows no caches and one through picker.

Owns which processes are started, with which flags and ports, and when they are ready. Sends no load.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from picker import envoy
from picker.children import Child, ChildFailedError, Children, last_lines, supervised
from picker.errors import ConfigError
from picker.load.client import ENDPOINT_HEADER, Client, Target

_READY_TIMEOUT = 60.0


class EnvoyMissingError(ConfigError):
    """There is no Envoy on this machine; the message says how to get one."""


class DataPlane(enum.Enum):
    """What stands between clients and pods; the value is the flag's word."""

    ENVOY = "envoy"
    PROXY = "proxy"


@dataclass(frozen=True, slots=True)
class Pods:
    """The simulated pods to start.

    profile: a name in `sim/profiles.toml`. kv_tokens: size of a cache, else the profile's. time_scale: how many times
    faster than real time they run.
    """

    count: int
    model: str
    profile: str
    kv_tokens: int | None
    time_scale: float
    seed: int


@dataclass(frozen=True, slots=True)
class Stack:
    """What runs: two ways to the same pods. URLs without a trailing slash; data_plane: its name and version."""

    data_plane: str
    cache_unaware: str
    picker: str
    admin: str
    pods: tuple[str, ...]


@contextlib.asynccontextmanager
async def running(data_plane: DataPlane, pods: Pods) -> AsyncIterator[Stack]:
    """Everything started and answering, until the block is left.

    Raises EnvoyMissingError when there is no Envoy, ChildFailedError when a child ends or does not become ready.
    """
    if data_plane is DataPlane.ENVOY:
        need_envoy()
    async with supervised() as children:
        urls = await _start_pods(children, pods)
        behind = _behind_envoy if data_plane is DataPlane.ENVOY else _behind_proxies
        async with behind(children, pods.model, urls) as stack:
            yield stack


def need_envoy() -> None:
    """Complain before anything is started."""
    try:
        envoy.find_envoy()
    except ConfigError as error:
        raise EnvoyMissingError(str(error)) from None


async def _start_pods(children: Children, pods: Pods) -> tuple[str, ...]:
    child = await children.start_picker(
        "pods",
        *("sim", "--count", str(pods.count), "--port", "0", "--model", pods.model),
        *("--profile", pods.profile, "--time-scale", str(pods.time_scale), "--seed", str(pods.seed)),
        *(("--kv-tokens", str(pods.kv_tokens)) if pods.kv_tokens else ()),
    )
    return tuple(await children.announced(child, _POD, timeout=_READY_TIMEOUT, count=pods.count))


# How the children tell which ports they took.
_POD = re.compile(r"pod on (http://\S+)")
_EXT_PROC = re.compile(r"ext-proc on \S*?:(\d+)")
_PROXY = re.compile(r"proxy on (http://\S+?)/v1")
_ADMIN = re.compile(r"debug on (http://\S+)")


@contextlib.asynccontextmanager
async def _behind_envoy(children: Children, model: str, pods: tuple[str, ...]) -> AsyncIterator[Stack]:
    epp = await children.start_picker(
        "picker",
        *("epp", "--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0"),
        *("--secure-serving", "false", *_endpoint_flags(pods)),
    )
    (port,) = await children.announced(epp, _EXT_PROC, timeout=_READY_TIMEOUT)
    (admin,) = await children.announced(epp, _ADMIN, timeout=_READY_TIMEOUT)
    config = envoy.bootstrap([pod.removeprefix("http://") for pod in pods], f"127.0.0.1:{port}", plain="127.0.0.1:0")
    log = children.folder / "envoy.log"
    async with envoy.running_envoy(naming_the_pod(config), log_path=log) as running, asyncio.TaskGroup() as group:
        watch = group.create_task(_watch(running, log))
        stack = Stack(
            data_plane=f"envoy {running.version}",
            cache_unaware=f"http://127.0.0.1:{running.ports[envoy.PLAIN]}",
            picker=f"http://127.0.0.1:{running.ports[envoy.GATEWAY]}",
            admin=admin,
            pods=pods,
        )
        await _first_answers(children, epp, model, stack)
        yield stack
        watch.cancel()


def naming_the_pod(config: envoy.Json) -> envoy.Json:
    """The same configuration, whose plain listener names the pod that answered, as picker does."""
    header = {"header": {"key": ENDPOINT_HEADER, "value": "%UPSTREAM_REMOTE_ADDRESS%"}}
    for listener in config["static_resources"]["listeners"]:
        if listener["name"] == envoy.PLAIN:
            manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
            manager["route_config"]["response_headers_to_add"] = [header]
    return config


async def _watch(running: envoy.Envoy, log: Path) -> None:
    """Raises ChildFailedError when Envoy is gone."""
    while True:
        await asyncio.sleep(1.0)
        try:
            await running.admin("/ready")
        except aiohttp.ClientError:
            raise ChildFailedError(f"Envoy ended by itself. Its last words:\n{last_lines(log)}") from None


@contextlib.asynccontextmanager
async def _behind_proxies(children: Children, model: str, pods: tuple[str, ...]) -> AsyncIterator[Stack]:
    in_turn = await _proxy(children, "round-robin", pods, "--policy", "round-robin")
    picker = await _proxy(children, "picker", pods)
    (in_turn_url,) = await children.announced(in_turn, _PROXY, timeout=_READY_TIMEOUT)
    (picker_url,) = await children.announced(picker, _PROXY, timeout=_READY_TIMEOUT)
    (admin,) = await children.announced(picker, _ADMIN, timeout=_READY_TIMEOUT)
    stack = Stack("picker proxy", cache_unaware=in_turn_url, picker=picker_url, admin=admin, pods=pods)
    await _first_answers(children, picker, model, stack)
    yield stack


async def _proxy(children: Children, name: str, pods: tuple[str, ...], *flags: str) -> Child:
    return await children.start_picker(
        name, *("proxy", "--port", "0", "--admin-port", "0", *flags, *_endpoint_flags(pods))
    )


def _endpoint_flags(pods: Iterable[str]) -> list[str]:
    return [flag for pod in pods for flag in ("--endpoint", pod)]


async def _first_answers(children: Children, child: Child, model: str, stack: Stack) -> None:
    """Wait until both ways answer a small request."""
    for url in (stack.cache_unaware, stack.picker):
        async with Client(Target(url, model=model)) as client:

            async def answered(client: Client = client) -> bool:
                body = client.body([("user", "hello")], 2)
                record, _ = await client.ask(body, intended_at=0.0)
                return record.error is None

            await children.ready(child, answered, timeout=_READY_TIMEOUT)
