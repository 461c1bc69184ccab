"""Who waits while the pool is saturated: highest priority first, then flow by flow in turn, each until its deadline.

A flow is what a request's fairness id says (a tenant, say). Within a flow, and for all who name none, first come is
first served; between flows of one priority everybody's turn comes before anybody's second, however many wait.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from picker.types import Request

# llm-d's names, new and old; the new one counts.
FAIRNESS_HEADERS = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
TTL_HEADERS = ("x-llm-d-inference-ttl",)
HEADERS = frozenset((*FAIRNESS_HEADERS, *TTL_HEADERS))

# As Go writes durations: "90s", "1m30s", "1.5h", "250ms".
_PART = r"(\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})(h|ms|us|µs|ns|m|s)"
_DURATION = re.compile(rf"\+?(?:{_PART})+")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}

_Flows = OrderedDict[str, OrderedDict[int, Request]]


class FlowQueue:
    """A bounded queue of requests. Iteration is in the order of service; removing on the way is allowed."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        # By priority; flows in the order of their turns; in a flow, requests in the order of arrival.
        self._waiting: dict[int, _Flows] = {}
        self._where: dict[int, tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[Request]:
        for priority in sorted(self._waiting, reverse=True):
            yield from _in_turns(self._waiting.get(priority, OrderedDict()))

    @property
    def full(self) -> bool:
        return len(self._where) >= self.capacity

    def add(self, request: Request) -> None:
        flow = fairness_id(request)
        flows = self._waiting.setdefault(request.priority, OrderedDict())
        flows.setdefault(flow, OrderedDict())[request.id] = request
        self._where[request.id] = request.priority, flow

    def remove(self, request_id: int) -> bool:
        """Take a request out that is not served; False when it is not here."""
        return self._take(request_id) is not None

    def serve(self, request_id: int) -> None:
        """Take a request out that is served: the next turn of its flow comes after everybody else's."""
        if (taken := self._take(request_id)) is not None:
            priority, flow = taken
            flows = self._waiting.get(priority)
            if flows is not None and flow in flows:
                flows.move_to_end(flow)

    def next_deadline(self) -> float | None:
        deadlines = [request.deadline for request in self._all() if request.deadline is not None]
        return min(deadlines, default=None)

    def _all(self) -> Iterator[Request]:
        return (self._waiting[priority][flow][number] for number, (priority, flow) in self._where.items())

    def _take(self, request_id: int) -> tuple[int, str] | None:
        where = self._where.pop(request_id, None)
        if where is not None:
            priority, flow = where
            flows = self._waiting[priority]
            del flows[flow][request_id]
            if not flows[flow]:
                del flows[flow]
            if not flows:
                del self._waiting[priority]
        return where


def _in_turns(flows: _Flows) -> Iterator[Request]:
    """One of each flow, then a second of each, and so on."""
    lines = [iter(list(line.values())) for line in flows.values()]
    while lines:
        left = []
        for line in lines:
            if (request := next(line, None)) is not None:
                left.append(line)
                yield request
        lines = left


def fairness_id(request: Request) -> str:
    """The flow that a request belongs to; empty where it names none."""
    return next((request.headers[name] for name in FAIRNESS_HEADERS if request.headers.get(name)), "")


def with_own_deadline(request: Request) -> Request:
    """The request as it is to wait: no longer than it says itself, where it does."""
    ttl = next((request.headers[name] for name in TTL_HEADERS if request.headers.get(name)), None)
    seconds = None if ttl is None else _seconds(ttl)
    if seconds is None or (request.deadline is not None and request.deadline <= request.arrived_at + seconds):
        return request
    return msgspec.structs.replace(request, deadline=request.arrived_at + seconds)


def _seconds(text: str) -> float | None:
    """A duration as Go writes it; None for what is none, or is not above zero."""
    if _DURATION.fullmatch(text.strip()) is None:
        return None
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text))
    return seconds if seconds > 0 else None
