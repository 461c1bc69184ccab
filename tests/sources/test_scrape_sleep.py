"""A pod that is put to sleep, as scrapes and a scheduler see it: real pages over a real connection."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import aiohttp

from fakes import NOW, blocks, endpoint, request, scheduler
from picker.core.scheduler import Scheduler
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import PodOptions
from picker.sources.scrape import AiohttpFetch, ScrapeSource
from picker.types import Decision, Finished, FirstToken, Rejection


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has happened; the test's time-out catches what never does."""
    while not condition():  # noqa: ASYNC110 - it happens in tasks that signal nobody
        await asyncio.sleep(0)


def standing(subject: Scheduler) -> tuple[bool, bool]:
    (state,) = subject.snapshot(NOW)
    return state.healthy, state.asleep


async def tell(pod: Pod, what: str) -> None:
    async with aiohttp.ClientSession() as session, session.post(pod.url + what) as response:
        assert response.status == 200


async def test_a_pod_that_sleeps_is_left_alone_and_comes_back_without_its_cache() -> None:
    prompt = blocks(shared=8)
    async with open_pods(PodOptions(model="tiny")) as (pod,), AiohttpFetch(timeout=5.0) as fetch:
        subject = scheduler(pod_endpoint := endpoint("a", address=pod.url.removeprefix("http://")))
        source = ScrapeSource(fetch, clock=lambda: NOW, rng=random.Random(1), interval=0.001)
        source.add(pod_endpoint)
        async with asyncio.TaskGroup() as group:
            scraping = group.create_task(source.run(lambda fact: subject.apply(fact, NOW)))
            outcome = subject.submit(request(1, prompt), NOW)
            assert isinstance(outcome, Decision)
            subject.apply(FirstToken(1), NOW)
            subject.apply(Finished(1, 200), NOW)
            await tell(pod, "/sleep?level=1")
            await until(lambda: standing(subject) == (True, True))
            assert isinstance(subject.submit(request(2), NOW), Rejection)
            await tell(pod, "/wake_up")
            await until(lambda: standing(subject) == (True, False))
            woken = subject.submit(request(3, prompt), NOW)
            assert isinstance(woken, Decision)
            assert woken.matched_blocks == 0
            scraping.cancel()
