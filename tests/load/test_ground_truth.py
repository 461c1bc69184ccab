"""Every figure against servers whose delays are known exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from load.virtual import Script, Server, VirtualLoop, virtually
from picker.load import report
from picker.load.arrivals import Arrivals, Process
from picker.load.client import Client, Target
from picker.load.schedule import Pace, Run, drive, without_warmup
from picker.load.text import Piece
from picker.load.workload import Plan, Planned, Turn

MILLISECOND = 0.001


def requests(rate: float, count: int) -> Plan:
    times = Arrivals(rate, Process.CONSTANT).times(count, np.random.default_rng(0))
    return Plan("test", tuple(Planned(float(at), (Turn((Piece(i, 10),), 4),)) for i, at in enumerate(times)))


def driven(script: Script, plan: Plan, pace: Pace | None = None, *, stream: bool = True) -> Run:
    async def main(loop: VirtualLoop) -> Run:
        loop.servers[80] = lambda: Server(script)
        async with Client(Target("http://virtual:80", model="m", stream=stream), clock=loop.time) as client:
            return without_warmup(await drive(plan, client, pace))

    return virtually(main)


def test_every_figure_is_the_true_one() -> None:
    script = Script(first=0.25, gaps=(0.02, 0.03, 0.10), prompt=10, cached=6)
    run = driven(script, requests(rate=20.0, count=200))
    figures = report.row(run)
    truth = {
        "requests": 200,
        "failed": 0,
        "ttft_mean_s": 0.25,
        "ttft_p50_s": 0.25,
        "ttft_p95_s": 0.25,
        "ttft_p99_s": 0.25,
        "tpot_mean_s": 0.05,
        "e2e_mean_s": 0.40,
        "e2e_p95_s": 0.40,
        "hit_ratio": 0.6,
        "duration_s": 10.0 + 0.4,
        "requests_per_s": 200 / 10.4,
        "output_tokens_per_s": 800 / 10.4,
    }
    for name, value in truth.items():
        measured = figures[name]
        assert isinstance(measured, (int, float))
        assert abs(measured - value) <= max(0.01 * value, MILLISECOND), name
    assert figures["by_endpoint"] == {"pod-1:8000": 200}


def test_every_gap_between_tokens_is_kept() -> None:
    run = driven(Script(gaps=(0.02, 0.03, 0.10)), requests(rate=50.0, count=20))
    for record in run.records:
        assert list(record.gaps) == pytest.approx([0.02, 0.03, 0.10], abs=1e-6)
        assert record.longest_gap == pytest.approx(0.10, abs=1e-6)


def test_requests_go_out_when_they_are_meant_to() -> None:
    script = Script()
    run = driven(script, requests(rate=10.0, count=50))
    assert np.diff(script.asked_at) == pytest.approx(np.full(49, 0.1), abs=1e-6)
    assert run.on_schedule
    assert run.requested_rate == pytest.approx(10.0)
    assert run.achieved_rate == pytest.approx(10.0)


def test_a_server_that_freezes_shows_in_the_tail_of_all_who_came_meanwhile() -> None:
    """Coordinated omission: a client that waits for answers before it asks on would see one slow request."""
    script = Script(first=0.01, gaps=(), frozen=(1005.0, 1007.0))
    run = driven(script, requests(rate=100.0, count=1000))
    figures = report.row(run)
    waited = [record.ttft for record in run.records if record.ttft is not None and record.ttft > 0.02]
    assert len(waited) == pytest.approx(200, abs=3)
    assert np.mean(waited) == pytest.approx(1.0, rel=0.02)
    # Of 1,000 the 990th: 200 wait between 0 and 2 s, so a twentieth of them longer than 1.9 s.
    assert figures["ttft_p99_s"] == pytest.approx(1.9, abs=0.03)
    assert figures["ttft_p50_s"] == pytest.approx(0.01, abs=MILLISECOND)
    assert run.on_schedule


def test_a_cap_turns_a_freeze_into_waiting_and_it_still_shows() -> None:
    script = Script(first=0.01, gaps=(), frozen=(1005.0, 1007.0))
    run = driven(script, requests(rate=100.0, count=1000), Pace(cap=4))
    assert report.row(run)["ttft_p99_s"] == pytest.approx(1.9, abs=0.1)


def test_a_closed_loop_of_n_users_has_n_requests_in_flight() -> None:
    script = Script(first=0.1, gaps=(0.1,))
    run = driven(script, requests(rate=1.0, count=100), Pace(closed=5))
    assert run.ended_at - run.started_at == pytest.approx(100 / 5 * 0.2, abs=MILLISECOND)


def test_users_begin_when_they_are_told_to() -> None:
    script = Script(first=5.0, gaps=())
    driven(script, requests(rate=1.0, count=2), Pace(closed=2, starts=(0.5, 3.0)))
    assert script.asked_at == pytest.approx([1000.5, 1003.0], abs=1e-6)


def test_thinking_begins_when_the_answer_ends() -> None:
    script = Script(first=0.1, gaps=(0.1, 0.1))
    turns = tuple(Turn((Piece(i, 4),), 3, think=5.0) for i in range(3))
    run = driven(script, Plan("test", (Planned(0.0, turns),)))
    assert script.asked_at == pytest.approx([1000.0, 1005.3, 1010.6], abs=1e-6)
    assert [(record.conversation, record.turn) for record in run.records] == [(0, 0), (0, 1), (0, 2)]


def test_what_is_not_streamed_has_an_end_and_no_first_token() -> None:
    run = driven(Script(first=0.2, gaps=(0.1,)), requests(rate=10.0, count=10), stream=False)
    figures = report.row(run)
    assert figures["e2e_mean_s"] == pytest.approx(0.3, abs=MILLISECOND)
    assert (figures["failed"], figures["ttft_mean_s"], figures["hit_ratio"]) == (0, None, 0.6)


def test_figures_of_faster_pods_are_in_their_seconds() -> None:
    run = driven(Script(first=0.05, gaps=(0.01,)), requests(rate=10.0, count=20), Pace(time_scale=10.0))
    figures = report.row(run)
    assert figures["ttft_mean_s"] == pytest.approx(0.5, rel=0.01)
    assert run.ended_at - run.started_at == pytest.approx(2.0 / 10 + 0.06, abs=MILLISECOND)


def test_a_warm_up_is_sent_and_not_measured() -> None:
    script = Script(first=0.1, gaps=())
    run = driven(script, requests(rate=10.0, count=100), Pace(warmup=4.0))
    assert (len(script.requests), len(run.warmup), len(run.records)) == (100, 39, 61)
    assert report.row(run)["duration_s"] == pytest.approx(6.1, abs=MILLISECOND)


def test_a_share_of_the_requests_can_be_the_warm_up() -> None:
    run = driven(Script(), requests(rate=10.0, count=100), Pace(warmup_share=0.2))
    assert (len(run.warmup), len(run.records)) == (20, 80)


def test_a_machine_that_cannot_keep_up_says_so() -> None:
    plan = requests(rate=100.0, count=300)

    async def main(loop: VirtualLoop) -> Run:
        class Busy(Server):
            def received(self, data: bytes) -> None:
                loop._jumping.now += 0.02  # what sending costs on this machine: half the speed that is asked for
                super().received(data)

        loop.servers[80] = lambda: Busy(Script(gaps=()))
        async with Client(Target("http://virtual:80", model="m"), clock=loop.time) as client:
            return await drive(plan, client)

    run = virtually(main)
    assert not run.on_schedule
    delay, achieved = run.schedule_delay_p99, run.achieved_rate
    assert delay is not None
    assert achieved is not None
    assert delay > 2.9
    assert achieved == pytest.approx(50.0, rel=0.02)
    assert not math.isnan(delay)
