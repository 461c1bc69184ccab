"""The Roles that are shipped grant what is asked for, and nothing that is not."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kubernetes.api_server import serving
from kubernetes.manifests import LEASES, PODS, POOLS, SLICES, address, endpoint_slice, pod, pool
from kubernetes.stage import (
    Stage,
    Told,
    access_to,
    following,
    on_every_stage,
    running,
    source,
    until,
    watching,
)
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.credentials import Access
from picker.sources.kubernetes.election import Election, Timing
from picker.sources.kubernetes.scope import Scope
from virtual_time import in_virtual_time

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "kubernetes" / "base"
ELECTION = FOLDER.parent / "components" / "leader-election"
Right = tuple[str, str, str]  # group, resource, verb


def documents(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((folder / name).read_text(encoding="utf-8")))


def granted(name: str, folder: Path = FOLDER) -> set[Right]:
    (role,) = [each for each in documents(name, folder) if each["kind"] == "Role"]
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def right(path: str, query: dict[str, str]) -> Right:
    root, _, rest = path.partition("/namespaces/")
    group = root.removeprefix("/apis/").partition("/")[0] if root.startswith("/apis/") else ""
    return group, rest.partition("/")[2], "watch" if "watch" in query else "list"


@pytest.mark.parametrize(
    ("name", "scope"),
    [("rbac.yaml", Scope("default", ("pool",))), ("rbac-services.yaml", Scope("default", services=("vllm",)))],
)
@in_virtual_time
async def test_a_role_grants_what_is_asked_for_and_nothing_else(name: str, scope: Scope) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        server.apply(*SLICES, endpoint_slice("vllm-x", address("10.0.0.1")))
        async with following(server, scope) as (_, told):
            await asyncio.sleep(2)
            assert told.routable
            assert {right(*each) for each in server.asked} == granted(name)


@in_virtual_time
async def test_the_leaders_role_grants_what_an_election_asks_for_and_nothing_else() -> None:
    verbs = {"GET": "get", "POST": "create", "PUT": "update"}
    async with serving() as server:
        await _lead_for_a_while(access_to(server), "a")
        await _lead_for_a_while(access_to(server), "b")
        asked = {(*right(*each)[:2], "get") for each in server.asked}
        asked |= {(*right(path, {})[:2], verbs[method]) for method, path, _ in server.wrote}
        shortened = {(group, what.partition("/")[0], verb) for group, what, verb in asked}
        assert shortened == granted("rbac.yaml", ELECTION)


# --- on every stage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rbac.yaml", "rbac-services.yaml"])
@on_every_stage
async def test_a_service_account_of_the_role_is_enough_and_may_do_nothing_else(stage: Stage, name: str) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    await stage.apply(SLICES, endpoint_slice("vllm-x", address("10.0.0.1", "a", ready=True)))
    access = await stage.account(*_roles(name))
    by = {"pools": ("pool",)} if name == "rbac.yaml" else {"services": ("vllm",)}
    found, told = source(access, Scope(stage.namespace, **by)), Told()  # type: ignore[arg-type]
    async with running(found, told):
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        await until(lambda: watching(found))
        assert dict(found.catalogue.conditions) == {}
        assert {each["problem"] for each in found.report()["watches"].values()} == {None}
    await _is_refused_everything_but(granted(name), stage, access)


@on_every_stage
async def test_a_service_account_of_the_leaders_role_can_lead_and_may_do_nothing_else(stage: Stage) -> None:
    access = await stage.account(*_roles("rbac.yaml", ELECTION))
    await _lead_for_a_while(access, "a", stage.namespace, stage.second)
    await _lead_for_a_while(access, "b", stage.namespace, stage.second)
    await _is_refused_everything_but(granted("rbac.yaml", ELECTION), stage, access)


def _roles(name: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    return [each for each in documents(name, folder) if each["kind"] == "Role"]


async def _is_refused_everything_but(rights: set[Right], stage: Stage, access: Access) -> None:
    """Ask for much; what there is to ask about does not matter, as rights are looked at first."""
    methods = {"list": "GET", "get": "GET", "create": "POST", "update": "PUT", "delete": "DELETE"}
    for root, plural in (PODS, SLICES, POOLS, LEASES, ("/api/v1", "secrets"), ("/api/v1", "configmaps")):
        group = root.removeprefix("/apis/").partition("/")[0] if root.startswith("/apis/") else ""
        for verb, method in methods.items():
            path = f"{root}/namespaces/{stage.namespace}/{plural}"
            path += "" if verb in ("list", "create") else "/none"
            body: dict[str, Any] | None = {} if method in ("POST", "PUT") else None
            answer = await stage.ask(method, path, body, access=access)
            assert (answer.status != 403) == ((group, plural, verb) in rights), (verb, plural, answer)
        elsewhere = f"{root}/namespaces/kube-public/{plural}"
        assert (await stage.ask("GET", elsewhere, access=access)).status == 403


async def _lead_for_a_while(access: Access, name: str, namespace: str = "default", second: float = 1.0) -> None:
    connect, clock = partial(Client, access), asyncio.get_running_loop().time
    timing = Timing(round(15 * second), 10 * second, 2 * second)
    election = Election(connect, namespace, "l", name, clock=clock, rng=random.Random(1), timing=timing)
    async with asyncio.TaskGroup() as group:
        group.create_task(election.run())
        await until(lambda: election.leading, within=30)
        await asyncio.sleep(5 * second)
        election.resign()


def test_the_binding_binds_the_role_to_the_account() -> None:
    account, role, binding = documents("rbac.yaml")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": "default"}
    ]
    assert documents("rbac-services.yaml")[0]["metadata"]["name"] == role["metadata"]["name"]
