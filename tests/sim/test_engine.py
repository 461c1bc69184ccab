import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.sim.adapters import AdapterSlots
from picker.sim.engine import Engine, EngineRequest, FinishedRequest, FinishReason, Policy, StepResult
from picker.sim.latency import Profile, profile

Timeline = list[tuple[float, StepResult]]


def pod(**limits: Any) -> Profile:
    """A quick pod of 64 blocks of 32 tokens unless told otherwise."""
    base = Profile(
        name="tiny",
        c0=1e-3,
        c_pf=1e-5,
        c_attn=1e-9,
        c_kv=1e-8,
        c_seq=1e-5,
        kv_tokens=64 * 32,
        source="made up",
        block_size=32,
        max_num_batched_tokens=2048,
        max_num_seqs=128,
    )
    return dataclasses.replace(base, **limits)


ROOMY = pod(kv_tokens=4096 * 32)


def chain(tokens: Sequence[int], size: int = 32) -> list[int]:
    """Chained hashes of the full blocks of a prompt."""
    hashes, parent = [], 0
    for end in range(size, len(tokens) + 1, size):
        parent = hash((parent, *tokens[end - size : end]))
        hashes.append(parent)
    return hashes


def ask(number: int, tokens: Sequence[int] | int, output: int = 1, **more: object) -> EngineRequest:
    """A request with these prompt tokens, or with so many of its own; its output blocks have hashes of their own."""
    prompt = [number * 1_000_000 + i for i in range(tokens)] if isinstance(tokens, int) else tokens
    defaults: dict[str, object] = {"hash_of": lambda i: hash((number, "output", i))}
    return EngineRequest(number, len(prompt), output, chain(prompt), **(defaults | more))  # type: ignore[arg-type]


def drain(engine: Engine, now: float = 0.0, *, merge: bool = False) -> Timeline:
    """Step until idle. Each result with the time at which it holds."""
    timeline: Timeline = []
    while (result := engine.step(now, math.inf if merge else None)) is not None:
        now += result.duration
        timeline.append((now, result))
        engine.check_integrity()
    return timeline


def finished(timeline: Timeline) -> dict[int, FinishedRequest]:
    return {record.id: record for _, result in timeline for record in result.finished}


def cached(engine: Engine, requests: Iterable[EngineRequest]) -> list[int | None]:
    """Serve the requests one after the other; the cached tokens of each."""
    counts = []
    for request in requests:
        engine.add(request, 0.0)
        counts.append(finished(drain(engine))[request.id].usage.cached_tokens)
    return counts


SYSTEM, USER, OTHER, AFTER = ([k * 10_000 + i for i in range(n)] for k, n in ((1, 1000), (2, 300), (3, 500), (4, 200)))


# --- prefix cache, as measured on a vLLM 0.32 pod -------------------------------------------------------------


def test_hits_are_those_of_a_real_pod() -> None:
    prompts = {
        "r1: system + user": (SYSTEM + USER, 0),
        "r2: same system, other user": (SYSTEM + OTHER, 992),
        "r2 repeated": (SYSTEM + OTHER, 1472),
        "r3: r1 and more": (SYSTEM + USER + AFTER, 1280),
        "r4: three tokens before the system prompt": ([7, 8, 9, *SYSTEM], 0),
        "r5: first 992, an exact multiple, loses a block": (SYSTEM[:992], 960),
    }
    requests = [ask(i, tokens) for i, (tokens, _) in enumerate(prompts.values())]
    found = cached(Engine(ROOMY), requests)
    assert dict(zip(prompts, found, strict=True)) == {name: hit for name, (_, hit) in prompts.items()}


@pytest.mark.parametrize(
    ("prompt", "hit"),
    [
        (USER, 288),
        (USER[:288], 256),
        (USER[:289], 288),
        (USER[:100] + OTHER[:60], 96),
        (USER[:96], 64),
        (USER[:33], 32),
        (USER[:32], 0),
    ],
)
def test_a_hit_is_whole_blocks_of_what_is_shared_less_the_last_token(prompt: list[int], hit: int) -> None:
    assert cached(Engine(ROOMY), [ask(1, USER), ask(2, prompt)]) == [0, hit]


@pytest.mark.parametrize(("length", "hit"), [(1000, 992), (3900, 3872)])
def test_identical_prompts_in_flight_hit_what_the_first_one_is_computing(length: int, hit: int) -> None:
    engine, tokens = Engine(ROOMY), list(range(length))
    for number in range(6):
        engine.add(ask(number, tokens), 0.0)
    records = finished(drain(engine))
    assert [records[n].usage.cached_tokens for n in range(6)] == [0, hit, hit, hit, hit, hit]


def test_hit_counters_are_tokens_counted_at_admission() -> None:
    engine = Engine(ROOMY)
    cached(engine, [ask(1, USER), ask(2, USER)])
    assert (engine.counters.queries, engine.counters.hits) == (600, 288)


def test_evicted_tail_blocks_shorten_the_hit() -> None:
    engine = Engine(pod(kv_tokens=(1 + 32 + 6) * 32))
    tokens = list(range(1000))
    # Of 38 blocks A leaves 31 hashed; B takes the 7 blank ones and the last 6 of A.
    found = cached(engine, [ask(1, tokens), ask(2, 13 * 32), ask(3, tokens)])
    assert found == [0, 0, 800]


def test_generated_tokens_are_cached_when_their_block_is_full() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, 60, output=40), 0.0)
    blocks = [run for _, result in drain(engine) for run in result.stored]
    # 99 of the 100 tokens have KV: the last one is sampled and never computed.
    assert [(run.first, len(run.hashes)) for run in blocks] == [(0, 1), (1, 1), (2, 1)]


def test_the_next_turn_hits_the_answer_of_the_one_before() -> None:
    engine = Engine(ROOMY)
    turn = ask(1, 60, output=40)
    engine.add(turn, 0.0)
    drain(engine)
    conversation = [*turn.block_hashes, *(turn.hash_of(i) for i in (1, 2) if turn.hash_of)]
    engine.add(EngineRequest(2, 130, 1, conversation), 0.0)
    assert finished(drain(engine))[2].usage.cached_tokens == 96


def test_output_without_hashes_is_not_cached() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, 60, output=40, hash_of=None), 0.0)
    assert [len(run.hashes) for _, result in drain(engine) for run in result.stored] == [1]


def test_a_full_hit_on_an_exact_multiple_stores_its_last_hash_a_second_time() -> None:
    engine, tokens = Engine(pod(kv_tokens=9 * 32)), list(range(96))
    for number in (1, 2):
        engine.add(ask(number, tokens), 0.0)
        timeline = drain(engine)
    last = chain(tokens)[-1]
    assert [run.hashes for _, result in timeline for run in result.stored] == [(last,)]
    engine.add(ask(3, 8 * 32), 0.0)
    removed = [h for _, result in drain(engine) for h in result.removed]
    # The copy was freed in the same pass as the prefix, tail first; then the first one, freed earlier but kept.
    assert sorted(removed) == sorted([*chain(tokens), last])
    assert removed.index(chain(tokens)[0]) == 3


def test_blocks_are_stored_chunk_by_chunk() -> None:
    engine = Engine(pod(kv_tokens=4096 * 32, max_num_batched_tokens=256))
    engine.add(ask(1, 600), 0.0)
    assert [[len(run.hashes) for run in result.stored] for _, result in drain(engine)] == [[8], [8], [2]]


def test_reset_forgets_the_cache_only_when_nothing_runs() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, USER, output=5), 0.0)
    engine.step(0.0)
    assert not engine.reset_prefix_cache()
    drain(engine)
    assert engine.reset_prefix_cache()
    assert cached(engine, [ask(2, USER)]) == [0]


# --- scheduling ----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_prefilled_in_chunks_of_the_token_budget() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, 5000), 0.0)
    timeline = drain(engine)
    assert [result.prefill_tokens for _, result in timeline] == [2048, 2048, 904]
    assert [result.first_tokens for _, result in timeline] == [(), (), (1,)]


def test_decoding_goes_on_beside_a_chunked_prefill_and_counts_in_its_budget() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, 10, output=50), 0.0)
    engine.step(0.0)
    engine.add(ask(2, 4000), 0.0)
    results = [engine.step(0.0) for _ in range(2)]
    assert [(r.prefill_tokens, r.decoding) for r in results if r] == [(2047, (1,)), (1953, (1,))]


def test_what_is_left_of_the_budget_starts_the_next_prefill() -> None:
    engine = Engine(ROOMY)
    for number in (1, 2):
        engine.add(ask(number, 1500), 0.0)
    assert [result.prefill_tokens for _, result in drain(engine)] == [2048, 952]


def test_no_more_than_max_num_seqs_run() -> None:
    engine = Engine(pod(max_num_seqs=2, kv_tokens=4096 * 32))
    for number in range(3):
        engine.add(ask(number, 10, output=3), 0.0)
    engine.step(0.0)
    assert (engine.num_running, engine.num_waiting) == (2, 1)
    assert set(finished(drain(engine))) == {0, 1, 2}


def test_the_head_of_the_queue_that_does_not_fit_holds_up_those_behind() -> None:
    engine = Engine(pod())  # 63 usable blocks
    engine.add(ask(1, 40 * 32, output=20), 0.0)
    engine.step(0.0)
    engine.add(ask(2, 30 * 32), 0.0)
    engine.add(ask(3, 10), 0.0)
    engine.step(0.0)
    assert (engine.num_running, engine.num_waiting) == (1, 2)
    order = [record.id for _, result in drain(engine) for record in result.finished]
    assert order == [1, 2, 3]


def test_admission_wants_the_whole_prompt_free_though_a_chunk_would_fit() -> None:
    engine = Engine(pod(max_num_batched_tokens=256))
    engine.add(ask(1, 40 * 32, output=20), 0.0)
    for _ in range(6):
        engine.step(0.0)
    engine.add(ask(2, 25 * 32), 0.0)  # 63 - 41 = 22 blocks are free, the first chunk needs 8
    engine.step(0.0)
    assert (engine.num_running, engine.num_waiting) == (1, 1)


def test_a_hit_on_held_blocks_lets_a_long_prompt_in() -> None:
    engine, shared = Engine(pod()), list(range(40 * 32))
    engine.add(ask(1, shared, output=20), 0.0)
    engine.step(0.0)
    engine.add(ask(2, shared + [5] * 64, output=20), 0.0)
    engine.step(0.0)
    assert engine.num_running == 2
    assert engine.kv_usage == pytest.approx((40 + 1 + 2) / 63)


def test_free_hit_blocks_count_as_needed() -> None:
    engine, shared = Engine(pod()), list(range(40 * 32))
    engine.add(ask(1, shared), 0.0)
    drain(engine)  # 40 blocks are cached and free
    engine.add(ask(2, 30 * 32, output=20), 0.0)
    engine.step(0.0)  # takes the 23 blank ones and 7 cached ones
    engine.add(ask(3, shared), 0.0)
    engine.step(0.0)
    # 33 of its blocks are found, and must be held besides 7 new ones: 40 are wanted and 32 are free.
    assert (engine.num_running, engine.num_waiting) == (1, 1)


def test_a_queue_held_up_by_blocks_moves_when_the_block_it_lacks_is_stored() -> None:
    """The head shares the runner's output; the runner stores that block while the head waits for room."""
    runner = ask(1, 31 * 32, output=50)
    follower = EngineRequest(2, 33 * 32, 1, [*runner.block_hashes, runner.hash_of(31), 5])  # type: ignore[misc]
    for merge in (False, True):
        engine = Engine(pod(kv_tokens=(1 + 33) * 32))
        engine.add(runner, 0.0)
        engine.step(0.0)
        engine.add(follower, 0.0)
        timeline = drain(engine, merge=merge)
        admitted = next(i for i, (_, result) in enumerate(timeline) if result.prefill_tokens)
        assert sum(result.steps for _, result in timeline[:admitted]) == 31
        assert finished(timeline)[2].usage.cached_tokens == 32 * 32


def test_priority_goes_before_arrival() -> None:
    engine = Engine(pod(max_num_seqs=1), policy=Policy.PRIORITY)
    for number, priority in enumerate([0, 5, -9, 0]):
        engine.add(ask(number, 10, arrived_at=float(number), priority=priority), 0.0)
    assert [record.id for _, result in drain(engine) for record in result.finished] == [2, 0, 3, 1]


def test_first_come_first_served_ignores_priority() -> None:
    engine = Engine(pod(max_num_seqs=1))
    for number, priority in enumerate([0, 5, -9]):
        engine.add(ask(number, 10, priority=priority), 0.0)
    assert [record.id for _, result in drain(engine) for record in result.finished] == [0, 1, 2]


# --- preemption ----------------------------------------------------------------------------------------------


def test_block_shortage_preempts_as_measured_on_a_real_pod() -> None:
    """63 usable blocks, 12 requests of 200 + 120 tokens, 8 slots: (running, waiting, usage) walks as it did there."""
    engine = Engine(pod(max_num_seqs=8))
    for number in range(12):
        engine.add(ask(number, 200, output=120), 0.0)
    states, now = list[tuple[float | None, float | None, float]](), 0.0
    while (result := engine.step(now)) is not None:
        now += result.duration
        load = engine.load(now)
        states.append((load.running, load.waiting, round(load.kv_usage or 0.0, 2)))
        engine.check_integrity()
    walked = [state for state, _ in itertools.groupby(states)]
    assert engine.counters.preemptions == 2
    # 8 x 7 blocks; the eighth block of each is one too many; 7 x 9 fill the pool; 6 x 10; the last six together.
    assert walked[1:5] == [(8, 4, 0.89), (7, 5, 0.89), (7, 5, 1.0), (6, 6, 0.95)]
    assert walked[6][:2] == (6, 0)
    assert engine.counters.success == {FinishReason.LENGTH: 12}


def test_a_preempted_sequence_goes_to_the_front_and_keeps_what_it_has_emitted() -> None:
    engine = Engine(pod(max_num_seqs=8))
    for number in range(12):
        engine.add(ask(number, 200, output=120), 0.0)
    timeline = drain(engine)
    preempted = [number for _, result in timeline for number in result.preempted]
    assert preempted == [7, 6]
    assert [number for _, result in timeline for number in result.resumed] == [6, 7]
    emitted = dict.fromkeys(range(12), 0)
    for _, result in timeline:
        for number in (*result.first_tokens, *result.decoding, *result.resumed):
            emitted[number] += 1
    assert set(emitted.values()) == {120}
    records = finished(timeline)
    assert [records[n].preemptions for n in range(12)] == [0] * 6 + [1, 1] + [0] * 4
    assert engine.counters.generation_tokens == 12 * 120


def test_cached_tokens_and_hit_counters_are_those_of_the_first_admission() -> None:
    engine = Engine(pod(max_num_seqs=8))
    for number in range(12):
        engine.add(ask(number, 200, output=120), 0.0)
    records = finished(drain(engine))
    assert records[7].usage.cached_tokens == 0  # though its recomputation started from its own blocks
    assert (engine.counters.queries, engine.counters.hits) == (12 * 200, 0)


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    engine = Engine(pod(max_num_seqs=8), policy=Policy.PRIORITY)
    for number in range(8):
        engine.add(ask(number, 200, output=120, arrived_at=float(number)), 0.0)
    engine.step(0.0)
    engine.add(ask(8, 10, priority=-1), 0.0)  # there is room for it, but no slot
    results = [result for _, result in drain(engine)]
    at = next(i for i, result in enumerate(results) if result.preempted)
    assert (results[at].preempted, results[at].prefill_tokens) == ((7,), 0)
    assert results[at + 1].first_tokens == (8,)


def test_under_priority_the_least_urgent_is_preempted() -> None:
    engine = Engine(pod(max_num_seqs=8), policy=Policy.PRIORITY)
    for number in range(8):
        engine.add(ask(number, 200, output=120, priority=9 if number == 3 else 0, arrived_at=float(number)), 0.0)
    preempted = [number for _, result in drain(engine) for number in result.preempted]
    assert preempted == [3, 7]


# --- time ----------------------------------------------------------------------------------------------------


def test_a_lone_request_takes_exactly_what_the_formula_says() -> None:
    qwen = profile("qwen3-32b-2xh100")
    engine = Engine(qwen)
    engine.add(EngineRequest(1, 6000, 100), 0.0)
    record = finished(drain(engine))[1]
    ttft = qwen.c0 + qwen.c_pf * 6000 + qwen.c_attn * 6000 * 3000
    contexts = range(6000, 6099)
    decode = sum(qwen.c0 + qwen.c_seq + qwen.c_kv * context for context in contexts)
    assert record.first_token_at == pytest.approx(ttft)
    assert record.finished_at == pytest.approx(ttft + decode)


@pytest.mark.parametrize(("batch", "published_ms"), [(21, 8.1), (47, 8.95), (80, 10.3), (119, 11.6)])
def test_inter_token_latency_of_8b_on_an_h100_is_the_published_one(batch: int, published_ms: float) -> None:
    engine = Engine(profile("llama-3.1-8b-h100"))
    for number in range(batch):
        engine.add(EngineRequest(number, 200, 63), 0.0)
    decodes = [result for _, result in drain(engine) if len(result.decoding) == batch and not result.prefill_tokens]
    assert len(decodes) > 50
    itl_ms = 1e3 * sum(r.duration for r in decodes) / len(decodes)
    assert itl_ms == pytest.approx(published_ms, rel=0.03)


def test_a_slower_pod_takes_longer_by_that_factor() -> None:
    times = []
    for factor in (1.0, 2.5):
        engine = Engine(ROOMY)
        engine.slow_down(factor)
        engine.add(ask(1, 100, output=10), 0.0)
        times.append(drain(engine)[-1][0])
    assert times[1] == pytest.approx(2.5 * times[0])


def test_noise_has_mean_one_and_the_profiles_spread() -> None:
    noisy = pod(kv_tokens=130 * 32, noise_sd=0.05, c_kv=0.0)
    engine = Engine(noisy, noise=np.random.default_rng(1))
    engine.add(ask(1, 10, output=4000), 0.0)
    durations = np.array([result.duration for _, result in drain(engine)[1:]])
    factors = durations / noisy.step_time(prefill_tokens=0, prefill_work=0, decodes=1, context=0)
    assert factors.mean() == pytest.approx(1.0, abs=0.004)
    assert factors.std() == pytest.approx(0.05, rel=0.1)


def test_records_tell_when_each_thing_happened() -> None:
    engine = Engine(pod(max_num_seqs=1))
    engine.add(ask(1, 10, output=2, arrived_at=0.5), 1.0)
    engine.add(ask(2, 10, output=2, arrived_at=0.75, ends_with=FinishReason.STOP), 1.0)
    timeline = drain(engine, now=1.0)
    ends = [end for end, _ in timeline]
    second = finished(timeline)[2]
    assert (second.arrived_at, second.queued_at) == (0.75, 1.0)
    assert (second.scheduled_at, second.first_token_at, second.finished_at) == (ends[1], ends[2], ends[3])
    assert second.reason is FinishReason.STOP


# --- what a scrape sees --------------------------------------------------------------------------------------


def test_gauges_show_the_end_of_the_last_completed_step() -> None:
    engine = Engine(pod(), name="a", started_at=3.0)
    engine.add(ask(1, 320, output=2), 0.0)
    assert (engine.load(0.0).running, engine.load(0.0).waiting) == (0, 0)
    seen = []
    while engine.step(0.0) is not None:
        load = engine.load(1.0)
        seen.append((load.running, load.waiting, round((load.kv_usage or 0) * 63)))
    assert seen == [(0, 0, 0), (1, 0, 10)]
    idle = engine.load(2.0)
    assert (idle.running, idle.waiting, idle.kv_usage) == (0, 0, 0.0)
    assert (idle.name, idle.observed_at, idle.started_at) == ("a", 2.0, 3.0)
    assert (idle.block_size, idle.kv_capacity_tokens, idle.adapters) == (32, 2048, None)


def test_gauges_return_to_zero_after_an_abort() -> None:
    engine = Engine(pod())
    engine.add(ask(1, 320, output=50), 0.0)
    engine.step(0.0)
    assert engine.abort(1, 0.0)
    assert engine.step(0.1) is None
    assert (engine.load(0.1).running, engine.load(0.1).kv_usage) == (0, 0.0)


# --- leaving early -------------------------------------------------------------------------------------------


def test_abort_frees_blocks_and_keeps_their_hashes() -> None:
    engine = Engine(ROOMY)
    engine.add(ask(1, USER, output=50), 0.0)
    engine.step(0.0)
    engine.step(0.0)
    assert engine.abort(1, 0.0)
    assert (engine.kv_usage, engine.idle) == (0.0, True)
    assert cached(engine, [ask(2, USER)]) == [288]


def test_abort_of_a_waiting_request_leaves_the_others() -> None:
    engine = Engine(pod(max_num_seqs=1))
    for number in (1, 2, 3):
        engine.add(ask(number, 10, output=3), 0.0)
    engine.step(0.0)
    assert engine.abort(2, 0.0)
    assert engine.num_waiting == 1
    assert set(finished(drain(engine))) == {1, 3}
    assert FinishReason.ABORT not in engine.counters.success  # as vLLM counts a client that left: not at all


def test_abort_of_an_unknown_or_finished_request_does_nothing() -> None:
    engine = Engine(ROOMY)
    cached(engine, [ask(1, 10)])
    assert not engine.abort(1, 0.0)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (ask(1, 10), "in the engine already"),
        (ask(2, 63 * 32, output=2), "do not fit in 63 blocks"),
        (EngineRequest(3, 0, 1), "no prompt"),
        (EngineRequest(4, 1, 0), "no output"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(request_: EngineRequest, why: str) -> None:
    engine = Engine(pod())
    engine.add(ask(1, 10), 0.0)
    with pytest.raises(ValueError, match=why):
        engine.add(request_, 0.0)


def test_a_request_that_just_fits_is_served() -> None:
    engine = Engine(pod())
    engine.add(ask(1, 63 * 32, output=1), 0.0)
    engine.add(ask(2, 60 * 32, output=3 * 32 + 1), 0.0)
    assert set(finished(drain(engine))) == {1, 2}


# --- LoRA ----------------------------------------------------------------------------------------------------


def test_an_adapter_beyond_the_slots_is_passed_over() -> None:
    engine = Engine(ROOMY, adapters=AdapterSlots(1))
    for number, lora in enumerate(["a", "b", "a", None]):
        engine.add(ask(number, 10, output=3, lora=lora), 0.0)
    result = engine.step(0.0)
    assert result is not None
    assert result.first_tokens == (0, 2, 3)
    assert (engine.num_waiting, engine.num_deferred) == (1, 1)
    assert engine.active_adapters == {"a", "b"}
    assert [r.id for _, result in drain(engine, merge=True) for r in result.finished] == [0, 2, 3, 1]
    assert (engine.num_deferred, engine.active_adapters) == (0, frozenset())


def test_an_adapter_that_is_not_on_the_gpu_holds_up_its_step() -> None:
    slots = AdapterSlots(2, load_s=1.0, overhead=0.0)
    engine = Engine(ROOMY, adapters=slots)
    durations = []
    for number, lora in enumerate(["a", "b", "a", "c", "a", "b"]):
        engine.add(ask(number, 10, lora=lora), 0.0)
        durations.append(round(drain(engine)[-1][0]))
    assert durations == [1, 1, 0, 1, 0, 1]  # c took the place of b, which was used less recently than a
    assert slots.loads == 4


def test_active_adapters_slow_a_step_up_to_a_tenth() -> None:
    slots = AdapterSlots(8, overhead=0.02)
    factors = []
    for adapter in "abcdefg":
        slots.start(adapter)
        factors.append(round(slots.factor, 2))
    assert factors == [1.02, 1.04, 1.06, 1.08, 1.1, 1.1, 1.1]
    for adapter in "abcdefg":
        slots.stop(adapter)
    assert slots.factor == 1.0


# --- merging -------------------------------------------------------------------------------------------------

Story = list[tuple[float, int, int, int]]  # gap to the arrival before, prefix family, own prompt tokens, output tokens
stories = st.lists(
    st.tuples(st.sampled_from([0.0, 0.001, 0.02, 0.3]), st.integers(0, 3), st.integers(1, 300), st.integers(1, 90)),
    min_size=1,
    max_size=14,
)


def tell(story: Story, *, merge: bool, noise: bool, seqs: int = 6) -> tuple[Engine, dict[int, FinishedRequest], int]:
    """Serve a story on a pod short of blocks; the engine, the records and the number of step results."""
    small = pod(kv_tokens=24 * 16, block_size=16, max_num_seqs=seqs, max_num_batched_tokens=128, noise_sd=0.05)
    engine = Engine(small, noise=np.random.default_rng(3) if noise else None)
    arrivals = np.cumsum([gap for gap, *_ in story]).tolist()
    records, results, now, at = dict[int, FinishedRequest](), 0, 0.0, 0
    while at < len(story) or not engine.idle:
        if engine.idle:
            now = max(now, arrivals[at])
        while at < len(story) and arrivals[at] <= now:
            _, family, own, output = story[at]
            tokens = [family * 1000 + i for i in range(48)] + [at * 10_000 + i for i in range(own)]
            hash_of = lambda i, family=family: hash((family, i))  # noqa: E731 - outputs of a family meet
            engine.add(
                EngineRequest(at, len(tokens), min(output, 360 - len(tokens)), chain(tokens, 16), hash_of, now), now
            )
            at += 1
        horizon = arrivals[at] if at < len(story) else math.inf
        result = engine.step(now, horizon if merge else None)
        assert result is not None
        now += result.duration
        results += 1
        records |= {record.id: record for record in result.finished}
    engine.check_integrity()
    return engine, records, results


@settings(max_examples=60, deadline=None)
@given(stories, st.booleans())
def test_merged_steps_have_the_times_and_effects_of_single_ones(story: Story, noise: bool) -> None:
    one, singly, _ = tell(story, merge=False, noise=noise)
    other, merged, _ = tell(story, merge=True, noise=noise)
    assert other.counters == one.counters
    assert merged.keys() == singly.keys()
    for number, record in singly.items():
        twin = merged[number]
        times = (record.scheduled_at, record.first_token_at, record.finished_at)
        assert (twin.scheduled_at, twin.first_token_at, twin.finished_at) == pytest.approx(times, rel=1e-9)
        assert dataclasses.replace(
            twin, queued_at=0.0, arrived_at=0.0, scheduled_at=0.0, first_token_at=0.0, finished_at=0.0
        ) == dataclasses.replace(
            record, queued_at=0.0, arrived_at=0.0, scheduled_at=0.0, first_token_at=0.0, finished_at=0.0
        )


def test_merging_saves_results_even_while_the_queue_is_stuck() -> None:
    story: Story = [(0.0, n, 250, 80) for n in range(6)]
    _, _, singly = tell(story, merge=False, noise=False)
    _, _, merged = tell(story, merge=True, noise=False)
    assert merged < singly / 5


def test_a_merged_result_stands_for_all_its_steps() -> None:
    single, merged = Engine(ROOMY), Engine(ROOMY)
    for engine in (single, merged):
        engine.add(ask(1, 100, output=70), 0.0)
        engine.add(ask(2, 50, output=40), 0.0)
    one_by_one, at_once = drain(single), drain(merged, merge=True)
    assert [result.steps for _, result in at_once] == [1, 39, 30]
    assert [result.decoding for _, result in at_once] == [(), (1, 2), (1,)]
    assert at_once[-1][0] == pytest.approx(one_by_one[-1][0], rel=1e-12)
    stored = [[run for _, result in timeline for run in result.stored] for timeline in (one_by_one, at_once)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("c_kv", [0.0, 1e-8, 1e-4])
def test_merging_ends_with_the_step_in_which_the_horizon_lies(c_kv: float) -> None:
    single, merged = (Engine(pod(kv_tokens=40 * 32, c_kv=c_kv)) for _ in range(2))
    for engine in (single, merged):
        engine.add(ask(1, 100, output=500), 0.0)
    ends = [end for end, _ in drain(single)]
    now, results = 0.0, []
    for horizon in (None, ends[300] - 1e-7, ends[300] + 1e-7):
        result = merged.step(now, horizon)
        assert result is not None
        now += result.duration
        results.append((result.steps, now))
    # The first horizon lies in step 300 and ends with it; the second lies in step 301.
    assert [steps for steps, _ in results] == [1, 300, 1]
    assert [end for _, end in results] == pytest.approx([ends[0], ends[300], ends[301]])


# --- nothing leaks -------------------------------------------------------------------------------------------

moves = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 3), st.integers(1, 260), st.integers(1, 60)),
        st.tuples(st.just("step"), st.booleans(), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=80, deadline=None)
@given(moves, st.sampled_from(list(Policy)), st.booleans())
def test_no_interleaving_of_add_step_and_abort_breaks_the_books(
    moves: list[tuple[str, int, int, int]], policy: Policy, lora: bool
) -> None:
    small = pod(kv_tokens=24 * 16, block_size=16, max_num_seqs=5, max_num_batched_tokens=96)
    engine = Engine(small, policy=policy, adapters=AdapterSlots(2) if lora else None)
    added, ended, aborted, now = 0, set[int](), set[int](), 0.0
    for move, a, b, c in moves:
        if move == "add":
            tokens = [a * 1000 + i for i in range(40)] + [added * 10_000 + i for i in range(b)]
            adapter = f"adapter-{a}" if lora and a else None
            engine.add(ask(added, tokens, output=c, priority=a, lora=adapter, arrived_at=now), now)
            added += 1
        elif move == "abort" and engine.abort(a, now):
            aborted.add(a)
        elif move == "step" and (result := engine.step(now, math.inf if a else None)) is not None:
            now += result.duration
            ended |= {record.id for record in result.finished}
        engine.check_integrity()
    ended |= set(finished(drain(engine, now)))
    assert ended | aborted == set(range(added))
    assert not ended & aborted
    assert (engine.kv_usage, engine.num_running, engine.num_waiting) == (0.0, 0, 0)
