"""What picker takes for granted about vLLM's prefix cache and its events, asked of a real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import msgspec

from picker.wire.metrics_text import decode_metrics
from real_vllm.conftest import Pair
from real_vllm.listener import END, PATIENCE, Frame, Listener, replay
from real_vllm.pod import Pod
from real_vllm.script import RESET, Answer, chat, completion, ids, said, send
from real_vllm.tiny_model import ADAPTER, NAME

Event = dict[str, Any]


def events(frames: list[Frame]) -> list[Event]:
    return [event for frame in frames for event in msgspec.msgpack.decode(frame.payload)[1]]


def stored(frames: list[Frame]) -> list[int]:
    """Hashes in the order they were stored, cleared ones too."""
    return [value for event in events(frames) if event["type"] == "BlockStored" for value in event["block_hashes"]]


def removed(frames: list[Frame]) -> list[int]:
    return [value for event in events(frames) if event["type"] == "BlockRemoved" for value in event["block_hashes"]]


def ask(client: httpx.Client, prompt: object, **rest: Any) -> Answer:
    answer = send(client, completion("", prompt, **rest))
    assert answer.status == 200, answer.body
    return answer


def published(pod: Pod, client: httpx.Client, work: Callable[[], object], count: int) -> list[Frame]:
    """The batches, `count` of them, that come of some work; no more than these until the next request's."""
    before = len(replay(pod)[0])
    work()
    deadline = time.monotonic() + PATIENCE
    while len(frames := replay(pod, before)[0]) < count and time.monotonic() < deadline:
        pass  # a replay takes its time by itself
    assert len(frames) == count, events(frames)
    return frames


def test_the_sources_of_events_can_be_asked_for(client: httpx.Client, pod: Pod) -> None:
    source = client.get("/kv_event_sources").json()["0"]
    assert source["endpoint"] == f"tcp://*:{pod.events_port}"
    assert source["replay_endpoint"] == f"tcp://*:{pod.replay_port}"


def test_a_hit_is_the_whole_blocks_that_are_shared_and_never_the_last_token(client: httpx.Client) -> None:
    prompt = ids(1, 300)
    ask(client, prompt)
    for end, cached in ((300, 288), (289, 288), (288, 256), (100, 96), (33, 32), (32, 0)):
        assert ask(client, prompt[:end]).cached == cached
    assert ask(client, prompt[:100] + ids(2, 60)).cached == 96


def test_batches_are_numbered_and_a_replay_is_what_was_heard(client: httpx.Client, pod: Pod) -> None:
    with Listener(pod) as listener:
        listener.until(lambda frames: _heard_latest(client, frames, pod))
        ask(client, ids(1, 700))
        listener.until(lambda frames: frames[-1] == replay(pod)[0][-1])
        heard = listener.frames
    numbers = [frame.seq for frame in heard]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert replay(pod, numbers[0])[0] == heard


def test_a_replay_ends_with_a_marker_and_begins_where_it_is_asked_to(client: httpx.Client, pod: Pod) -> None:
    ask(client, ids(1, 70))
    everything, end = replay(pod)
    assert everything[0].seq == 0
    assert end == [b"", b"", END, b""]
    last = everything[-1].seq
    assert [frame.seq for frame in replay(pod, last)[0]] == [last]
    assert replay(pod, last + 1)[0] == []


def test_a_step_that_fills_no_block_publishes_nothing(client: httpx.Client, pod: Pod) -> None:
    published(pod, client, lambda: ask(client, ids(1, 40)), 1)  # with what the reset before this test left
    published(pod, client, lambda: ask(client, ids(2, 31)), 0)


def test_a_reset_is_published_with_the_next_step_and_before_its_blocks(client: httpx.Client, pod: Pod) -> None:
    ask(client, ids(1, 40))
    published(pod, client, lambda: client.post(RESET).raise_for_status(), 0)
    frames = published(pod, client, lambda: ask(client, ids(1, 40)), 1)
    assert [event["type"] for event in events(frames)] == ["AllBlocksCleared", "BlockStored"]


def test_a_prompt_in_chunks_is_published_step_by_step_as_one_chain(client: httpx.Client, pod: Pod) -> None:
    frames = published(pod, client, lambda: ask(client, ids(1, 700)), 2)
    first, second = (event for event in events(frames) if event["type"] == "BlockStored")
    assert (len(first["block_hashes"]), len(second["block_hashes"])) == (512 // 32, 700 // 32 - 512 // 32)
    assert first["parent_block_hash"] is None
    assert second["parent_block_hash"] == first["block_hashes"][-1]
    assert [*first["token_ids"], *second["token_ids"]] == ids(1, 700 // 32 * 32)


def test_equal_prompts_have_equal_hashes_on_two_servers(pods: Pair) -> None:
    hashes = []
    for pod in pods:
        with httpx.Client(base_url=pod.url, timeout=60.0) as client:
            hashes.append(stored(published(pod, client, lambda client=client: ask(client, ids(1, 200)), 1)))  # type: ignore[misc]
    assert len(hashes[0]) == 6
    assert hashes[0] == hashes[1]


def test_a_salt_is_named_on_the_first_block_and_parts_the_cache(client: httpx.Client, pod: Pod) -> None:
    prompt = ids(1, 100)
    plain = stored(published(pod, client, lambda: ask(client, prompt), 1))
    frames = published(pod, client, lambda: ask(client, prompt, cache_salt="a"), 1)
    assert [event["extra_keys"] for event in events(frames)] == [[["a"], None, None]]
    assert not set(stored(frames)) & set(plain)
    assert ask(client, prompt, cache_salt="b").cached == 0
    assert ask(client, prompt, cache_salt="a").cached == 96


def test_an_adapter_is_named_on_every_block_and_parts_the_cache(client: httpx.Client, pod: Pod) -> None:
    prompt = ids(1, 100)
    published(pod, client, lambda: ask(client, prompt), 1)
    frames = published(pod, client, lambda: ask(client, prompt, model=ADAPTER), 1)
    assert [(event["lora_name"], event["extra_keys"]) for event in events(frames)] == [(ADAPTER, [[ADAPTER]] * 3)]
    adapters = [model for model in client.get("/v1/models").json()["data"] if model["parent"] == NAME]
    assert [model["id"] for model in adapters] == [ADAPTER]


def test_a_whole_hit_stores_its_last_block_a_second_time(client: httpx.Client, pod: Pod) -> None:
    prompt = ids(1, 96)
    first = stored(published(pod, client, lambda: ask(client, prompt), 1))
    again = published(pod, client, lambda: ask(client, prompt), 1)
    assert stored(again) == first[-1:]
    assert events(again)[0]["parent_block_hash"] == first[-2]


def test_blocks_are_removed_when_their_room_is_needed_the_end_of_the_oldest_prompt_first(
    client: httpx.Client, pod: Pod
) -> None:
    oldest = stored(published(pod, client, lambda: ask(client, ids(1, 300)), 1))
    before = len(replay(pod)[0])
    for start in range(2, 9):
        ask(client, ids(start, 860))
    gone = removed(replay(pod, before)[0])
    assert gone[: len(oldest)] == oldest[::-1]
    assert ask(client, ids(1, 300)).cached == 0


def test_what_a_decode_fills_is_published_and_hit(client: httpx.Client, pod: Pod) -> None:
    prompt = ids(1, 60)
    before = len(replay(pod)[0])
    answer = ask(client, prompt, max_tokens=40, return_token_ids=True)
    frames = replay(pod, before)[0]
    assert len(stored(frames)) == 3  # 60 + 40, and the last token's keys and values are not computed
    assert ask(client, prompt + answer.body["choices"][0]["token_ids"]).cached == 96


def test_the_prompts_tokens_can_be_given_with_a_chat(client: httpx.Client) -> None:
    ask(client, ids(1, 200))
    given = send(client, chat("", [said("user", "Hello")], kv_transfer_params={"prompt_token_ids": ids(1, 220)}))
    assert given.usage is not None
    assert (given.usage["prompt_tokens"], given.cached) == (220, 192)


def test_a_chat_is_the_tokens_that_tokenize_says(client: httpx.Client, pod: Pod) -> None:
    messages = [said("system", "Größe ≥ 1 🙂 def f(x):\n\treturn x " * 8), said("user", "e\u0301")]
    frames = published(pod, client, lambda: send(client, chat("", messages)), 1)
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    (event,) = [event for event in events(frames) if event["type"] == "BlockStored"]
    assert event["token_ids"] == tokens[: len(tokens) // 32 * 32]


def test_a_client_that_leaves_frees_its_request(client: httpx.Client) -> None:
    body = completion("", ids(1, 100), max_tokens=1900, stream=True).body
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + PATIENCE
    while running(client) and time.monotonic() < deadline:
        pass  # a scrape takes its time by itself
    assert running(client) == 0
    assert ask(client, ids(1, 100)).cached == 96


def running(client: httpx.Client) -> float:
    load = decode_metrics(client.get("/metrics").content, name="pod", observed_at=0.0)
    assert load.running is not None
    return load.running


def test_a_restarted_server_counts_from_zero_and_says_nothing_of_its_past(client: httpx.Client, pod: Pod) -> None:
    with Listener(pod) as listener:
        before = stored(published(pod, client, lambda: ask(client, ids(1, 200)), 1))
        listener.hear()
        pod.restart(kill=True)
        ask(client, ids(5, 40))  # whatever is published before the subscription is back is not heard
        listener.until(lambda frames: _heard_latest(client, frames, pod))
        heard = listener.frames
    assert replay(pod)[0][0].seq == 0
    assert [event["type"] for event in events(replay(pod)[0][:1])] == ["BlockStored"]
    after = stored(published(pod, client, lambda: ask(client, ids(1, 200)), 1))
    assert after == before
    assert heard[-1].seq <= replay(pod)[0][-1].seq


def _heard_latest(client: httpx.Client, frames: list[Frame], pod: Pod) -> bool:
    """Whether the subscription is in force, after giving the server something to say: it takes effect unannounced."""
    latest = replay(pod)[0][-1:]
    ask(client, [20 + latest[-1].seq if latest else 10] * 40)
    return bool(frames) and frames[-1:] == latest
