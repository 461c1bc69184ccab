"""What is done to KV events on their way to the scheduler, off the request path: learn what ids spell, judge spellings.

A model's own output need not be what its text tokenises to; then no prompt with that text will ever find the block, and
it is left out. Facts of one endpoint keep their order; those that need no work and wait behind nothing pass at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from picker.prefix.spelling import Vocabulary
from picker.types import BlocksStored, EndpointRemoved, EventsChanged, EventState, Fact

_WAITING = 10_000  # facts of one endpoint, beyond which its events come faster than they can be worked on
_TAILS = 4096  # blocks of one endpoint whose ids are remembered as the context of what follows
_CONTEXT = 64  # ids before a block that a judge is shown
_BATCH = 256  # facts worked on at once

Emit = Callable[[Fact], None]
Learn = Callable[[str, Sequence[int]], Awaitable[bool]]
"""(endpoint, ids) -> whether all of them can be spelled after asking that endpoint's engine."""
Judge = Callable[[Sequence[int], Sequence[int]], bool]
"""(ids before a block, its own) -> whether they are what their text is cut into. Called in a thread."""


@dataclass(slots=True)
class _Line:
    """One endpoint's facts that wait, and the last ids of its recent blocks."""

    waiting: deque[Fact] = field(default_factory=deque)
    tails: OrderedDict[int, tuple[int, ...]] = field(default_factory=OrderedDict)


@dataclass(slots=True)
class IngestStats:
    """unspelled: blocks with ids nobody could spell. foreign: blocks no text tokenises to. overrun: lines dropped."""

    unspelled: int = 0
    foreign: int = 0
    overrun: int = 0


class Ingest:
    """Takes the facts of an event source and hands them on. vocabulary_of, judge_of: by endpoint name, None: unknown.

    learn: None where vocabularies are complete.
    """

    def __init__(
        self,
        vocabulary_of: Callable[[str], Vocabulary | None],
        judge_of: Callable[[str], Judge | None],
        learn: Learn | None = None,
    ) -> None:
        self._vocabulary_of = vocabulary_of
        self._judge_of = judge_of
        self._learn = learn
        self._lines: dict[str, _Line] = {}
        self._busy: dict[str, None] = {}  # endpoints whose facts wait, in the order they began to
        self._wake = asyncio.Event()
        self._emit: Emit = _nowhere
        self.stats = IngestStats()

    def take(self, fact: Fact) -> None:
        """Give it a fact of the event source."""
        name = getattr(fact, "name", "")
        line = self._lines.setdefault(name, _Line())
        if isinstance(fact, EventsChanged):
            line.tails.clear()
        if not line.waiting and not self._needs_work(fact):
            self._pass(line, fact)
            return
        if len(line.waiting) >= _WAITING:
            self._overrun(name, line)
            return
        line.waiting.append(fact)
        self._busy[name] = None
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return not any(line.waiting for line in self._lines.values())

    def observe(self, fact: Fact) -> None:
        """Follow the pool: whoever left has nothing waiting."""
        if isinstance(fact, EndpointRemoved):
            self._lines.pop(fact.name, None)
            self._busy.pop(fact.name, None)

    async def run(self, emit: Emit) -> None:
        """Work until cancelled."""
        self._emit = emit
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._busy:
                name = next(iter(self._busy))
                del self._busy[name]
                await self._work(name)

    async def _work(self, name: str) -> None:
        """One batch of an endpoint's facts; the rest waits for its next turn."""
        line = self._lines.get(name)
        if line is None:
            return
        batch = [line.waiting[i] for i in range(min(_BATCH, len(line.waiting)))]
        await self._spell(name, batch)
        parents = {fact.parent for fact in batch if isinstance(fact, BlocksStored) and fact.parent is not None}
        tails = {parent: line.tails[parent] for parent in parents if parent in line.tails}
        fits = await asyncio.to_thread(_judged, self._judge_of(name), tails, batch)
        if self._lines.get(name) is not line or not line.waiting or line.waiting[0] is not batch[0]:
            return  # it left or was overrun meanwhile
        for fact, fit in zip(batch, fits, strict=True):
            line.waiting.popleft()
            if fit:
                self._pass(line, fact)
            else:
                self.stats.foreign += 1
        if line.waiting:
            self._busy[name] = None

    async def _spell(self, name: str, batch: Sequence[Fact]) -> None:
        vocabulary = self._vocabulary_of(name)
        if self._learn is None or vocabulary is None:
            return
        for fact in batch:
            if isinstance(fact, BlocksStored) and vocabulary.missing(fact.tokens):
                known = await self._learn(name, fact.tokens)
                self.stats.unspelled += 0 if known else len(fact.hashes)

    def _needs_work(self, fact: Fact) -> bool:
        if not isinstance(fact, BlocksStored) or not fact.tokens:
            return False
        if _generated(fact) and self._judge_of(fact.name) is not None:
            return True
        vocabulary = self._vocabulary_of(fact.name) if self._learn is not None else None
        return vocabulary is not None and bool(vocabulary.missing(fact.tokens))

    def _pass(self, line: _Line, fact: Fact) -> None:
        if isinstance(fact, BlocksStored) and fact.tokens:
            line.tails[fact.hashes[-1]] = _tail(line.tails, fact)
            if len(line.tails) > _TAILS:
                line.tails.popitem(last=False)
        self._emit(fact)

    def _overrun(self, name: str, line: _Line) -> None:
        line.waiting.clear()
        line.tails.clear()
        self.stats.overrun += 1
        self._emit(EventsChanged(name, EventState.SUSPECT, "its KV events come faster than they can be worked on"))
        self._emit(EventsChanged(name, EventState.PARTIAL, "learning anew after falling behind its KV events"))


def _judged(judge: Judge | None, tails: dict[int, tuple[int, ...]], batch: Sequence[Fact]) -> list[bool]:
    """Which facts to hand on. tails: ids before blocks of the batch, by parent; more come from the batch itself."""
    fits = []
    for fact in batch:
        fit = True
        if isinstance(fact, BlocksStored) and fact.tokens:
            if judge is not None and _generated(fact) and fact.parent in tails:
                fit = judge(tails[fact.parent], fact.tokens)
            tails[fact.hashes[-1]] = _tail(tails, fact)
        fits.append(fit)
    return fits


def _tail(tails: Mapping[int, tuple[int, ...]], fact: BlocksStored) -> tuple[int, ...]:
    """The last ids up to the end of these blocks, those before them included where they are few."""
    before = () if fact.parent is None or len(fact.tokens) >= _CONTEXT else tails.get(fact.parent, ())
    return (*before, *fact.tokens)[-_CONTEXT:]


def _generated(fact: BlocksStored) -> bool:
    """Whether a block may hold output: it comes alone, when it is full. Those of prompts the engine cut itself."""
    return len(fact.hashes) == 1 and fact.parent is not None


def _nowhere(fact: Fact) -> None:
    """Where facts go while nobody runs this."""
