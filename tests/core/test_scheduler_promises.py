"""Whatever happens, in whatever order: no charge leaks, none is released twice, and equal calls decide equally."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes import NOW, blocks, endpoint, request, scheduler
from picker.core import filters
from picker.core.scheduler import Scheduler
from picker.types import (
    CacheCleared,
    Decision,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    LoadObserved,
    Queued,
    Rejection,
    Request,
    ResponseStarted,
    Usage,
)

NAMES = ("a", "b", "c")
names = st.sampled_from(NAMES)
which = st.integers(0, 30)
maybe = st.booleans()
# Booked and released to the last token: what is booked is always the sum over the open charges.
EXACT = ("inflight", "context", "prefilling", "backlog", "work", "decoding")
PROMPTS = (blocks(), blocks(shared=6, x=3), blocks(shared=6, y=3), blocks(shared=1), blocks(z=200))


class Interleavings(RuleBasedStateMachine):
    """One scheduler under every kind of call, its twin under the same, and the decisions that are open."""

    @initialize(limit=st.sampled_from([None, 1, 2]), seed=st.integers(0, 9))
    def start(self, limit: int | None, seed: int) -> None:
        options: dict[str, Any] = {"max_inflight": limit, "seed": seed, "queue_size": 3, "eject_after": 2}
        self.subject: Scheduler = scheduler(*NAMES, eject_s=2.0, **options)
        self.twin: Scheduler = scheduler(*NAMES, eject_s=2.0, **options)
        self.now = NOW
        self.open: dict[int, Request] = {}
        self.queued: dict[int, Request] = {}
        self.ended: list[int] = []
        self.ids = 0

    # what a runtime does

    @rule(
        prompt=st.sampled_from(PROMPTS),
        streaming=maybe,
        priority=st.integers(0, 2),
        subset=st.none() | names,
        patience=st.none() | st.floats(0.1, 5),
    )
    def submit(self, prompt: Any, streaming: bool, priority: int, subset: str | None, patience: float | None) -> None:
        self.ids += 1
        asked = request(
            self.ids,
            prompt,
            arrived_at=self.now,
            streaming=streaming,
            priority=priority,
            subset=None if subset is None else frozenset({f"{subset}:8000"}),
            session=f"session {self.ids % 3}",
            deadline=None if patience is None else self.now + patience,
        )
        self.ask(asked)

    def ask(self, asked: Request) -> None:
        outcome = self.subject.submit(asked, self.now)
        assert outcome == self.twin.submit(asked, self.now)
        if isinstance(outcome, Queued):
            self.queued[asked.id] = asked
        else:
            self.settle(asked, outcome)

    def settle(self, asked: Request, outcome: Decision | Rejection) -> None:
        if isinstance(outcome, Rejection):
            self.ended.append(asked.id)
            return
        row = self.subject.pool.row(outcome.endpoint.name)
        assert row is not None
        assert outcome.ranking is not None
        assert np.isfinite(outcome.ranking.total).all()
        assert filters.alive(self.subject.pool, self.now)[row]
        assert outcome.endpoint.name not in asked.exclude
        assert asked.subset is None or outcome.endpoint.address in asked.subset
        self.open[asked.id] = asked

    @rule()
    def poll(self) -> None:
        outcomes = self.subject.poll(self.now)
        assert outcomes == self.twin.poll(self.now)
        for outcome in outcomes:
            self.settle(self.queued.pop(outcome.request_id), outcome)

    @rule(seconds=st.sampled_from([0.01, 0.5, 3.0, 100.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def tell(self, fact: Fact) -> None:
        self.subject.apply(fact, self.now)
        self.twin.apply(fact, self.now)

    # facts about requests

    def one_of_the_open(self, number: int) -> int:
        return list(self.open)[number % len(self.open)]

    def end(self, request_id: int, fact: Fact) -> None:
        self.tell(fact)
        del self.open[request_id]
        self.ended.append(request_id)

    @precondition(lambda self: self.open)
    @rule(number=which)
    def first_token(self, number: int) -> None:
        self.tell(FirstToken(self.one_of_the_open(number)))

    @precondition(lambda self: self.open)
    @rule(number=which, name=names)
    def another_endpoint_answers(self, number: int, name: str) -> None:
        self.tell(ResponseStarted(self.one_of_the_open(number), 200, f"{name}:8000"))

    @precondition(lambda self: self.open)
    @rule(
        number=which,
        status=st.sampled_from([200, 200, 400, 500]),
        cached=st.none() | st.integers(0, 500),
        answer=st.sampled_from([0, 9, 200]),
    )
    def finish(self, number: int, status: int, cached: int | None, answer: int) -> None:
        request_id = self.one_of_the_open(number)
        self.end(request_id, Finished(request_id, status, Usage(500, answer, cached)))

    @precondition(lambda self: self.open)
    @rule(number=which, reason=st.sampled_from(FailureReason))
    def fail(self, number: int, reason: FailureReason) -> None:
        request_id = self.one_of_the_open(number)
        self.end(request_id, Failed(request_id, reason))

    @precondition(lambda self: self.open)
    @rule(number=which, name=names)
    def fail_and_try_again(self, number: int, name: str) -> None:
        asked = self.open[self.one_of_the_open(number)]
        self.end(asked.id, Failed(asked.id, FailureReason.CONNECT))
        self.ask(request(asked.id, PROMPTS[1], arrived_at=self.now, streaming=False, exclude=frozenset({name})))

    @precondition(lambda self: self.queued)
    @rule(number=which)
    def leave_the_queue(self, number: int) -> None:
        request_id = list(self.queued)[number % len(self.queued)]
        self.tell(Failed(request_id, FailureReason.CLIENT_GONE))
        del self.queued[request_id]

    @precondition(lambda self: self.ended)
    @rule(number=which)
    def hear_late_of_one_that_ended(self, number: int) -> None:
        request_id = self.ended[number % len(self.ended)]
        if request_id in self.open or request_id in self.queued:
            return
        for fact in (FirstToken(request_id), ResponseStarted(request_id, 200, "b:8000"), Finished(request_id, 200)):
            self.tell(fact)

    # facts about endpoints

    @rule(name=names, moved=maybe)
    def join(self, name: str, moved: bool) -> None:
        self.tell(EndpointAdded(endpoint(name, address=f"{name}:9000" if moved else f"{name}:8000")))

    @rule(name=names)
    def leave(self, name: str) -> None:
        self.tell(EndpointRemoved(name))

    @rule(gone=names, number=st.integers(0, 1))
    def hand_a_row_over(self, gone: str, number: int) -> None:
        self.tell(EndpointRemoved(gone))
        self.tell(EndpointAdded(endpoint(NAMES[(NAMES.index(gone) + number) % len(NAMES)])))

    @rule(name=names, draining=maybe)
    def drain(self, name: str, draining: bool) -> None:
        self.tell(EndpointDraining(name, draining))

    @rule(name=names, healthy=maybe)
    def probe(self, name: str, healthy: bool) -> None:
        self.tell(HealthObserved(name, healthy))

    @rule(name=names, waiting=st.none() | st.integers(0, 9), capacity=st.sampled_from([None, 500, 100_000]))
    def scrape(self, name: str, waiting: int | None, capacity: int | None) -> None:
        self.tell(LoadObserved(name, self.now, waiting=waiting, kv_capacity_tokens=capacity))

    @rule(name=names)
    def clear(self, name: str) -> None:
        self.tell(CacheCleared(name))

    # what must hold

    @invariant()
    def the_pool_is_the_sum_of_the_open_charges(self) -> None:
        if not hasattr(self, "subject"):
            return
        pool, charges = self.subject.pool, self.subject.charges
        assert len(charges) == len(self.open)
        expected = np.zeros((pool.rows, len(EXACT)), dtype=np.int64)
        for request_id in self.open:
            charge = charges.get(request_id)
            assert charge is not None
            if charges.stands(charge):
                ahead = (1, charge.tokens, charge.work, 0)
                past = (0, 0, 0, charge.context)
                expected[charge.row] += (1, charge.context, *(ahead if charge.prefilling else past))
        booked = np.stack([getattr(pool, column) for column in EXACT], axis=1)
        np.testing.assert_array_equal(booked[pool.present], expected[pool.present])

    @invariant()
    def what_requests_in_flight_hold_is_counted_once(self) -> None:
        if not hasattr(self, "subject"):
            return
        pool, charges = self.subject.pool, self.subject.charges
        standing = [charge for charge in map(charges.get, self.open) if charge is not None and charges.stands(charge)]
        assert len(charges.pins) == len({(charge.row, key) for charge in standing for key in charge.held.keys})
        # How many tokens a piece counts is what its first holder took it for, who may have ended.
        alone = np.zeros(pool.rows, dtype=np.int64)
        for charge in standing:
            alone[charge.row] += charge.held.rest
        assert (pool.pinned >= alone)[pool.present].all()
        assert not pool.pinned[pool.present & (pool.inflight == 0)].any()

    @invariant()
    def what_was_learned_makes_sense(self) -> None:
        if not hasattr(self, "subject"):
            return
        pool, learned = self.subject.pool, self.subject.learned
        for column in (pool.decodes_area, pool.context_area, pool.prefill_area):
            assert (column >= 0).all()
        for model in (learned.prefill, learned.decode):
            assert np.isfinite(model.coefficients).all()
            assert (model.coefficients >= 0).all()
        for speed in (learned.prefill_speed.value, learned.decode_speed.value):
            assert speed.size == pool.rows
            assert np.isfinite(speed).all()
            assert (speed > 0).all()

    @invariant()
    def the_queue_holds_who_waits(self) -> None:
        if hasattr(self, "subject"):
            assert sorted(each.id for each in self.subject.queue) == sorted(self.queued)

    def teardown(self) -> None:
        if not hasattr(self, "subject"):
            return
        for request_id in [*self.open, *self.queued]:
            self.tell(Failed(request_id, FailureReason.SHUTDOWN))
        pool = self.subject.pool
        charges = self.subject.charges
        assert (len(charges), len(charges.pins), len(self.subject.queue)) == (0, 0, 0)
        for column in (*EXACT, "pinned"):
            assert not getattr(pool, column)[pool.present].any(), column


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
