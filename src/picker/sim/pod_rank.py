"""One data-parallel rank of a simulated pod: an engine whose steps take their time on the pod's clock.

Owns the engine, the step in progress and the rank's metrics and KV events. Knows no client and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from picker.sim.engine import Engine, EngineRequest, StepResult
from picker.sim.pod_clock import PodClock
from picker.sim.pod_events import CacheEvents, Prompted
from picker.sim.pod_metrics import PodMetrics
from picker.sim.pod_publisher import EventPublisher

_FAMILY = b"# HELP "
_FIRST_RANK = b'engine="0"'


class Host(Protocol):
    """What a rank asks of its pod."""

    @property
    def hung(self) -> bool:
        """Whether engines stand still."""
        ...

    @property
    def next_arrival(self) -> float | None:
        """When the next request that is known of reaches an engine, on the clock."""
        ...

    def deliver(self, result: StepResult) -> None:
        """A step has ended."""
        ...


class Rank:
    """An engine in time. It steps while it has work; a step's effects are told to `host` when it ends.

    events, publisher: an account of its cache and where it is told; None: it publishes none.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: PodMetrics,
        clock: PodClock,
        host: Host,
        *,
        events: CacheEvents | None = None,
        publisher: EventPublisher | None = None,
    ) -> None:
        self.engine = engine
        self.metrics = metrics
        self._clock = clock
        self._host = host
        self._publisher = publisher
        self._events = events
        self._stepping = False
        self._held: StepResult | None = None
        self._dead = False

    def add(self, request: EngineRequest, prompted: Prompted) -> None:
        """Queue a request; `wake` lets the engine look at it."""
        if self._events is not None:
            self._events.add(request.id, prompted, request.block_hashes)
        self.engine.add(request, self._clock.now)

    def abort(self, request_id: int) -> None:
        self.engine.abort(request_id, self._clock.now)
        if self._events is not None:
            self._events.forget(request_id)

    def wake(self) -> None:
        """Begin a step unless one is in progress."""
        if not self._stepping:
            self._step(self._clock.now)

    def resume(self) -> None:
        """After a hang: time went on, the engine did not."""
        held, self._held = self._held, None
        if held is not None:
            self._end(held)
        if held is not None or not self._stepping:
            self._step(self._clock.now)

    def reset_prefix_cache(self) -> bool:
        cleared = self.engine.reset_prefix_cache()
        if cleared and self._events is not None:
            self._events.cleared()
        return cleared

    def die(self) -> None:
        """Nothing comes of the step in progress, nor of anything later."""
        self._dead = True

    def _step(self, now: float) -> None:
        """Begin the next engine step, or several where the loop is behind and nobody can have come in between."""
        self._stepping = False
        if self._host.hung:
            return
        result = self.engine.step(now, self._horizon())
        if result is None:
            return
        self._stepping = True
        if self._events is not None:
            self._events.begun(result)
        self._clock.at(now + result.duration, lambda: self._step_ended(result))

    def _horizon(self) -> float | None:
        if self._events is not None:
            return None  # a batch of events is that of one step
        arrival = self._host.next_arrival
        known = self._clock.known_until
        return known if arrival is None else min(known, arrival)

    def _step_ended(self, result: StepResult) -> None:
        if self._dead:
            return
        if self._host.hung:
            self._held = result
            return
        self._end(result)
        self._step(self._clock.now)

    def _end(self, result: StepResult) -> None:
        self.metrics.step(result)
        self._host.deliver(result)
        if self._events is not None and self._publisher is not None and (events := self._events.take()):
            self._publisher.publish(events)


def metrics_page(ranks: Sequence[PodMetrics], now: float) -> bytes:
    """The text of a scrape of a pod with these ranks: every family with the series of all of them. now: unix seconds.

    Series without the label `engine` are those of the first rank, which counts for the whole pod what has none.
    """
    first, *others = (metrics.render(now) for metrics in ranks)
    if not others:
        return first
    lines: dict[bytes, list[bytes]] = {}
    for number, page in enumerate(others, start=1):
        label = b'engine="%d"' % number
        for family in page.split(_FAMILY)[1:]:
            own = (line for line in family.splitlines() if not line.startswith(b"#") and _FIRST_RANK in line)
            lines.setdefault(_name(family), []).extend(line.replace(_FIRST_RANK, label) for line in own)
    families = (family + b"".join(line + b"\n" for line in lines[_name(family)]) for family in first.split(_FAMILY)[1:])
    return b"".join(_FAMILY + family for family in families)


def _name(family: bytes) -> bytes:
    return family.split(b" ", 1)[0]
