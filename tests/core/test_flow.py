from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, request
from picker.core.flow import FlowQueue, with_own_deadline
from picker.types import Request

FAIRNESS, OLD = "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"


def ids(queue: FlowQueue) -> list[int]:
    return [each.id for each in queue]


def test_the_urgent_go_first_and_equals_in_order_of_arrival() -> None:
    queue = FlowQueue(10)
    for request_id, priority in ((1, 0), (2, 5), (3, 0), (4, 5), (5, -1)):
        queue.add(request(request_id, priority=priority))
    assert ids(queue) == [2, 4, 1, 3, 5]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), max_size=20))
def test_the_order_is_that_of_a_stable_sort(priorities: list[int]) -> None:
    queue = FlowQueue(100)
    for number, priority in enumerate(priorities):
        queue.add(request(number, priority=priority))
    assert ids(queue) == sorted(range(len(priorities)), key=lambda number: -priorities[number])


def test_a_queue_is_full_at_its_capacity() -> None:
    queue = FlowQueue(2)
    for request_id in (1, 2):
        assert not queue.full
        queue.add(request(request_id))
    assert queue.full
    assert FlowQueue(0).full


def test_a_request_is_removed_once() -> None:
    queue = FlowQueue(10)
    for request_id in (1, 2, 3):
        queue.add(request(request_id))
    assert [queue.remove(2), queue.remove(2)] == [True, False]
    assert (ids(queue), len(queue)) == ([1, 3], 2)


def test_requests_may_leave_while_the_queue_is_walked() -> None:
    queue = FlowQueue(10)
    for request_id in (1, 2, 3):
        queue.add(request(request_id))
    walked = []
    for each in queue:
        walked.append(each.id)
        queue.remove(each.id)
    assert (walked, len(queue)) == ([1, 2, 3], 0)


def test_the_next_deadline_is_the_earliest_whatever_the_order() -> None:
    queue = FlowQueue(10)
    assert queue.next_deadline() is None
    queue.add(request(1, priority=9))
    assert queue.next_deadline() is None
    queue.add(request(2, deadline=20.0, priority=5))
    queue.add(request(3, deadline=10.0))
    assert queue.next_deadline() == 10.0
    queue.remove(3)
    assert queue.next_deadline() == 20.0


# --- flows ---


def of(flow: str, request_id: int, **changes: Any) -> Request:
    return request(request_id, headers={FAIRNESS: flow}, **changes)


def test_flows_take_turns_however_many_of_one_wait() -> None:
    queue = FlowQueue(100)
    for number in range(4):
        queue.add(of("greedy", number))
    queue.add(of("modest", 10))
    queue.add(request(20))
    queue.add(of("modest", 11))
    assert ids(queue) == [0, 10, 20, 1, 11, 2, 3]


def test_whoever_was_served_has_the_next_turn_after_all_others() -> None:
    queue = FlowQueue(100)
    for number in range(3):
        queue.add(of("a", number))
        queue.add(of("b", 10 + number))
    served = []
    while len(queue):
        first = ids(queue)[0]
        queue.serve(first)
        served.append(first)
    assert served == [0, 10, 1, 11, 2, 12]


def test_a_flow_that_comes_again_at_once_does_not_go_before_those_who_wait() -> None:
    queue = FlowQueue(100)
    queue.add(of("eager", 0))
    for number in range(3):
        queue.add(of("patient", 10 + number))
    served = []
    for _ in range(4):
        first = ids(queue)[0]
        queue.serve(first)
        served.append(first)
        if first < 10:
            queue.add(of("eager", first + 1))
    assert served == [0, 10, 1, 11]


def test_new_flows_do_not_keep_an_old_one_waiting() -> None:
    """A client that makes up an id for each request gains one turn a request, and holds up nobody for ever."""
    queue = FlowQueue(100)
    for number in range(3):
        queue.add(of("honest", number))
    honest = []
    for number in range(100, 110):
        queue.add(of(f"made up {number}", number))
        first = ids(queue)[0]
        queue.serve(first)
        honest += [first] if first < 100 else []
    assert honest == [0, 1, 2]


def test_leaving_unserved_costs_no_turn() -> None:
    queue = FlowQueue(100)
    for request_id, flow in ((1, "a"), (2, "a"), (10, "b")):
        queue.add(of(flow, request_id))
    assert queue.remove(1)
    assert ids(queue) == [2, 10]


def test_priority_comes_before_fairness() -> None:
    queue = FlowQueue(100)
    for request_id, flow, priority in ((1, "a", 0), (2, "a", 1), (3, "a", 1), (4, "b", 0)):
        queue.add(of(flow, request_id, priority=priority))
    assert ids(queue) == [2, 3, 1, 4]


def test_the_new_name_of_the_header_counts_before_the_old_one() -> None:
    queue = FlowQueue(100)
    queue.add(request(1, headers={FAIRNESS: "a", OLD: "b"}))
    queue.add(request(2, headers={FAIRNESS: "", OLD: "a"}))
    queue.add(request(3, headers={OLD: "c"}))
    assert ids(queue) == [1, 3, 2]


FLOWS = st.lists(st.tuples(st.sampled_from(["add", "serve", "remove"]), st.integers(0, 3), st.integers(-1, 1)))


@settings(max_examples=60, deadline=None)
@given(FLOWS)
def test_no_request_is_lost_or_doubled_and_nothing_is_kept_of_those_that_left(
    steps: list[tuple[str, int, int]],
) -> None:
    queue = FlowQueue(1000)
    waiting: set[int] = set()
    for number, (step, flow, priority) in enumerate(steps):
        if step == "add" or not waiting:
            queue.add(of(f"flow {flow}", number, priority=priority))
            waiting.add(number)
        else:
            gone = ids(queue)[0] if step == "serve" else sorted(waiting)[flow % len(waiting)]
            (queue.serve if step == "serve" else queue.remove)(gone)
            waiting.discard(gone)
        assert sorted(ids(queue)) == sorted(waiting)
        assert len(queue) == len(waiting)
    for number in waiting:
        queue.remove(number)
    assert (queue._waiting, queue._where) == ({}, {})


# --- deadlines of their own ---


@pytest.mark.parametrize(
    ("ttl", "deadline"),
    [
        ("5s", 5.0),
        ("250ms", 0.25),
        ("1m30s", 60.0),  # no longer than everybody
        ("0.5m", 30.0),
        ("0s", 60.0),
        ("-5s", 60.0),
        ("5", 60.0),
        ("soon", 60.0),
        ("", 60.0),
        ("1s" * 10_000, 60.0),
    ],
)
def test_a_request_may_say_that_it_waits_less(ttl: str, deadline: float) -> None:
    asked = request(1, headers={"x-llm-d-inference-ttl": ttl}, deadline=NOW + 60.0)
    assert with_own_deadline(asked).deadline == NOW + deadline


def test_without_a_limit_for_all_its_own_is_one() -> None:
    assert with_own_deadline(request(1, headers={"x-llm-d-inference-ttl": "1h1m1s1ms"})).deadline == NOW + 3661.001
    assert with_own_deadline(request(1)).deadline is None
