"""The whole demo with real processes: pods, picker, Envoy, load."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from picker.demo_stack import EnvoyMissingError, need_envoy

pytestmark = pytest.mark.e2e


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "picker", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )


def children_of(parent: int) -> set[int]:
    """Its children, by the fourth field of /proc/PID/stat; the second is a name in brackets."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        if int(fields[1]) == parent:
            found.add(int(stat.parent.name))
    return found


def wait_for_end(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(60_000), "still running after 60 s"
    os.close(pidfd)


@pytest.fixture
def plane(request: pytest.FixtureRequest) -> str:
    if request.param == "envoy":
        try:
            need_envoy()
        except EnvoyMissingError as missing:
            pytest.skip(str(missing))
    return str(request.param)


@pytest.mark.parametrize("plane", ["envoy", "proxy"], indirect=True)
async def test_the_demo_answers_everything_and_hits_more(plane: str) -> None:
    process = await start("--duration", "2", "--json", "--data-plane", plane)
    out, err = await process.communicate()
    assert out, err.decode()
    figures = json.loads(out)
    unaware, picker = figures["routing"]["cache-unaware"], figures["routing"]["picker"]
    assert figures["failed"] == 0
    assert figures["requests"] == unaware["requests"] + picker["requests"] > 40
    assert figures["data_plane"].startswith(plane if plane == "envoy" else "picker")
    assert picker["hit_ratio"] > unaware["hit_ratio"]
    assert len(unaware["by_endpoint"]) == 4
    assert set(picker["by_endpoint"]) <= set(unaware["by_endpoint"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("plane", "number"),
    [("envoy", signal.SIGINT), ("envoy", signal.SIGKILL), ("proxy", signal.SIGTERM), ("proxy", signal.SIGKILL)],
    indirect=["plane"],
)
async def test_nothing_is_left_behind(plane: str, number: signal.Signals) -> None:
    process = await start("--data-plane", plane)
    assert process.stderr is not None
    while not (line := await process.stderr.readline()).startswith(b"Up."):
        assert line, "the demo ended by itself"
    below = children_of(process.pid)
    assert len(below) == 3
    ends = [asyncio.to_thread(wait_for_end, os.pidfd_open(pid)) for pid in below]
    os.killpg(process.pid, number)
    await process.communicate()
    await asyncio.gather(*ends)
