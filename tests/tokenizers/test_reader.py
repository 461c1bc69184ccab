"""Readings within a budget: small ones at once, large ones in a thread, and a slow one in nobody's way."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from picker.prefix.spelling import PrefixHasher
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.prompt import LocalPrompts, ReadPrompt
from picker.tokenizers.reader import Reader
from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.whole import WholeTokens
from picker.tokenizers.window import KnownSplits, Seams
from picker.types import Call, CallKind, Reading, Unread
from tiny_tokenizers import PROSE, spec

HASHER = PrefixHasher(b"secret")
LONG = 60.0  # seconds that no test waits for


class FakePrompts:
    """Reads a body as its own text. Bodies that begin with "slow" wait for the test; "odd" and "broken" fail."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Semaphore(0), threading.Event()
        self.threads: list[str] = []

    def read(self, call: Call) -> ReadPrompt:
        self.threads.append(threading.current_thread().name)
        if call.body.startswith(b"slow"):
            self.entered.release()
            assert self.go.wait(LONG)
        if call.body.startswith(b"odd"):
            raise Unreadable("odd")
        if call.body.startswith(b"broken"):
            raise KeyError("secret text")
        return ReadPrompt(call.body, KnownSplits([2]), whole=not call.body.startswith(b"half"))


class FakeEngine:
    """Answers when it is told to."""

    def __init__(self, answer: ReadPrompt | None = None) -> None:
        self.answer, self.go = answer, asyncio.Event()

    async def read(self, call: Call) -> ReadPrompt:
        await self.go.wait()
        if self.answer is None:
            raise Unreadable("no")
        return self.answer


def call(body: bytes, model: str = "base", salt: str | None = None) -> Call:
    return Call(CallKind.COMPLETION, model, body=body, salt=salt)


@pytest.fixture
def prompts() -> Iterator[FakePrompts]:
    fake = FakePrompts()
    yield fake
    fake.go.set()


def reader(prompts: FakePrompts, budget: float = LONG, inline: int = 100) -> Reader:
    return Reader(HASHER, prompts=prompts, budget=budget, inline_bytes=inline)


LARGE = b"x" * 200


def test_a_small_call_is_read_at_once(prompts: FakePrompts) -> None:
    found = reader(prompts).read_now(call(b"text", salt="s"))
    assert isinstance(found, Reading)
    assert found.hashes.tolist() == HASHER.hashes(b"text").tolist()
    assert (found.salt, found.adapter, found.tokens, found.whole) == ("s", None, None, True)
    assert found.splits is not None
    assert found.splits(2)
    assert prompts.threads == [threading.current_thread().name]


def test_only_the_name_of_an_adapter_is_an_adapter(prompts: FakePrompts) -> None:
    asked = Reader(HASHER, prompts=prompts, is_adapter=lambda model: model == "ad")
    readings = [asked.read_now(call(b"text", model=model)) for model in ("ad", "base")]
    assert [found.adapter for found in readings if isinstance(found, Reading)] == ["ad", None]


def test_a_reading_of_a_part_says_so(prompts: FakePrompts) -> None:
    found = reader(prompts).read_now(call(b"half"))
    assert isinstance(found, Reading)
    assert not found.whole


async def test_a_large_call_is_read_in_a_thread(prompts: FakePrompts) -> None:
    asked = reader(prompts)
    assert asked.read_now(call(LARGE)) is Unread.UNREAD
    assert prompts.threads == []
    found = await asked.read(call(LARGE))
    assert isinstance(found, Reading)
    assert found.hashes.tolist() == HASHER.hashes(LARGE).tolist()
    assert prompts.threads[0].startswith("picker-reader")
    assert (asked.stats.read, asked.stats.threaded) == (1, 1)
    asked.close()


async def test_a_slow_call_is_given_up_and_delays_no_other(prompts: FakePrompts) -> None:
    asked = reader(prompts, budget=0.0)
    slow = b"slow" + LARGE
    assert await asked.read(call(slow)) is None
    assert asked.stats.late == 1
    prompts_of_others = reader(prompts)
    assert await prompts_of_others.read(call(LARGE)) is not None
    prompts_of_others.close()
    asked.close()


async def test_while_one_is_held_up_small_and_large_ones_are_read(prompts: FakePrompts) -> None:
    asked = reader(prompts)
    async with asyncio.TaskGroup() as group:
        held = group.create_task(asked.read(call(b"slow" + LARGE)))
        await asyncio.to_thread(prompts.entered.acquire)
        assert isinstance(await asked.read(call(b"small")), Reading)  # at once, on this thread
        assert not held.done()
        held.cancel()  # its client went away, or its budget was over: the same to the thread
        await asyncio.wait([held])
        assert isinstance(await asked.read(call(LARGE)), Reading)  # in another thread
        assert not prompts.go.is_set()
    asked.close()


async def test_threads_that_are_held_up_are_few(prompts: FakePrompts) -> None:
    asked = reader(prompts)
    for _ in range(4):
        async with asyncio.TaskGroup() as group:
            held = group.create_task(asked.read(call(b"slow" + LARGE)))
            await asyncio.to_thread(prompts.entered.acquire)
            held.cancel()
            await asyncio.wait([held])
    assert await asked.read(call(LARGE)) is None
    assert asked.stats.busy == 1
    assert isinstance(await asked.read(call(b"small")), Reading)
    asked.close()


async def test_what_cannot_be_read_is_counted_by_its_reason(prompts: FakePrompts) -> None:
    asked = reader(prompts)
    assert asked.read_now(call(b"odd")) is None
    assert await asked.read(call(b"odd" + LARGE)) is None
    assert (asked.stats.unreadable, asked.stats.reasons) == (2, {"odd": 2})
    asked.close()


def test_a_fault_of_ours_fails_no_request_and_quotes_none(
    prompts: FakePrompts, caplog: pytest.LogCaptureFixture
) -> None:
    asked = reader(prompts)
    with caplog.at_level(logging.ERROR):
        assert asked.read_now(call(b"broken")) is None
    assert asked.stats.failed == 1
    assert "KeyError" in caplog.text
    assert "secret text" not in caplog.text


def test_a_prompt_beyond_the_hashers_limit_is_not_read(prompts: FakePrompts) -> None:
    asked = Reader(PrefixHasher(b"s", max_units=5), prompts=prompts)
    assert asked.read_now(call(b"123456")) is None
    assert asked.stats.reasons == {"a prompt longer than is hashed": 1}


async def test_without_files_and_engine_nothing_is_read() -> None:
    assert Reader(HASHER).read_now(call(b"text")) is None
    assert await Reader(HASHER).read(call(b"text")) is None


async def test_an_engine_is_asked_within_the_budget() -> None:
    engine = FakeEngine(ReadPrompt(b"ab", KnownSplits([1, 2]), [7, 8]))
    late = Reader(HASHER, remote=engine, budget=0.0)
    assert await late.read(call(b"text")) is None
    assert late.stats.late == 1
    engine.go.set()
    asked = Reader(HASHER, remote=engine, budget=LONG)
    assert asked.read_now(call(b"text")) is Unread.UNREAD
    found = await asked.read(call(b"text"))
    assert found is not None
    assert (found.hashes.tolist(), found.tokens) == (HASHER.hashes(b"ab").tolist(), 2)
    engine.answer = None
    assert await asked.read(call(b"text")) is None
    assert asked.stats.reasons == {"no": 1}


async def test_the_reference_reads_by_tokens() -> None:
    tokenizer = TextTokenizer(spec("qwen"))
    seams = Seams(tokenizer)
    prompts = LocalPrompts(tokenizer, seams, None)
    asked = Reader(HASHER, prompts=prompts, whole=WholeTokens(tokenizer, seams), budget=LONG)
    body = b'{"prompt": "The scheduler places each request."}'
    assert asked.units == "tokens"
    assert asked.read_now(call(body)) is Unread.UNREAD
    found = await asked.read(call(body))
    ids = tokenizer.encode("The scheduler places each request.")
    assert found is not None
    assert found.tokens == len(ids)
    assert found.splits is None
    assert np.array_equal(found.hashes, HASHER.hashes_of_ids(ids))
    asked.close()


def test_readings_of_a_growing_text_share_their_prefix() -> None:
    tokenizer = TextTokenizer(spec("qwen"))
    asked = Reader(HASHER, prompts=LocalPrompts(tokenizer, Seams(tokenizer), None))
    first, second = (asked.read_now(call(b'{"prompt": "%s"}' % text)) for text in (b"some words", b"some words more"))
    assert isinstance(first, Reading)
    assert isinstance(second, Reading)
    assert np.array_equal(first.hashes, second.hashes[: len(first.hashes)])
    assert PROSE not in repr(asked)
