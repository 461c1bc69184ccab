"""Several schedulers in front of one cluster, in virtual time: what each decides reaches the others a moment later.

In the words that replicas use on the wire, so what is simulated is what is told. Every scheduler sees discovery and
scrapes by itself; a request and all that becomes of it are one's own. One may die and come back with nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

from picker.core.charges import Charge
from picker.core.scheduler import Scheduler
from picker.replicas import words
from picker.replicas.guests import LATE, Guests
from picker.replicas.handover import Receiver, lessons_of, offer, taught
from picker.sim.cluster import Router
from picker.types import (
    Decision,
    EndpointAdded,
    Fact,
    Failed,
    Finished,
    FirstToken,
    Queued,
    Rejection,
    Request,
    ResponseStarted,
    UInt64Array,
)

LEASE_S = 2.0  # after so much silence the requests of a replica are taken as ended


class Replicated(Router):
    """A `Router` of several. delay: seconds until the others know; inf: never. choose: the replica of a request.

    lessons: whether a new one is told what the others have learned, beside what is cached where.
    None in `schedulers` is one that is dead.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        *,
        delay: float,
        choose: Callable[[Request], int],
        lessons: bool = True,
    ) -> None:
        self.schedulers: list[Scheduler | None] = list(schedulers)
        self._delay = delay
        self._choose = choose
        self._lessons = lessons
        self._guests = [Guests() for _ in schedulers]
        self._owners: dict[int, int] = {}
        self._mail: list[tuple[float, int, Callable[[float], None]]] = []
        self._sent = itertools.count()
        self._endpoints: dict[str, EndpointAdded] = {}
        self._lives = [0] * len(schedulers)

    @property
    def wants_events(self) -> bool:
        return any(each.wants_events for each in self.schedulers if each is not None)

    # --- the verbs ---

    def submit(self, request: Request, now: float) -> Decision | Rejection | Queued:
        self.deliver(now)
        index = self._alive(self._owners.get(request.id, self._choose(request)))
        self._owners[request.id] = index
        outcome = self._scheduler(index).submit(request, now)
        self._note(index, outcome, now)
        return outcome

    def apply(self, fact: Fact, now: float) -> None:
        self.deliver(now)
        if isinstance(fact, EndpointAdded):
            self._endpoints[fact.endpoint.name] = fact
        if not isinstance(fact, ResponseStarted | FirstToken | Finished | Failed):
            for each in self.schedulers:
                if each is not None:
                    each.apply(fact, now)
            return
        index = self._owners.get(fact.request_id)
        scheduler = None if index is None else self.schedulers[index]
        if index is None or scheduler is None:
            return  # who routed it is dead: nobody can tell
        scheduler.apply(fact, now)
        if (word := words.told(fact)) is not None:
            self._tell(index, word, now)
        if isinstance(fact, Finished):
            del self._owners[fact.request_id]

    def poll(self, now: float) -> list[Decision | Rejection]:
        self.deliver(now)
        outcomes = []
        for index, each in enumerate(self.schedulers):
            for outcome in each.poll(now) if each is not None else ():
                self._note(index, outcome, now)
                outcomes.append(outcome)
        return outcomes

    def next_wakeup(self) -> float | None:
        instants = [each.next_wakeup() for each in self.schedulers if each is not None]
        return min((at for at in instants if at is not None), default=None)

    # --- life and death ---

    def kill(self, index: int, now: float) -> None:
        """A replica is gone, with all that it knew; the others find out when its lease is over."""
        self.deliver(now)
        self.schedulers[index] = None
        self._lives[index] += 1
        for other in self._others(index):
            self._post(now + LEASE_S, other, partial(self._miss, other, index))

    def start(self, index: int, scheduler: Scheduler, now: float) -> None:
        """A new one comes, and is told what another knows."""
        self.deliver(now)
        self.schedulers[index], self._guests[index] = scheduler, Guests()
        for fact in self._endpoints.values():
            scheduler.apply(fact, now)
        others = list(self._others(index))
        for other in others:
            standing = words.Standing([words.routed(each, name, fresh=False) for each, name in self._own(other)])
            self._post(now + self._delay, index, partial(self._hear, index, other, standing))
        if others:
            self._hand_over(others[0], index, now)

    def _hand_over(self, source: int, target: int, now: float) -> None:
        of, receiver = self._scheduler(source), Receiver()
        told_words = list(offer(of.index, lambda row: of.pool.endpoint(row).name))
        facts: list[Fact] = [lessons_of(taught(of.lessons(now)))] if self._lessons else []
        facts += [fact for word in told_words if (fact := receiver.take(word)) is not None]
        self._post(now + self._delay, target, partial(self._learn, target, facts))

    # --- mail ---

    def deliver(self, now: float) -> None:
        """Hand out what has arrived by now."""
        while self._mail and self._mail[0][0] <= now:
            at, _, hand_out = heapq.heappop(self._mail)
            hand_out(at)

    def _note(self, index: int, outcome: Decision | Rejection | Queued, now: float) -> None:
        if isinstance(outcome, Decision) and outcome.charged:
            scheduler = self._scheduler(index)
            charge = scheduler.charges.get(outcome.request_id)
            assert charge is not None
            self._tell(index, words.routed(charge, outcome.endpoint.name, fresh=True), now)

    def _tell(self, index: int, word: words.FromReplica, now: float) -> None:
        if self._delay == math.inf:
            return
        for other in self._others(index):
            self._post(now + self._delay, other, partial(self._hear, other, index, word))

    def _post(self, at: float, to: int, hand_out: Callable[[float], None]) -> None:
        life = self._lives[to]

        def if_alive(now: float) -> None:
            if self._lives[to] == life:
                hand_out(now)

        heapq.heappush(self._mail, (at, next(self._sent), if_alive))

    def _hear(self, index: int, speaker: int, word: words.FromReplica, at: float) -> None:
        # Through bytes, as on the wire.
        for heard in words.unbatch(words.batch([words.encode(word)])):
            facts = self._guests[index].facts(str(speaker), heard, late=self._delay > LATE)  # type: ignore[arg-type]
            self._learn(index, facts, at)

    def _learn(self, index: int, facts: Sequence[Fact], at: float) -> None:
        scheduler = self._scheduler(index)
        for fact in facts:
            scheduler.apply(fact, at)

    def _miss(self, index: int, lost: int, at: float) -> None:
        self._learn(index, self._guests[index].gone(str(lost)), at)

    # --- who is there ---

    def _alive(self, index: int) -> int:
        return index if self.schedulers[index] is not None else self._others(index)[0]

    def _others(self, index: int) -> list[int]:
        return [each for each in range(len(self.schedulers)) if each != index and self.schedulers[each] is not None]

    def _scheduler(self, index: int) -> Scheduler:
        scheduler = self.schedulers[index]
        assert scheduler is not None, f"replica {index} is dead"
        return scheduler

    def _own(self, index: int) -> list[tuple[Charge, str]]:
        scheduler = self._scheduler(index)
        charges = [each for each in scheduler.charges if each.request.id > 0 and scheduler.charges.stands(each)]
        return [(each, scheduler.pool.endpoint(each.row).name) for each in charges]


def agreement(one: Scheduler, other: Scheduler, prompts: Sequence[UInt64Array]) -> float:
    """How much of what `other` believes to be cached of these prompts `one` believes, too: 0..1."""
    known = wanted = 0
    rows = {endpoint.name: row for row, endpoint in one.pool}
    for prompt in prompts:
        mine, theirs = one.index.match(prompt), other.index.match(prompt)
        for row, endpoint in other.pool:
            wanted += int(theirs[row])
            known += min(int(theirs[row]), int(mine[rows[endpoint.name]])) if endpoint.name in rows else 0
    return known / wanted if wanted else 1.0
