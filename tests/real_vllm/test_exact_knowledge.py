"""What picker predicts an engine has cached is what the engine then says it had, to the token, 99 times of 100.

Two real servers, a mixed workload through `picker proxy`, one of the servers restarted on the way and one stream of
events broken. In between, requests that picker does not see fill the cache: only events can have told it of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from real_vllm.accuracy import REQUESTS, Gateway, States, measure, picker_before
from real_vllm.conftest import Pair
from real_vllm.listener import replay
from real_vllm.pod import Pod
from real_vllm.prediction import Comparison, Row
from real_vllm.relay import Relay, event_relay
from real_vllm.script import COMPLETIONS, RESET, completion, ids
from real_vllm.workload import workload

RESTART, GAP = REQUESTS // 3, 2 * REQUESTS // 3  # before which requests these happen
WHOLE = "whole"


@asynccontextmanager
async def exact_picker(pods: Pair, model: Path, *flags: str) -> AsyncIterator[tuple[Gateway, Relay]]:
    """Picker in exact mode, which hears the first server's events through a wire that can lose some."""
    async with event_relay(pods[0]) as wire, picker_before(pods, "--tokenizer", str(model), *flags) as gateway:
        await gateway.until(lambda states: all(state["kv_events"] == WHOLE for state in states))
        yield gateway, wire


async def test_predictions_are_what_the_engine_reports(pods: Pair, model: Path) -> None:
    async with exact_picker(pods, model) as (gateway, _):
        check(await measure(gateway, workload(seed=1, count=REQUESTS)))


@pytest.mark.parametrize("pods", [(64, 32)], ids=["blocks-of-64-and-32"], indirect=True)
async def test_a_restart_and_a_gap_leave_predictions_right(pods: Pair, model: Path) -> None:
    async with exact_picker(pods, model) as (gateway, wire):
        disturbances = {
            RESTART: lambda: restart(gateway, pods[1]),
            GAP: lambda: lose_events(gateway, pods[0], wire),
        }
        check(await measure(gateway, workload(seed=2, count=REQUESTS), disturbances))


def check(compared: Comparison) -> None:
    assert not compared.skipped, compared
    assert len(compared.rows) == REQUESTS
    # What may be wrong: a block of generated tokens whose last few are not what its text is cut into. They end where a
    # token of the next prompt ends, too, so only tokenising all of that prompt would show it.
    assert len(compared.wrong()) <= 0.01 * REQUESTS, f"{compared}\n{compared.wrong()}"
    assert len({row.endpoint for row in compared.rows}) == 2
    assert sum(row.cached > 0 for row in compared.rows) > REQUESTS / 2


async def restart(gateway: Gateway, pod: Pod) -> None:
    """End a server at once and start it again with an empty cache; go on when picker follows its events again."""
    await asyncio.to_thread(pod.stop, kill=True)
    await gateway.until(lambda states: not _state(states, pod)["healthy"])
    pod.start()
    await asyncio.to_thread(pod.wait)
    await gateway.until(lambda states: bool(_state(states, pod)["healthy"]))
    await caught_up(gateway, pod, 1000)


async def lose_events(gateway: Gateway, pod: Pod, wire: Relay) -> None:
    """Lose what the server publishes while it evicts, forgets and stores blocks; go on when picker has noticed."""
    wire.losing = True
    async with httpx.AsyncClient(base_url=pod.url, timeout=60.0) as direct:
        for start in range(3):
            await _say(direct, ids(900 + start, 800))
        (await direct.post(RESET)).raise_for_status()
        await _say(direct, ids(903, 300))
    await asyncio.to_thread(replay, pod)  # answered after everything before it has been published
    wire.losing = False
    assert wire.lost >= 7
    await caught_up(gateway, pod, 2000)


async def caught_up(gateway: Gateway, pod: Pod, start: int) -> None:
    """Wait until picker knows at once what it cannot have learned but from events: a prompt that it has not seen."""
    async with asyncio.timeout(30.0), httpx.AsyncClient(base_url=pod.url, timeout=60.0) as direct:
        while True:
            start += 1
            prompt = [3 + start % 1000, *ids(start, 299)]
            await _say(direct, prompt)
            row, _ = await gateway.send(0, completion("probe", prompt))
            if isinstance(row, Row) and row.endpoint == pod.address and row.exact and row.cached > 200:
                return


async def _say(direct: httpx.AsyncClient, prompt: list[int]) -> None:
    """A request that picker does not see."""
    (await direct.post(COMPLETIONS, json=completion("", prompt).body)).raise_for_status()


def _state(states: States, pod: Pod) -> dict[str, Any]:
    (state,) = [state for state in states if state["address"] == pod.address]
    return state
