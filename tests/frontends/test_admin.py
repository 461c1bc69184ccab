from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

import fakes
from picker.core.scheduler import Scheduler
from picker.exchange import RequestBody, RequestHead
from picker.frontends.admin import Admin
from picker.frontends.serving import listen, port_of
from picker.prefix.blocks import BlockHasher
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import EndpointDraining, Failed, FailureReason, Finished, HealthObserved, LoadObserved, Usage

PROMPT = "the launch code is 0000 " * 64
SESSION = "alice-4711"


def runtime_of(scheduler: Scheduler, clock: fakes.ManualClock | None = None) -> Runtime:
    hasher = BlockHasher(b"secret", fakes.BLOCK_BYTES)
    return Runtime(scheduler, hasher, Telemetry(CollectorRegistry()), clock=clock or fakes.ManualClock())


async def ask(runtime: Runtime) -> int:
    """Puts one request through to its decision; returns its id."""
    exchange = runtime.open()
    await runtime.receive(exchange, RequestHead("POST", "/v1/completions", {}))
    body = json.dumps({"model": "m", "prompt": PROMPT, "max_tokens": 7, "session_id": SESSION})
    await runtime.receive(exchange, RequestBody(body.encode(), end=True))
    return exchange.id


@asynccontextmanager
async def admin(runtime: Runtime, token: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(Admin(runtime, token=token).app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:9090") as client:
        yield client


async def get(runtime: Runtime, path: str) -> Any:
    async with admin(runtime) as client:
        answer = await client.get(path)
        assert answer.status_code == 200
        assert "NaN" not in answer.text
        return answer.json()


# --- health ------------------------------------------------------------------------------------------------


async def test_metrics_are_in_prometheus_text_format() -> None:
    runtime = runtime_of(fakes.scheduler("a"))
    await ask(runtime)
    async with admin(runtime) as client:
        answer = await client.get("/metrics")
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert 'picker_picks_total{endpoint="a"} 1.0' in answer.text


async def test_a_process_without_endpoints_is_alive_and_not_ready() -> None:
    async with admin(runtime_of(fakes.scheduler())) as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        answer = await client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "reason": "no endpoint is known", "endpoints": []}


async def test_one_healthy_endpoint_makes_it_ready_whatever_its_scrapes_say() -> None:
    clock = fakes.ManualClock()
    scheduler = fakes.scheduler("a", "b")
    scheduler.apply(HealthObserved("b", healthy=False), clock())
    scheduler.apply(LoadObserved("b", observed_at=clock()), clock())
    clock.advance(2.5)
    detail = await get(runtime_of(scheduler, clock), "/readyz")
    unsubscribed = {"kv_events": "off", "kv_events_reason": "", "asleep": False}
    assert detail == {
        "ready": True,
        "reason": "1 of 2 endpoints can serve",
        "endpoints": [
            {"name": "a", "healthy": True, "draining": False, "scrape_age_s": None, "metrics_missing": []}
            | unsubscribed,
            {"name": "b", "healthy": False, "draining": False, "scrape_age_s": 2.5}
            | {"metrics_missing": ["waiting", "running", "kv_usage"]}
            | unsubscribed,
        ],
    }


async def test_draining_endpoints_do_not_make_it_ready() -> None:
    scheduler = fakes.scheduler("a")
    scheduler.apply(EndpointDraining("a"), fakes.NOW)
    async with admin(runtime_of(scheduler)) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert answer.json()["reason"] == "every known endpoint is unhealthy or draining"


async def test_a_replica_that_is_still_being_told_what_others_know_is_not_ready() -> None:
    runtime = runtime_of(fakes.scheduler("a"))
    settled = False
    runtime.reports["replicas"] = lambda: {"settled": settled}
    async with admin(runtime) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (
            503,
            "the other replicas have not told yet what they know",
        )
        settled = True
        assert (await client.get("/readyz")).status_code == 200


async def test_a_draining_gateway_is_not_ready() -> None:
    runtime = runtime_of(fakes.scheduler("a"))
    runtime.drain()
    async with admin(runtime) as client:
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "shutting down")


# --- endpoints ---------------------------------------------------------------------------------------------


async def test_endpoints_show_what_is_known_and_null_for_the_rest() -> None:
    clock = fakes.ManualClock()
    scheduler = fakes.scheduler(fakes.endpoint("a", models=["m", "lora"]))
    scheduler.apply(LoadObserved("a", observed_at=clock(), running=3.0), clock())
    runtime = runtime_of(scheduler, clock)
    await ask(runtime)
    clock.advance(1.0)
    (state,) = (await get(runtime, "/debug/endpoints"))["endpoints"]
    assert (state["name"], state["address"], state["models"]) == ("a", "a:8000", ["lora", "m"])
    assert (state["running"], state["waiting"], state["kv_usage"]) == (3.0, None, None)
    assert (state["inflight_requests"], state["scrape_age_s"]) == (1, 1.0)


async def test_numbers_that_are_none_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = fakes.scheduler("a")
    (state,) = scheduler.snapshot(fakes.NOW)
    strange = dataclasses.replace(state, prefill_tokens_per_s=float("nan"), index_trust=float("inf"))
    monkeypatch.setattr(Scheduler, "snapshot", lambda self, now: [strange])
    (shown,) = (await get(runtime_of(scheduler), "/debug/endpoints"))["endpoints"]
    assert (shown["prefill_tokens_per_s"], shown["index_trust"]) == (None, None)


# --- decisions ---------------------------------------------------------------------------------------------


async def test_the_latest_decisions_come_newest_first() -> None:
    clock = fakes.ManualClock()
    runtime = runtime_of(fakes.scheduler("a"), clock)
    ids = [await ask(runtime) for _ in range(60)]
    runtime.emit(Finished(ids[-1], 200))
    runtime.emit(Failed(ids[-2], FailureReason.RESET))
    clock.advance(3.0)
    shown = (await get(runtime, "/debug/decisions"))["decisions"]
    assert [entry["id"] for entry in shown] == ids[:9:-1]
    assert shown[0] == {
        "id": ids[-1],
        "age_s": 3.0,
        "model": "m",
        "endpoint": "a",
        "rejected": None,
        "matched_blocks": 6,
        "total_blocks": 6,
        "seconds": 0.0,
        "status": 200,
        "failure": None,
    }
    assert (shown[1]["status"], shown[1]["failure"]) == (None, "reset")
    assert len((await get(runtime, "/debug/decisions?limit=2"))["decisions"]) == 2


async def test_a_decision_is_explained_down_to_every_candidates_parts() -> None:
    clock = fakes.ManualClock()
    runtime = runtime_of(fakes.scheduler("a", "b"), clock)
    request_id = await ask(runtime)
    clock.advance(2.0)
    runtime.emit(Finished(request_id, 200, Usage(400, 7, cached_tokens=None)))
    shown = await get(runtime, f"/debug/decisions/{request_id}")
    assert shown["request"] == {
        "model": "m",
        "blocks": 6,
        "prompt_bytes": len(PROMPT),
        "extra_bytes": 0,
        "prompt_tokens": None,
        "max_tokens": 7,
        "priority": 0,
        "has_session": True,
        "role": "both",
        "subset": None,
        "exclude": [],
    }
    assert shown["decision"]["endpoint"] in ("a", "b")
    assert shown["rejection"] is None
    assert sorted(candidate["endpoint"] for candidate in shown["candidates"]) == ["a", "b"]
    totals = {candidate["endpoint"]: candidate["total"] for candidate in shown["candidates"]}
    assert totals[shown["decision"]["endpoint"]] == max(totals.values()) == shown["candidates"][0]["total"]
    assert all(candidate["parts"] for candidate in shown["candidates"])
    assert shown["end"] == {
        "after_s": 2.0,
        "status": 200,
        "failure": None,
        "usage": {"prompt_tokens": 400, "completion_tokens": 7, "cached_tokens": None},
    }


async def test_a_running_request_has_no_end() -> None:
    runtime = runtime_of(fakes.scheduler("a"))
    assert (await get(runtime, f"/debug/decisions/{await ask(runtime)}"))["end"] is None


async def test_a_rejection_is_explained_too() -> None:
    runtime = runtime_of(fakes.scheduler())
    shown = await get(runtime, f"/debug/decisions/{await ask(runtime)}")
    assert (shown["decision"], shown["candidates"]) == (None, None)
    assert (shown["rejection"]["reason"], shown["rejection"]["status"]) == ("no-endpoints", 503)
    assert (await get(runtime, "/debug/decisions"))["decisions"][0]["rejected"] == "no-endpoints"


async def test_an_unknown_decision_is_404_json() -> None:
    async with admin(runtime_of(fakes.scheduler())) as client:
        answer = await client.get("/debug/decisions/99")
        assert answer.status_code == 404
        assert "99" in answer.json()["detail"]
        assert (await client.get("/debug/decisions/x")).status_code == 422


async def test_nothing_shows_text_hashes_or_sessions() -> None:
    runtime = runtime_of(fakes.scheduler("a"))
    request_id = await ask(runtime)
    record = runtime.record(request_id)
    assert record is not None
    async with admin(runtime) as client:
        for path in ("/metrics", "/debug/endpoints", "/debug/decisions", f"/debug/decisions/{request_id}"):
            text = (await client.get(path)).text
            assert "launch" not in text
            assert SESSION not in text
            assert not any(str(block) in text for block in record.request.block_hashes)


# --- access ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Basic s3cret", "s3cret", "Bearer s3cret!"])
async def test_a_token_closes_debug_and_nothing_else(given: str | None) -> None:
    headers = {} if given is None else {"authorization": given}
    async with admin(runtime_of(fakes.scheduler("a")), token="s3cret") as client:
        for path in ("/debug/endpoints", "/debug/decisions", "/debug/decisions/1"):
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/", "/metrics", "/healthz", "/readyz"):
            assert (await client.get(path, headers=headers)).status_code == 200


async def test_the_token_opens_debug() -> None:
    async with admin(runtime_of(fakes.scheduler("a")), token="s3cret") as client:
        answer = await client.get("/debug/endpoints", headers={"authorization": "Bearer s3cret"})
        assert answer.status_code == 200


async def test_the_start_page_lists_every_route() -> None:
    async with admin(runtime_of(fakes.scheduler("a"))) as client:
        page = (await client.get("/")).text
        for path in ("/metrics", "/healthz", "/readyz", "/debug/endpoints", "/debug/decisions/{request_id}"):
            assert path in page
        assert '<a href="/debug/decisions">' in page


async def test_it_is_served_on_a_socket() -> None:
    listener, stop = listen("127.0.0.1", 0), asyncio.Event()
    url = f"http://127.0.0.1:{port_of(listener)}"
    async with asyncio.TaskGroup() as group, httpx.AsyncClient() as client:
        group.create_task(Admin(runtime_of(fakes.scheduler("a"))).serve(listener, stop))
        assert (await client.get(f"{url}/readyz")).status_code == 200
        stop.set()


# --- who may look ------------------------------------------------------------------------------------------

DEBUG = ("/debug/endpoints", "/debug/decisions", "/debug/decisions/1")


async def statuses(
    *paths: str, peer: str = "10.0.0.9", host: str = "10.0.0.1:9090", key: str | None = None, **options: Any
) -> list[int]:
    made = Admin(runtime_of(fakes.scheduler("a")), **options)
    transport = httpx.ASGITransport(made.app, client=(peer, 1234))
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return [(await client.get(path, headers=headers)).status_code for path in paths]


async def test_without_a_key_other_machines_see_metrics_and_health_alone() -> None:
    assert await statuses(*DEBUG) == [403, 403, 403]
    assert await statuses("/metrics", "/healthz", "/readyz") == [200, 200, 200]


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
async def test_without_a_key_programs_on_this_machine_see_all_and_web_pages_do_not(peer: str) -> None:
    assert await statuses("/debug/endpoints", peer=peer, host="localhost:9090") == [200]
    assert await statuses("/debug/endpoints", peer=peer, host="evil.example:9090") == [403]


async def test_without_a_key_it_is_the_address_that_counts_and_not_what_a_request_says() -> None:
    assert await statuses(*DEBUG, host="localhost:9090") == [403, 403, 403]


async def test_with_a_key_it_is_from_wherever_it_comes() -> None:
    assert await statuses("/debug/endpoints", token="t", key="t") == [200]
    assert await statuses("/debug/endpoints", token="t", key="wrong") == [401]
    assert await statuses("/debug/endpoints", token="t", peer="127.0.0.1", host="localhost:9090") == [401]


async def test_read_only_without_a_key_is_for_everybody() -> None:
    assert await statuses(*DEBUG[:2], read_only=True) == [200, 200]


async def test_metrics_may_be_kept_to_those_with_a_key() -> None:
    assert await statuses("/metrics", "/healthz", token="t", guard_metrics=True) == [401, 200]
    assert await statuses("/metrics", token="t", key="t", guard_metrics=True) == [200]
    assert await statuses("/metrics", guard_metrics=True) == [403]
