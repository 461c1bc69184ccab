"""The client against the service itself; times are real only where the client's own are tested."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from frontends.api_rig import BODY, Rig, rig
from picker.client import Blocks, Client, Endpoint, Explain, Failure, Features, RefusedError, Usage
from picker.exchange import Limits
from picker.rewrites import Rewriting, build_rule
from picker.types import EndpointRemoved, Failed, FailureReason, Finished, FirstToken, ResponseStarted
from picker.types import Usage as Counted


def client(this: Rig, **more: Any) -> Client:
    return Client(f"127.0.0.1:{this.port}", **more)


async def test_a_request_is_picked_for_followed_and_ended() -> None:
    async with rig() as this, client(this) as picker:
        async with picker.pick(BODY, path="/v1/completions") as picked:
            assert picked.endpoint.url == f"http://{picked.endpoint.address}"
            assert len(picked.fallbacks) == 2
            assert picked.total_blocks == 3
            assert [each.endpoint for each in picked.candidates] == [picked.endpoint.name]
            picked.started(200)
            picked.first_token()
            picked.first_token()
            picked.finished(Usage(255, 10, 0))
        await this.until(lambda: this.charges == 0)
    assert this.of(picked) == [
        ResponseStarted(1, 200, picked.endpoint.address),
        FirstToken(1),
        Finished(1, 200, Counted(255, 10, 0)),
    ]


async def test_a_body_for_another_model_is_made_of_the_one_that_was_shown() -> None:
    rewriting = Rewriting(lambda: 0.0, ("configuration",))
    rewriting.put("configuration", [build_rule("canary", ("chat",), [("m", 1)])])
    body = BODY.replace(b'"model": "m"', b'"model": "chat"')
    async with rig(limits=Limits(rewriting=rewriting)) as this, client(this) as picker:
        async with picker.pick(body, path="/v1/completions") as picked:
            assert (picked.model, picked.body(body)) == ("m", BODY)
        async with picker.pick(BODY, path="/v1/completions") as picked:
            assert (picked.model, picked.body(BODY)) == (None, BODY)
        async with picker.pick(Features(model="chat")) as picked:
            assert (picked.model, picked.body(b"kept")) == ("m", b"kept")


async def test_leaving_the_block_without_a_word_is_an_end() -> None:
    async with rig() as this, client(this) as picker:
        async with picker.pick(Features(model="m", prompt=b"Once"), explain=Explain.NONE) as picked:
            assert picked.candidates == ()
            picked.started(404)
        await this.until(lambda: this.charges == 0)
        assert this.of(picked)[-1] == Finished(1, 404)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(), FailureReason.CONNECT),
        (ConnectionResetError(), FailureReason.RESET),
        (TimeoutError(), FailureReason.TIMEOUT),
        (asyncio.CancelledError(), FailureReason.CLIENT_GONE),
        (ZeroDivisionError(), FailureReason.UNHEARD),
    ],
)
async def test_an_error_that_leaves_the_block_is_told(error: BaseException, reason: FailureReason) -> None:
    async with rig() as this, client(this) as picker:
        with pytest.raises(type(error)):
            async with picker.pick(BODY, path="/v1/completions") as picked:
                raise error
        await this.until(lambda: this.charges == 0)
        assert this.of(picked)[-1] == Failed(1, reason)


async def test_the_end_is_told_once() -> None:
    async with rig() as this, client(this) as picker:
        async with picker.pick(BODY, path="/v1/completions") as picked:
            picked.failed(Failure.TRUNCATED)
            picked.finished()
            assert picked.over
        await this.until(lambda: this.charges == 0)
        assert this.of(picked) == [Failed(1, FailureReason.TRUNCATED)]


async def test_a_fallback_that_answered_is_named() -> None:
    async with rig() as this, client(this) as picker:
        async with picker.pick(BODY, path="/v1/completions") as picked:
            picked.started(200, picked.fallbacks[0])
        await this.until(lambda: this.charges == 0)
        assert this.of(picked)[0] == ResponseStarted(1, 200, picked.fallbacks[0].address)


async def test_a_refusal_is_raised_with_what_to_answer() -> None:
    async with rig(max_inflight=1, queue_size=0) as this, client(this) as picker:
        with pytest.raises(RefusedError, match="400 bad-request") as caught:
            async with picker.pick(b"{"):
                pass
        assert caught.value.status == 400
        assert caught.value.headers["content-type"] == "application/json"
        assert caught.value.retry_after is None
        with pytest.raises(RefusedError) as caught:
            async with picker.pick(BODY, path="/v1/completions", exclude=["a", "b", "c"]):
                pass
        assert caught.value.reason == "no-match"


async def test_features_are_handed_on() -> None:
    async with rig("a") as this, client(this) as picker:
        features = Features(
            model="m",
            prompt=Blocks(range(64), block_tokens=16),
            prompt_tokens=1024,
            max_tokens=7,
            priority=2,
            session="s",
            cache_salt="x",
        )
        async with picker.pick(features, subset=["a:8000"], first_token=False) as picked:
            record = this.runtime.record(1)
            assert record is not None
            asked = record.request
            assert (asked.model, asked.block_hashes.size, asked.prompt_tokens) == ("m", 16, 1024)
            assert (asked.max_tokens, asked.priority, asked.session, asked.streaming) == (7, 2, "s", False)
            assert asked.subset == frozenset({"a:8000"})
            assert picked.endpoint == Endpoint("a", "a:8000", "http")


async def test_the_key_is_shown() -> None:
    async with rig(key="secret") as this:
        async with client(this, key="secret") as picker, picker.pick(Features()) as picked:
            assert picked.id
        async with client(this) as stranger:
            with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
                async with stranger.pick(Features()):
                    pass


async def test_endpoints_are_watched() -> None:
    async with rig("a", "b") as this, client(this) as picker:
        watching = picker.watch(interval=0.1)
        states = await anext(watching)
        assert set(states) == {"a", "b"}
        assert states["a"].healthy
        assert (states["a"].waiting, states["a"].inflight_requests) == (None, 0)
        this.clock.advance(1.0)
        this.runtime.emit(EndpointRemoved("b"))
        assert set(await anext(watching)) == {"a"}
        await watching.aclose()  # type: ignore[attr-defined]


async def test_reports_go_on_when_their_stream_broke() -> None:
    async with rig() as this, client(this) as picker:
        async with picker.pick(BODY, path="/v1/completions") as picked:
            picked.started(200)
            await this.until(lambda: bool(this.of(picked)))
            for connection in [*_server(this).connections]:
                for call in list(connection.calls.values()):
                    call.cancel()
            await this.until(lambda: not any(each.streams for each in this.picks._reporters.values()))
            # Before anything is to be told: else the pick would be taken for that of a client that is gone.
            await this.until(lambda: any(each.streams for each in this.picks._reporters.values()))
            picked.finished(Usage(255, 10))
        await this.until(lambda: this.charges == 0)
        assert this.of(picked)[-1] == Finished(1, 200, Counted(255, 10))


def _server(this: Rig) -> Any:
    return this.api.server


async def test_a_picker_that_is_not_there_holds_nobody_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picker.client._PARTING", 0.05)
    async with asyncio.timeout(60):
        async with Client("127.0.0.1:1") as picker:
            with pytest.raises(grpc.aio.AioRpcError):
                async with picker.pick(Features()):
                    pass


async def test_what_was_told_last_is_sent_before_the_client_closes() -> None:
    async with rig() as this:
        async with client(this) as picker, picker.pick(BODY, path="/v1/completions") as picked:
            pass
        await this.until(lambda: this.charges == 0)
        assert this.of(picked)[-1] == Finished(1, 200)


def test_nothing_of_a_prompt_is_shown() -> None:
    assert "secret" not in repr(Features(prompt=b"secret", cache_salt="secret"))
