"""What following a Kubernetes API server costs, and how soon a change of the cluster is a change of the routing.

    python bench/kubernetes.py [--pods 1000] [--rounds 20] [--kubeconfig FILE] [--json]

The API server is the one of the tests, in this process, or a real one that a kubeconfig names; picker is a process of
its own, and so are its clients' figures end to end: pods are addresses 127.x.y.z of one small HTTP server that answers
completions and metrics. Of a real one every span begins before the write that causes the event is sent, so that the
API server's own time is in it; `write` says how long such a write takes until it is answered.

| row | is |
|---|---|
| startup | from starting `picker epp --pool-name` until /readyz counts every pod, its CPU and memory then |
| rest | CPU of ten quiet seconds, in which every pod is scraped (--scrape-interval 1) |
| churn | CPU for a change of a pod, with 500 pods that change as fast as they are taken; not with a kubeconfig |
| ready | from the event that a pod is ready until it gets the first request, at a pool with no other |
| deleted | from the event with a pod's deletionTimestamp until it gets the last request, under load |
| rolling | requests that fail while every pod is replaced under load |
| reading | CPU to make objects of a list of so many pods |
| write | until a real API server has answered the write of a pod's status |
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import click
import yaml
from aiohttp import web

from picker.bench import machine
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.objects import read_metadata, read_page

# Here `kubernetes` would be this very file.
sys.path[0] = str(Path(__file__).parent.parent / "tests")
from kubernetes.api_server import ApiServer, serving  # noqa: E402
from kubernetes.manifests import PODS, POOLS, Kind, pod, pool  # noqa: E402
from kubernetes.real_cluster import Real, real_cluster  # noqa: E402
from kubernetes.stage import InTest, at_once  # noqa: E402

Row = dict[str, Any]

_TICKS = os.sysconf("SC_CLK_TCK")
_METRICS = (
    'vllm:num_requests_running{engine="0",model_name="m"} 0\nvllm:num_requests_waiting{engine="0",model_name="m"} 0\n'
    'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0\n'
)
_CLIENTS = 8
_GRACE = 0.3  # seconds that a pod of a rolling restart lives after its deletionTimestamp


class Cluster(Protocol):
    """What is measured against: the tests' API server, or a namespace of a real one."""

    namespace: str
    kubeconfig: Path

    async def apply(self, kind: Kind, value: Row) -> None: ...
    async def say(self, kind: Kind, value: Row) -> None: ...
    async def delete(self, kind: Kind, name: str) -> None: ...
    async def terminate(self, pod: str) -> None: ...


class Local(InTest):
    """The tests' API server, in this process."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        super().__init__(server)
        self.kubeconfig = folder / "kubeconfig"
        named = {"name": "x", "context": {"cluster": "x", "namespace": self.namespace}}
        whole = {"current-context": "x", "contexts": [named]}
        whole |= {"clusters": [{"name": "x", "cluster": {"server": server.url}}]}
        self.kubeconfig.write_text(yaml.safe_dump(whole), encoding="utf-8")

    async def say(self, kind: Kind, value: Row) -> None:
        await self.apply(kind, value)


class Pods:
    """One HTTP server for all pods: a pod is the address that it was asked at. dead: those that refuse."""

    def __init__(self) -> None:
        self.port = 0
        self.last: dict[str, float] = {}  # when each got its latest request
        self.first: dict[str, float] = {}
        self.dead: set[str] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Pods]:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", 0, backlog=4096).start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    async def busy(self, host: str) -> None:
        """Wait until a pod has just got a request."""
        await _until(lambda: time.perf_counter() - self.last.get(host, 0.0) < 0.002)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=_METRICS)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        host = request.transport.get_extra_info("sockname")[0]
        if host in self.dead:
            request.transport.abort()
            return web.Response()
        self.last[host] = time.perf_counter()
        self.first.setdefault(host, self.last[host])
        await asyncio.sleep(0.005)
        return web.json_response({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def ip(number: int) -> str:
    return f"127.{1 + number // 62_500}.{number // 250 % 250}.{number % 250 + 1}"


class Picker:
    """A picker that is a process."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self._log = folder / "picker.log"
        self._kubeconfig, self._namespace = cluster.kubeconfig, cluster.namespace
        found = {"pools": ["pool"], "kubeconfig": str(self._kubeconfig), "namespace": self._namespace}
        (folder / "proxy.yaml").write_text(yaml.safe_dump({"kubernetes": found}), encoding="utf-8")
        self._config = folder / "proxy.yaml"
        self._process: asyncio.subprocess.Process | None = None
        self.admin = self.url = ""

    @contextlib.asynccontextmanager
    async def epp(self) -> AsyncIterator[Picker]:
        own = ("--host", "127.0.0.1", "--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
        found = ("--pool-name", "pool", "--pool-namespace", self._namespace, "--kubeconfig", str(self._kubeconfig))
        async with self._running("epp", *own, *found, "--secure-serving=false", "--drain-delay", "0"):
            yield self

    @contextlib.asynccontextmanager
    async def proxy(self) -> AsyncIterator[Picker]:
        async with self._running("proxy", "--port", "0", "--admin-port", "0", "--config", str(self._config)):
            self.url = await self._said(r"proxy on (http://\S+)") + "/completions"
            yield self

    @contextlib.asynccontextmanager
    async def _running(self, *arguments: str) -> AsyncIterator[None]:
        with self._log.open("wb") as out:
            command = (sys.executable, "-m", "picker", *arguments, "--log-level", "error")
            self._process = await asyncio.create_subprocess_exec(*command, stdout=out, stderr=out)
        try:
            self.admin = await self._said(r"debug on (http://\S+)")
            yield
        finally:
            self._process.kill()
            await self._process.wait()

    async def _said(self, pattern: str) -> str:
        assert self._process is not None
        while not (found := re.search(pattern, self._log.read_text(errors="replace"))):
            if self._process.returncode is not None:
                raise RuntimeError(self._log.read_text(errors="replace")[-2000:])
            await asyncio.sleep(0.01)
        return found[1]

    @property
    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    @property
    def rss_mb(self) -> float:
        assert self._process is not None
        return int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    async def knows(self, endpoints: int, session: aiohttp.ClientSession) -> None:
        """Wait until it is ready with so many."""
        while True:
            async with session.get(f"{self.admin}/readyz") as response:
                found = await response.json()
            if found["ready"] and found["kubernetes"]["endpoints"] == endpoints:
                return
            await asyncio.sleep(0.02)


# --- measurements ------------------------------------------------------------------------------------------


async def startup(cluster: Cluster, pods: Pods, folder: Path, count: int) -> list[Row]:
    await cluster.apply(POOLS, pool(ports=(pods.port,)))
    await at_once(cluster.apply(PODS, _heavy(f"p{number}", ip(number))) for number in range(count))
    began = time.perf_counter()
    async with aiohttp.ClientSession() as session, Picker(folder, cluster).epp() as picker:
        await picker.knows(count, session)
        seconds, cpu, rss = time.perf_counter() - began, picker.cpu_s, picker.rss_mb
        await asyncio.sleep(5)
        settled = picker.cpu_s
        await asyncio.sleep(10)
        rest = (picker.cpu_s - settled) / 10
        return [
            {"row": "startup", "pods": count, "seconds": seconds, "cpu_s": cpu, "rss_mb": rss},
            {"row": "rest", "pods": count, "cpu_cores": rest, "rss_mb": picker.rss_mb},
        ]


async def churn(cluster: Cluster, pods: Pods, folder: Path, count: int, changes: int) -> Row:
    await cluster.apply(POOLS, pool(ports=(pods.port,)))
    async with aiohttp.ClientSession() as session, Picker(folder, cluster).epp() as picker:
        await at_once(cluster.apply(PODS, _heavy(f"p{number}", ip(number))) for number in range(count))
        await picker.knows(count, session)
        await asyncio.sleep(5)
        before = picker.cpu_s
        await asyncio.sleep(5)
        quiet, began, before = (picker.cpu_s - before) / 5, time.perf_counter(), picker.cpu_s
        for batch in range(0, changes, 50):
            await at_once(
                cluster.say(PODS, _heavy(f"p{each % count}", ip(each % count), ready=each // count % 2 == 1))
                for each in range(batch, batch + 50)
            )
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)  # for what is on its way
        seconds = time.perf_counter() - began
        cpu = picker.cpu_s - before - quiet * seconds
        return {"row": "churn", "pods": count, "changes": changes, "cpu_us_per_change": cpu / changes * 1e6}


async def ready(cluster: Cluster, pods: Pods, folder: Path, rounds: int) -> Row:
    await cluster.apply(POOLS, pool(ports=(pods.port,)))
    spans = []
    async with aiohttp.ClientSession() as session, Picker(folder, cluster).proxy() as picker:
        for number in range(rounds):
            await cluster.apply(PODS, _heavy("p", ip(number), ready=False))
            await asyncio.sleep(0.3)
            asking = asyncio.get_running_loop().create_task(_ask_until_answered(session, picker.url))
            await asyncio.sleep(0.1)
            at = time.perf_counter()
            await cluster.say(PODS, _heavy("p", ip(number)))
            await asking
            spans.append(pods.first[ip(number)] - at)
            await cluster.delete(PODS, "p")
            await asyncio.sleep(0.1)
    return _spans("ready", spans)


async def deleted(cluster: Cluster, pods: Pods, folder: Path, rounds: int) -> Row:
    await cluster.apply(POOLS, pool(ports=(pods.port,)))
    await cluster.apply(PODS, _heavy("stays", ip(10_000)))
    spans = []
    async with Picker(folder, cluster).proxy() as picker, _load(picker.url) as load:
        await _until(lambda: load.done > 100)
        load.failed = 0  # until the first pod was known
        for number in range(rounds):
            await cluster.apply(PODS, _heavy(f"p{number}", ip(number)))
            await pods.busy(ip(number))
            if isinstance(cluster, Real):
                await cluster.bind(f"p{number}")
            await asyncio.sleep(0.2)
            await pods.busy(ip(number))
            at = time.perf_counter()
            await cluster.terminate(f"p{number}")
            await asyncio.sleep(0.5)
            spans.append(max(0.0, pods.last[ip(number)] - at))
            await cluster.delete(PODS, f"p{number}")
    return _spans("deleted", spans) | {"requests": load.done, "failed": load.failed}


async def rolling(cluster: Cluster, pods: Pods, folder: Path, count: int) -> Row:
    """Each pod is replaced as a Deployment with maxUnavailable 0 does it."""
    await cluster.apply(POOLS, pool(ports=(pods.port,)))
    for number in range(count):
        await cluster.apply(PODS, _heavy(f"old{number}", ip(number)))
    async with Picker(folder, cluster).proxy() as picker, _load(picker.url) as load:
        await _until(lambda: load.done > 200)
        load.failed = 0  # until the first pod was known
        for number in range(count):
            await cluster.apply(PODS, _heavy(f"new{number}", ip(count + number)))
            await asyncio.sleep(0.1)
            await cluster.terminate(f"old{number}")
            await asyncio.sleep(_GRACE)
            pods.dead.add(ip(number))
            await cluster.delete(PODS, f"old{number}")
        await asyncio.sleep(0.5)
        return {"row": "rolling", "pods": count, "requests": load.done, "failed": load.failed}


async def write(cluster: Cluster, pods: Pods, folder: Path, rounds: int) -> Row:
    spans = []
    await cluster.apply(PODS, _heavy("p", ip(0)))
    for number in range(rounds):
        at = time.perf_counter()
        await cluster.say(PODS, _heavy("p", ip(0), ready=number % 2 == 1))
        spans.append(time.perf_counter() - at)
    return _spans("write", spans)


def reading(count: int) -> Row:
    """As the reflector reads a list."""
    body = json.dumps({"metadata": {}, "items": [_heavy(f"p{number}", ip(number)) for number in range(count)]}).encode()
    read = objects.pods("default", "").read
    spent = []
    for _ in range(5):
        before = time.process_time()
        for item in read_page(body).items or ():
            read_metadata(item)
            read(item)
        spent.append(time.process_time() - before)
    return {"row": "reading", "pods": count, "bytes": len(body), "cpu_ms": statistics.median(spent) * 1e3}


# --- load --------------------------------------------------------------------------------------------------

_BODY = {"model": "m", "prompt": "hello", "max_tokens": 1}


class _Load:
    """Clients that ask one request after the other."""

    done = failed = 0

    def __init__(self, url: str) -> None:
        self._url = url

    async def client(self, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                async with session.post(self._url, json=_BODY) as response:
                    await response.read()
                    good = response.status == 200
            except aiohttp.ClientError:
                good = False
            self.done += 1
            self.failed += not good
            if not good:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _load(url: str) -> AsyncIterator[_Load]:
    load = _Load(url)
    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        clients = [group.create_task(load.client(session)) for _ in range(_CLIENTS)]
        try:
            yield load
        finally:
            for client in clients:
                client.cancel()


async def _ask_until_answered(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.post(url, json=_BODY) as response:
            await response.read()
            if response.status == 200:
                return
        await asyncio.sleep(0.002)


async def _until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not check():  # noqa: ASYNC110 - what it waits for is another process's doing
            await asyncio.sleep(0.001)


def _spans(row: str, spans: list[float]) -> Row:
    millis = sorted(span * 1e3 for span in spans)
    return {"row": row, "rounds": len(millis), "median_ms": statistics.median(millis), "max_ms": millis[-1]}


def _heavy(name: str, host: str, **more: Any) -> Row:
    """A pod of the size that they have in a cluster: 4 kB, most of which nobody reads."""
    found = pod(name, host, **more)
    fields: Row = {"f:metadata": {"f:labels": {f"f:l{number}": {} for number in range(20)}}}
    entry = {"operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": fields}
    found["metadata"]["managedFields"] = [entry | {"manager": f"kubelet-{number}"} for number in range(3)]
    found["spec"]["containers"][0]["env"] = [{"name": f"VARIABLE_{number}", "value": "x" * 40} for number in range(25)]
    return found


Step = Callable[[Cluster, Pods, Path], Awaitable[Row | list[Row]]]

# --- the command -------------------------------------------------------------------------------------------


@click.command()
@click.option("--pods", "count", default=1000, show_default=True, help="Pods of the start-up.")
@click.option("--rounds", default=20, show_default=True, help="Pods that come and go, one after the other.")
@click.option(
    "--kubeconfig",
    type=click.Path(exists=True, resolve_path=True),
    help="Of a real API server; its user may make namespaces and all that is in them.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(count: int, rounds: int, kubeconfig: str | None, as_json: bool) -> None:
    """What following a Kubernetes API server costs, and how soon changes of the cluster are changes of the routing."""
    rows: list[Row] = [reading(count)]
    steps: list[Step] = [
        lambda cluster, pods, folder: startup(cluster, pods, folder, count),
        lambda cluster, pods, folder: ready(cluster, pods, folder, rounds),
        lambda cluster, pods, folder: deleted(cluster, pods, folder, rounds),
        lambda cluster, pods, folder: rolling(cluster, pods, folder, 10),
    ]
    if kubeconfig is None:
        steps.append(lambda cluster, pods, folder: churn(cluster, pods, folder, 500, 5000))
    else:  # where changes are too slow to be seen in the CPU
        steps.append(lambda cluster, pods, folder: write(cluster, pods, folder, rounds))
    for step in steps:
        found = asyncio.run(_alone(step, kubeconfig))
        rows += found if isinstance(found, list) else [found]
        if not as_json:
            click.echo("  ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()), err=True)
    result = {"bench": "kubernetes", "rows": rows, "machine": machine.describe()}
    click.echo(json.dumps(result) if as_json else "\n".join(_line(row) for row in rows))


async def _alone(step: Step, kubeconfig: str | None) -> Row | list[Row]:
    with tempfile.TemporaryDirectory(prefix="picker-bench-") as name:
        folder = Path(name)
        async with _cluster(folder, kubeconfig) as cluster, Pods().running() as pods:
            return await step(cluster, pods, folder)


@contextlib.asynccontextmanager
async def _cluster(folder: Path, kubeconfig: str | None) -> AsyncIterator[Cluster]:
    if kubeconfig is not None:
        async with real_cluster(kubeconfig) as real:
            yield real
    else:
        async with serving() as server:
            yield Local(server, folder)


def _line(row: Row) -> str:
    return "  ".join(f"{key} {_shown(value)}" for key, value in row.items())


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
