"""Every check of a cluster passes where all is well, and fails where the one thing it is about is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from click.testing import CliRunner

from kubernetes.api_server import ApiServer, serving
from kubernetes.manifests import PODS, POOLS, SLICES, Json, address, endpoint_slice, pod, pool
from kubernetes.test_rbac import granted
from picker.check import cluster_run, registry
from picker.check.cluster import WANTED, Asked
from picker.check.verdict import Outcome, Verdict
from picker.commands.check import command
from picker.errors import ConfigError

SERVICES = ("/api/v1", "services")
GATEWAYS = ("/apis/gateway.networking.k8s.io/v1", "gateways")
ROUTES = ("/apis/gateway.networking.k8s.io/v1", "httproutes")
HOSTS = ("127.0.0.1", "127.0.0.2")


def conditions(*true: str, **other: str) -> list[Json]:
    found = [{"type": name, "status": "True", "reason": name, "message": ""} for name in true]
    return found + [{"type": name, "status": "False", "reason": why, "message": "no"} for name, why in other.items()]


class Engines:
    """Two engines behind one port, and a gateway in front of them that sends prompts where they have been."""

    def __init__(self) -> None:
        self.port = self.gateway_port = 0
        self.caching, self.load, self.names_pods, self.tells_cached = True, True, True, True
        self.by_turns, self.one_only, self.status = False, False, 200
        self._seen: dict[str, set[str]] = {host: set() for host in HOSTS}
        self._places: dict[str, str] = {}
        self._times: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Engines]:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        gateway = web.Application()
        gateway.router.add_get("/v1/models", self._models)
        gateway.router.add_post("/v1/completions", self._complete)
        runners = [web.AppRunner(each, access_log=None) for each in (app, gateway)]
        for runner in runners:
            await runner.setup()
        await web.TCPSite(runners[0], "0.0.0.0", 0).start()
        await web.TCPSite(runners[1], "127.0.0.1", 0).start()
        self.port, self.gateway_port = runners[0].addresses[0][1], runners[1].addresses[0][1]
        yield self
        for runner in runners:
            await runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        lines = [f'vllm:cache_config_info{{block_size="16",enable_prefix_caching="{self.caching}"}} 1']
        if self.load:
            lines += ["vllm:num_requests_waiting 0", "vllm:num_requests_running 0", "vllm:kv_cache_usage_perc 0"]
        return web.Response(text="\n".join(lines))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    async def _complete(self, request: web.Request) -> web.Response:
        prompt = (await request.json())["prompt"]
        if self.one_only:
            host = HOSTS[0]
        elif self.by_turns:
            host = HOSTS[self._times[prompt] % 2]
        else:
            host = self._places.setdefault(prompt, HOSTS[len(self._places) % 2])
        self._times[prompt] += 1
        cached = 100 if prompt in self._seen[host] else 0
        self._seen[host].add(prompt)
        usage: Json = {"prompt_tokens": 120}
        if self.tells_cached:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        headers = {"x-picker-endpoint": host} if self.names_pods else {}
        return web.json_response({"choices": [], "usage": usage}, status=self.status, headers=headers)


class Scene:
    """A cluster in which all is well, to spoil."""

    def __init__(self, server: ApiServer, engines: Engines, folder: Path) -> None:
        self.server, self.engines = server, engines
        self.kubeconfig = folder / "kubeconfig"
        named = {"name": "x", "context": {"cluster": "x", "namespace": "default"}}
        cluster = {"name": "x", "cluster": {"server": server.url}}
        self.kubeconfig.write_text(yaml.safe_dump({"current-context": "x", "contexts": [named], "clusters": [cluster]}))
        server.rights = {tuple(right) for right in WANTED}  # type: ignore[misc]
        parents = [{"conditions": conditions("Accepted", "ResolvedRefs")}]
        self.put(POOLS, pool(ports=(engines.port,)) | {"status": {"parents": parents}})
        for number, host in enumerate(HOSTS):
            self.put(PODS, pod(f"p{number}", host))
        ports = [{"port": 9002, "appProtocol": "kubernetes.io/h2c"}]
        self.put(SERVICES, {"metadata": {"name": "pool-epp"}, "spec": {"ports": ports, "clusterIP": "None"}})
        self.put(SLICES, endpoint_slice("pool-epp-1", address("10.0.0.9", ready=True), service="pool-epp"))
        spec = {
            "parentRefs": [{"name": "gate"}],
            "rules": [
                {"backendRefs": [{"group": "inference.networking.k8s.io", "kind": "InferencePool", "name": "pool"}]}
            ],
        }
        self.put(ROUTES, {"metadata": {"name": "route"}, "spec": spec, "status": {"parents": parents}})
        listeners = [{"name": "http", "protocol": "HTTP", "port": engines.gateway_port}]
        status = {"conditions": conditions("Accepted", "Programmed"), "addresses": [{"value": "127.0.0.1"}]}
        self.put(
            GATEWAYS,
            {"metadata": {"name": "gate"}, "spec": {"gatewayClassName": "envoy", "listeners": listeners}}
            | {"status": status},
        )

    def put(self, kind: tuple[str, str], value: Json) -> None:
        self.server.apply(*kind, value)

    def change(self, kind: tuple[str, str], name: str, **fields: Any) -> None:
        self.put(kind, self.server.get(*kind, name) | fields)

    async def check(self, *only: str, evidence: Path | None = None, **asked: Any) -> dict[str, Verdict]:
        wanted = Asked("pool", kubeconfig=str(self.kubeconfig), **asked)
        verdicts = await cluster_run.run(wanted, only, 2.0, lambda verdict: None, evidence)
        return {verdict.id: verdict for verdict in verdicts}


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with serving() as server, Engines().running() as engines:
        yield Scene(server, engines, tmp_path)


SKIPPED = {"K8S-3.tls"}  # a headless Service has no address


async def test_where_all_is_well_all_passes(scene: Scene) -> None:
    found = await scene.check()
    assert set(found) == {check.id for check in registry.T4}
    assert {name: (each.outcome, each.why) for name, each in found.items() if each.outcome is not Outcome.PASS} == {
        "K8S-3.tls": (Outcome.SKIP, "the Service pool-epp has no address of its own")
    }


def _no_parents(scene: Scene) -> None:
    scene.change(POOLS, "pool", status={})


def _unresolved(scene: Scene) -> None:
    parents = [{"conditions": conditions("Accepted", ResolvedRefs="BackendNotFound")}]
    scene.change(ROUTES, "route", status={"parents": parents})


def _not_programmed(scene: Scene) -> None:
    scene.change(GATEWAYS, "gate", status={"conditions": conditions("Accepted", Programmed="AddressNotAssigned")})


def _no_address(scene: Scene) -> None:
    # One that only answers the first connection: the kernel's, and no engine behind it.
    scene.change(POOLS, "pool", spec=pool(ports=(1,))["spec"])


def _half_the_ports(scene: Scene) -> None:
    scene.put(POOLS, pool(ports=(scene.engines.port, 1)))


def _unready(scene: Scene) -> None:
    for number, host in enumerate(HOSTS):
        scene.put(PODS, pod(f"p{number}", host, ready=False))


def _in_clear(scene: Scene) -> None:
    spec = {"ports": [{"port": scene.engines.port}], "clusterIP": "127.0.0.1"}
    scene.put(SERVICES, {"metadata": {"name": "pool-epp"}, "spec": spec})
    found = pool(ports=(scene.engines.port,))
    found["spec"]["endpointPickerRef"]["port"]["number"] = scene.engines.port
    scene.put(POOLS, found)


FAULTS: dict[str, tuple[Callable[[Scene], object], str]] = {
    "K8S-1.sufficient": (lambda scene: scene.server.rights.discard(("", "pods", "watch")), "may not watch pods"),
    "K8S-1.no-more": (lambda scene: scene.server.rights.add(("", "secrets", "get")), "may also get secrets"),
    "K8S-2.selects": (lambda scene: scene.put(POOLS, pool(labels={"app": "other"})), "selects no pod"),
    "K8S-2.ready": (_unready, "no pod is ready: p0 (it is not Ready); p1 (it is not Ready)"),
    "K8S-2.alone": (lambda scene: scene.put(POOLS, pool("twin")), "the pool twin selects p0; p1, too"),
    "K8S-2.accepted": (_no_parents, "no gateway has taken it"),
    "K8S-2.picker": (lambda scene: scene.server.delete(*SERVICES, "pool-epp"), "pool-epp, which is not there"),
    "K8S-3.ports": (_half_the_ports, "2 of 4 ports of pods do not answer"),
    "K8S-3.metrics": (lambda scene: setattr(scene.engines, "load", False), "p0: its metrics do not show"),
    "K8S-3.caching": (lambda scene: setattr(scene.engines, "caching", False), "prefix caching is off"),
    "K8S-3.tls": (_in_clear, "does not speak TLS"),
    "K8S-4.routed": (_unresolved, "route: ResolvedRefs is False: BackendNotFound"),
    "K8S-4.programmed": (_not_programmed, "default/gate: Programmed is False: AddressNotAssigned"),
    "K8S-5.answers": (lambda scene: setattr(scene.engines, "status", 503), "answers 503"),
    "K8S-5.affinity": (
        lambda scene: setattr(scene.engines, "by_turns", True),
        "0 of 24 repetitions found their prompt",
    ),
    "K8S-5.spread": (lambda scene: setattr(scene.engines, "one_only", True), "all 24 prompts went to 127.0.0.1"),
}


async def test_who_may_hold_the_lease_of_an_election_may_not_too_much(scene: Scene) -> None:
    scene.server.rights |= {("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")}
    assert (await scene.check("K8S-1.no-more"))["K8S-1.no-more"].outcome is Outcome.PASS
    scene.server.rights.add(("coordination.k8s.io", "leases", "delete"))
    assert (await scene.check("K8S-1.no-more"))["K8S-1.no-more"].outcome is Outcome.FAIL


def test_the_rights_that_are_wanted_are_those_of_the_role_that_is_shipped() -> None:
    assert {tuple(right) for right in WANTED} == granted("rbac.yaml")


def test_every_check_has_a_fault() -> None:
    assert set(FAULTS) == {check.id for check in registry.T4}


@pytest.mark.parametrize("name", FAULTS)
async def test_a_check_fails_where_what_it_is_about_is_wrong(name: str, scene: Scene) -> None:
    spoil, why = FAULTS[name]
    spoil(scene)
    found = (await scene.check(name))[name]
    assert (found.outcome, why in found.why) == (Outcome.FAIL, True), found


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("K8S-1.no-more", lambda scene: setattr(scene.server, "knows_all_rights", False), "incomplete"),
        ("K8S-3.ports", _no_address, "run it inside the cluster"),
        ("K8S-3.metrics", _no_address, "run it inside the cluster"),
        ("K8S-5.answers", lambda scene: scene.server.delete(*GATEWAYS, "gate"), "--gateway URL"),
        ("K8S-5.spread", lambda scene: setattr(scene.engines, "names_pods", False), "do not name the pod"),
    ],
)
async def test_what_cannot_be_known_from_here_is_not_passed(
    name: str, spoil: Callable[[Scene], object], why: str, scene: Scene
) -> None:
    spoil(scene)
    found = (await scene.check(name))[name]
    assert (found.outcome, why in found.why) == (Outcome.SKIP, True), found


@pytest.mark.parametrize("by_turns", [False, True])
async def test_affinity_is_seen_by_pods_where_engines_do_not_tell(scene: Scene, *, by_turns: bool) -> None:
    scene.engines.tells_cached, scene.engines.by_turns = False, by_turns
    found = (await scene.check("K8S-5.affinity"))["K8S-5.affinity"]
    assert found.outcome is (Outcome.FAIL if by_turns else Outcome.PASS)


async def test_one_pod_proves_nothing(scene: Scene) -> None:
    scene.server.delete(*PODS, "p1")
    scene.engines.one_only = True
    found = (await scene.check("K8S-5.affinity"))["K8S-5.affinity"]
    assert found.outcome is Outcome.SKIP


async def test_the_rights_are_those_of_the_service_account_that_is_named(scene: Scene) -> None:
    await scene.check("K8S-1", account="picker")
    assert set(scene.server.reviewed_for) == {"system:serviceaccount:default:picker"}


async def test_a_pool_that_is_not_there_is_named_with_those_that_are(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="no InferencePool nowhere in the namespace default: there are pool"):
        await cluster_run.run(Asked("nowhere", kubeconfig=str(scene.kubeconfig)), (), 1.0, lambda verdict: None, None)


async def test_what_was_measured_is_written_for_the_programme(scene: Scene, tmp_path: Path) -> None:
    await scene.check(evidence=tmp_path / "evidence")
    told = json.loads((tmp_path / "evidence" / "advanced_inference_ingress.json").read_text())
    assert told["kubernetes"] == "v1.35.0"
    assert told["gateways"] == {"default/gate": "envoy"}
    assert told["affinity"] == {"repetitions": 24, "known": 24, "found": 24, "share": 1.0}
    assert len(told["requests"]) == 48
    page = (tmp_path / "evidence" / "advanced_inference_ingress.md").read_text()
    assert "24 of 24 repetitions (100%) found their prompt in the cache" in page
    assert "0 of 16 requirements are not met, 1 were not exercised." in page


async def test_the_command_checks_a_cluster(scene: Scene, tmp_path: Path) -> None:
    flags = ["--kubernetes", "--pool", "pool", "--kubeconfig", str(scene.kubeconfig), "--output", str(tmp_path / "out")]
    done = await asyncio.to_thread(CliRunner().invoke, command, [*flags, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["subject"] == "pool pool"
    assert {each.name for each in (tmp_path / "out").iterdir()} > {"results.json", "advanced_inference_ingress.md"}


@pytest.mark.parametrize("flags", [["--kubernetes"], ["--pool", "pool"]])
def test_the_command_wants_a_pool(flags: list[str]) -> None:
    done = CliRunner().invoke(command, flags)
    assert done.exit_code == 2
    assert "name it with --pool" in done.output
