"""What a policy may ask of the scheduler: filters that leave nobody, headers, and shedding what may be dropped."""

from __future__ import annotations

from fakes import NOW, scheduler
from fakes import request as ask
from picker.core.plan import Plan, Route
from picker.core.saturation import Utilization
from picker.core.scheduler import Scheduler
from picker.core.view import PoolView
from picker.prefix.approximate import ApproximateIndex
from picker.types import BoolArray, Decision, EndpointAdded, LoadObserved, Rejection, RejectReason, Request


class Nobody:
    name = "nobody"
    headers = ("x-wanted",)

    def __call__(self, view: PoolView, request: Request) -> BoolArray:
        wanted: BoolArray = view.rows < 0
        return wanted


def test_a_request_that_no_endpoint_passes_the_filters_of_is_refused() -> None:
    plan = Plan({"only": Route([], [Nobody()])}, "only")
    made = scheduler("a", profile=plan, picker=plan.pick)
    outcome = made.submit(ask(), NOW)
    assert isinstance(outcome, Rejection)
    assert (outcome.status, outcome.reason) == (429, RejectReason.NO_MATCH)
    assert len(made.charges) == 0


def test_the_headers_that_a_policy_asks_for_are_known() -> None:
    plan = Plan({"only": Route([], [Nobody()])}, "only", header="X-Profile")
    assert scheduler("a", profile=plan, picker=plan.pick).headers == {"x-profile", "x-wanted"}
    assert scheduler("a").headers == frozenset()


def test_what_may_be_dropped_is_dropped_when_the_endpoints_are_full() -> None:
    plain = scheduler("a")
    made = Scheduler(plain.settings, ApproximateIndex(1 << 20), saturation=Utilization(queue_depth=5.0))
    for endpoint in (each for _, each in plain.pool):
        made.apply(EndpointAdded(endpoint), NOW)
    made.apply(LoadObserved("a", NOW, waiting=4.0, kv_usage=0.1), NOW)
    assert isinstance(made.submit(ask(1, priority=-1), NOW), Decision)
    made.apply(LoadObserved("a", NOW, waiting=6.0, kv_usage=0.1), NOW)
    dropped = made.submit(ask(2, priority=-1), NOW)
    assert isinstance(dropped, Rejection)
    assert (dropped.status, dropped.reason) == (429, RejectReason.SATURATED)
    assert isinstance(made.submit(ask(3), NOW), Decision)
