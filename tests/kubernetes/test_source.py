from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from kubernetes.api_server import serving, status
from kubernetes.manifests import (
    OBJECTIVES,
    OLD_OBJECTIVES,
    OLD_POOLS,
    PODS,
    POOLS,
    REWRITES,
    objective,
    old_pool,
    pod,
    pool,
    rewrite,
    rule,
)
from kubernetes.stage import Told, access_to, following, running, source, until
from kubernetes.virtual_time import in_virtual_time
from picker.errors import ConfigError
from picker.sources.kubernetes.credentials import Access, FileTokens
from picker.sources.kubernetes.scope import Scope

POOL = Scope("default", ("pool",))


def now() -> float:
    return asyncio.get_running_loop().time()


# --- changes of the cluster --------------------------------------------------------------------------------


@in_virtual_time
async def test_five_hundred_pods_churn_and_what_is_told_is_what_is_there() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (found, told):
            for number in range(500):
                server.apply(*PODS, pod(f"p{number}", f"10.0.{number // 250}.{number % 250 + 1}", ready=False))
            for number in range(500):
                server.apply(*PODS, pod(f"p{number}", f"10.0.{number // 250}.{number % 250 + 1}"))
            await until(lambda: len(told.routable) == 500)
            for number in range(0, 500, 2):
                server.apply(*PODS, pod(f"p{number}", f"10.0.{number // 250}.{number % 250 + 1}", deleting=True))
                if number == 250:
                    server.cut_watches()
            for number in range(0, 500, 4):
                server.delete(*PODS, f"p{number}")
            await until(lambda: len(told.endpoints) == 375)
            assert set(told.routable) == {f"p{number}-rank-0" for number in range(1, 500, 2)}
            assert len(told.draining) == 125
            assert not told.cleared
            assert found.catalogue.roster.routable == 250


@in_virtual_time
async def test_every_rank_of_a_pod_is_an_endpoint_and_active_ports_choose_among_them() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool(ports=(8000, 8001, 8002)))
        server.apply(*PODS, pod("a", annotations={"llm-d.ai/active-ports": "8000,8002"}))
        async with following(server) as (_, told):
            assert told.routable == {"a-rank-0": "10.0.0.1:8000", "a-rank-2": "10.0.0.1:8002"}
            server.apply(*PODS, pod("a"))
            await until(lambda: len(told.routable) == 3)
            server.apply(*PODS, pod("a", annotations={"llm-d.ai/active-ports": "8001"}))
            await until(lambda: told.routable == {"a-rank-1": "10.0.0.1:8001"})


@in_virtual_time
async def test_a_container_that_restarts_in_its_pod_has_lost_its_cache() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool(ports=(8000, 8001)))
        server.apply(*PODS, pod("a"))
        async with following(server) as (_, told):
            server.apply(*PODS, pod("a", ready=False, container="containerd://b"))
            await until(lambda: told.cleared == ["a-rank-0", "a-rank-1"])
            assert not told.routable
            server.apply(*PODS, pod("a", container="containerd://b"))
            await until(lambda: len(told.routable) == 2)
            assert len(told.cleared) == 2


@in_virtual_time
async def test_two_pools_in_one_process_have_their_own_pods_and_ports() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool("a", labels={"model": "a"}, ports=(8000,)))
        server.apply(*POOLS, pool("b", labels={"model": "b"}, ports=(9000,)))
        server.apply(*PODS, pod("x", "10.0.0.1", labels={"model": "a"}))
        server.apply(*PODS, pod("y", "10.0.0.2", labels={"model": "b"}))
        async with following(server, Scope("default", ("a", "b"))) as (found, told):
            assert told.routable == {"x-rank-0": "10.0.0.1:8000", "y-rank-0": "10.0.0.2:9000"}
            assert dict(found.catalogue.conditions) == {}
            server.delete(*POOLS, "a")
            await until(lambda: told.routable == {"y-rank-0": "10.0.0.2:9000"})


@in_virtual_time
async def test_other_ports_of_a_pool_cost_no_new_list_of_its_pods() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (_, told):
            await until(lambda: server.watches == 6)
            server.asked.clear()
            server.apply(*POOLS, pool(ports=(9000,)))
            await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:9000"})
            assert server.asked == []


@in_virtual_time
async def test_of_a_pool_that_is_deleted_nothing_is_followed_any_more() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (found, told):
            await until(lambda: server.watches == 6)
            server.delete(*POOLS, "pool")
            await until(lambda: not told.endpoints)
            await until(lambda: server.watches == 5)
            assert "pool/pool" not in found.report()["watches"]
            server.apply(*POOLS, pool())
            await until(lambda: told.routable)


@in_virtual_time
async def test_a_pool_of_the_older_group_is_mapped() -> None:
    async with serving() as server:
        server.absent.add("/apis/inference.networking.k8s.io/v1")
        server.apply(*OLD_POOLS, old_pool())
        server.apply(*PODS, pod("a"))
        scope = Scope("default", ("pool",), group="inference.networking.x-k8s.io")
        async with following(server, scope) as (_, told):
            assert told.routable == {"a-rank-0": "10.0.0.1:8000"}


# --- watches that break ------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_watch_that_is_cut_goes_on_where_it_was_without_a_new_list() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (_, told):
            await until(lambda: server.watches == 6)
            server.asked.clear()
            server.cut_watches()
            server.apply(*PODS, pod("b", "10.0.0.2"))
            await until(lambda: len(told.routable) == 2)
            assert [query for _, query in server.asked if "watch" not in query] == []
            assert len(told.facts) == 2


@in_virtual_time
async def test_a_watch_that_stalls_is_noticed_and_begun_anew() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (found, told):
            await until(lambda: server.watches == 6)
            server.stall()
            began = now()
            server.apply(*PODS, pod("a"))
            await asyncio.sleep(70)
            assert not told.routable
            server.flow_for_new_watches()
            await until(lambda: told.routable)
            assert 70 <= now() - began < 80
            assert set(found.catalogue.conditions) <= {"pool/pool"}


@in_virtual_time
async def test_a_quiet_watch_with_bookmarks_is_not_taken_for_a_stalled_one() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (_, _told):
            await until(lambda: server.watches == 6)
            server.asked.clear()
            await asyncio.sleep(250)
            assert server.asked == []


@in_virtual_time
async def test_a_forgotten_version_costs_a_list_of_which_only_the_differences_are_told() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        for name in ("a", "b", "c"):
            server.apply(*PODS, pod(name, f"10.0.0.{ord(name)}"))
        async with following(server) as (_, told):
            await until(lambda: server.watches == 6)
            server.hold_watches()
            server.cut_watches()
            server.delete(*PODS, "a")
            server.apply(*PODS, pod("d", "10.0.0.4"))
            server.compact()
            server.asked.clear()
            before = len(told.facts)
            server.let_watches()
            await until(lambda: set(told.routable) == {"b-rank-0", "c-rank-0", "d-rank-0"})
            assert len(told.facts) == before + 2
            lists = [query for path, query in server.asked if path.endswith("/pods") and "watch" not in query]
            assert len(lists) == 1
            assert "resourceVersion" not in lists[0]


@in_virtual_time
async def test_bookmarks_spare_a_quiet_collection_the_new_list() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (_, told):
            await until(lambda: server.watches == 6)
            server.apply(*PODS, pod("other", labels={"app": "other"}))
            server.compact()
            await server.bookmark()
            await asyncio.sleep(1)
            server.asked.clear()
            server.cut_watches()
            server.apply(*PODS, pod("a"))
            await until(lambda: told.routable)
            assert [query for _, query in server.asked if "watch" not in query] == []


# --- an API server that is away ----------------------------------------------------------------------------


@in_virtual_time
async def test_routing_goes_on_while_the_api_server_is_gone_for_a_minute_and_its_age_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "picker.kubernetes")
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        server.apply(*PODS, pod("b", "10.0.0.2"))
        async with following(server) as (found, told):
            await until(lambda: server.watches == 6)
            assert found.age(now()) == 0.0
            before = list(told.facts)
            await server.down()
            await asyncio.sleep(61)
            assert told.facts == before
            age = found.age(now())
            assert age is not None
            assert 60 < age < 62
            words = found.report()["conditions"]["api-server"]
            assert "cannot be reached" in words
            assert "routing goes on with what is known" in words
            assert "2 endpoints are known, nothing new since" in caplog.text
            server.delete(*PODS, "a")
            server.apply(*PODS, pod("c", "10.0.0.3"))
            server.asked.clear()
            await server.up()
            back = now()
            await until(lambda: set(told.routable) == {"b-rank-0", "c-rank-0"}, within=15)
            await until(lambda: found.age(now()) == 0.0)
            assert now() - back < 11
            await until(lambda: "api-server" not in found.catalogue.conditions)
            assert "api-server: good again" in caplog.text


@in_virtual_time
async def test_an_api_server_that_is_away_is_not_asked_all_the_time() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (_, _told):
            await until(lambda: server.watches == 6)
            server.failing = [status(503, "ServiceUnavailable", "starting") for _ in range(10_000)]
            server.asked.clear()
            server.cut_watches()
            await asyncio.sleep(60)
            assert 6 * 6 <= len(server.asked) <= 6 * 16
            assert len({path for path, _ in server.asked}) == 6


@in_virtual_time
async def test_it_starts_without_an_api_server_and_finds_the_endpoints_when_it_comes() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        await server.down()
        found, told = source(access_to(server), POOL), Told()
        async with running(found, told):
            await asyncio.sleep(30)
            assert not found.synced.is_set()
            assert found.age(now()) is None
            await server.up()
            await until(lambda: told.routable, within=15)
            assert found.synced.is_set()


@in_virtual_time
async def test_a_token_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.token = "new"
        (tmp_path / "token").write_text("old\n")
        tokens = FileTokens(tmp_path / "token")
        assert await tokens.token() == "old"
        (tmp_path / "token").write_text("new\n")
        found, told = source(Access(server.url, tokens), POOL), Told()
        async with running(found, told), asyncio.timeout(5):
            await found.synced.wait()


# --- what is wrong, in plain words -------------------------------------------------------------------------


@in_virtual_time
async def test_a_pool_that_is_not_there_is_named() -> None:
    async with serving() as server, following(server) as (found, _):
        assert found.catalogue.conditions["pool/pool"] == (
            "there is no InferencePool of this name (inference.networking.k8s.io) in namespace default"
        )
        server.apply(*POOLS, pool())
        await until(lambda: "it has no pods" in found.catalogue.conditions["pool/pool"])
        server.apply(*PODS, pod("a", ready=False))
        await until(lambda: found.catalogue.conditions["pool/pool"] == "none of its pods is ready")
        server.apply(*PODS, pod("a"))
        await until(lambda: dict(found.catalogue.conditions) == {})


@in_virtual_time
async def test_a_pool_that_cannot_be_read_stays_as_it_was() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (found, told):
            flat = pool()
            flat["spec"]["selector"] = {"matchLabels": {}}
            server.apply(*POOLS, flat)
            await until(lambda: found.catalogue.conditions)
            assert dict(found.catalogue.conditions) == {
                "pool/pool": "its selector has no matchLabels; it stays as it was"
            }
            server.apply(*PODS, pod("b", "10.0.0.2"))
            await until(lambda: len(told.routable) == 2)
            server.apply(*POOLS, pool(ports=(8001,)))
            await until(lambda: told.routable["a-rank-0"] == "10.0.0.1:8001")
            assert "pool/pool" not in found.catalogue.conditions


@in_virtual_time
async def test_crds_that_are_not_installed_are_named_and_looked_for_again() -> None:
    async with serving() as server:
        server.absent.add("inferencepools")
        found, told = source(access_to(server), POOL), Told()
        async with running(found, told):
            await until(lambda: found.catalogue.conditions)
            assert found.catalogue.conditions["watch/pools"] == (
                "the API server does not know inferencepools.inference.networking.k8s.io/v1: install its CRD, "
                "or name the other group: --pool-group inference.networking.x-k8s.io"
            )
            server.absent.clear()
            server.apply(*POOLS, pool())
            server.apply(*PODS, pod("a"))
            await until(lambda: told.routable, within=40)
            await until(lambda: dict(found.catalogue.conditions) == {})


@in_virtual_time
async def test_kinds_that_need_not_be_there_are_not_missed() -> None:
    async with serving() as server:
        server.absent |= {"inferenceobjectives", "inferencemodelrewrites"}
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (found, told):
            await asyncio.sleep(20)
            assert told.routable
            assert dict(found.catalogue.conditions) == {}


@in_virtual_time
async def test_a_right_that_is_missing_is_named_and_the_rest_goes_on() -> None:
    async with serving() as server:
        server.forbidden.add("inferenceobjectives")
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        async with following(server) as (found, told):
            await until(lambda: "watch/objectives/llm-d.ai" in found.catalogue.conditions)
            assert "inferenceobjectives is forbidden" in found.catalogue.conditions["watch/objectives/llm-d.ai"]
            assert told.routable


@in_virtual_time
async def test_a_pod_that_cannot_be_read_leaves_the_others_alone() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        broken = pod("b")
        broken["status"]["podIP"] = 7
        server.apply(*PODS, pod("a"))
        server.apply(*PODS, broken)
        async with following(server) as (found, told):
            assert set(told.routable) == {"a-rank-0"}
            assert "it cannot be read" in found.catalogue.conditions["pod/b"]
            server.apply(*PODS, pod("b", "10.0.0.2"))
            await until(lambda: len(told.routable) == 2)
            assert dict(found.catalogue.conditions) == {}


# --- objectives and rewrites -------------------------------------------------------------------------------


@in_virtual_time
async def test_objectives_of_both_groups_are_priorities_by_name() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*OLD_OBJECTIVES, objective("batch", -5))
        server.apply(*OLD_OBJECTIVES, objective("chat", 1))
        server.apply(*OBJECTIVES, objective("chat", 10))
        server.apply(*OBJECTIVES, objective("plain", None))
        server.apply(*OBJECTIVES, objective("theirs", 99, pool="other"))
        async with following(server) as (found, _):
            await until(lambda: dict(found.objectives) == {"batch": -5, "chat": 10, "plain": 0})
            server.delete(*OBJECTIVES, "chat")
            await until(lambda: found.objectives["chat"] == 1)


@in_virtual_time
async def test_rewrites_are_checked_and_it_is_said_that_they_are_not_applied() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        server.apply(*REWRITES, rewrite("bad", rule("m", x=0)))
        server.apply(*REWRITES, rewrite("good", rule("m", v1=90, v2=10)))
        async with following(server) as (found, _):
            await until(lambda: len(found.catalogue.conditions) == 2)
            assert "weight 0 of 'x' is not from 1 to 1,000,000" in found.catalogue.conditions["rewrite/bad"]
            assert "requests keep the model that they name" in found.catalogue.conditions["rewrites"]
            assert found.catalogue.rewrites.model("m", 0.95) == "v2"


# --- scopes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (Scope("d"), "give one of pools, selector and services"),
        (Scope("d", ("a",), services=("b",)), "give one of"),
        (Scope("d", selector="a=b"), "pods without a pool need them"),
        (Scope("d", selector="a=b", ports=(0,)), "from 1 to 65535"),
        (Scope("d", ("a",), ports=(8000,)), "a pool names its own ports"),
        (Scope("d", ("a",), group="example.com"), "'example.com' has no pools that picker knows"),
    ],
)
def test_a_scope_that_cannot_be_meant_is_refused(scope: Scope, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        scope.check()
