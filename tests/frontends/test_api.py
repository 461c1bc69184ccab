"""The API against gRPC's own client, in front of a real scheduler under a clock that stands still."""

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

import fakes
from fakes import ManualClock
from frontends.api_rig import BODY, CALLS, fails, finished, first_token, hello, rig, started
from picker.exchange import Limits
from picker.frontends.certificates import Certificates, self_signed
from picker.frontends.extproc import ExtProc
from picker.prefix.blocks import BlockHasher
from picker.rewrites import Rewriting, build_rule
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import (
    EndpointAdded,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    HealthObserved,
    ResponseStarted,
    Rewritten,
    Usage,
)
from picker.wire.api import SERVICE
from picker.wire.extproc import SERVICE as EXT_PROC
from picker.wire.extproc import ProcessingRequest, ProcessingResponse
from picker.wire.pb import picker_pb2 as pb

# --- Pick --------------------------------------------------------------------------------------------------


async def test_a_pick_names_an_endpoint_its_fallbacks_and_why() -> None:
    async with rig() as this:
        picked = await this.pick()
        names = [picked.endpoint.name, *(each.name for each in picked.fallbacks)]
        assert sorted(names) == ["a", "b", "c"]
        assert picked.endpoint.address == f"{picked.endpoint.name}:8000"
        assert (picked.matched_blocks, picked.total_blocks) == (0, 3)
        [why] = picked.candidates
        assert why.endpoint == picked.endpoint.name
        assert why.parts
        assert sum(why.parts.values()) == pytest.approx(-why.total)  # seconds: a cost
        assert picked.charged
        assert this.charges == 1


async def test_all_candidates_are_explained_or_none() -> None:
    async with rig() as this:
        every = await this.pick(explain=pb.EXPLAIN_ALL)
        assert sorted(each.endpoint for each in every.candidates) == ["a", "b", "c"]
        totals = {each.endpoint: each.total for each in every.candidates}
        assert totals[every.endpoint.name] == every.candidates[0].total == max(totals.values())
        assert not (await this.pick(explain=pb.EXPLAIN_NONE)).candidates


async def test_a_prompt_returns_to_where_it_was_sent() -> None:
    async with rig() as this:
        first = await this.pick()
        await this.report(finished(first, prompt_tokens=255, completion_tokens=10))
        again = await this.pick()
        assert again.endpoint == first.endpoint
        assert again.matched_blocks == again.total_blocks == 3


async def test_subset_and_exclusion_are_kept_to() -> None:
    async with rig() as this:
        assert (await this.pick(subset=["b:8000"])).endpoint.name == "b"
        assert (await this.pick(subset=["b:8000", "c"], exclude=["b"])).endpoint.name == "c"
        refusal = (await this.ask(subset=["b:8000"], exclude=["b"])).refusal
        assert refusal.reason == "no-match"


async def test_a_refusal_says_what_to_answer_the_client_with() -> None:
    async with rig(max_inflight=1, queue_size=0) as this:
        for _ in range(3):
            await this.pick()
        refusal = (await this.ask()).refusal
        assert (refusal.status, refusal.reason, refusal.retry_after_s) == (429, "saturated", 1.0)
        assert refusal.headers["retry-after"] == "1"
        assert json.loads(refusal.body)["error"]["message"] == refusal.message
        assert this.charges == 3


@pytest.mark.parametrize(
    ("path", "body", "status", "reason"),
    [
        ("/v1/completions", b"{", 400, "bad-request"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "bad-request"),
        ("/v1/completions", b'{"prompt": "%s"}' % (b"x" * 2000), 413, "too-large"),
    ],
)
async def test_a_body_that_is_no_request_is_refused(path: str, body: bytes, status: int, reason: str) -> None:
    async with rig(limits=Limits(max_body_bytes=1500)) as this:
        refusal = (await this.ask(body, path=path)).refusal
        assert (refusal.status, refusal.reason) == (status, reason)
        assert refusal.message == json.loads(refusal.body)["error"]["message"]
        assert this.charges == 0


async def test_a_call_that_is_given_up_leaves_the_queue() -> None:
    async with rig("a", max_inflight=1) as this:
        first = await this.pick()
        waiting = this.call("Pick")(pb.PickRequest(features=pb.Features()))
        await this.until(lambda: len(this.scheduler.queue) == 1)
        waiting.cancel()
        await this.until(lambda: len(this.scheduler.queue) == 0)
        await this.report(finished(first))
        assert this.charges == 0


async def test_a_deadline_ends_the_wait_in_the_queue() -> None:
    async with rig("a", max_inflight=1) as this:
        await this.pick()
        code, _ = await fails(this.call("Pick")(pb.PickRequest(features=pb.Features()), timeout=0.05))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        await this.until(lambda: len(this.scheduler.queue) == 0)


async def test_a_queued_request_is_answered_when_there_is_room() -> None:
    async with rig("a", max_inflight=1) as this:
        first = await this.pick()
        waiting = this.call("Pick")(pb.PickRequest(features=pb.Features()))
        await this.until(lambda: len(this.scheduler.queue) == 1)
        await this.report(finished(first))
        assert (await waiting).picked.endpoint.name == "a"


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.PickRequest(), "http or features"),
        (pb.PickRequest(features=pb.Features(blocks=pb.BlockHashes(hashes=[1]))), "block_tokens or block_bytes"),
        (pb.PickRequest(features=pb.Features(prompt_tokens=2**40)), "beyond the limit"),
        (pb.PickRequest(features=pb.Features(), reporter="x" * 257), "reporter"),
    ],
)
async def test_a_question_that_is_none_is_an_error(request_: Any, says: str) -> None:
    async with rig() as this:
        code, message = await fails(this.call("Pick")(request_))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert says in message
        assert this.charges == 0


async def test_bytes_that_are_no_message_are_an_error() -> None:
    async with rig() as this:
        for method in CALLS:
            stream = this.channel.stream_stream(f"/{SERVICE}/{method}")(iter([b"\xff\xff\xff"]))
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_nobody_is_waited_for_longer_than_the_bound() -> None:
    async with rig("a", max_inflight=1, decision=0.05) as this:
        for method in ("Pick", "WatchEndpoints"):
            silent = this.channel.stream_stream(f"/{SERVICE}/{method}")()
            assert await silent.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await this.pick()
        code, _ = await fails(this.ask())
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(this.scheduler.queue) == 0
        assert this.charges == 1


async def test_more_open_picks_than_the_limit_are_refused() -> None:
    async with rig() as this:
        for _ in range(5):
            await this.pick()
        code, _ = await fails(this.ask())
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert this.charges == 5


# --- features ----------------------------------------------------------------------------------------------


async def test_equal_block_hashes_meet_at_one_endpoint() -> None:
    async with rig() as this:
        hashes = list(range(1000, 1040))  # 40 blocks of 16 tokens: ten of picker's
        first = await this.features(blocks=pb.BlockHashes(hashes=hashes, block_tokens=16), prompt_tokens=650)
        assert (first.matched_blocks, first.total_blocks) == (0, 10)
        assert first.prompt_tokens == pytest.approx(650, rel=0.02)
        await this.report(finished(first))
        hashes[20:] = range(5000, 5020)  # the second half differs
        other = await this.features(blocks=pb.BlockHashes(hashes=hashes, block_tokens=16), prompt_tokens=650)
        assert other.endpoint == first.endpoint
        assert other.matched_blocks == 5
        assert other.matched_tokens == pytest.approx(320, rel=0.02)


async def test_blocks_of_another_size_never_match() -> None:
    async with rig("a") as this:
        await this.features(blocks=pb.BlockHashes(hashes=range(64), block_tokens=16))
        other = await this.features(blocks=pb.BlockHashes(hashes=range(64), block_tokens=32))
        assert other.matched_blocks == 0
        await this.features(blocks=pb.BlockHashes(hashes=[7], block_bytes=256))
        other = await this.features(blocks=pb.BlockHashes(hashes=[7], block_bytes=512))
        assert (other.matched_blocks, other.total_blocks) == (0, 2)


async def test_blocks_larger_than_pickers_match_as_far_as_they_agree() -> None:
    async with rig("a") as this:
        await this.features(blocks=pb.BlockHashes(hashes=[1, 2, 3], block_bytes=600))
        other = await this.features(blocks=pb.BlockHashes(hashes=[1, 2, 4], block_bytes=600))
        assert other.total_blocks == 7
        assert other.matched_blocks == 4  # the fifth ends within the third of theirs


async def test_another_model_or_salt_shares_nothing() -> None:
    async with rig("a") as this:
        blocks = pb.BlockHashes(hashes=range(64), block_tokens=16)
        await this.features(blocks=blocks, model="m")
        assert (await this.features(blocks=blocks, model="n")).matched_blocks == 0
        assert (await this.features(blocks=blocks, model="m", cache_salt="s")).matched_blocks == 0
        assert (await this.features(blocks=blocks, model="m")).matched_blocks == 16


async def test_a_prompt_as_text_meets_completions_of_the_same_text() -> None:
    async with rig() as this:
        first = await this.pick()
        await this.report(finished(first))
        other = await this.features(model="m", prompt=("Once upon a time " * 60).encode())
        assert (other.endpoint, other.matched_blocks) == (first.endpoint, 3)


async def test_a_prompt_may_be_told_by_its_size_alone() -> None:
    async with rig() as this:
        assert (await this.features(prompt_tokens=1234)).prompt_tokens == 1234
        assert (await this.features(prompt_bytes=4000)).prompt_tokens == pytest.approx(1000)
        assert (await this.features()).prompt_tokens == 0


async def test_headers_say_what_they_say_elsewhere() -> None:
    async with rig(limits=Limits(objectives={"batch": -5})) as this:
        headers = {"X-Session-ID": "s", "x-llm-d-inference-objective": "batch"}
        picked = await this.features(headers=headers, session="")
        record = this.runtime.record(int(picked.id.partition("-")[0]))
        assert record is not None
        assert (record.request.session, record.request.priority) == ("s", -5)


# --- another model than the one that is named --------------------------------------------------------------


def rewriting() -> Rewriting:
    made = Rewriting(lambda: 0.0, ("configuration",))
    made.put("configuration", [build_rule("canary", ("chat",), [("m", 1)])])
    return made


async def test_a_gateway_is_told_what_to_change_of_a_body() -> None:
    body = BODY.replace(b'"model": "m"', b'"model": "chat"')
    async with rig(limits=Limits(rewriting=rewriting())) as this:
        picked = await this.pick(body)
        change = picked.rewrite
        assert change.model == "m"
        assert body[: change.begin] + change.data + body[change.end :] == BODY
        assert not (await this.pick()).HasField("rewrite")


async def test_features_are_for_the_target_and_share_what_is_cached_of_it() -> None:
    async with rig(limits=Limits(rewriting=rewriting())) as this:
        first = await this.features(model="m", prompt=b"Once upon a time " * 60)
        await this.report(finished(first))
        second = await this.features(model="chat", prompt=b"Once upon a time " * 60)
        assert (second.rewrite.model, second.rewrite.data) == ("m", b"")
        assert (second.endpoint, second.matched_blocks) == (first.endpoint, 3)
        record = this.runtime.record(int(second.id.partition("-")[0]))
        assert record is not None
        assert record.request.rewritten == Rewritten("chat", "canary")


# --- the same as behind Envoy ------------------------------------------------------------------------------


async def ext_proc_pick(channel: grpc.aio.Channel, body: bytes) -> str:
    stream = channel.stream_stream(
        f"/{EXT_PROC}/Process", ProcessingRequest.SerializeToString, ProcessingResponse.FromString
    )()
    head = ProcessingRequest()
    for name, value in ((":method", "POST"), (":path", "/v1/completions")):
        head.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    await stream.write(head)
    message = ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = body, True
    await stream.write(message)
    verdict = await stream.read()
    stream.cancel()
    fields = verdict.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    return str(fields["x-gateway-destination-endpoint"].string_value)


async def ext_proc_picks(bodies: list[bytes]) -> list[str]:
    """What ext-proc says to these in turn, over a scheduler as `rig` has it."""
    scheduler = fakes.scheduler("a", "b", "c", "d")
    runtime = Runtime(scheduler, BlockHasher(b"a secret"), Telemetry(CollectorRegistry()), clock=ManualClock())
    service, port = ExtProc(runtime), asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(service.serve("127.0.0.1", 0, grace=0.0, ready=lambda at, _: port.set_result(at)))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{await port}") as channel:
            picks = []
            for body in bodies:
                picks.append(await ext_proc_pick(channel, body))
                while service.open_streams:  # noqa: ASYNC110
                    await asyncio.sleep(0)
        serving.cancel()
    return picks


async def test_the_same_body_and_state_give_the_same_pick_as_ext_proc() -> None:
    texts = [f"Story {number % 5}. " * 200 + f"And then {number}" for number in range(25)]
    bodies = [json.dumps({"model": "m", "prompt": text, "stream": True}).encode() for text in texts]
    expected = await ext_proc_picks(bodies)
    assert len(set(expected)) > 1
    async with rig("a", "b", "c", "d") as this:
        picks = []
        for body in bodies:
            picked = await this.pick(body, reports_first_token=True)
            picks.append(",".join(each.address for each in (picked.endpoint, *picked.fallbacks)))
            await this.report(pb.Outcome(pick_id=picked.id, failed=pb.Failed(reason=pb.FAILURE_REASON_CLIENT_GONE)))
    assert picks == expected


# --- Report ------------------------------------------------------------------------------------------------


async def test_what_is_reported_is_learned() -> None:
    async with rig() as this:
        picked = await this.pick()
        summary = await this.report(
            started(picked),
            first_token(picked),
            finished(picked, prompt_tokens=255, completion_tokens=10, cached_tokens=128),
        )
        assert (summary.heard, summary.unknown) == (3, 0)
        number = int(picked.id.partition("-")[0])
        assert this.of(picked) == [
            ResponseStarted(number, 200, None),
            FirstToken(number),
            Finished(number, 200, Usage(255, 10, 128)),
        ]
        assert this.charges == 0


async def test_a_pick_ends_once() -> None:
    async with rig() as this:
        picked = await this.pick()
        summary = await this.report(started(picked), started(picked, 500), finished(picked), finished(picked))
        assert (summary.heard, summary.unknown) == (4, 1)
        assert sum(isinstance(fact, ResponseStarted) for fact in this.of(picked)) == 1
        assert sum(isinstance(fact, Finished | Failed) for fact in this.of(picked)) == 1


async def test_a_status_not_told_at_the_end_is_that_of_the_beginning() -> None:
    async with rig() as this:
        picked = await this.pick()
        await this.report(started(picked, 503), first_token(picked), finished(picked))
        assert [type(fact) for fact in this.of(picked)] == [ResponseStarted, Finished]
        last = this.of(picked)[-1]
        assert isinstance(last, Finished)
        assert last.status == 503


async def test_the_charge_follows_a_fallback_that_answered() -> None:
    async with rig() as this:
        picked = await this.pick()
        other = picked.fallbacks[0]
        await this.report(started(picked, endpoint=other.name))
        pool = this.scheduler.pool
        inflight = {each.name: int(pool.inflight[row]) for row, each in pool}
        assert inflight[other.name] == 1
        assert inflight[picked.endpoint.name] == 0


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (pb.FAILURE_REASON_UNSPECIFIED, FailureReason.UNHEARD),
        (pb.FAILURE_REASON_CONNECT, FailureReason.CONNECT),
        (pb.FAILURE_REASON_TRUNCATED, FailureReason.TRUNCATED),
        (77, FailureReason.UNHEARD),
    ],
)
async def test_a_failure_is_told_with_its_reason(reason: Any, expected: FailureReason) -> None:
    async with rig() as this:
        picked = await this.pick()
        await this.report(pb.Outcome(pick_id=picked.id, failed=pb.Failed(reason=reason)))
        assert this.of(picked) == [Failed(int(picked.id.partition("-")[0]), expected)]


async def test_ids_cannot_be_made_up() -> None:
    async with rig() as this:
        picked = await this.pick()
        number = picked.id.partition("-")[0]
        for made_up in (number, f"{number}-0000000000000000"):
            summary = await this.report(pb.Outcome(pick_id=made_up, finished=pb.Finished()))
            assert summary.unknown == 1
        assert this.charges == 1


@pytest.mark.parametrize(
    "outcome",
    [
        pb.Outcome(pick_id="1"),
        pb.Outcome(pick_id="1", started=pb.Started(status=42)),
        pb.Outcome(pick_id="1", finished=pb.Finished(usage=pb.Usage(prompt_tokens=2**32 - 1))),
    ],
)
async def test_an_outcome_that_is_none_ends_the_stream(outcome: Any) -> None:
    async with rig() as this:
        code, _ = await fails(this.report(outcome))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


# --- charges that nobody ends ------------------------------------------------------------------------------


async def test_a_pick_nobody_tells_of_ends_when_it_should_be_over() -> None:
    async with rig(predicted=30.0) as this:
        picked = await this.pick()
        this.picks.sweep(this.clock.now + 29.0)
        assert this.charges == 1
        this.picks.sweep(this.clock.now + 30.0)
        assert this.charges == 0
        assert this.of(picked)[-1] == Failed(int(picked.id.partition("-")[0]), FailureReason.UNHEARD)


async def test_a_pick_is_waited_for_while_its_reporter_is_connected() -> None:
    async with rig(predicted=30.0) as this:
        stream = this.call("Report")()
        await stream.write(hello("me"))
        picked = await this.pick(reporter="me")
        await stream.write(started(picked))
        await this.until(lambda: bool(this.of(picked)))
        this.picks.sweep(this.clock.now + 299.0)
        assert this.charges == 1
        this.picks.sweep(this.clock.now + 301.0)
        assert this.charges == 0
        stream.cancel()


@pytest.mark.parametrize("broken", [True, False])
async def test_picks_of_a_reporter_that_left_end_unless_it_comes_back(broken: bool) -> None:
    async with rig(predicted=30.0) as this:
        stream = this.call("Report")()
        await stream.write(hello("me"))
        first, second = await this.pick(reporter="me"), await this.pick(reporter="me")
        await stream.write(started(first))
        await this.until(lambda: bool(this.of(first)))
        if broken:
            stream.cancel()
        else:
            await stream.done_writing()
        await this.until(lambda: this.picks._reporters["me"].streams == 0)
        this.picks.sweep(this.clock.now + 4.0)
        assert this.charges == 2
        again = this.call("Report")()
        await again.write(hello("me"))
        await again.write(finished(first))
        await this.until(lambda: this.charges == 1)
        this.picks.sweep(this.clock.now + 6.0)
        assert this.charges == 1
        again.cancel()
        await this.until(lambda: this.picks._reporters["me"].streams == 0)
        this.picks.sweep(this.clock.now + 6.0)
        assert this.of(second)[-1] == Failed(int(second.id.partition("-")[0]), FailureReason.CLIENT_GONE)
        assert this.charges == 0


async def test_a_connection_that_is_lost_takes_its_picks_along() -> None:
    async with rig() as this:
        picked = await this.pick()
        stream = this.call("Report")()
        await stream.write(started(picked))  # nameless: the pick is this stream's from here on
        await this.until(lambda: bool(this.of(picked)))
        await this.channel.close()
        await this.until(lambda: all(not each.streams for each in this.picks._reporters.values()))
        this.picks.sweep(this.clock.now + 6.0)
        assert this.charges == 0
        assert not this.picks._reporters


async def test_another_stream_cannot_take_a_pick_from_a_reporter_that_is_there() -> None:
    async with rig() as this:
        mine = this.call("Report")()
        await mine.write(hello("me"))
        await this.until(lambda: "me" in this.picks._reporters)
        picked = await this.pick(reporter="me")
        await this.report(started(picked))  # heard, but the pick stays where it is
        this.picks.sweep(this.clock.now + 6.0)
        assert this.charges == 1
        mine.cancel()


# --- WatchEndpoints ----------------------------------------------------------------------------------------


async def test_a_watcher_is_told_all_and_then_what_changes() -> None:
    async with rig("a", "b") as this:
        watch = this.call("WatchEndpoints")(pb.WatchEndpointsRequest(interval_ms=100))
        first = await watch.read()
        assert first.snapshot
        assert {state.endpoint.address for state in first.changed} == {"a:8000", "b:8000"}
        assert not first.changed[0].HasField("waiting")
        this.clock.advance(1.0)
        this.runtime.emit(HealthObserved("a", healthy=False))
        update = await watch.read()
        assert not update.snapshot
        assert [(state.endpoint.name, state.healthy) for state in update.changed] == [("a", False)]
        this.clock.advance(1.0)
        this.runtime.emit(EndpointRemoved("b"))
        this.runtime.emit(EndpointAdded(fakes.endpoint("c")))
        update = await watch.read()
        assert [state.endpoint.name for state in update.changed] == ["c"]
        assert list(update.removed) == ["b"]
        this.clock.advance(1.0)
        await this.pick()
        update = await watch.read()
        assert [state.inflight_requests for state in update.changed] == [1]
        watch.cancel()


async def test_a_slow_reader_gets_the_latest_and_costs_no_memory() -> None:
    # Labels make an update larger than what the connection takes while nobody reads.
    big = [fakes.endpoint(f"e{number}", models=["x" * 4000]) for number in range(40)]
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]
    async with rig(*big, options=options) as this:  # type: ignore[arg-type]
        watch = this.call("WatchEndpoints")(pb.WatchEndpointsRequest(interval_ms=100))
        assert (await watch.read()).snapshot
        for turn in range(200):
            this.clock.advance(1.0)
            for each in big:
                this.runtime.emit(HealthObserved(each.name, healthy=bool(turn % 2)))
            await asyncio.sleep(0)
        this.clock.advance(1.0)
        this.runtime.emit(EndpointRemoved("e0"))
        removed, updates = False, 0
        while not removed:
            update = await watch.read()
            updates += 1
            removed = "e0" in update.removed
        assert updates < 20
        watch.cancel()


async def test_a_reader_that_takes_nothing_is_ended() -> None:
    # Two hundred and more kilobytes, which no window takes while nobody reads.
    big = [fakes.endpoint(f"e{number}", models=["x" * 40_000]) for number in range(40)]
    options = [("grpc.http2.bdp_probe", 0), ("grpc.max_receive_message_length", -1)]
    async with rig(*big, stalled=0.1, options=options) as this:  # type: ignore[arg-type]
        watch = this.call("WatchEndpoints")(pb.WatchEndpointsRequest(interval_ms=100))
        async with asyncio.timeout(10):
            turn = 0
            while not watch.done() and this.api._watchers < 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
            while this.api._watchers:
                this.clock.advance(1.0)
                turn += 1
                for each in big:
                    this.runtime.emit(HealthObserved(each.name, healthy=bool(turn % 2)))
                await asyncio.sleep(0.01)
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await watch.read() is not grpc.aio.EOF:
                pass
        assert await watch.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# --- who may call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "allowed"),
    [(None, False), ("Bearer wrong", False), ("Basic secret", False), ("Bearer secret", True), ("bearer secret", True)],
)
async def test_the_key_is_asked_for(sent: str | None, allowed: bool) -> None:
    async with rig(key="secret") as this:
        metadata = () if sent is None else (("authorization", sent),)
        for _ in range(3):  # the first call comes before the peer has given up its table of headers
            call = this.call("Pick")(pb.PickRequest(features=pb.Features()), metadata=metadata)
            if allowed:
                assert (await call).picked.endpoint.name
            else:
                code, message = await fails(call)
                assert code is grpc.StatusCode.UNAUTHENTICATED
                assert "Bearer" in message


async def test_calls_with_and_without_the_key_share_a_connection() -> None:
    async with rig(key="secret") as this:
        pick, request = this.call("Pick"), pb.PickRequest(features=pb.Features())
        for _ in range(2):
            assert (await pick(request, metadata=(("authorization", "Bearer secret"),))).picked.id
            assert (await fails(pick(request)))[0] is grpc.StatusCode.UNAUTHENTICATED
            assert (await fails(pick(request, timeout=5)))[0] is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("key", [None, "secret"])
@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_answers_without_a_key(key: str | None, service: str) -> None:
    async with rig(key=key) as this:
        stub = health_pb2_grpc.HealthStub(this.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_there_is_no_reflection() -> None:
    async with rig() as this:
        for version in ("v1", "v1alpha"):
            call = this.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")()
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_it_speaks_tls_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    certificate, key = self_signed(["localhost", "127.0.0.1"])
    (tmp_path / "tls.crt").write_bytes(certificate)
    (tmp_path / "tls.key").write_bytes(key)
    async with rig(key="secret", tls=Certificates(tmp_path).context) as this:
        credentials = grpc.ssl_channel_credentials(root_certificates=certificate)
        async with grpc.aio.secure_channel(f"localhost:{this.port}", credentials) as this.channel:
            pick = this.call("Pick")
            metadata = (("authorization", "Bearer secret"),)
            assert (await pick(pb.PickRequest(features=pb.Features()), metadata=metadata)).picked.id


async def test_a_message_beyond_the_limit_is_refused() -> None:
    async with rig() as this:
        call = this.call("Pick")(pb.PickRequest(http=pb.HttpRequest(body=b"x" * (65 * 1024 * 1024))))
        assert (await fails(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- going -------------------------------------------------------------------------------------------------


async def test_told_to_go_it_hears_reports_to_the_end_and_picks_no_more() -> None:
    async with rig(grace=30.0) as this:
        stream = this.call("Report")()
        picked = await this.pick()
        await stream.write(started(picked))
        this.runtime.drain()
        this.stop.set()
        refusal = (await this.ask()).refusal
        assert (refusal.status, refusal.reason) == (503, "shutdown")
        assert not this.task.done()
        await stream.write(finished(picked))
        await this.task
        assert this.of(picked)[-1] == Finished(int(picked.id.partition("-")[0]), 200)
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE


async def test_picks_that_are_left_end_with_the_service() -> None:
    async with rig() as this:
        picked = await this.pick()
        this.stop.set()
        await this.task
        assert this.of(picked)[-1] == Failed(int(picked.id.partition("-")[0]), FailureReason.SHUTDOWN)
        assert this.charges == 0


async def test_prompts_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="picker")
    async with rig() as this:
        await this.ask(b'{"prompt": "a secret thought"}')
        await this.ask(b'{"prompt": "a secret thought')
        await this.features(prompt=b"a secret thought")
    assert "secret thought" not in caplog.text
