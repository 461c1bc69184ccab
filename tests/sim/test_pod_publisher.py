"""Simulated pods and their event sockets over loopback: what a gateway sees of them. Nothing here waits for time."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio

from picker.children import free_ports
from picker.errors import ConfigError
from picker.sim.engine_hashes import BlockHasher, HashAlgorithm, as_number
from picker.sim.pod import Pod, open_pods
from picker.sim.pod_options import EventFault, EventOptions, PodOptions

END = b"\xff" * 8
USES = ("endpoint", "replay_endpoint")
# A store that vLLM 0.32 published for 32 tokens 7 under cache_salt "saltA", from behind its time stamp on.
RECORDED = bytes.fromhex(
    "918ba474797065ab426c6f636b53746f726564ac626c6f636b5f68617368657391cfb58148fccb79ed99b1706172656e745f626c6f636b5f6861"
    "7368c0a9746f6b656e5f696473dc00200707070707070707070707070707070707070707070707070707070707070707aa626c6f636b5f73697a"
    "6520a76c6f72615f6964c0a66d656469756da3475055a96c6f72615f6e616d65c0aa65787472615f6b6579739191a573616c7441a967726f7570"
    "5f69647800b26b765f63616368655f737065635f6b696e64ae66756c6c5f617474656e74696f6e00"
)


@dataclass
class Batch:
    """A batch as it came over a socket."""

    topic: bytes
    seq: int
    payload: bytes

    @property
    def events(self) -> list[Any]:
        events: list[Any] = msgspec.msgpack.decode(self.payload)[1]
        return events

    @property
    def told(self) -> list[tuple[str, list[int]]]:
        """(type, hashes) of every event."""
        return [(event["type"], event.get("block_hashes", [])) for event in self.events]


class Gateway:
    """A client of some pods: requests, and the sockets of rank `rank` of the first pod."""

    def __init__(self, pods: list[Pod], session: aiohttp.ClientSession, context: zmq.asyncio.Context) -> None:
        self.pods = pods
        self.pod = pods[0]
        self._session = session
        self._context = context
        self._sockets: list[zmq.asyncio.Socket] = []

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(self.pod.url + path, json=body, headers=named) as response:
            return response.status, await response.json(content_type=None)

    async def complete(self, prompt: Sequence[int], max_tokens: int = 1, **more: Any) -> dict[str, Any]:
        headers = {name: more.pop(name) for name in tuple(more) if name.startswith("x_")}
        body = {"prompt": list(prompt), "max_tokens": max_tokens, **more}
        status, answer = await self.post("/v1/completions", body, **headers)
        assert status == 200, answer
        return dict(answer["usage"]["prompt_tokens_details"])

    async def sources(self) -> dict[str, dict[str, Any]]:
        async with self._session.get(self.pod.url + "/kv_event_sources") as response:
            return dict(await response.json())

    async def page(self) -> str:
        async with self._session.get(self.pod.url + "/metrics") as response:
            return await response.text()

    async def subscribe(self, rank: int = 0, topic: bytes = b"") -> zmq.asyncio.Socket:
        """A SUB socket that the pod knows of."""
        socket = self._socket(zmq.SUB)
        socket.subscribe(topic)
        socket.connect((await self.sources())[str(rank)]["endpoint"])
        publisher = self.pod.publishers[rank]
        before = publisher.subscriptions
        await until(lambda: publisher.subscriptions > before)
        return socket

    async def replay(self, start: int, rank: int = 0) -> list[Batch]:
        """What the pod still has from `start` on; its end marker must be the last thing."""
        socket = self._socket(zmq.DEALER)
        socket.connect((await self.sources())[str(rank)]["replay_endpoint"])
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        found = []
        while (frames := await socket.recv_multipart())[2] != END:
            empty, topic, seq, payload = frames
            assert empty == b""
            found.append(Batch(topic, int.from_bytes(seq, "big"), payload))
        assert frames == [b"", b"", END, b""]
        return found

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.linger = 0
        self._sockets.append(socket)
        return socket

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()


async def receive(socket: zmq.asyncio.Socket) -> Batch:
    topic, seq, payload = await socket.recv_multipart()
    return Batch(topic, int.from_bytes(seq, "big"), payload)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for happens in ZeroMQ, which signals nobody
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def serving(events: EventOptions | None = EventOptions(), **options: Any) -> AsyncIterator[Gateway]:
    defaults: dict[str, Any] = {"model": "tiny", "time_scale": 1000.0, "noise": False, "block_size": 4}
    chosen = PodOptions(events=events, **(defaults | options))
    async with open_pods(chosen) as pods, aiohttp.ClientSession() as session:
        context = zmq.asyncio.Context()
        gateway = Gateway(pods, session, context)
        try:
            yield gateway
        finally:
            gateway.close()
            context.term()


def chain(ids: Sequence[int], size: int = 4, algorithm: HashAlgorithm = HashAlgorithm.SHA256) -> list[int]:
    hasher, parent, numbers = BlockHasher(algorithm), None, []
    for at in range(0, len(ids) // size * size, size):
        parent = hasher.block(parent, list(ids[at : at + size]))
        numbers.append(as_number(parent))
    return numbers


# --- batches -------------------------------------------------------------------------------------------------


async def test_a_batch_is_vllms_byte_for_byte() -> None:
    async with serving(block_size=32) as gateway:
        socket = await gateway.subscribe()
        await gateway.complete([7] * 32, cache_salt="saltA")
        batch = await receive(socket)
    assert (batch.topic, batch.seq) == (b"", 0)
    assert batch.payload[:2] == b"\x93\xcb"
    assert batch.payload[10:] == RECORDED


async def test_every_step_that_changes_the_cache_is_a_batch() -> None:
    prompt = list(range(10, 19))
    async with serving() as gateway:
        socket = await gateway.subscribe()
        await gateway.complete(prompt, max_tokens=12)
        batches = [await receive(socket) for _ in range(4)]
        publisher = gateway.pod.publishers[0]
    assert [batch.seq for batch in batches] == [0, 1, 2, 3]
    assert [len(event["block_hashes"]) for batch in batches for event in batch.events] == [2, 1, 1, 1]
    whole = [token for batch in batches for event in batch.events for token in event["token_ids"]]
    assert whole[:9] == prompt
    numbers = chain(whole)
    assert [event["block_hashes"] for batch in batches for event in batch.events] == [
        numbers[:2],
        *([number] for number in numbers[2:]),
    ]
    assert [event["parent_block_hash"] for batch in batches for event in batch.events] == [None, *numbers[1:4]]
    assert publisher.next_seq == 4


async def test_evictions_resets_and_duplicates_are_told_in_order() -> None:
    a, b = list(range(100, 108)), list(range(200, 220))
    async with serving(kv_tokens=28) as gateway:
        socket = await gateway.subscribe()
        for prompt in (a, a, b):
            await gateway.complete(prompt)
        one, two, three = [(await receive(socket)).told for _ in range(3)]
        await gateway.post("/reset_prefix_cache", {})
        await gateway.complete([1, 2, 3, 4])
        four = (await receive(socket)).told
    of_a, of_b = chain(a), chain(b)
    assert one == [("BlockStored", of_a)]
    assert two == [("BlockStored", of_a[1:])]
    # Six blocks: three blank, then A's: the copy of its last, the last itself.
    assert three == [("BlockRemoved", of_a[1:]), ("BlockRemoved", of_a[1:]), ("BlockStored", of_b)]
    assert four == [("AllBlocksCleared", []), ("BlockStored", chain([1, 2, 3, 4]))]


async def test_session_and_adapter_are_told() -> None:
    async with serving(loras=("ad1",)) as gateway:
        socket = await gateway.subscribe()
        await gateway.complete(range(4), model="ad1", x_session_id="sess-1")
        (event,) = (await receive(socket)).events
    assert (event["lora_id"], event["lora_name"], event["extra_keys"]) == (1, "ad1", [["ad1"]])
    assert event["session_id"] == "sess-1"


async def test_the_topic_may_name_pod_and_model_and_is_filtered_by() -> None:
    async with serving(EventOptions(topic="kv@{address}@{model}")) as gateway:
        topic = f"kv@{gateway.pod.url.removeprefix('http://')}@tiny"
        socket = await gateway.subscribe(topic=topic.encode())
        await gateway.complete(range(4))
        assert (await receive(socket)).topic == topic.encode()
        assert (await gateway.sources())["0"]["topic"] == topic
        assert [batch.topic for batch in await gateway.replay(0)] == [topic.encode()]


async def test_old_and_other_forms_can_be_had() -> None:
    old = EventOptions(arrays=True, whole_hashes=True, algorithm=HashAlgorithm.SHA256_CBOR)
    async with serving(old) as gateway:
        socket = await gateway.subscribe()
        await gateway.complete(range(4))
        (event,) = (await receive(socket)).events
    assert event[0] == "BlockStored"
    assert [as_number(h) for h in event[1]] == chain(range(4), algorithm=HashAlgorithm.SHA256_CBOR)
    assert event[2:5] == [None, [0, 1, 2, 3], 4]


# --- where they are ------------------------------------------------------------------------------------------


async def test_sources_are_told_as_vllm_tells_them() -> None:
    async with serving(EventOptions(buffer_steps=7, replay=False)) as gateway:
        (source,) = (await gateway.sources()).values()
    assert source.pop("endpoint").startswith("tcp://127.0.0.1:")
    assert source == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "replay_endpoint": None,
        "buffer_steps": 7,
        "hwm": 100_000,
        "max_queue_size": 100_000,
        "topic": "",
    }


async def test_a_pod_without_events_has_no_sources_and_no_event_faults() -> None:
    async with serving(events=None) as gateway:
        assert await gateway.sources() == {}
        status, answer = await gateway.post("/_sim/fault", {"events": {"drop": 1}})
    assert (status, answer["error"]["message"]) == (400, "fault: events: this pod publishes no KV events")


async def test_ports_follow_each_other_by_pod_use_and_rank() -> None:
    free, *_ = free_ports(8)
    async with serving(EventOptions(port=free), count=2, ranks=2) as gateway:
        used = [[p.source[use] for p in pod.publishers] for pod in gateway.pods for use in USES]
    assert list(itertools.chain(*used)) == [f"tcp://127.0.0.1:{free + n}" for n in range(8)]


async def test_a_taken_port_is_a_config_error() -> None:
    async with serving() as gateway:
        taken = int((await gateway.sources())["0"]["endpoint"].rsplit(":", 1)[1])
        with pytest.raises(ConfigError, match=f"cannot publish KV events on tcp://127.0.0.1:{taken}"):
            async with serving(EventOptions(port=taken)):
                pass


async def test_a_port_on_all_interfaces_has_a_star_for_its_host() -> None:
    async with serving(host="0.0.0.0") as gateway:
        (publisher,) = gateway.pod.publishers
    assert publisher.source["endpoint"].startswith("tcp://*:")


@pytest.mark.parametrize("options", [{"port": -1}, {"buffer_steps": 0}, {"topic": "{pod}"}, {"topic": "{"}])
def test_options_that_make_no_sense_are_config_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="KV events"):
        EventOptions(**options)


# --- replays -------------------------------------------------------------------------------------------------


async def test_a_replay_has_what_was_published_from_a_number_on() -> None:
    async with serving() as gateway:
        socket = await gateway.subscribe()
        for start in range(0, 40, 4):
            await gateway.complete(range(start, start + 4))
        live = [await receive(socket) for _ in range(10)]
        assert await gateway.replay(0) == live
        assert await gateway.replay(7) == live[7:]
        assert await gateway.replay(10) == []


async def test_the_buffer_forgets_the_oldest() -> None:
    async with serving(EventOptions(buffer_steps=3)) as gateway:
        for start in range(0, 20, 4):
            await gateway.complete(range(start, start + 4))
        assert [batch.seq for batch in await gateway.replay(0)] == [2, 3, 4]


async def test_replays_before_0_26_have_no_topic() -> None:
    async with serving(EventOptions(replay_topic=False, topic="t")) as gateway:
        await gateway.complete(range(4))
        socket = gateway._socket(zmq.DEALER)
        socket.connect((await gateway.sources())["0"]["replay_endpoint"])
        await socket.send_multipart([b"", bytes(8)])
        assert [len(await socket.recv_multipart()), await socket.recv_multipart()] == [3, [b"", END, b""]]


async def test_a_request_of_another_form_is_dropped_and_does_no_harm() -> None:
    async with serving() as gateway:
        await gateway.complete(range(4))
        socket = gateway._socket(zmq.DEALER)
        socket.connect((await gateway.sources())["0"]["replay_endpoint"])
        for frames in ([b"", b"", bytes(8)], [bytes(8)], [b"", bytes(8)]):
            await socket.send_multipart(frames)
        assert (await socket.recv_multipart())[2] == bytes(8)


# --- faults --------------------------------------------------------------------------------------------------


async def test_dropped_batches_leave_a_gap_that_a_replay_fills() -> None:
    async with serving() as gateway:
        socket = await gateway.subscribe()
        await gateway.post("/_sim/fault", {"events": {"drop": 2}})
        for start in range(0, 16, 4):
            await gateway.complete(range(start, start + 4))
        assert [(await receive(socket)).seq for _ in range(2)] == [2, 3]
        assert [batch.seq for batch in await gateway.replay(0)] == [0, 1, 2, 3]
        status, fault = await gateway.post("/_sim/fault", {})
    assert (status, fault["events"]["drop"]) == (200, 0)


async def test_garbage_is_no_msgpack_and_a_replay_has_the_truth() -> None:
    async with serving(EventOptions(fault=EventFault(garbage=1))) as gateway:
        socket = await gateway.subscribe()
        await gateway.complete(range(4))
        await gateway.complete(range(4, 8))
        wrong, right = [await receive(socket) for _ in range(2)]
        assert [wrong.seq, right.seq] == [0, 1]
        with pytest.raises(msgspec.DecodeError):
            msgspec.msgpack.decode(wrong.payload)
        assert (await gateway.replay(0))[0].told == [("BlockStored", chain(range(4)))]


async def test_a_stall_holds_everything_back_and_loses_nothing() -> None:
    async with serving() as gateway:
        socket = await gateway.subscribe()
        await gateway.post("/_sim/fault", {"events": {"stall": True}})
        async with asyncio.TaskGroup() as group:
            for start in range(0, 12, 4):
                await gateway.complete(range(start, start + 4))
            asked = group.create_task(gateway.replay(0))
            await gateway.sources()
            assert not await socket.poll(0)
            assert not asked.done()
            await gateway.post("/_sim/fault", {"events": {"stall": False}})
            assert [batch.seq for batch in await asked] == [0, 1, 2]
        assert [(await receive(socket)).seq for _ in range(3)] == [0, 1, 2]


async def test_arrays_and_wrong_block_sizes_are_told_on_demand() -> None:
    async with serving() as gateway:
        socket = await gateway.subscribe()
        await gateway.post("/_sim/fault", {"events": {"arrays": True, "block_size": 16}})
        await gateway.complete(range(4))
        await gateway.post("/_sim/fault", {"events": {"arrays": False, "block_size": None}})
        await gateway.complete(range(4, 8))
        (wrong,), (right,) = [(await receive(socket)).events for _ in range(2)]
    assert (wrong[0], wrong[4]) == ("BlockStored", 16)
    assert (right["type"], right["block_size"]) == ("BlockStored", 4)


@pytest.mark.parametrize("wrong", [{"drop": -1}, {"drops": 1}, {"stall": 1}])
async def test_event_faults_that_make_no_sense_change_nothing(wrong: dict[str, Any]) -> None:
    async with serving() as gateway:
        status, _ = await gateway.post("/_sim/fault", {"slowdown": 2.0, "events": wrong})
        assert status == 400
        assert gateway.pod.publishers[0].fault == EventFault()
        assert gateway.pod.fault.slowdown == 1.0


async def test_after_a_restart_batches_count_from_0_and_nobody_says_that_the_cache_is_empty() -> None:
    async with serving() as gateway:
        socket = await gateway.subscribe()
        before = await gateway.sources()
        for start in range(0, 12, 4):
            await gateway.complete(range(start, start + 4))
        assert [(await receive(socket)).seq for _ in range(3)] == [0, 1, 2]
        async with asyncio.TaskGroup() as group:
            # ZeroMQ subscribes again after it has found its way back only where somebody looks at the socket.
            received = group.create_task(receive(socket))
            await gateway.post("/_sim/fault", {"restart": True})
            publisher = gateway.pod.publishers[0]
            await until(lambda: publisher.subscriptions == 1)
            await gateway.complete(range(4))
        batch = received.result()
        assert (batch.seq, batch.told) == (0, [("BlockStored", chain(range(4)))])
        assert [batch.seq for batch in await gateway.replay(0)] == [0]
        assert await gateway.sources() == before


async def test_a_dead_pod_publishes_nothing_until_it_is_back() -> None:
    async with serving(time_scale=1e9) as gateway:
        await gateway.complete(range(4))
        await gateway.post("/_sim/fault", {"down_s": 1e-3})
        await until(lambda: gateway.pod.up)
        await gateway.complete(range(8))
        assert [batch.told for batch in await gateway.replay(0)] == [[("BlockStored", chain(range(8)))]]


async def test_a_step_that_was_in_progress_at_death_is_told_by_nobody() -> None:
    async with serving() as gateway:
        await gateway.post("/_sim/fault", {"hang": True})
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(gateway.complete(range(8)))
            await until(lambda: gateway.pod.engine.num_waiting == 1)
            asked.cancel()
        await gateway.post("/_sim/fault", {"hang": False, "restart": True})
        await gateway.complete(range(4))
        assert [batch.told for batch in await gateway.replay(0)] == [[("BlockStored", chain(range(4)))]]


# --- data-parallel ranks -------------------------------------------------------------------------------------


async def test_every_rank_has_a_cache_numbers_and_a_socket_of_its_own() -> None:
    async with serving(ranks=2) as gateway:
        sockets = [await gateway.subscribe(rank) for rank in (0, 1)]
        for rank in ("1", "0", "1"):
            await gateway.complete(range(9), x_data_parallel_rank=rank)
        one, two = [await receive(socket) for socket in sockets]
        assert [msgspec.msgpack.decode(batch.payload)[2] for batch in (one, two)] == [0, 1]
        assert (one.seq, two.seq) == (0, 0)
        assert one.told == two.told == [("BlockStored", chain(range(8)))]
        assert (await gateway.complete(range(9), x_data_parallel_rank="0"))["cached_tokens"] == 8
        status, answer = await gateway.post("/v1/completions", {"prompt": "x"}, x_data_parallel_rank="2")
    assert (status, answer["error"]["message"]) == (400, "data_parallel_rank 2 is out of range [0, 2).")


async def test_ranks_take_turns_and_each_has_series_of_its_own() -> None:
    async with serving(ranks=3) as gateway:
        cached = [(await gateway.complete(range(9)))["cached_tokens"] for _ in range(4)]
        page = await gateway.page()
    assert cached == [0, 0, 0, 8]
    counts = [
        f'vllm:request_success_total{{engine="{rank}",finished_reason="length",model_name="tiny"}} '
        for rank in range(3)
    ]
    assert [page.count(series + value) for series, value in zip(counts, ("2.0", "1.0", "1.0"), strict=True)] == [
        1,
        1,
        1,
    ]
    assert page.count("# TYPE vllm:request_success_total counter") == 1
    assert page.count("vllm:admission_rejections_total{") == 2


async def test_a_reset_empties_all_ranks() -> None:
    async with serving(ranks=2) as gateway:
        for _ in range(2):
            await gateway.complete(range(9))
        assert await gateway.post("/reset_prefix_cache", {}) == (200, {"success": True})
        assert [(await gateway.complete(range(9)))["cached_tokens"] for _ in range(2)] == [0, 0]


def test_events_work_on_uvloop_too() -> None:
    async def main() -> list[int]:
        async with serving() as gateway:
            socket = await gateway.subscribe()
            for start in range(0, 12, 4):
                await gateway.complete(range(start, start + 4))
            live = [(await receive(socket)).seq for _ in range(3)]
            assert [batch.seq for batch in await gateway.replay(0)] == live
            return live

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [0, 1, 2]
