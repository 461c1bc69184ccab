"""How long reading takes: a request's body, a streamed answer, a page of metrics.

pytest bench/micro -o python_files='bench_*.py' --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name -s
"""

import json

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from picker.bench import pages
from picker.wire.metrics_text import MetricsReader, decode_metrics
from picker.wire.openai import parse_call
from picker.wire.sse import StreamObserver

ROUNDS = 500
SIZES = [1024, 32_768, 400_000]

pytestmark = pytest.mark.benchmark(disable_gc=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_parsing_a_request(benchmark: BenchmarkFixture, path: str, size: int) -> None:
    text = ("All work and no play. " * (size // 22 + 1))[:size]
    turns = [{"role": "user" if n % 2 == 0 else "assistant", "content": text[n::8]} for n in range(7)]
    what = {"messages": turns} if "chat" in path else {"prompt": text}
    body = json.dumps({"model": "m", "max_tokens": 100, "stream": True, **what}).encode()
    call = benchmark.pedantic(parse_call, (path, body), rounds=ROUNDS, warmup_rounds=20)  # type: ignore[no-untyped-call]
    assert call.model == "m"


def stream(chunks: int) -> list[bytes]:
    """An answer as vLLM sends it, an event at a time, with usage at its end."""
    head = {"id": "chatcmpl-0123456789", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    events: list[dict[str, object]] = [
        {**head, "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}]} for _ in range(chunks)
    ]
    events[-1]["choices"] = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    details = {"cached_tokens": 64}
    usage = {"prompt_tokens": 128, "completion_tokens": chunks, "prompt_tokens_details": details}
    events.append({**head, "choices": [], "usage": usage})
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


@pytest.mark.parametrize("chunks", [1, 100, 1000])
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "all at once"])
def test_observing_a_stream(benchmark: BenchmarkFixture, chunks: int, at_once: bool) -> None:
    pieces = [b"".join(stream(chunks))] if at_once else stream(chunks)

    def read() -> StreamObserver:
        observer = StreamObserver()
        for piece in pieces:
            observer.feed(piece)
        observer.feed(b"", end=True)
        return observer

    observer = benchmark.pedantic(read, rounds=ROUNDS, warmup_rounds=20)  # type: ignore[no-untyped-call]
    assert observer.usage is not None
    assert observer.usage.cached_tokens == 64


@pytest.mark.parametrize("known", [False, True], ids=["first page", "page like the last"])
def test_reading_metrics(benchmark: BenchmarkFixture, known: bool) -> None:
    page, reader = pages.page(), MetricsReader()

    def read() -> float | None:
        if known:
            return reader.read(page).load(name="e", observed_at=0.0).running
        return decode_metrics(page, name="e", observed_at=0.0).running

    running = benchmark.pedantic(read, rounds=ROUNDS, warmup_rounds=20)  # type: ignore[no-untyped-call]
    benchmark.extra_info["bytes"] = len(page)
    assert running is not None
