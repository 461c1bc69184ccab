"""Tier T3 on an honest engine and a content picker, and on those that lie in one way for each check."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from check.engines import LIARS, BadBatches, HalfBlocks, HonestEngine, NeverEnds, under_test, write_model
from picker.check import admin_port, registry, runner, sources
from picker.check.admin_port import AdminPort
from picker.check.verdict import Outcome, Trace, Verdict
from picker.sim.pod import open_pods
from picker.sim.pod_options import EventOptions, PodOptions

Json = dict[str, Any]


def complaints(verdicts: list[Verdict]) -> dict[str, str]:
    return {verdict.id: verdict.why for verdict in verdicts if verdict.outcome in (Outcome.FAIL, Outcome.ERROR)}


async def of_engine(made: HonestEngine, tokenizer: Path | None = None, *only: str) -> list[Verdict]:
    async with under_test(made, tokenizer) as engine:
        return await runner.run(runner.chosen(sources.CHECKS, only), engine, engine.trace)


async def test_an_honest_engine_passes_every_check(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    verdicts = await of_engine(HonestEngine(folder), folder)
    assert {verdict.id: verdict.why for verdict in verdicts if verdict.outcome is not Outcome.PASS} == {}


def test_every_check_has_one_that_lies() -> None:
    assert set(LIARS) | set(ADMINS) == {check.id for check in registry.T3}


@pytest.mark.parametrize("name", LIARS)
async def test_an_engine_that_lies_is_caught(name: str, tmp_path: Path) -> None:
    make, also = LIARS[name]
    folder = write_model(tmp_path / "model") if name.startswith("KV-5") else None
    found = complaints(await of_engine(make(tmp_path) if folder else make(), folder))  # type: ignore[call-arg]
    assert name in found, found
    assert set(found) <= {name, *also}, found
    assert all(found.values())


@pytest.mark.parametrize(
    ("liar", "name", "complaint"),
    [
        (NeverEnds, "KV-4.replay", "did not end with its marker"),
        (BadBatches, "KV-2.blocks", "cannot be read"),
        (HalfBlocks, "KV-2.blocks", "blocks of 8 tokens hold"),
    ],
)
async def test_further_lies_are_caught(liar: Callable[[], HonestEngine], name: str, complaint: str) -> None:
    assert complaint in complaints(await of_engine(liar(), None, name))[name]


async def test_without_a_folder_its_checks_are_not_exercised() -> None:
    verdicts = await of_engine(HonestEngine(), None, "KV-5")
    assert {verdict.outcome for verdict in verdicts} == {Outcome.SKIP}


async def test_a_simulated_pod_tells_the_truth(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    options = PodOptions(
        count=1,
        model="tiny",
        time_scale=200.0,
        block_size=16,
        kv_tokens=30_000,
        tokenizer=folder,
        events=EventOptions(),
    )
    async with open_pods(options) as (pod,), under_test(HonestEngine(), folder) as engine:
        engine.url, engine.quiet, engine.patience, engine.settle = pod.url, 0.2, 3.0, 0.1
        verdicts = await runner.run(sources.CHECKS, engine, engine.trace)
    assert complaints(verdicts) == {}
    assert [verdict.id for verdict in verdicts if verdict.outcome is Outcome.SKIP] == []


# --- a picker's admin port ---------------------------------------------------------------------------------

FINE: Json = {
    "name": "a",
    "healthy": True,
    "draining": False,
    "scrape_age_s": 0.5,
    "metrics_missing": [],
    "kv_events": "whole",
    "kv_events_reason": "seen from its first batch on",
}


def predictions(right: int, over: int) -> str:
    name = "picker_cached_token_predictions_total"
    return f'{name}{{endpoint="a",verdict="right"}} {right}\n{name}{{endpoint="a",verdict="over"}} {over}.0\n'


ADMINS: dict[str, tuple[Json, str, str]] = {
    "ADM-1.reachable": ({"healthy": False}, predictions(50, 0), "a is unhealthy"),
    "ADM-1.measured": ({"metrics_missing": ["waiting"]}, predictions(50, 0), "a does not show waiting: were they ren"),
    "ADM-1.told": (
        {"kv_events": "doubted", "kv_events_reason": "its template"},
        predictions(50, 0),
        "a: doubted, its te",
    ),
    "ADM-1.right": ({}, predictions(40, 10), "a: 10 of 50 predictions were wrong"),
}


@asynccontextmanager
async def admin(ready: Json, page: str) -> AsyncIterator[AdminPort]:
    async def readyz(request: web.Request) -> web.Response:
        return web.json_response(ready, status=503)

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=page)

    app = web.Application()
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    served = web.AppRunner(app)
    await served.setup()
    await web.TCPSite(served, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession() as session:
            yield AdminPort(f"http://127.0.0.1:{served.addresses[0][1]}", session, Trace(), patience=1.0)
    finally:
        await served.cleanup()


async def of_admin(ready: Json, page: str) -> list[Verdict]:
    async with admin(ready, page) as port:
        return await runner.run(admin_port.CHECKS, port, port.trace)


async def test_a_content_picker_passes() -> None:
    verdicts = await of_admin({"endpoints": [FINE]}, predictions(50, 1))
    assert [verdict.outcome for verdict in verdicts] == [Outcome.PASS] * 4


@pytest.mark.parametrize("name", ADMINS)
async def test_what_picker_complains_of_is_passed_on(name: str) -> None:
    change, page, complaint = ADMINS[name]
    found = complaints(await of_admin({"endpoints": [FINE | change]}, page))
    assert set(found) == {name}
    assert complaint in found[name]


@pytest.mark.parametrize(("age", "complaint"), [(None, "has never shown"), (99.0, "for 99 s")])
async def test_metrics_that_are_old_are_named(age: float | None, complaint: str) -> None:
    found = complaints(await of_admin({"endpoints": [FINE | {"scrape_age_s": age}]}, ""))
    assert complaint in found["ADM-1.measured"]


async def test_what_cannot_be_said_yet_is_not_exercised() -> None:
    verdicts = await of_admin({"endpoints": [FINE | {"kv_events": "off"}]}, predictions(1, 1))
    assert [verdict.id for verdict in verdicts if verdict.outcome is Outcome.SKIP] == ["ADM-1.told", "ADM-1.right"]


async def test_what_is_no_picker_is_an_error() -> None:
    verdicts = await of_admin({"status": "ok"}, "")
    assert complaints(verdicts)["ADM-1.told"].endswith("/readyz is no picker's")
