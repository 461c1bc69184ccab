from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from kubernetes.answers import status
from kubernetes.api_server import ApiServer, serving
from kubernetes.manifests import PODS, pod
from kubernetes.stage import InTest, Stage, on_every_stage, until
from picker.sources.kubernetes import objects
from picker.sources.kubernetes.client import Client
from picker.sources.kubernetes.objects import Pod
from picker.sources.kubernetes.reflector import PAGE_SIZE, Reflector
from virtual_time import in_virtual_time


@dataclass
class Seen:
    """A follower. fails: names on which it does, once each."""

    pods: dict[str, Pod] = field(default_factory=dict)
    changes: int = 0
    lists: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    fails: set[str] = field(default_factory=set)

    def put(self, found: Pod) -> None:
        if found.metadata.name in self.fails:
            self.fails.remove(found.metadata.name)
            raise ZeroDivisionError
        self.pods[found.metadata.name] = found
        self.changes += 1

    def drop(self, name: str) -> None:
        del self.pods[name]
        self.changes += 1

    def unread(self, name: str, problem: str | None) -> None:
        if problem is None:
            del self.problems[name]
        else:
            self.problems[name] = problem

    def listed(self) -> None:
        self.lists += 1


class Elsewhere:
    """A client whose first list is of another version: of long ago, or of a time before the server was set back."""

    def __init__(self, client: Client, version: str) -> None:
        self._client, self._version = client, version
        self.watch = client.watch

    async def get(self, path: str, query: Mapping[str, str]) -> bytes:
        body = await self._client.get(path, query)
        if self._version:
            whole = json.loads(body)
            whole["metadata"]["resourceVersion"], self._version = self._version, ""
            body = json.dumps(whole).encode()
        return body


@asynccontextmanager
async def reflecting(
    where: ApiServer | Stage, resync: float = 900.0, version: str = ""
) -> AsyncIterator[tuple[Reflector[Pod], Seen]]:
    stage = InTest(where) if isinstance(where, ApiServer) else where
    seen, clock = Seen(), asyncio.get_running_loop().time
    async with Client(stage.access, silence=75 * stage.second) as client, asyncio.TaskGroup() as group:
        collection = objects.pods(stage.namespace, "app=vllm")
        api = Elsewhere(client, version)
        reflector = Reflector(api, collection, seen, clock=clock, rng=random.Random(1), resync=resync)
        task = group.create_task(reflector.run())
        try:
            yield reflector, seen
        finally:
            task.cancel()


def lists(server: ApiServer) -> list[dict[str, str]]:
    return [query for _, query in server.asked if "watch" not in query]


@in_virtual_time
async def test_the_first_list_comes_from_the_servers_cache() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server) as (reflector, seen):
            await until(lambda: server.watches)
            assert set(seen.pods) == {"a"}
            assert lists(server)[0] == {
                "labelSelector": "app=vllm",
                "limit": "500",
                "resourceVersion": "0",
                "resourceVersionMatch": "NotOlderThan",
            }
            watch = server.asked[-1][1]
            assert watch["resourceVersion"] == "101"
            assert watch["allowWatchBookmarks"] == "true"
            assert 300 <= int(watch["timeoutSeconds"]) <= 600
            assert reflector.count == 1


@in_virtual_time
async def test_a_list_from_etcd_comes_in_pages() -> None:
    async with serving() as server:
        for number in range(2 * PAGE_SIZE + 1):
            server.apply(*PODS, pod(f"p{number:04d}"))
        server.failing = [status(410, "Expired", "too old resource version")]
        async with reflecting(server) as (_, seen):
            await until(lambda: server.watches)
            assert len(seen.pods) == 2 * PAGE_SIZE + 1
            assert len(lists(server)) == 4
            assert ["continue" in query for query in lists(server)] == [False, False, True, True]


@in_virtual_time
async def test_a_token_that_expires_between_two_pages_begins_the_list_anew() -> None:
    async with serving() as server:
        for number in range(PAGE_SIZE + 1):
            server.apply(*PODS, pod(f"p{number:04d}"))
        server.failing = [status(410, "Expired", "too old resource version")]
        server.compact_before_continuing = True
        async with reflecting(server) as (_, seen):
            await until(lambda: server.watches)
            assert len(seen.pods) == PAGE_SIZE + 1
            assert seen.lists == 1


@in_virtual_time
async def test_a_server_that_is_behind_is_asked_without_a_version() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server, resync=50.0) as (_, seen):
            await until(lambda: seen.lists == 1)
            server.set_back()
            await until(lambda: seen.lists == 2, within=100)
            assert "resourceVersion" not in lists(server)[-1]
            assert set(seen.pods) == {"a"}


@in_virtual_time
async def test_what_was_forgotten_in_an_outage_is_listed_at_once_when_it_is_over() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server) as (reflector, seen):
            await until(lambda: server.watches)
            await server.down()
            await asyncio.sleep(60)
            server.apply(*PODS, pod("b"))
            server.compact()
            server.apply(*PODS, pod("c"))
            server.asked.clear()
            await server.up()
            await until(lambda: server.asked, within=15)
            began = asyncio.get_running_loop().time()
            await until(lambda: set(seen.pods) == {"a", "b", "c"})
            assert asyncio.get_running_loop().time() - began < 0.1
            await until(lambda: reflector.freshness.problem is None)


@in_virtual_time
async def test_a_server_that_forgets_every_version_is_not_asked_all_the_time() -> None:
    async with serving() as server:
        server.forgets_at_once = True
        async with reflecting(server):
            await asyncio.sleep(60)
            assert 6 < len(server.asked) < 50


@on_every_stage
async def test_a_server_that_was_set_back_says_nothing_and_is_asked_whether_it_has_the_version(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    async with reflecting(stage, version="1000000000000") as (reflector, seen):
        await until(lambda: reflector.freshness.watching)
        await stage.apply(PODS, pod("b"))
        await asyncio.sleep(70 * stage.second)
        assert set(seen.pods) == {"a"}
        await until(lambda: set(seen.pods) == {"a", "b"}, within=15)
        assert seen.lists == 2


@in_virtual_time
async def test_a_silent_server_that_has_the_version_costs_no_list() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server) as (_, seen):
            await until(lambda: server.watches)
            server.stall()
            await asyncio.sleep(70)
            server.flow_for_new_watches()
            await asyncio.sleep(10)
            assert seen.lists == 1
            last = lists(server)[-1]
            assert (last["limit"], last["resourceVersion"]) == ("1", "101")
            server.apply(*PODS, pod("b"))
            await until(lambda: set(seen.pods) == {"a", "b"})


@in_virtual_time
async def test_every_now_and_then_all_is_listed_and_only_what_was_missed_is_told() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        server.apply(*PODS, pod("b"))
        async with reflecting(server, resync=120.0) as (_, seen):
            await until(lambda: server.watches)
            server.lose(*PODS, "a")
            await asyncio.sleep(100)
            assert set(seen.pods) == {"a", "b"}
            await until(lambda: seen.lists == 2, within=40)
            assert set(seen.pods) == {"b"}
            assert seen.changes == 3


@in_virtual_time
async def test_a_watch_whose_time_is_up_goes_on_at_once() -> None:
    async with serving() as server, reflecting(server) as (reflector, seen):
        await until(lambda: server.watches)
        await asyncio.sleep(30)
        server.end_watches()
        server.apply(*PODS, pod("a"))
        began = asyncio.get_running_loop().time()
        await until(lambda: seen.pods)
        assert asyncio.get_running_loop().time() - began < 0.1
        assert seen.lists == 1
        assert reflector.freshness.problem is None


@in_virtual_time
async def test_a_server_that_ends_watches_at_once_is_not_asked_all_the_time() -> None:
    async with serving() as server:
        server.ends_watches_at_once = True
        async with reflecting(server):
            await asyncio.sleep(60)
            assert 6 < len(server.asked) < 25


@in_virtual_time
async def test_changes_that_come_before_the_watch_are_not_missed() -> None:
    async with serving() as server:
        server.hold_watches()
        async with reflecting(server) as (_, seen):
            await until(lambda: seen.lists)
            server.apply(*PODS, pod("a"))
            server.apply(*PODS, pod("b"))
            server.delete(*PODS, "a")
            server.let_watches()
            await until(lambda: set(seen.pods) == {"b"})


@in_virtual_time
async def test_a_server_that_asks_to_wait_is_left_alone_for_so_long() -> None:
    async with serving() as server:
        server.failing = [status(429, "TooManyRequests", "later", {"Retry-After": "20"})]
        began = asyncio.get_running_loop().time()
        async with reflecting(server) as (_, seen):
            await until(lambda: seen.lists, within=30)
            assert 20 <= asyncio.get_running_loop().time() - began <= 25


@pytest.mark.parametrize(
    "line",
    [
        b'{"type":"ERROR","object":{"kind":"Status","code":500,"message":"etcdserver: leader changed"}}\n',
        b"not json\n",
        b'{"type":"ADDED","object":{"metadata":{}}}\n',
        b'{"type":"BOOKMARK","object":{}}\n',
    ],
)
@in_virtual_time
async def test_a_watch_that_goes_wrong_is_begun_anew(line: bytes) -> None:
    async with serving() as server, reflecting(server) as (_, seen):
        await until(lambda: server.watches)
        await server.send_raw(line)
        await asyncio.sleep(1)
        server.apply(*PODS, pod("a"))
        await until(lambda: seen.pods)


@in_virtual_time
async def test_events_of_a_type_to_come_are_passed_over() -> None:
    async with serving() as server, reflecting(server) as (_, seen):
        await until(lambda: server.watches)
        await server.send_raw(b'{"type":"NEWS","object":{"metadata":{}}}\n')
        server.apply(*PODS, pod("a"))
        await until(lambda: seen.pods)
        assert len(server.asked) == 2


@in_virtual_time
async def test_an_object_may_be_long_and_its_line_come_in_pieces() -> None:
    async with serving() as server, reflecting(server) as (_, seen):
        await until(lambda: server.watches)
        server.apply(*PODS, pod("a", annotations={"long": "x" * 900_000}))
        await until(lambda: seen.pods)
        await server.send_raw(b'{"type":"DELETED","object":{"meta')
        await asyncio.sleep(1)
        await server.send_raw(b'data":{"name":"a","resourceVersion":"999"}}}\n\n')
        await until(lambda: not seen.pods)


@in_virtual_time
async def test_a_bug_on_one_object_does_not_end_the_watching() -> None:
    async with serving() as server, reflecting(server) as (_, seen):
        await until(lambda: server.watches)
        seen.fails.add("a")
        server.apply(*PODS, pod("a"))
        server.apply(*PODS, pod("b"))
        await until(lambda: set(seen.pods) == {"b"})
        assert "a bug of picker's" in seen.problems["a"]
        server.apply(*PODS, pod("a", container="containerd://b"))
        await until(lambda: set(seen.pods) == {"a", "b"})
        assert not seen.problems
        assert len(server.asked) == 2


@in_virtual_time
async def test_an_object_that_cannot_be_read_stays_as_it_was_until_it_can_or_goes() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server) as (_, seen):
            await until(lambda: server.watches)
            broken = pod("a")
            broken["status"]["phase"] = ["Running"]
            server.apply(*PODS, broken)
            await until(lambda: seen.problems)
            assert set(seen.pods) == {"a"}
            server.delete(*PODS, "a")
            await until(lambda: not seen.pods)
            assert not seen.problems


@in_virtual_time
async def test_what_is_known_stays_when_the_kind_is_not_to_be_found() -> None:
    async with serving() as server:
        server.apply(*PODS, pod("a"))
        async with reflecting(server, resync=30.0) as (reflector, seen):
            await until(lambda: server.watches)
            server.absent.add("pods")
            await until(lambda: reflector.freshness.status == 404, within=60)
            assert set(seen.pods) == {"a"}
