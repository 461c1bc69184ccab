from typing import Any

import pytest

from fakes import NOW, endpoint, request, scheduler
from picker.core.filters import candidates
from picker.core.pool import Pool
from picker.core.scheduler import Scheduler
from picker.types import (
    BoolArray,
    Decision,
    EndpointAdded,
    EndpointDraining,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    Queued,
    Rejection,
    RejectReason,
    Request,
)


def saturated(*names: str, **settings: Any) -> Scheduler:
    """Every endpoint has the one request it may have: number 1 at the first, 2 at the second, ..."""
    subject = scheduler(*(names or ("a",)), max_inflight=1, **settings)
    for number, name in enumerate(names or ("a",), start=1):
        outcome = subject.submit(request(number, subset=frozenset({f"{name}:8000"})), NOW)
        assert isinstance(outcome, Decision)
    return subject


def wait(subject: Scheduler, request_id: int, **fields: Any) -> None:
    assert isinstance(subject.submit(request(request_id, **fields), NOW), Queued)


def let_go(subject: Scheduler, now: float = NOW) -> list[tuple[int, str]]:
    """What poll answers: (request, endpoint or reason)."""
    return [
        (each.request_id, each.endpoint.name if isinstance(each, Decision) else each.reason.value)
        for each in subject.poll(now)
    ]


def test_a_request_waits_when_every_endpoint_has_its_fill() -> None:
    subject = saturated("a", "b")
    wait(subject, 3)
    assert let_go(subject) == []
    assert len(subject.queue) == 1


def test_without_a_limit_nobody_waits() -> None:
    subject = scheduler("a")
    assert all(isinstance(subject.submit(request(number), NOW), Decision) for number in range(200))


def test_an_endpoint_below_its_limit_is_taken_whatever_it_costs() -> None:
    subject = saturated("a", "b")
    subject.apply(Finished(2, 200), NOW)
    outcome = subject.submit(request(3), NOW)
    assert isinstance(outcome, Decision)
    assert outcome.endpoint.name == "b"


@pytest.mark.parametrize("end", [Finished(1, 200), Finished(1, 500), Failed(1, FailureReason.CLIENT_GONE)])
def test_a_request_that_ends_lets_one_go(end: Finished | Failed) -> None:
    subject = saturated("a")
    wait(subject, 2)
    wait(subject, 3)
    subject.apply(end, NOW)
    assert let_go(subject) == [(2, "a")]
    assert let_go(subject) == []
    subject.apply(Finished(2, 200), NOW)
    assert let_go(subject) == [(3, "a")]


def test_the_urgent_go_first_and_equals_in_order_of_arrival() -> None:
    subject = saturated("a")
    for number, priority in ((2, 0), (3, 5), (4, 0), (5, 5)):
        wait(subject, number, priority=priority)
    order = []
    for ended in (1, 3, 5, 2):
        subject.apply(Finished(ended, 200), NOW)
        order += let_go(subject)
    assert order == [(3, "a"), (5, "a"), (2, "a"), (4, "a")]


def test_the_wait_is_counted_from_arrival() -> None:
    subject = saturated("a")
    wait(subject, 2)
    subject.apply(Finished(1, 200), NOW + 2)
    (decision,) = subject.poll(NOW + 2.5)
    assert isinstance(decision, Decision)
    assert decision.waited == 2.5


def test_a_newcomer_does_not_overtake_those_who_wait_for_the_same() -> None:
    subject = saturated("a")
    wait(subject, 2)
    subject.apply(Finished(1, 200), NOW)
    wait(subject, 3)
    wait(subject, 4, priority=-1)
    assert let_go(subject) == [(2, "a")]


def test_a_more_urgent_newcomer_does() -> None:
    subject = saturated("a")
    wait(subject, 2)
    subject.apply(Finished(1, 200), NOW)
    assert isinstance(subject.submit(request(3, priority=1), NOW), Decision)


def test_nobody_waits_behind_those_who_wait_for_other_endpoints() -> None:
    subject = scheduler(endpoint("a", models=["x"]), endpoint("b", models=["y"]), max_inflight=1)
    assert isinstance(subject.submit(request(1, model="x"), NOW), Decision)
    wait(subject, 2, model="x")
    assert isinstance(subject.submit(request(3, model="y"), NOW), Decision)
    wait(subject, 4, model="y")
    subject.apply(Finished(3, 200), NOW)
    assert let_go(subject) == [(4, "b")]


def test_nobody_waits_behind_those_who_may_go_nowhere() -> None:
    subject = saturated("a", "b")
    wait(subject, 3, subset=frozenset({"a:8000"}))
    subject.apply(EndpointRemoved("a"), NOW)
    subject.apply(Finished(2, 200), NOW)
    assert isinstance(subject.submit(request(4), NOW), Decision)
    assert let_go(subject) == [(3, "no-match")]


def test_a_deadline_ends_the_wait_with_429() -> None:
    subject = saturated("a")
    wait(subject, 2, deadline=NOW + 5)
    assert let_go(subject, NOW + 4.9) == []
    (rejection,) = subject.poll(NOW + 5)
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.status) == (RejectReason.EXPIRED, 429)
    assert rejection.retry_after == 5.0  # as long as nobody has left by now
    assert rejection.message == "No endpoint had room within 5.0 s."
    assert len(subject.queue) == 0


def test_too_late_is_too_late_even_when_there_is_room() -> None:
    subject = saturated("a")
    wait(subject, 2, deadline=NOW + 5)
    wait(subject, 3, deadline=NOW + 9)
    subject.apply(Finished(1, 200), NOW + 6)
    assert let_go(subject, NOW + 6) == [(2, "expired"), (3, "a")]


def test_a_full_queue_refuses_with_429_and_books_nothing() -> None:
    subject = saturated("a", queue_size=2)
    wait(subject, 2)
    wait(subject, 3)
    rejection = subject.submit(request(4), NOW)
    assert isinstance(rejection, Rejection)
    assert (rejection.reason, rejection.status) == (RejectReason.SATURATED, 429)
    assert (len(subject.queue), len(subject.charges)) == (2, 1)


def test_an_impossible_request_is_refused_at_once_and_does_not_wait() -> None:
    subject = saturated("a")
    assert isinstance(subject.submit(request(2, subset=frozenset({"nowhere"})), NOW), Rejection)


def test_a_client_that_leaves_takes_its_request_out_of_the_queue() -> None:
    subject = saturated("a")
    wait(subject, 2)
    wait(subject, 3)
    subject.apply(Failed(2, FailureReason.CLIENT_GONE), NOW)
    subject.apply(Finished(1, 200), NOW)
    assert let_go(subject) == [(3, "a")]


def test_a_new_endpoint_lets_requests_go() -> None:
    subject = saturated("a")
    wait(subject, 2)
    subject.apply(EndpointAdded(endpoint("b")), NOW)
    assert let_go(subject) == [(2, "b")]


def test_when_the_last_endpoint_leaves_those_who_wait_are_told() -> None:
    subject = saturated("a")
    wait(subject, 2)
    subject.apply(EndpointDraining("a"), NOW)
    assert let_go(subject) == [(2, "no-endpoints")]


def test_several_are_let_go_at_once_and_spread() -> None:
    subject = saturated("a", "b", "c")
    for number in (4, 5, 6, 7):
        wait(subject, number)
    for number in (1, 2, 3):
        subject.apply(Finished(number, 200), NOW)
    gone = let_go(subject)
    assert [number for number, _ in gone] == [4, 5, 6]
    assert {name for _, name in gone} == {"a", "b", "c"}


def test_a_long_queue_of_equal_wishes_is_a_single_question(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = saturated("a")
    for number in range(2, 52):
        wait(subject, number, priority=number % 3)
    asked: list[int] = []

    def counting(pool: Pool, request: Request, now: float) -> BoolArray | Rejection:
        asked.append(request.id)
        return candidates(pool, request, now)

    monkeypatch.setattr("picker.core.filters.candidates", counting)
    assert let_go(subject) == []
    assert len(asked) == 1


def test_prefills_that_are_silently_over_no_longer_count_when_the_queue_is_served() -> None:
    subject = scheduler("a", max_inflight=2)
    for number, prompt_bytes in ((1, 320_000), (2, 400)):
        asked = request(number, prompt_bytes=prompt_bytes, streaming=False)
        assert isinstance(subject.submit(asked, NOW), Decision)
    wait(subject, 3)
    subject.apply(Finished(2, 200), NOW + 11)
    (decision,) = subject.poll(NOW + 11)
    assert isinstance(decision, Decision)
    assert decision.ranking is not None
    assert decision.ranking.parts["queue"][0] == 0.0


def test_the_next_wakeup_is_the_earliest_deadline() -> None:
    subject = saturated("a")
    assert subject.next_wakeup() is None
    wait(subject, 2)
    assert subject.next_wakeup() is None
    wait(subject, 3, deadline=NOW + 9)
    wait(subject, 4, deadline=NOW + 5, priority=-1)
    assert subject.next_wakeup() == NOW + 5
    subject.poll(NOW + 5)
    assert subject.next_wakeup() == NOW + 9
    subject.poll(NOW + 9)
    assert subject.next_wakeup() is None


def test_a_request_that_says_how_long_it_waits_is_told_so_late_and_no_later() -> None:
    subject = saturated("a")
    wait(subject, 2, deadline=NOW + 60, headers={"x-llm-d-inference-ttl": "2s"})
    assert subject.next_wakeup() == NOW + 2
    (outcome,) = subject.poll(NOW + 2)
    assert isinstance(outcome, Rejection)
    assert outcome.reason is RejectReason.EXPIRED


def test_flows_are_served_in_turn() -> None:
    subject = saturated("a")
    for number, flow in ((2, "greedy"), (3, "greedy"), (4, "greedy"), (5, "modest")):
        wait(subject, number, headers={"x-gateway-inference-fairness-id": flow})
    gone, last = [], 1
    for _ in range(3):
        subject.apply(Finished(last, 200), NOW)
        ((last, _),) = let_go(subject)
        gone.append(last)
    assert gone == [2, 5, 3]


def test_only_where_requests_may_wait_are_the_headers_of_those_who_wait_asked_for() -> None:
    assert "x-llm-d-inference-ttl" in scheduler("a", max_inflight=1).headers
    assert scheduler("a").headers == frozenset()


def test_it_is_also_when_an_ejected_endpoint_has_rested() -> None:
    subject = scheduler("a", "b", max_inflight=1, eject_after=1, eject_s=4.0)
    assert isinstance(subject.submit(request(1, subset=frozenset({"b:8000"})), NOW), Decision)
    subject.apply(Finished(1, 500), NOW)
    assert subject.next_wakeup() is None
    assert isinstance(subject.submit(request(2), NOW), Decision)
    wait(subject, 3, deadline=NOW + 60)
    assert subject.next_wakeup() == NOW + 4
    assert let_go(subject, NOW + 3) == []
    assert subject.next_wakeup() == NOW + 4
    assert let_go(subject, NOW + 4) == [(3, "b")]
    wait(subject, 4, deadline=NOW + 60)
    assert subject.next_wakeup() == NOW + 8  # one at a time finds out whether it answers
    subject.apply(Finished(3, 200), NOW + 5)
    assert let_go(subject, NOW + 5) == [(4, "b")]
