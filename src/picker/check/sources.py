"""KV: does an engine tell the truth about its cache, so that whoever follows its KV events knows what is cached?

Each check sends prompts of its own to the engine and holds what it publishes against what it answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from picker.check.engine import Engine, Json, Sample
from picker.check.local_text import LocalText, UntoldError
from picker.check.verdict import Check, Finding, Level, Tier, failed, held, passed, skipped

Try = Callable[[Engine], Awaitable[Finding]]

EVENTS = "vLLM, KV cache events"
CACHE = "vLLM, automatic prefix caching"
PAGE = "vLLM, production metrics"
REQUESTS = "vLLM, OpenAI-compatible server"

# By what they mean: the names of any engine that picker reads.
LOAD = {
    "requests that wait": ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "trtllm_num_requests_waiting"),
    "requests that run": ("vllm:num_requests_running", "sglang:num_running_reqs", "trtllm_num_requests_running"),
    "use of the KV cache": (
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "sglang:token_usage",
        "trtllm_kv_cache_utilization",
    ),
}
HITS = ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total")
_SAMPLES = (
    "The quick brown fox jumps over 12,345 lazy dogs.",
    "naïve café — 東京 🙂\n\n    def f(x):\n\treturn x**2",
    "\x00 a  b",
)
_CHATS: tuple[list[Json], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And now?"},
    ],
)


# --- are there events --------------------------------------------------------------------------------------


async def published(engine: Engine) -> Finding:
    events, _ = await engine.places()
    if events is None:
        return failed(
            "it publishes no KV events, or does not say where: start it with --kv-events-config, or tell --kv-events"
        )
    async with engine.listening():
        return passed(events)


async def caching(engine: Engine) -> Finding:
    on = await engine.setting("enable_prefix_caching")
    if on is None:
        return skipped("its metrics do not say whether prefix caching is on")
    return held("prefix caching is off: nothing is ever found again" if on == "False" else None)


async def heard(engine: Engine) -> Finding:
    stores, answer, ids = await _prompted(engine, engine.prompt())
    if answer != 200:
        return failed(f"a completion was answered {answer}")
    if not stores and ids is not None:
        return failed("of a prompt that nobody had sent before, no block with its token ids was told")
    return held(None if stores else "nothing was published about a prompt that nobody had sent before")


# --- do they tell the truth --------------------------------------------------------------------------------


async def blocks(engine: Engine) -> Finding:
    told = await engine.setting("block_size")
    async with engine.listening() as listener:
        await engine.complete(engine.prompt())
        stores = await listener.told(None)
    broken = next((batch.problem for batch in listener.heard if batch.problem), None)
    if broken:
        return failed(broken)
    if not stores:
        return failed("no block was told of")
    return held(next((wrong for store in stores if (wrong := _misfit(store, told))), None))


def _misfit(store: Json, told: str | None) -> str | None:
    """What is wrong with the size of the blocks of a store of the first tier."""
    size, tokens, hashes = store.get("block_size"), len(store["token_ids"]), len(store["block_hashes"])
    if store.get("medium") not in (None, "GPU") or store.get("kv_cache_spec_kind") not in (None, "full_attention"):
        return None
    if not isinstance(size, int) or tokens != hashes * size:
        return f"{hashes} blocks of {size} tokens hold {tokens}"
    return None if told is None or int(told) == size else f"blocks have {size} tokens in events, {told} in the metrics"


async def tokens(engine: Engine) -> Finding:
    stores, _, ids = await _prompted(engine, engine.prompt())
    if ids is None:
        return skipped("it has no /tokenize to compare with")
    size = stores[0]["block_size"] if stores else 1
    known = sum(len(store["token_ids"]) for store in stores)
    if stores and known >= len(ids) // size * size:
        return passed(f"{known} ids")
    return failed(f"of the {len(ids)} ids that /tokenize makes of a prompt, events told {known} in their order")


async def chain(engine: Engine) -> Finding:
    prompt = engine.prompt()
    first, _, _ = await _prompted(engine, prompt)
    second, _, _ = await _prompted(engine, prompt + " " + engine.prompt(), whole=False)
    if not first or not second:
        return failed("no blocks were told of a prompt, or of one that continues it")
    before = {number for store in first for number in store["block_hashes"]}
    continued = [store for store in second if store.get("parent_block_hash") in before]
    if not continued:
        return failed("what continues a prompt does not continue its blocks: hashes of equal tokens change")
    return passed()


async def same(engine: Engine) -> Finding:
    """A request sent again stores nothing under other names."""
    prompt = engine.prompt()
    first, _, _ = await _prompted(engine, prompt)
    again, _, _ = await _prompted(engine, prompt)
    if not first:
        return skipped("no blocks were told of the prompt")
    before = [number for store in first for number in store["block_hashes"]]
    new = [number for store in again for number in store["block_hashes"] if number not in before]
    return held(f"the same prompt again was stored under {len(new)} other hashes" if new else None)


async def cached(engine: Engine) -> Finding:
    prompt = engine.prompt()
    stores, _, _ = await _prompted(engine, prompt)
    reported = (await engine.complete(prompt)).cached
    if not stores:
        return failed("no blocks were told of the prompt, so nothing can be promised")
    if reported is None:
        return skipped("its answers do not tell cached_tokens: start it with --enable-prompt-tokens-details")
    size = stores[0]["block_size"]
    promised = sum(len(store["block_hashes"]) for store in stores) * size
    # The last token of a prompt is always computed: a block that ends with it is of no use.
    return held(
        None
        if promised - size <= reported <= promised
        else f"events promise {promised} tokens of a prompt that was sent before; it reports {reported} as cached"
    )


async def witness(engine: Engine) -> Finding:
    """Whether predictions can be held against anything."""
    before, prompt = _sum(await engine.metrics(), HITS), engine.prompt()
    await engine.complete(prompt)
    if (await engine.complete(prompt)).cached is not None:
        return passed("answers tell cached_tokens")
    after = _sum(await engine.metrics(), HITS)
    until = time.monotonic() + engine.patience
    while after == before is not None and time.monotonic() < until:
        await asyncio.sleep(0.1)
        after = _sum(await engine.metrics(), HITS)
    if before is None or after is None:
        return failed(
            f"neither answers tell cached_tokens nor the metrics {HITS[0]}: nobody can see predictions come true"
        )
    return held(None if after > before else f"{HITS[0]} did not count a prompt that was sent twice")


async def load(engine: Engine) -> Finding:
    names = {sample.name for sample in await engine.metrics()}
    if not names:
        return failed("it has no metrics at /metrics")
    missing = [f"{what} ({known[0]})" for what, known in LOAD.items() if names.isdisjoint(known)]
    return held(f"its metrics do not show {', '.join(missing)}: were they renamed?" if missing else None)


async def replay(engine: Engine) -> Finding:
    async with engine.listening() as listener:
        await engine.complete(engine.prompt())
        await listener.told(None)
    if not listener.heard:
        return failed("nothing was published")
    start = listener.heard[0].number
    found = await engine.replayed(start)
    if found is None:
        return skipped(
            "it offers no replays (replay_endpoint of --kv-events-config): gaps and restarts of picker cost knowledge"
        )
    batches, ended = found
    kept = {batch.number: batch.payload for batch in batches}
    if not ended:
        return failed(f"a replay from {start} did not end with its marker")
    missing = [batch.number for batch in listener.heard if kept.get(batch.number) != batch.payload]
    return held(f"batch {missing[0]} is replayed otherwise than it was published, or not at all" if missing else None)


# --- is it the model that picker is told of ----------------------------------------------------------------


async def tokenizer(engine: Engine) -> Finding:
    def differs(local: LocalText, theirs: list[int], sample: Any) -> bool:
        return local.ids(sample) != theirs

    async def asked(sample: Any) -> list[int] | None:
        return await engine.ids(prompt=sample, add_special_tokens=False)

    return await _compared(engine, _SAMPLES, asked, differs, "text")


async def template(engine: Engine) -> Finding:
    def differs(local: LocalText, theirs: list[int], sample: Any) -> bool:
        return local.ids(local.rendered(sample)) != theirs

    async def asked(sample: Any) -> list[int] | None:
        return await engine.ids(messages=sample)

    return await _compared(engine, _CHATS, asked, differs, "chat")


async def _compared(
    engine: Engine,
    samples: Sequence[Any],
    asked: Callable[[Any], Awaitable[list[int] | None]],
    differs: Callable[[LocalText, list[int], Any], bool],
    what: str,
) -> Finding:
    """Whether the engine and the local files make the same tokens of some samples."""
    if engine.tokenizer is None:
        return skipped("tell the folder that picker is given, with --tokenizer")
    try:
        local = LocalText(engine.tokenizer)
        for number, sample in enumerate(samples, start=1):
            theirs = await asked(sample)
            if theirs is None:
                return skipped(f"it does not tell what it makes of a {what}")
            if differs(local, theirs, sample):
                return failed(f"{engine.tokenizer} and the engine make other tokens of {what} {number}")
    except UntoldError as error:
        return skipped(str(error))
    return passed()


# --- requests ----------------------------------------------------------------------------------------------


async def _prompted(engine: Engine, prompt: str, *, whole: bool = True) -> tuple[list[Json], int, list[int] | None]:
    """(stores of a prompt that is sent, the answer's status, its ids). whole: from its first token on."""
    ids = await engine.ids(prompt=prompt)
    async with engine.listening() as listener:
        answer = await engine.complete(prompt)
        stores = await listener.told(ids if whole else None)
    return stores, answer.status, ids


def _sum(page: Sequence[Sample], names: Sequence[str]) -> float | None:
    found = [sample.value for sample in page if sample.name in names]
    return sum(found) if found else None


def _check(name: str, requirement: str, run: Try, source: str, level: Level = Level.MUST) -> Check[Engine]:
    return Check(f"KV-{name}", Tier.T3, requirement, source, run, level)


CHECKS: Sequence[Check[Engine]] = (
    _check("1.published", "The engine publishes KV events and says where.", published, EVENTS),
    _check("1.caching", "Its prefix cache is on.", caching, CACHE),
    _check("1.heard", "A new prompt's blocks are told of.", heard, EVENTS),
    _check("2.blocks", "Blocks are of one size, which the metrics tell too, and full.", blocks, EVENTS),
    _check("2.tokens", "Blocks tell the token ids that the engine makes of the prompt.", tokens, EVENTS),
    _check("2.chain", "What continues a prompt continues its blocks.", chain, EVENTS),
    _check("2.same", "Equal tokens have equal hashes as long as the engine lives.", same, EVENTS),
    _check("3.cached", "What events promise is what the engine finds.", cached, CACHE),
    _check(
        "3.witness", "Answers or metrics tell what was found, so that predictions can be checked.", witness, REQUESTS
    ),
    _check("3.load", "The metrics that picker reads are there, by names that it knows.", load, PAGE),
    _check("4.replay", "Replays tell what was published, and when they end.", replay, EVENTS),
    _check("5.tokenizer", "The tokenizer that picker is given is the engine's.", tokenizer, REQUESTS),
    _check("5.template", "So is the chat template.", template, REQUESTS),
)
