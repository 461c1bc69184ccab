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
from kubernetes.manifests import PODS, POOLS, SLICES, address, endpoint_slice, pod, pool
from kubernetes.stage import access_to, following, until
from kubernetes.virtual_time import in_virtual_time
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.credentials import Access
from picker.sources.kubernetes.election import Election
from picker.sources.kubernetes.scope import Scope

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


async def _lead_for_a_while(access: Access, name: str) -> None:
    connect, clock = partial(Client, access), asyncio.get_running_loop().time
    election = Election(connect, "default", "l", name, clock=clock, rng=random.Random(1))
    async with asyncio.TaskGroup() as group:
        group.create_task(election.run())
        await until(lambda: election.leading, within=30)
        await asyncio.sleep(5)
        election.resign()


def test_the_binding_binds_the_role_to_the_account() -> None:
    account, role, binding = documents("rbac.yaml")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["metadata"]["name"], "namespace": "default"}
    ]
    assert documents("rbac-services.yaml")[0]["metadata"]["name"] == role["metadata"]["name"]
