"""When there is no endpoint, a request may wait for one to come."""

from fakes import NOW, endpoint, request, scheduler
from picker.types import (
    Decision,
    EndpointAdded,
    EndpointDraining,
    Failed,
    FailureReason,
    Queued,
    Rejection,
    RejectReason,
)


def test_without_it_nobody_waits() -> None:
    outcome = scheduler().submit(request(1), NOW)
    assert isinstance(outcome, Rejection)
    assert (outcome.status, outcome.reason) == (503, RejectReason.NO_ENDPOINTS)


def test_a_request_waits_for_the_first_endpoint() -> None:
    subject = scheduler(hold_s=5.0)
    assert isinstance(subject.submit(request(1), NOW), Queued)
    assert subject.poll(NOW + 1.0) == []
    subject.apply(EndpointAdded(endpoint("a")), NOW + 2.0)
    (outcome,) = subject.poll(NOW + 2.0)
    assert isinstance(outcome, Decision)
    assert outcome.waited == 2.0


def test_who_has_waited_in_vain_is_told_when_to_come_again() -> None:
    subject = scheduler(hold_s=5.0)
    subject.submit(request(1), NOW)
    assert subject.next_wakeup() == NOW + 5.0
    (outcome,) = subject.poll(NOW + 5.0)
    assert isinstance(outcome, Rejection)
    assert (outcome.status, outcome.reason) == (503, RejectReason.NO_ENDPOINTS)
    assert outcome.retry_after is not None
    assert len(subject.queue) == 0


def test_nobody_waits_longer_than_it_wants_to() -> None:
    subject = scheduler(hold_s=5.0)
    subject.submit(request(1, deadline=NOW + 1.0), NOW)
    assert subject.next_wakeup() == NOW + 1.0


def test_a_pool_that_is_going_away_is_none() -> None:
    subject = scheduler("a", hold_s=5.0)
    subject.apply(EndpointDraining("a"), NOW)
    assert isinstance(subject.submit(request(1), NOW), Queued)


def test_a_model_that_nobody_serves_is_not_waited_for() -> None:
    subject = scheduler(endpoint("a", models=["m"]), hold_s=5.0)
    assert isinstance(subject.submit(request(1, model="other"), NOW), Rejection)


def test_there_is_no_room_for_more_than_the_queue_holds() -> None:
    subject = scheduler(hold_s=5.0, queue_size=1)
    assert isinstance(subject.submit(request(1), NOW), Queued)
    assert isinstance(subject.submit(request(2), NOW), Rejection)


def test_a_second_attempt_does_not_wait() -> None:
    assert isinstance(scheduler(hold_s=5.0).submit(request(1, exclude=frozenset({"a"})), NOW), Rejection)


def test_who_leaves_is_not_waited_with() -> None:
    subject = scheduler(hold_s=5.0)
    subject.submit(request(1), NOW)
    subject.apply(Failed(1, FailureReason.CLIENT_GONE), NOW)
    subject.apply(EndpointAdded(endpoint("a")), NOW)
    assert subject.poll(NOW) == []
