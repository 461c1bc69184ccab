"""Who the other replicas are, what they are told and what is made of what they say; knows no wire.

Watches what this replica decides and sees, and hands it to the bus; what others say becomes facts of the runtime. A
replica that has been silent for the lease is taken as gone and its requests as ended. With a bus that is lost, routing
goes on by what this replica knows itself, and `report` says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from picker.replicas import words
from picker.replicas.guests import LATE, Guests
from picker.replicas.handover import Receiver, lessons_of, offer, taught
from picker.replicas.lateness import Lateness
from picker.replicas.relay import Relay
from picker.replicas.words import Word
from picker.runtime import Runtime
from picker.types import Decision, Fact, Outcome, Request

log = logging.getLogger("picker.replicas")

LEASE = 2.0  # seconds without a word after which a replica's requests are taken as ended
BEAT = 0.5  # seconds between two signs of life
_FORGET = 60.0  # seconds after which a replica that is gone is not reported any more
_ALONE = 2.0  # seconds after which a new replica waits no longer for somebody to learn from
_PATIENCE = 5.0  # and for being told all
_MORE = 1.25  # times as many blocks as we know of, and somebody is worth asking


@dataclass(slots=True)
class Neighbour:
    """Another replica. heard_at: None before its first word. gone: its lease is over."""

    name: str
    heard_at: float
    held: int = 0
    gone: bool = False
    words: int = 0


class Circle(Collector):
    """ready: whether the endpoints are known, before which nothing can be learned of them.

    settled: set once there is nothing left to wait for: all was told, or nobody is there to tell.
    """

    def __init__(self, runtime: Runtime, *, name: str, block_bytes: int, ready: Callable[[], bool]) -> None:
        self.name = name
        self.settled = asyncio.Event()
        self.refused = 0  # by the buses: of who does not know the secret, or is of another version
        self.problem: str | None = None  # of the bus, in plain words
        self.tell: Callable[[bytes], None] = _nobody
        self.tell_one: Callable[[str, bytes], None] = _nobody_else
        self.lateness = Lateness()
        self.relay = Relay(lambda replica, word: self.tell_one(replica, words.encode(word)))
        self.relay.on_logs = lambda: self.tell(words.encode(self.alive()))
        self._runtime = runtime
        self._block_bytes = block_bytes
        self._ready = ready
        self._guests = Guests()
        self._neighbours: dict[str, Neighbour] = {}
        self._began_at = runtime.clock()
        self._teacher: str | None = None
        self._receiver: Receiver | None = None
        self._taught = self._missed = False
        self._told = self._heard = self._learned = self._lost = 0
        runtime.telemetry.watch(self)
        runtime.telemetry.registry.register(self)
        runtime.reports["replicas"] = self.report

    # --- what we do ---

    def decision(self, outcome: Outcome, seconds: float, request: Request | None) -> None:
        """Told by the telemetry, right after it was booked."""
        if not isinstance(outcome, Decision) or not outcome.charged:
            return
        charge = self._runtime.scheduler.charges.get(outcome.request_id)
        if charge is not None:
            self._say(words.routed(charge, outcome.endpoint.name, fresh=True))

    def fact(self, fact: Fact) -> None:
        word = words.told(fact)
        if word is not None:
            self._say(word)

    def _say(self, word: Word) -> None:
        self._told += 1
        self.tell(words.encode(word))

    # --- what others are told first ---

    @property
    def ready(self) -> bool:
        """Whether anything can be learned yet."""
        return self._ready() and len(self._runtime.scheduler.pool) > 0

    def greeting(self) -> words.Greeting:
        relay = self.relay
        return words.Greeting(words.VERSION, self.name, self._block_bytes, self.held, relay.marks, relay.logs)

    def alive(self) -> words.Alive:
        now = self._runtime.clock()
        return words.Alive(self.held, self.relay.logs, now, self.lateness.echoes(now))

    def standing(self) -> words.Standing:
        """All requests of ours that are open."""
        scheduler = self._runtime.scheduler
        own = [each for each in scheduler.charges if each.request.id > 0 and scheduler.charges.stands(each)]
        return words.Standing([words.routed(each, scheduler.pool.endpoint(each.row).name, fresh=False) for each in own])

    def knowledge(self, wanted: words.Wanted) -> Iterator[words.Taught | words.Node | words.Held]:
        """What we have learned, and what we believe to be cached where; lazily."""
        scheduler = self._runtime.scheduler
        if wanted.lessons:
            yield taught(scheduler.lessons(self._runtime.clock()))
        yield from offer(scheduler.index, lambda row: _name(scheduler.pool.endpoints[row]))

    @property
    def held(self) -> int:
        return self._runtime.scheduler.index.blocks

    # --- what others say ---

    def greeted(self, replica: str, greeting: words.Greeting) -> None:
        """Raises ValueError for one that cannot be understood."""
        if greeting.version != words.VERSION:
            raise ValueError(f"{greeting.name} speaks version {greeting.version}, we {words.VERSION}")
        if greeting.block_bytes != self._block_bytes:
            raise ValueError(
                f"{greeting.name} hashes blocks of {greeting.block_bytes} bytes, we of {self._block_bytes}: "
                "index.block_bytes must be the same everywhere"
            )
        known = self._neighbours.get(replica)
        if known is None:
            log.info("replica %s is there", greeting.name)
        elif known.gone:
            log.info("replica %s is back", greeting.name)
            self._missed = True  # what it decided meanwhile nobody has told us
        now = self._runtime.clock()
        self._neighbours[replica] = Neighbour(greeting.name, now, greeting.held)
        self.relay.met(replica, greeting)

    def hear(self, replica: str, said: Sequence[words.FromReplica]) -> None:
        """Make facts of words. Raises ValueError for what makes no sense."""
        known = self._neighbours.get(replica)
        if known is None:
            return
        known.heard_at, known.gone = self._runtime.clock(), False
        known.words += len(said)
        self._heard += len(said)
        late = (self.lateness.of(replica) or 0.0) > LATE
        facts: list[Fact] = []
        for word in said:
            match word:
                case words.Alive(held, logs, at, echoes):
                    known.held = held
                    self.relay.heard(replica, logs)
                    if at is not None:
                        self.lateness.heard(replica, at, echoes, known.heard_at)
                case words.Logged():
                    self.relay.take(word)
                case words.Node() | words.Held():
                    if self._receiver is not None and self._teacher == replica:
                        fact = self._receiver.take(word)
                        facts += () if fact is None else (fact,)
                case words.Taught():
                    if self._teacher == replica:
                        facts.append(lessons_of(word))
                case words.Handed():
                    self._all_told(replica)
                case words.Greeting() | words.Wanted():
                    pass
                case _:
                    facts += self._guests.facts(replica, word, late=late)
        self._learned += len(facts)
        self._runtime.learn(facts)

    def lost(self, replica: str) -> None:
        """A connection is over. Its lease runs on: it may be back in a moment."""
        self.relay.left(replica)
        if self._teacher == replica:
            self._teacher = self._receiver = None

    def wants(self, replica: str) -> bool:
        """Whether to ask this one for what it knows; who asks must then be told, or say `lost`."""
        known = self._neighbours.get(replica)
        if known is None or self._teacher is not None or (self._taught and not self._missed):
            return False
        if not self._missed and known.held <= _MORE * self.held:
            return False
        self._teacher, self._receiver = replica, Receiver()
        return True

    def _all_told(self, replica: str) -> None:
        if replica == self._teacher:
            self._teacher = self._receiver = None
            self._taught, self._missed = True, False
            self.settled.set()
            log.info("%s has told what is cached where", self._neighbours[replica].name)

    # --- time ---

    def note(self, problem: str | None) -> None:
        """What is wrong with the bus, None: nothing. Said when it changes."""
        if problem is not None and self.problem is None:
            log.warning("%s; routing goes on by what this replica knows", problem)
        elif problem is None and self.problem is not None:
            log.info("all replicas can be heard")
        self.problem = problem

    def sweep(self) -> None:
        """Every `BEAT`: end the leases of those who are silent, and wait no longer than is sensible."""
        now = self._runtime.clock()
        for replica, known in list(self._neighbours.items()):
            silent = now - known.heard_at
            if silent > LEASE and not known.gone:
                known.gone = True
                self._lost += 1
                self.lost(replica)
                facts = self._guests.gone(replica)
                log.warning("replica %s is gone; %d requests of it are taken as ended", known.name, len(facts))
                self._runtime.learn(facts)
                self.lateness.forget(replica)
            elif silent > _FORGET:
                del self._neighbours[replica]
                self.relay.forget(replica)
        since = now - self._began_at
        if since > _PATIENCE or (since > _ALONE and self._teacher is None):
            self.settled.set()

    # --- for people ---

    @property
    def connected(self) -> int:
        return sum(not known.gone for known in self._neighbours.values())

    def report(self) -> dict[str, Any]:
        """For `/readyz`."""
        now = self._runtime.clock()
        return {
            "name": self.name,
            "connected": self.connected,
            "problem": self.problem,
            "settled": self.settled.is_set(),
            "others": [
                {
                    "name": known.name,
                    "gone": known.gone,
                    "heard_s": now - known.heard_at,
                    "late_s": self.lateness.of(replica),
                    "open_requests": self._guests.open(replica),
                    "words": known.words,
                }
                for replica, known in self._neighbours.items()
            ],
        }

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield GaugeMetricFamily("picker_replicas", "Other replicas that can be heard.", value=self.connected)
        broken = 0.0 if self.problem is None else 1.0
        yield GaugeMetricFamily("picker_replicas_bus_broken", "1 while the bus to them does not work.", value=broken)
        requests = "Requests that other replicas have open, as far as they are followed."
        yield GaugeMetricFamily("picker_replicas_requests", requests, value=len(self._guests))
        late = (
            "How old it is what they say, when it is heard: of the replica where it is oldest; nan before it is known."
        )
        yield GaugeMetricFamily("picker_replicas_late_seconds", late, value=self.lateness.worst)
        for name, text, count in (
            ("told", "Words told to other replicas.", self._told),
            ("heard", "Words heard from them.", self._heard),
            ("learned", "Facts learned from them.", self._learned),
            ("lost", "Times that one was taken as gone.", self._lost),
            ("refused", "Connections and messages refused: another secret, another version.", self.refused),
            ("ignored", "Requests of theirs beyond what is followed.", self._guests.ignored),
            ("entries_passed_on", "Access-log entries handed on to whose requests they tell of.", self.relay.passed),
            ("entries_taken", "Access-log entries of our requests that others have handed on.", self.relay.taken),
            ("entries_unclaimed", "Access-log entries with the mark of nobody known.", self.relay.unclaimed),
        ):
            yield CounterMetricFamily(f"picker_replicas_{name}", text, value=count)


def _name(endpoint: Any) -> str | None:
    return None if endpoint is None else endpoint.name


def _nobody(word: bytes) -> None:
    """Where words go before there is a bus."""


def _nobody_else(replica: str, word: bytes) -> None:
    """Where those for one replica go then."""
