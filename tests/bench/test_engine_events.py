import numpy as np
import pytest

from picker.bench.engine_events import GENERATED, MIXED, PREFILL, Engine, Load, steps
from picker.wire.kv_events import Cleared, Stored, decode_batch, tell


@pytest.mark.parametrize("load", [MIXED, PREFILL, GENERATED])
def test_an_engine_continues_and_removes_only_blocks_it_has_stored(load: Load) -> None:
    engine, held = Engine(0, 1000, np.random.default_rng(0), load), set[int | bytes]()
    for _ in range(100):
        for event in decode_batch(engine.step().payload).events:
            assert not isinstance(event, Cleared)
            hashes = set(event.hashes)
            if isinstance(event, Stored):
                assert event.parent is None or event.parent in held
                assert len(event.tokens) == len(hashes) * event.block_size
                held |= hashes
            else:
                assert hashes <= held
                held -= hashes
    assert 1000 <= len(held) <= 2000


@pytest.mark.parametrize("load", [MIXED, PREFILL, GENERATED])
def test_an_engine_with_a_full_cache_removes_what_it_stores(load: Load) -> None:
    _, timed = steps(3, 6000, load, np.random.default_rng(0))
    told = [tell(decode_batch(step.payload).events, "pod") for step in timed]
    stored, removed = sum(each.stored for each in told), sum(each.removed for each in told)
    assert stored == len(timed) * load.blocks
    assert 0.9 * stored <= removed <= 1.1 * stored
