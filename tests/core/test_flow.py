from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import request
from picker.core.flow import FlowQueue


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
