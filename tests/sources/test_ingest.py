"""Ingest: facts keep their order, odd spellings are left out, and nobody waits without end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from picker.prefix.spelling import Vocabulary
from picker.sources import ingest
from picker.sources.ingest import Ingest
from picker.types import BlocksRemoved, BlocksStored, EndpointRemoved, EventsChanged, EventState, Fact

KNOWN = Vocabulary([b"a", b"b", b"c", b"d", b"e"])


def prompt(*hashes: int, name: str = "pod") -> BlocksStored:
    """The blocks of a prompt, two tokens each."""
    return BlocksStored(name, hashes, None, (0, 1) * len(hashes), 2)


def output(block_hash: int, parent: int, tokens: tuple[int, int] = (2, 3), name: str = "pod") -> BlocksStored:
    return BlocksStored(name, (block_hash,), parent, tokens, 2)


class Told(list[Fact]):
    """What was emitted; `until` waits for so many."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()

    def emit(self, fact: Fact) -> None:
        self.append(fact)
        self._more.set()

    async def until(self, count: int) -> list[Fact]:
        async with asyncio.timeout(60):
            while len(self) < count:
                self._more.clear()
                await self._more.wait()
        return list(self)


@asynccontextmanager
async def running(made: Ingest) -> AsyncIterator[Told]:
    told = Told()
    task = asyncio.ensure_future(made.run(told.emit))  # noqa: TID251 - ended below, whatever happens
    try:
        await asyncio.sleep(0)
        yield told
    finally:
        task.cancel()


def judging(judge: Callable[[Sequence[int], Sequence[int]], bool]) -> Ingest:
    return Ingest(lambda name: KNOWN, lambda name: judge)


async def test_prompts_and_removals_pass_at_once() -> None:
    made = judging(lambda context, block: False)
    async with running(made) as told:
        for fact in (prompt(1, 2), BlocksRemoved("pod", (2,))):
            made.take(fact)
        assert told == [prompt(1, 2), BlocksRemoved("pod", (2,))]


async def test_output_that_its_text_is_not_cut_into_is_left_out() -> None:
    made = judging(lambda context, block: tuple(block) != (2, 3))
    async with running(made) as told:
        for fact in (prompt(1), output(2, 1), output(3, 2, (3, 3))):
            made.take(fact)
        assert await told.until(2) == [prompt(1), output(3, 2, (3, 3))]
        assert made.stats.foreign == 1


async def test_a_judge_is_shown_what_comes_before() -> None:
    seen: list[tuple[int, ...]] = []

    def judge(context: Sequence[int], block: Sequence[int]) -> bool:
        seen.append(tuple(context))
        return True

    made = judging(judge)
    async with running(made) as told:
        for fact in (prompt(1), output(2, 1), output(3, 2)):
            made.take(fact)
        await told.until(3)
    assert seen == [(0, 1), (0, 1, 2, 3)]


async def test_facts_behind_one_that_is_worked_on_wait_for_it_and_those_of_others_do_not() -> None:
    made = judging(lambda context, block: True)
    async with running(made) as told:
        facts: list[Fact] = [prompt(1), output(2, 1), BlocksRemoved("pod", (2,))]
        for fact in facts:
            made.take(fact)
        made.take(prompt(9, name="other"))
        assert told == [facts[0], prompt(9, name="other")]
        assert await told.until(4) == [facts[0], prompt(9, name="other"), *facts[1:]]


async def test_what_ids_spell_is_learned_before_a_block_is_handed_on() -> None:
    vocabulary, asked = Vocabulary([b"a"]), []

    async def learn(name: str, ids: Sequence[int]) -> bool:
        asked.append((name, tuple(ids)))
        vocabulary.learn(1, b"b")
        return True

    made = Ingest(lambda name: vocabulary, lambda name: None, learn)
    async with running(made) as told:
        made.take(prompt(1))
        made.take(prompt(2))
        await told.until(2)
    assert asked == [("pod", (0, 1))]


async def test_events_faster_than_the_work_on_them_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_WAITING", 3)
    made = judging(lambda context, block: True)
    async with running(made) as told:
        for number in range(5):
            made.take(output(10 + number, 1))
        changes = [fact for fact in told if isinstance(fact, EventsChanged)]
        assert [change.state for change in changes] == [EventState.SUSPECT, EventState.PARTIAL]
        assert made.stats.overrun == 1
        await told.until(3)
        assert told[-1] == output(14, 1)


async def test_an_endpoint_that_left_has_nothing_waiting() -> None:
    made = judging(lambda context, block: True)
    async with running(made) as told:
        made.take(output(2, 1))
        made.observe(EndpointRemoved("pod"))
        made.take(output(3, 1, name="other"))
        assert await told.until(1) == [output(3, 1, name="other")]
