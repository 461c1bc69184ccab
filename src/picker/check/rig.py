"""A real Envoy on loopback around any picker: configuration, process, endpoints and a client.

Owns what stands where. The configuration is the one that picker ships (`picker.envoy.bootstrap`), once for each
situation that a check wants to meet, put together into one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from picker import envoy
from picker.check import pods, reference
from picker.check.gateway import Gateway, Target
from picker.check.pods import Pod, Pods, Seen
from picker.check.prompts import Prompts
from picker.check.reference import Reference
from picker.check.relay import Relay, relaying
from picker.check.verdict import Trace
from picker.envoy import EXT_PROC, GATEWAY, POOL, Json, Topology

# Listeners. All but DIRECT go to the picker by way of the relay.
CLOSE = "close"
OPEN = "open"
SHORT = "short"
DIRECT = "direct"
ROUTES = "routes"
SECOND = "second"
VERIFIED = "verified"
MISTRUSTED = "mistrusted"

# Seconds: of Envoy's idle timer on SHORT.
IDLE = 1.0
SUBSET_HEADER = "x-check-subset"
_TIMEOUT = 15.0

# The gateway's subset hint, as a list, from a header of the client's.
_SUBSET_LUA = f"""
function envoy_on_request(handle)
  local told = handle:headers():get("{SUBSET_HEADER}")
  if told == nil then return end
  handle:headers():remove("{SUBSET_HEADER}")
  local entries = {{}}
  for entry in string.gmatch(told, "[^,]+") do entries[#entries + 1] = entry end
  local metadata = handle:streamInfo():dynamicMetadata()
  metadata:set("envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset", entries)
end
"""
_TYPE = "type.googleapis.com/envoy.extensions.filters.http."


@dataclass(frozen=True, slots=True)
class Wiring:
    """Everything that Envoy is told of. secure: the picker's TLS port; stranger: a certificate that is not its own."""

    topology: Topology
    pool: Sequence[str]
    relay: str
    direct: Target
    second_pool: Sequence[str]
    second_picker: str
    probed: bool
    secure: Target | None = None
    stranger: Path | None = None

    def compose(self) -> Json:
        """One configuration with all listeners."""
        filters = [{"name": "subset", "typed_config": {"@type": f"{_TYPE}lua.v3.Lua", "inline_code": _SUBSET_LUA}}]
        close = envoy.bootstrap(self.pool, self.relay, topology=self.topology, filters=filters)
        config = copy.deepcopy(close)
        resources: Json = config["static_resources"]
        resources["listeners"] = [_named(close, CLOSE), _hurried(_named(close, SHORT)), _routes(_named(close, ROUTES))]
        allowing = envoy.bootstrap(
            self.pool, self.relay, topology=self.topology, filters=filters, failure_mode_allow=True
        )
        resources["listeners"].append(_named(allowing, OPEN))
        second = envoy.bootstrap(self.second_pool, self.second_picker, topology=self.topology, filters=filters)
        nowhere = envoy.bootstrap(self.pool, "127.0.0.1:1", topology=self.topology)
        _add(resources, _renamed(second, SECOND), pool=True)
        _add(resources, _renamed(nowhere, "nowhere"), listener=False)
        _add(resources, _renamed(self._to(self.direct, filters), DIRECT))
        if self.secure is not None:
            _add(resources, _renamed(self._to(self.secure, filters), VERIFIED))
            if self.stranger is not None:
                wrong = Target(self.secure.address, tls=True, ca=self.stranger)
                _add(resources, _renamed(self._to(wrong, filters), MISTRUSTED))
        for cluster in resources["clusters"]:
            _probe_often(cluster, probed=self.probed)
        return config

    def _to(self, target: Target, filters: Sequence[Json]) -> Json:
        return envoy.bootstrap(
            self.pool, target.address, topology=self.topology, filters=filters, tls=target.tls, ca=target.ca
        )


def manager(listener: Json) -> Json:
    """The HTTP connection manager's settings."""
    found: Json = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return found


def ext_proc(listener: Json) -> Json:
    """The ext-proc filter's settings."""
    filters = manager(listener)["http_filters"]
    found: Json = next(one for one in filters if one["name"] == "envoy.filters.http.ext_proc")["typed_config"]
    return found


def listener(config: Json, name: str) -> Json:
    found: Json = next(one for one in config["static_resources"]["listeners"] if one["name"] == name)
    return found


def cluster(config: Json, name: str) -> Json:
    found: Json = next(one for one in config["static_resources"]["clusters"] if one["name"] == name)
    return found


def _named(config: Json, name: str) -> Json:
    made = copy.deepcopy(listener(config, GATEWAY))
    made["name"] = name
    return made


def _hurried(made: Json) -> Json:
    manager(made)["stream_idle_timeout"] = f"{IDLE:g}s"
    return made


def _renamed(config: Json, name: str) -> Json:
    """The same with clusters and listener of its own names: `name`, `pool-name`, `ext-proc-name`."""
    text = json.dumps(config)
    for old in (POOL, EXT_PROC):
        for key in ("cluster_name", "cluster", "name"):
            text = text.replace(f'"{key}": "{old}"', f'"{key}": "{old}-{name}"')
    made: Json = json.loads(text)
    listener(made, GATEWAY)["name"] = name
    return made


def _add(resources: Json, config: Json, *, listener: bool = True, pool: bool = True) -> None:
    parts = config["static_resources"]
    resources["listeners"] += parts["listeners"] if listener else []
    resources["clusters"] += [one for one in parts["clusters"] if pool or not one["name"].startswith(POOL)]


def _probe_often(made: Json, *, probed: bool) -> None:
    """Health checks in tenths of seconds, so that checks need not wait for them; none where the picker has no such."""
    # A picker that is refused needs no probing ten times a second.
    often = () if made["name"] == f"{EXT_PROC}-{MISTRUSTED}" else made.get("health_checks", ())
    for check in often:
        check |= {"interval": "0.1s", "no_traffic_interval": "0.1s", "timeout": "2s"}
    if not probed and made["name"] in (f"{EXT_PROC}-{name}" for name in (DIRECT, VERIFIED, MISTRUSTED)):
        made.pop("health_checks", None)


def _routes(made: Json) -> Json:
    """One listener, several pools: by path, by weight, by host, and one whose picker is not there."""
    (host,) = manager(made)["route_config"]["virtual_hosts"]
    (primary,) = host["routes"]
    routes = [
        _route(primary, "/second", SECOND),
        _route(primary, "/no-picker", "nowhere", pool=POOL),
        _weighted(primary),
        primary | {"match": {"prefix": "/first"}},
    ]
    host["routes"], host["domains"] = routes, ["pool.check"]
    return made


def _route(primary: Json, prefix: str, name: str, *, pool: str | None = None) -> Json:
    action = primary["route"] | {"cluster": pool or f"{POOL}-{name}"}
    return {"match": {"prefix": prefix}, "route": action, "typed_per_filter_config": _picker_of(name)}


def _weighted(primary: Json) -> Json:
    mark = [{"header": {"key": "x-check-pool", "value": SECOND}}]
    weights = [
        {"name": POOL, "weight": 70},
        {
            "name": f"{POOL}-{SECOND}",
            "weight": 30,
            "typed_per_filter_config": _picker_of(SECOND),
            "request_headers_to_add": mark,
        },
    ]
    action = {key: value for key, value in primary["route"].items() if key != "cluster"}
    return {"match": {"prefix": "/weighted"}, "route": action | {"weighted_clusters": {"clusters": weights}}}


def _picker_of(name: str) -> Json:
    service = {"envoy_grpc": {"cluster_name": f"{EXT_PROC}-{name}"}}
    override = {"@type": f"{_TYPE}ext_proc.v3.ExtProcPerRoute", "overrides": {"grpc_service": service}}
    return {"envoy.filters.http.ext_proc": override}


# --- what runs ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Got:
    """What a client got. error: why there is no complete answer. chunks: of the body, as they came."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""
    seconds: float = 0.0

    @property
    def pod(self) -> str | None:
        return self.headers.get(pods.POD_HEADER)

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error

    def said(self) -> str:
        words = f"{self.status or 'no response'}" + (f" from {self.pod}" if self.pod else "")
        return words + (f", broken off: {self.error}" if self.error else "")


@dataclass(slots=True)
class Rig:
    """What the checks of tier T2 are played on. known: endpoints that the picker was told of. settle: seconds for it to
    notice what happens to them. overload: requests at once of which it must shed some, None where it need not."""

    topology: Topology
    envoy: envoy.Envoy
    client: aiohttp.ClientSession
    relay: Relay
    pods: Pods
    second: Pods
    canary: Pod
    prompts: Prompts
    trace: Trace
    overload: int | None
    settle: float
    secure: bool
    log: Path
    marks: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def mark(self) -> str:
        """A name for a request that no other has, of this rig or of another at the same endpoints."""
        return f"{self.topology.value}-{next(self.marks)}"

    def url(self, listener: str, path: str) -> str:
        return f"http://127.0.0.1:{self.envoy.ports[listener]}{path}"

    def headers(self, mark: str, more: Mapping[str, str], subset: Sequence[str] | None) -> dict[str, str]:
        hint = {} if subset is None else {SUBSET_HEADER: ",".join(subset)}
        return {pods.MARK_HEADER: mark, **hint, **more}

    async def post(
        self,
        body: bytes | None = None,
        *,
        listener: str = CLOSE,
        path: str = "/v1/completions",
        mark: str = "",
        headers: Mapping[str, str] | None = None,
        subset: Sequence[str] | None = None,
        timeout: float = _TIMEOUT,
    ) -> Got:
        """One request through Envoy, answered or not within `timeout` seconds."""
        body = self.prompts.body() if body is None else body
        sent = self.headers(mark or self.mark(), headers or {}, subset)
        self.trace.send(f"POST {path} {len(body)} B to {listener}" + (f" {sorted(headers)}" if headers else ""))
        got, started = Got(), time.monotonic()
        try:
            async with (
                asyncio.timeout(timeout),
                self.client.post(self.url(listener, path), data=body, headers=sent) as response,
            ):
                got.status, got.headers = response.status, dict(response.headers)
                got.body = await response.read()
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            got.error = type(error).__name__
        got.seconds = time.monotonic() - started
        self.trace.receive(got.said())
        return got

    async def get(self, path: str = "/v1/models", *, listener: str = CLOSE, mark: str = "") -> Got:
        """A request without a body."""
        self.trace.send(f"GET {path} to {listener}")
        sent = self.headers(mark or self.mark(), {}, None)
        async with self.client.get(self.url(listener, path), headers=sent) as response:
            got = Got(response.status, dict(response.headers), await response.read())
        self.trace.receive(got.said())
        return got

    async def until(
        self,
        wanted: Callable[[Got], bool],
        *,
        listener: str = CLOSE,
        seconds: float = 10.0,
        subset: Sequence[str] | None = None,
    ) -> Got:
        """Ask until the answer is as wanted; the last one when the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            got = await self.post(listener=listener, subset=subset)
            if wanted(got) or time.monotonic() > deadline:
                return got
            await asyncio.sleep(0.03)

    @contextlib.asynccontextmanager
    async def without_picker(self) -> AsyncIterator[None]:
        """The picker refuses connections for the length of the block, and Envoy has noticed."""
        await self.relay.down()
        await self._until_healthy(wanted=False)
        try:
            yield
        finally:
            await self.relay.up()
            await self._until_healthy(wanted=True)
            await self.until(lambda got: got.ok)

    async def _until_healthy(self, *, wanted: bool) -> None:
        """What Envoy thinks of the relay."""
        line = f"{EXT_PROC}::{self.relay.address}::health_flags::"
        async with asyncio.timeout(10.0):
            while True:
                flags = [told for told in (await self.envoy.admin("/clusters")).splitlines() if told.startswith(line)]
                if bool(flags and flags[0].endswith("::healthy")) == wanted:
                    return
                await asyncio.sleep(0.03)

    def arrived(self, mark: str) -> list[tuple[str, Seen]]:
        """Every arrival of a request at any endpoint, the other pool's and the canary's included."""
        return [*self.pods.seen(mark), *self.second.seen(mark), *Pods([self.canary]).seen(mark)]


@dataclass(frozen=True, slots=True)
class Setup:
    """A rig to be built. change: what to do to the configuration before Envoy gets it. binary: Envoy's, else found."""

    topology: Topology
    picker: Target
    pods: Pods
    prompts: Prompts
    trace: Trace
    overload: int | None = None
    settle: float = 10.0
    secure: Target | None = None
    stranger: Path | None = None
    binary: Path | None = None
    change: Callable[[Json], None] = lambda config: None


@contextlib.asynccontextmanager
async def standing(setup: Setup, folder: Path) -> AsyncIterator[Rig]:
    """A rig for the length of the block. Raises ConfigError when Envoy does not come up."""
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(relaying(setup.picker))
        second = await stack.enter_async_context(pods.running(["127.0.0.1:0"] * 2, setup.prompts.model))
        canary = (await stack.enter_async_context(pods.running(["127.0.0.1:0"], setup.prompts.model))).all[0]
        listed = setup.topology is Topology.OVERRIDE_HOST
        other = await stack.enter_async_context(reference.serving(Reference(lambda: second.up, fallbacks=listed)))
        probed = await _probed(setup)
        wiring = Wiring(
            setup.topology,
            pool=setup.pods.addresses,
            relay=relay.address,
            direct=setup.picker,
            second_pool=second.addresses,
            second_picker=other.address,
            probed=probed,
            secure=setup.secure,
            stranger=setup.stranger,
        )
        config = wiring.compose()
        setup.change(config)
        log = folder / f"envoy-{setup.topology.value}.log"
        (folder / f"envoy-{setup.topology.value}.json").write_text(json.dumps(config, indent=1))
        running = await stack.enter_async_context(envoy.running_envoy(config, log_path=log, binary=setup.binary))
        client = await stack.enter_async_context(aiohttp.ClientSession(connector=_connector()))
        rig = Rig(
            setup.topology,
            envoy=running,
            client=client,
            relay=relay,
            pods=setup.pods,
            second=second,
            canary=canary,
            prompts=setup.prompts,
            trace=setup.trace,
            overload=setup.overload,
            settle=setup.settle,
            secure=setup.secure is not None,
            log=log,
        )
        await rig.until(lambda got: got.ok, seconds=setup.settle)
        yield rig


def _connector() -> aiohttp.TCPConnector:
    # A connection of its own for each request: nothing that Envoy does to one tells on another.
    return aiohttp.TCPConnector(limit=0, force_close=True)


async def _probed(setup: Setup) -> bool:
    """Does the picker answer health checks on its ext-proc port, as picker's own configuration wants it?"""
    gateway = Gateway(setup.picker, patience=3.0, trace=Trace())
    try:
        return await gateway.health("liveness") == "SERVING"
    finally:
        await gateway.close()
