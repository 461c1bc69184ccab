"""Who waits while the pool is saturated: highest priority first, then first come, each until its deadline."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from picker.types import Request


@dataclass(order=True, slots=True)
class _Place:
    urgency: int  # minus the priority
    number: int  # of arrival
    request: Request = field(compare=False)


class FlowQueue:
    """A bounded queue of requests. Iteration is in the order of service and sees a copy: it may remove on the way."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._places: list[_Place] = []
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        return iter([place.request for place in self._places])

    @property
    def full(self) -> bool:
        return len(self._places) >= self.capacity

    def add(self, request: Request) -> None:
        self._arrivals += 1
        bisect.insort(self._places, _Place(-request.priority, self._arrivals, request))

    def remove(self, request_id: int) -> bool:
        """Take a request out; False when it is not here."""
        for index, place in enumerate(self._places):
            if place.request.id == request_id:
                del self._places[index]
                return True
        return False

    def next_deadline(self) -> float | None:
        deadlines = [place.request.deadline for place in self._places if place.request.deadline is not None]
        return min(deadlines, default=None)
