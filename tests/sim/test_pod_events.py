"""Events against the engine that they tell of: no sockets, no bytes, no time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.sim import tokens
from picker.sim.engine import Engine, EngineRequest
from picker.sim.engine_hashes import BlockHasher, as_number, extra_keys
from picker.sim.latency import Profile
from picker.sim.pod_events import CacheEvents, Prompted, adapter_path
from picker.sim.tokens import TokenArray
from picker.wire.kv_events import Cleared, Event, Removed, Stored

SIZE = 4
PROFILE = Profile(
    name="small",
    c0=0.01,
    c_pf=0.001,
    c_attn=0.0,
    c_kv=0.0,
    c_seq=0.0,
    kv_tokens=13 * SIZE,
    source="made up",
    block_size=SIZE,
    max_num_batched_tokens=16,
    max_num_seqs=4,
)


def chain(ids: Sequence[int], salt: str | None = None, adapter: str | None = None) -> list[int]:
    """vLLM's numbers for the full blocks of these ids."""
    hasher, parent, numbers = BlockHasher(), None, []
    path = adapter and adapter_path(adapter)
    for index in range(len(ids) // SIZE):
        keys = extra_keys(index, adapter=adapter, path=path, salt=salt)
        parent = hasher.block(parent, ids[index * SIZE : (index + 1) * SIZE], keys)
        numbers.append(as_number(parent))
    return numbers


def numbered(told: int | bytes) -> int:
    return as_number(told) if isinstance(told, bytes) else told


@dataclass
class Bench:
    """An engine, its events, and what somebody knows who has read them all."""

    engine: Engine = field(default_factory=lambda: Engine(PROFILE))
    events: CacheEvents = field(default_factory=lambda: CacheEvents(SIZE, adapters=("ad1", "ad2")))
    view: Counter[int] = field(default_factory=Counter)
    number_of: dict[int, int] = field(default_factory=dict)  # the engine's hash -> vLLM's
    live: list[int] = field(default_factory=list)
    ids: int = 0

    def add(
        self,
        prompt: Sequence[int],
        output: Sequence[int],
        *,
        salt: str | None = None,
        adapter: str | None = None,
        session: str | None = None,
    ) -> int:
        self.ids += 1
        whole = np.array([*prompt, *output], dtype="<u4")
        hashes = tokens.block_hashes(whole, SIZE, tokens.namespace("m", adapter, salt))
        self.number_of |= dict(zip(hashes.tolist(), chain(whole.tolist(), salt, adapter), strict=True))
        self.events.add(self.ids, Prompted(whole, adapter, salt, session), hashes)
        self.engine.add(EngineRequest(self.ids, len(prompt), len(output), hashes), 0.0)
        self.live.append(self.ids)
        return self.ids

    def abort(self, request: int) -> None:
        self.engine.abort(request, 0.0)
        self.events.forget(request)
        self.live.remove(request)

    def reset(self) -> None:
        if self.engine.reset_prefix_cache():
            self.events.cleared()

    def step(self) -> tuple[Event, ...]:
        result = self.engine.step(0.0)
        if result is None:
            return ()
        self.events.begun(result)
        for record in result.finished:
            self.live.remove(record.id)
        told = self.events.take()
        for event in told:
            self.read(event)
        return told

    def run(self) -> list[Event]:
        found: list[Event] = []
        while not self.engine.idle:
            found += self.step()
        return found

    def read(self, event: Event) -> None:
        match event:
            case Stored():
                self.view.update(map(numbered, event.hashes))
            case Removed():
                self.view.subtract(map(numbered, event.hashes))
                assert min(self.view.values()) >= 0, "removed more often than stored"
            case Cleared():
                self.view.clear()

    @property
    def resident(self) -> Counter[int]:
        """vLLM's hashes of the blocks in the engine's table, with their copies."""
        pool = self.engine.pool
        copies = {h: 1 + len(pool._twins.get(h, ())) for h in pool._by_hash}
        return Counter({self.number_of[h]: count for h, count in copies.items()})


def stored(events: Sequence[Event]) -> list[Stored]:
    return [event for event in events if isinstance(event, Stored)]


def test_a_prompt_is_told_chunk_by_chunk_and_its_answer_block_by_block() -> None:
    bench = Bench()
    prompt, said = list(range(100, 122)), list(range(200, 207))
    bench.add(prompt, said)
    told = bench.run()
    numbers, whole = chain(prompt + said), prompt + said
    assert (
        [(event.hashes, event.parent, event.tokens) for event in stored(told)]
        == [
            (tuple(numbers[:4]), None, tuple(whole[:16])),  # the token budget ends the first chunk
            ((numbers[4],), numbers[3], tuple(whole[16:20])),
            ((numbers[5],), numbers[4], tuple(whole[20:24])),
            ((numbers[6],), numbers[5], tuple(whole[24:28])),  # of 29 tokens the last was never computed
        ]
    )


def test_hits_are_not_told_again_and_a_block_computed_twice_is_told_twice() -> None:
    bench = Bench()
    prompt = list(range(8))
    bench.add(prompt, [90])
    first = bench.run()
    bench.add(prompt, [91])  # all cached, so its last block is computed again
    second = bench.run()
    numbers = chain(prompt)
    assert [event.hashes for event in stored(first)] == [tuple(numbers)]
    assert [(event.hashes, event.parent) for event in stored(second)] == [((numbers[1],), numbers[0])]
    assert bench.view == {numbers[0]: 1, numbers[1]: 2}


def test_removals_come_one_by_one_and_before_the_stores_of_their_step() -> None:
    bench = Bench()
    bench.add(range(40), [90])
    bench.run()
    bench.add(range(500, 524), [91])
    (*removed, last) = bench.step()
    assert isinstance(last, Stored)
    assert [event.hashes for event in removed if isinstance(event, Removed)] == [
        (number,) for number in chain(range(40))[:-3:-1]
    ]


def test_a_salt_is_in_the_first_key_and_an_adapter_in_all() -> None:
    bench = Bench()
    bench.add(range(8), [90], salt="s", adapter="ad2", session="sess-1")
    (event,) = bench.step()
    assert isinstance(event, Stored)
    assert event.hashes == tuple(chain(range(8), salt="s", adapter="ad2"))
    assert event.extra_keys == [("ad2", "s"), ("ad2",)]
    assert (event.lora_id, event.lora_name, event.session) == (2, "ad2", "sess-1")


def test_a_reset_is_told_with_the_next_step_and_as_often_as_it_happened() -> None:
    bench = Bench()
    bench.add(range(8), [90])
    bench.run()
    bench.reset()
    bench.reset()
    assert bench.events.take() == ()
    bench.add([1, 2], [90])
    assert bench.step() == (Cleared(), Cleared())
    assert not +bench.view


def test_a_reset_during_a_step_is_told_after_it() -> None:
    bench = Bench()
    request = bench.add(range(8), [90, 91])
    result = bench.engine.step(0.0)
    assert result is not None
    bench.events.begun(result)
    bench.abort(request)
    bench.reset()
    assert [type(event) for event in bench.events.take()] == [Stored]
    bench.add(range(4), [90])
    assert [type(event) for event in bench.step()] == [Cleared, Stored]


def test_whole_hashes_are_32_bytes() -> None:
    bench = Bench(events=CacheEvents(SIZE, whole_hashes=True))
    bench.add(range(8), [90])
    (event,) = bench.step()
    assert isinstance(event, Stored)
    assert [len(h) for h in event.hashes if isinstance(h, bytes)] == [32, 32]
    assert [as_number(h) for h in event.hashes if isinstance(h, bytes)] == chain(range(8))


# Few prefixes and long tails, in a cache of twelve blocks: hits, evictions, twins, preemptions.
REQUESTS = st.tuples(
    st.just("add"), st.integers(0, 2), st.integers(1, 30), st.integers(1, 14), st.sampled_from((None, "s"))
)
DEEDS = st.lists(
    st.one_of(REQUESTS, st.tuples(st.just("abort"), st.integers(0, 9)), st.just(("reset",)), st.just(("step",))),
    max_size=40,
)


def prompt_of(family: int, length: int, number: int) -> TokenArray:
    shared = np.arange(family * 1000, family * 1000 + min(length, 12), dtype="<u4")
    return np.concatenate([shared, np.arange(number * 100, number * 100 + length - len(shared), dtype="<u4")])


@settings(max_examples=150, deadline=None)
@given(DEEDS)
def test_who_reads_all_events_knows_what_is_cached_after_every_step(deeds: list[tuple[object, ...]]) -> None:
    bench = Bench()
    for deed in deeds:
        match deed:
            case ("add", int(family), int(length), int(output), salt):
                prompt = prompt_of(family, length, bench.ids).tolist()
                bench.add(prompt, range(7000, 7000 + output), salt=salt)  # type: ignore[arg-type]
            case ("abort", int(which)) if bench.live:
                bench.abort(bench.live[which % len(bench.live)])
            case ("reset",):
                bench.reset()
            case ("step",):
                if not bench.engine.idle:
                    bench.step()
                    assert +bench.view == bench.resident
    while not bench.engine.idle:
        bench.step()
        assert +bench.view == bench.resident
    assert bench.events._cached.keys() == bench.engine.pool._by_hash.keys()
    assert not bench.events._requests
