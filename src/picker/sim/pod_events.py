"""What one engine of a simulated pod does to its prefix cache, in the words and with the hashes of vLLM's KV events.

Owns the digests of cached blocks and the events of the step in progress. Knows no socket, no bytes and no time.

The engine works with cheap hashes of its own; a block gets vLLM's when it is stored, so that a hit costs nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from picker.sim.engine import StepResult, StoredBlocks
from picker.sim.engine_hashes import BlockHasher, Keys, as_number, extra_keys, told_keys
from picker.sim.tokens import TokenArray
from picker.types import UInt64Array
from picker.wire.kv_events import Cleared, Event, Hash, Removed, Stored


@dataclass(frozen=True, slots=True, eq=False)
class Prompted:
    """What the blocks of one request are made of. tokens: ids of its prompt and of the answer it will get."""

    tokens: TokenArray
    adapter: str | None = None
    salt: str | None = None
    session: str | None = None


class _Cached:
    """A hash in the cache: its digest as vLLM has it, how events tell it, and how many blocks carry it."""

    __slots__ = ("copies", "digest", "told")

    def __init__(self, digest: bytes, told: Hash) -> None:
        self.digest = digest
        self.told = told
        self.copies = 0


class CacheEvents:
    """The KV events of one engine, in vLLM's order.

    Call `add` before the engine's `add`, `begun` with every step's result when the step begins (then its blocks are in
    the engine's hash table), `take` when the step has ended, and `cleared` and `forget` in between as they happen.

    adapters: by their ids, which count from 1. whole_hashes: tell 32 bytes instead of 64 bits of a hash.
    """

    def __init__(
        self,
        block_size: int,
        hasher: BlockHasher | None = None,
        *,
        adapters: Sequence[str] = (),
        whole_hashes: bool = False,
    ) -> None:
        self._block_size = block_size
        self._hasher = hasher or BlockHasher()
        self._adapters = {name: number for number, name in enumerate(adapters, start=1)}
        self._whole_hashes = whole_hashes
        self._requests: dict[int, Prompted] = {}
        self._cached: dict[int, _Cached] = {}
        self._chains: dict[int, Sequence[int] | UInt64Array] = {}  # a request's hashes as the engine has them
        self._step: list[Event] = []
        self._after: list[Event] = []  # of what happened while the step was in progress

    def add(self, request_id: int, prompted: Prompted, hashes: Sequence[int] | UInt64Array) -> None:
        """A request is about to enter the engine. hashes: the engine's, of its blocks from the first on."""
        self._requests[request_id] = prompted
        self._chains[request_id] = hashes

    def forget(self, request_id: int) -> None:
        """The request has left the engine; its blocks stay cached."""
        self._requests.pop(request_id, None)
        self._chains.pop(request_id, None)

    def begun(self, result: StepResult) -> None:
        """A step begins whose effects these are."""
        self._step += self._after
        self._after = []
        for block_hash in result.removed:
            self._step.append(Removed(hashes=(self._removed(block_hash),), medium="GPU", group=0))
        for stored in result.stored:
            self._step.append(self._stored(stored))
        for record in result.finished:
            self.forget(record.id)

    def cleared(self) -> None:
        """The cache was emptied. Told with the next step that begins, as vLLM does: only a step drains its queue."""
        self._cached.clear()
        self._after.append(Cleared())

    def take(self) -> tuple[Event, ...]:
        """The events of the step that has ended, and of what came before it; none twice."""
        events, self._step = tuple(self._step), []
        return events

    def _removed(self, block_hash: int) -> Hash:
        cached = self._cached[block_hash]
        cached.copies -= 1
        if not cached.copies:
            del self._cached[block_hash]
        return cached.told

    def _stored(self, stored: StoredBlocks) -> Stored:
        prompted, size, first = self._requests[stored.request_id], self._block_size, stored.first
        tokens = prompted.tokens[first * size : (first + len(stored.hashes)) * size].tolist()
        parent = last = self._cached[int(self._chains[stored.request_id][first - 1])] if first else None
        keys = [self._keys(prompted, first + i) for i in range(len(stored.hashes))]
        told: list[Hash] = []
        for number, block_hash in enumerate(stored.hashes):
            block = tokens[number * size : (number + 1) * size]
            last = self._cache(block_hash, None if last is None else last.digest, block, keys[number])
            told.append(last.told)
        return Stored(
            hashes=tuple(told),
            parent=None if parent is None else parent.told,
            tokens=tuple(tokens),
            block_size=size,
            lora_id=self._adapters.get(prompted.adapter) if prompted.adapter else None,
            medium="GPU",
            lora_name=prompted.adapter,
            extra_keys=[told_keys(each) for each in keys],
            group=0,
            kind="full_attention",
            session=prompted.session,
        )

    def _cache(self, block_hash: int, parent: bytes | None, tokens: list[int], keys: Keys) -> _Cached:
        cached = self._cached.get(block_hash)
        if cached is None:
            digest = self._hasher.block(parent, tokens, keys)
            told = digest if self._whole_hashes else as_number(digest)
            cached = self._cached[block_hash] = _Cached(digest, told)
        cached.copies += 1
        return cached

    def _keys(self, prompted: Prompted, index: int) -> Keys:
        adapter, salt = prompted.adapter, prompted.salt
        if adapter is None and (salt is None or index):
            return ()
        return extra_keys(index, adapter=adapter, path=adapter and adapter_path(adapter), salt=salt)


def adapter_path(adapter: str) -> str:
    """Where a simulated pod says that it loaded an adapter from."""
    return f"/adapters/{adapter}"
