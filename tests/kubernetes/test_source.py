from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kubernetes.answers import status
from kubernetes.api_server import serving
from kubernetes.manifests import (
    OBJECTIVES,
    OLD_OBJECTIVES,
    OLD_POOLS,
    PODS,
    POOLS,
    REWRITES,
    SLICES,
    Json,
    address,
    endpoint_slice,
    objective,
    old_pool,
    pod,
    pool,
    rewrite,
    rule,
)
from kubernetes.stage import (
    Stage,
    Told,
    access_to,
    at_once,
    following,
    on_every_stage,
    running,
    source,
    until,
    watching,
)
from picker.errors import ConfigError
from picker.sources.kubernetes.credentials import FileTokens
from picker.sources.kubernetes.scope import Scope
from picker.types import EndpointAdded, EndpointRemoved
from virtual_time import in_virtual_time

POOL = Scope("default", ("pool",))
OLD_REWRITES = ("/apis/inference.networking.x-k8s.io/v1alpha2", "inferencemodelrewrites")
FOLDER = Path(__file__).parent.parent.parent / "deploy" / "kubernetes" / "base"
(ROLE,) = [each for each in yaml.safe_load_all((FOLDER / "rbac.yaml").read_text()) if each["kind"] == "Role"]


def now() -> float:
    return asyncio.get_running_loop().time()


# --- changes of the cluster --------------------------------------------------------------------------------


@on_every_stage
async def test_a_pool_is_created_changed_and_deleted(stage: Stage) -> None:
    await stage.apply(PODS, pod("a", "10.0.0.1"))
    await stage.apply(PODS, pod("b", "10.0.0.2", labels={"app": "other"}))
    async with following(stage) as (_, told):
        assert told.endpoints == {}
        await stage.apply(POOLS, pool())
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        await stage.apply(POOLS, pool(ports=(8000, 8001)))
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000", "a-rank-1": "10.0.0.1:8001"})
        await stage.apply(POOLS, pool(labels={"app": "other"}, ports=(8000,)))
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:8000"})
        await stage.delete(POOLS, "pool")
        await until(lambda: told.endpoints == {})


@on_every_stage
async def test_a_pod_comes_serves_terminates_and_goes(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    async with following(stage) as (_, told):
        await stage.apply(PODS, pod("a", ip="", ready=False, phase="Pending"))
        await stage.apply(PODS, pod("a", ready=False))
        await stage.apply(PODS, pod("a"))
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        await stage.terminate("a")
        await until(lambda: told.routable == {})
        assert set(told.endpoints) == {"a-rank-0"}
        await stage.delete(PODS, "a")
        await until(lambda: told.endpoints == {})


@on_every_stage
async def test_a_pod_that_leaves_the_selector_is_gone(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    async with following(stage) as (_, told):
        await until(lambda: told.routable)
        await stage.apply(PODS, pod("a", labels={"app": "quarantine"}))
        await until(lambda: told.endpoints == {})
        await stage.apply(PODS, pod("a"))
        await until(lambda: told.routable)


@on_every_stage
async def test_pods_are_found_without_a_pool(stage: Stage) -> None:
    await stage.apply(PODS, pod("a"))
    await stage.apply(PODS, pod("b", "10.0.0.2", labels={"tier": "gold"}))
    scope = Scope(stage.namespace, selector="app in (vllm),tier=gold,!old", ports=(9000,))
    async with following(stage, scope) as (_, told):
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:9000"})


@on_every_stage
async def test_endpoints_are_found_by_a_services_slices(stage: Stage) -> None:
    await stage.apply(SLICES, endpoint_slice("vllm-x", address("10.0.0.1", "a", ready=True)))
    async with following(stage, Scope(stage.namespace, services=("vllm",))) as (_, told):
        await until(lambda: told.routable == {"a-rank-0": "10.0.0.1:8000"})
        going = address("10.0.0.1", "a", ready=False, serving=True, terminating=True)
        await stage.apply(SLICES, endpoint_slice("vllm-x", going, address("10.0.0.2", "b", ready=True)))
        await until(lambda: told.routable == {"b-rank-0": "10.0.0.2:8000"})
        assert set(told.endpoints) == {"a-rank-0", "b-rank-0"}
        await stage.delete(SLICES, "vllm-x")
        await until(lambda: told.endpoints == {})


@on_every_stage
async def test_five_hundred_pods_churn_and_what_is_told_is_what_is_there(stage: Stage) -> None:
    def numbered(number: int, *, ready: bool = True) -> Json:
        return pod(f"p{number}", f"10.0.{number // 250}.{number % 250 + 1}", ready=ready)

    await stage.apply(POOLS, pool())
    async with following(stage) as (found, told):
        await at_once(stage.apply(PODS, numbered(number, ready=False)) for number in range(500))
        await at_once(stage.apply(PODS, numbered(number)) for number in range(500))
        await until(lambda: len(told.routable) == 500, within=60)
        await at_once(stage.terminate(f"p{number}") for number in range(0, 252, 2))
        stage.cut()
        await at_once(stage.terminate(f"p{number}") for number in range(252, 500, 2))
        await at_once(stage.delete(PODS, f"p{number}") for number in range(0, 500, 4))
        await until(lambda: len(told.endpoints) == 375, within=60)
        assert set(told.routable) == {f"p{number}-rank-0" for number in range(1, 500, 2)}
        assert len(told.draining) == 125
        assert not told.cleared
        assert found.catalogue.roster.routable == 250


@on_every_stage
async def test_every_rank_of_a_pod_is_an_endpoint_and_active_ports_choose_among_them(stage: Stage) -> None:
    await stage.apply(POOLS, pool(ports=(8000, 8001, 8002)))
    await stage.apply(PODS, pod("a", annotations={"llm-d.ai/active-ports": "8000,8002"}))
    async with following(stage) as (_, told):
        assert told.routable == {"a-rank-0": "10.0.0.1:8000", "a-rank-2": "10.0.0.1:8002"}
        await stage.apply(PODS, pod("a", annotations={"llm-d.ai/active-ports": "8000,8001,8002"}))
        await until(lambda: len(told.routable) == 3)
        await stage.apply(PODS, pod("a", annotations={"llm-d.ai/active-ports": "8001"}))
        await until(lambda: told.routable == {"a-rank-1": "10.0.0.1:8001"})


@on_every_stage
async def test_a_container_that_restarts_in_its_pod_has_lost_its_cache(stage: Stage) -> None:
    await stage.apply(POOLS, pool(ports=(8000, 8001)))
    await stage.apply(PODS, pod("a"))
    async with following(stage) as (_, told):
        await stage.apply(PODS, pod("a", ready=False, container="containerd://b"))
        await until(lambda: told.cleared == ["a-rank-0", "a-rank-1"])
        assert not told.routable
        await stage.apply(PODS, pod("a", container="containerd://b"))
        await until(lambda: len(told.routable) == 2)
        assert len(told.cleared) == 2


@on_every_stage
async def test_a_resize_in_place_changes_nothing_and_one_with_a_restart_makes_the_endpoints_new(stage: Stage) -> None:
    small, large = {"requests": {"cpu": "1"}}, {"requests": {"cpu": "2"}}
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a", resources=small))
    async with following(stage) as (found, told):
        before = list(told.facts)
        await stage.resize("a", large)
        asked = (await stage.get(PODS, "a"))["spec"]["containers"][0]["resources"]
        assert asked["requests"] == large["requests"]
        await stage.apply(PODS, pod("a", resources=large))  # the kubelet has done so, and nothing restarted
        await until(lambda: found.catalogue.roster.endpoints == 1)
        await stage.apply(PODS, pod("b", "10.0.0.2"))
        await until(lambda: len(told.endpoints) == 2)
        assert [fact for fact in told.facts if fact not in before] == [EndpointAdded(told.endpoints["b-rank-0"])]
        huge = {"requests": {"cpu": "4"}}
        await stage.resize("a", huge)
        await stage.apply(PODS, pod("a", resources=huge, container="containerd://b"))  # this one restarted it
        await until(lambda: told.facts[-2:] == [EndpointRemoved("a-rank-0"), EndpointAdded(told.endpoints["a-rank-0"])])


@on_every_stage
async def test_two_pools_in_one_process_have_their_own_pods_and_ports(stage: Stage) -> None:
    await stage.apply(POOLS, pool("a", labels={"model": "a"}, ports=(8000,)))
    await stage.apply(POOLS, pool("b", labels={"model": "b"}, ports=(9000,)))
    await stage.apply(PODS, pod("x", "10.0.0.1", labels={"model": "a"}))
    await stage.apply(PODS, pod("y", "10.0.0.2", labels={"model": "b"}))
    async with following(stage, Scope(stage.namespace, ("a", "b"))) as (found, told):
        assert told.routable == {"x-rank-0": "10.0.0.1:8000", "y-rank-0": "10.0.0.2:9000"}
        assert dict(found.catalogue.conditions) == {}
        await stage.delete(POOLS, "a")
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


@on_every_stage
async def test_a_pool_of_the_older_group_is_mapped(stage: Stage) -> None:
    await stage.apply(OLD_POOLS, old_pool())
    await stage.apply(PODS, pod("a"))
    scope = Scope(stage.namespace, ("pool",), group="inference.networking.x-k8s.io")
    async with following(stage, scope) as (_, told):
        assert told.routable == {"a-rank-0": "10.0.0.1:8000"}


# --- watches that break ------------------------------------------------------------------------------------


@on_every_stage
async def test_a_watch_that_is_cut_goes_on_where_it_was(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    async with following(stage) as (found, told):
        await until(lambda: watching(found))
        stage.cut()
        await stage.apply(PODS, pod("b", "10.0.0.2"))
        await until(lambda: len(told.routable) == 2)
        assert [type(fact).__name__ for fact in told.facts] == ["EndpointAdded", "EndpointAdded"]


@in_virtual_time
async def test_a_watch_that_is_cut_costs_no_new_list() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        async with following(server) as (_, told):
            await until(lambda: server.watches == 6)
            server.asked.clear()
            server.cut_watches()
            server.apply(*PODS, pod("b", "10.0.0.2"))
            await until(lambda: told.routable)
            assert [query for _, query in server.asked if "watch" not in query] == []


@on_every_stage
async def test_a_watch_that_stalls_is_noticed_and_begun_anew(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    async with following(stage, silence=75 * stage.second) as (found, told):
        await until(lambda: watching(found))
        stage.stall()
        began = now()
        await stage.apply(PODS, pod("a"))
        await asyncio.sleep(70 * stage.second)
        assert not told.routable
        stage.flow_for_new()
        await until(lambda: told.routable)
        assert 70 <= (now() - began) / stage.second < 80
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


@on_every_stage
async def test_routing_goes_on_while_the_api_server_is_gone_for_a_minute_and_its_age_is_told(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "picker.kubernetes")
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    await stage.apply(PODS, pod("b", "10.0.0.2"))
    async with following(stage) as (found, told):
        await until(lambda: watching(found))
        assert found.age(now()) == 0.0
        before = list(told.facts)
        await stage.down()
        await asyncio.sleep(61)
        assert told.facts == before
        age = found.age(now())
        assert age is not None
        assert 60 < age < 62
        words = found.report()["conditions"]["api-server"]
        assert "cannot be reached" in words
        assert "routing goes on with what is known" in words
        assert "2 endpoints are known, nothing new since" in caplog.text
        await stage.delete(PODS, "a")
        await stage.apply(PODS, pod("c", "10.0.0.3"))
        await stage.up()
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


@on_every_stage
async def test_it_starts_without_an_api_server_and_finds_the_endpoints_when_it_comes(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    await stage.down()
    found, told = source(stage.access, Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told):
        await asyncio.sleep(30 * stage.second)
        assert not found.synced.is_set()
        assert found.age(now()) is None
        await stage.up()
        await until(lambda: told.routable, within=15)
        await until(found.synced.is_set)


@on_every_stage
async def test_a_token_that_was_replaced_is_read_again(stage: Stage, tmp_path: Path) -> None:
    await stage.apply(POOLS, pool())
    access = await stage.account(ROLE)
    token = await access.tokens.token()
    assert token is not None
    (tmp_path / "token").write_text("old\n")
    tokens = FileTokens(tmp_path / "token")
    assert await tokens.token() == "old"
    (tmp_path / "token").write_text(f"{token}\n")
    found, told = source(replace(access, tokens=tokens), Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told), asyncio.timeout(5):
        await found.synced.wait()


# --- what is wrong, in plain words -------------------------------------------------------------------------


@on_every_stage
async def test_a_pool_that_is_not_there_is_named(stage: Stage) -> None:
    async with following(stage) as (found, _):
        assert found.catalogue.conditions["pool/pool"] == (
            f"there is no InferencePool of this name (inference.networking.k8s.io) in namespace {stage.namespace}"
        )
        await stage.apply(POOLS, pool())
        await until(lambda: "it has no pods" in found.catalogue.conditions.get("pool/pool", ""))
        await stage.apply(PODS, pod("a", ready=False))
        await until(lambda: found.catalogue.conditions.get("pool/pool") == "none of its pods is ready")
        await stage.apply(PODS, pod("a"))
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


@on_every_stage
async def test_a_right_that_is_missing_is_named_and_the_rest_goes_on(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(PODS, pod("a"))
    less = {"rules": [rule for rule in ROLE["rules"] if "inferenceobjectives" not in rule["resources"]]}
    found, told = source(await stage.account(less), Scope(stage.namespace, ("pool",))), Told()
    async with running(found, told):
        await until(lambda: "watch/objectives/llm-d.ai" in found.catalogue.conditions)
        words = found.catalogue.conditions["watch/objectives/llm-d.ai"]
        assert "inferenceobjectives.llm-d.ai is forbidden" in words
        assert 'cannot list resource "inferenceobjectives" in API group "llm-d.ai"' in words
        await until(lambda: told.routable)


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


@on_every_stage
async def test_objectives_of_both_groups_are_priorities_by_name(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(OLD_OBJECTIVES, objective("batch", -5))
    await stage.apply(OLD_OBJECTIVES, objective("chat", 1))
    await stage.apply(OBJECTIVES, objective("chat", 10))
    await stage.apply(OBJECTIVES, objective("plain", None))
    await stage.apply(OBJECTIVES, objective("theirs", 99, pool="other"))
    async with following(stage) as (found, _):
        await until(lambda: dict(found.objectives) == {"batch": -5, "chat": 10, "plain": 0})
        await stage.delete(OBJECTIVES, "chat")
        await until(lambda: found.objectives["chat"] == 1)


@on_every_stage
async def test_rewrites_of_both_groups_are_rules_until_they_go(stage: Stage) -> None:
    await stage.apply(POOLS, pool())
    await stage.apply(OLD_REWRITES, rewrite("old", rule("m", v1=1)))
    await stage.apply(REWRITES, rewrite("new", rule("m", v1=90, v2=10), rule(v3=None)))
    await stage.apply(REWRITES, rewrite("theirs", rule("m", v1=1), pool="other"))
    async with following(stage) as (found, _):
        await until(lambda: len(found.catalogue.rewrites.rules) == 3)
        await stage.delete(REWRITES, "new")
        await until(lambda: len(found.catalogue.rewrites.rules) == 1)


@in_virtual_time
async def test_rewrites_are_checked_and_the_valid_ones_are_rules() -> None:
    async with serving() as server:
        server.apply(*POOLS, pool())
        server.apply(*PODS, pod("a"))
        server.apply(*REWRITES, rewrite("bad", rule("m", x=0)))
        server.apply(*REWRITES, rewrite("good", rule("m", v1=90, v2=10)))
        async with following(server) as (found, _):
            await until(lambda: found.catalogue.rewrites.rules and found.catalogue.conditions)
            assert dict(found.catalogue.conditions) == {
                "rewrite/bad": "the weight 0 of 'x' is not from 1 to 1,000,000: all of it is left out"
            }
            (known,) = found.catalogue.rewrites.rules
            assert (known.name, known.models, known.at(0.95)) == ("good", frozenset({"m"}), "v2")


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
