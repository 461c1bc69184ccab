"""Reads calls for exact matching within a time that a request may wait: small prompts at once, large ones in a thread.

A call that cannot be read, or not in time, gives None and is routed without exact knowledge; nothing here refuses or
delays a request beyond the budget. A reading that runs over does not stand in the way of the next: the thread it holds
is left to it and another one begins, up to a few.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from picker.prefix.spelling import PrefixHasher
from picker.tokenizers.conversation import Unreadable
from picker.tokenizers.prompt import ReadPrompt
from picker.tokenizers.whole import WholeTokens
from picker.types import Call, Reading, Unread

_log = logging.getLogger(__name__)

BUDGET = 0.020
_WARM = 1 << 18  # bytes of keys made at the start, so that no ordinary prompt waits for them
_LEFT_BEHIND = 4  # threads that may be busy with readings nobody waits for


class Prompts(Protocol):
    """What turns a call into canonical bytes in this process."""

    def read(self, call: Call) -> ReadPrompt:
        """Raises Unreadable."""
        ...


class AsyncPrompts(Protocol):
    """The same by asking an engine."""

    async def read(self, call: Call) -> ReadPrompt:
        """Raises Unreadable."""
        ...


@dataclass(slots=True)
class ReaderStats:
    """Calls by what became of them. reasons: unreadable ones by why, in fixed words."""

    read: int = 0
    threaded: int = 0  # of those read, how many in a thread
    unreadable: int = 0
    late: int = 0  # over the budget
    busy: int = 0  # not tried: all threads hold readings that nobody waits for
    failed: int = 0  # by a fault of ours
    reasons: dict[str, int] = field(default_factory=dict)


class Reader:
    """Turns calls into readings.

    prompts, remote: where text comes from; prompts wins, and without either nothing is read. is_adapter: whether a
    model's name is that of a LoRA adapter. whole: tokenise fully and match by tokens (reference), not by bytes. budget:
    seconds a call may wait. inline_bytes: bodies up to so many bytes are read on the caller's thread.
    """

    def __init__(
        self,
        hasher: PrefixHasher,
        *,
        prompts: Prompts | None = None,
        remote: AsyncPrompts | None = None,
        is_adapter: Callable[[str], bool] = lambda model: False,
        whole: WholeTokens | None = None,
        budget: float = BUDGET,
        inline_bytes: int = 64 << 10,
    ) -> None:
        self._hasher, self._prompts, self._remote, self._is_adapter = hasher, prompts, remote, is_adapter
        self._whole, self._budget, self._inline_bytes = whole, budget, 0 if whole is not None else inline_bytes
        self._thread = _Thread()
        self.stats = ReaderStats()
        hasher.hashes(bytes(min(_WARM, hasher.max_units)))

    @property
    def units(self) -> str:
        """What readings count in: "bytes" or "tokens"."""
        return "bytes" if self._whole is None else "tokens"

    def read_now(self, call: Call) -> Reading | Unread | None:
        """Read a call if that is cheap: some hundred microseconds at most."""
        if self._prompts is None:
            return None if self._remote is None else Unread.UNREAD
        if len(call.body) > self._inline_bytes:
            return Unread.UNREAD
        return self._counted(self._tried(call))

    async def read(self, call: Call) -> Reading | None:
        """Read a call within the budget; None where it cannot be read, or not in time."""
        found = self.read_now(call)
        if not isinstance(found, Unread):
            return found
        if self._prompts is None:
            return await self._read_remote(call)
        job = self._thread.begin(lambda: self._tried(call))
        if job is None:
            self.stats.busy += 1
            return None
        try:
            async with asyncio.timeout(self._budget):
                await asyncio.wait([asyncio.wrap_future(job)])
        except TimeoutError:
            self._thread.leave(job)
            self.stats.late += 1
            return None
        except asyncio.CancelledError:
            self._thread.leave(job)
            raise
        self.stats.threaded += 1
        return self._counted(job.result())

    def close(self) -> None:
        """Let the threads go. Readings that still run end by themselves."""
        self._thread.close()

    async def _read_remote(self, call: Call) -> Reading | None:
        assert self._remote is not None
        try:
            async with asyncio.timeout(self._budget):
                prompt = await self._remote.read(call)
        except TimeoutError:
            self.stats.late += 1
            return None
        except Unreadable as why:
            return self._counted(why)
        return self._counted(self._tried(call, prompt))

    def _tried(self, call: Call, prompt: ReadPrompt | None = None) -> Reading | Exception:
        """A reading or what came of it instead; a value, because in a thread nobody may be left to catch it."""
        try:
            if prompt is None:
                assert self._prompts is not None
                prompt = self._prompts.read(call)
            return self._reading(call, prompt)
        except UnicodeError:
            return Unreadable("text that is not UTF-8")
        except Exception as fault:
            return fault

    def _reading(self, call: Call, prompt: ReadPrompt) -> Reading:
        if len(prompt.data) > self._hasher.max_units:
            raise Unreadable("a prompt longer than is hashed")
        adapter = call.model if call.model is not None and self._is_adapter(call.model) else None
        tokens = None if prompt.ids is None else len(prompt.ids)
        if self._whole is None:
            hashes = self._hasher.hashes(prompt.data)
            return Reading(hashes, adapter, call.salt, tokens, prompt.splits, prompt.whole)
        ids = prompt.ids if prompt.ids is not None else self._whole.ids(prompt.data)
        return Reading(self._hasher.hashes_of_ids(ids), adapter, call.salt, len(ids), None, prompt.whole)

    def _counted(self, found: Reading | Exception) -> Reading | None:
        match found:
            case Reading():
                self.stats.read += 1
                return found
            case Unreadable():
                why = str(found)
                self.stats.unreadable += 1
                self.stats.reasons[why] = self.stats.reasons.get(why, 0) + 1
            case _:
                # The request must go on. No traceback: it may quote the prompt.
                self.stats.failed += 1
                _log.error("a call could not be read for exact matching: %s", type(found).__name__)
        return None


class _Thread:
    """One worker, replaced when it is held up."""

    def __init__(self) -> None:
        self._pool = self._made()
        self._left: set[Future[Reading | Exception]] = set()

    def begin(self, work: Callable[[], Reading | Exception]) -> Future[Reading | Exception] | None:
        """Queue some work; None while too many threads are held."""
        self._left = {job for job in self._left if not job.done()}
        return self._pool.submit(work) if len(self._left) < _LEFT_BEHIND else None

    def leave(self, job: Future[Reading | Exception]) -> None:
        """Nobody waits for this any more. Where it has begun, it keeps its thread and the next work gets another."""
        if job.cancel() or job.done():
            return
        self._left.add(job)
        held, self._pool = self._pool, self._made()
        # What was queued behind it has its own budget, and is late or soon will be.
        held.shutdown(wait=False, cancel_futures=False)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _made(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="picker-reader")
