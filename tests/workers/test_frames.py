from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, endpoint
from picker.types import (
    Call,
    CallKind,
    Decision,
    EndpointRemoved,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Rejection,
    RejectReason,
    Request,
    ResponseStarted,
    Usage,
)
from picker.wire.als import Ended
from picker.workers import frames
from picker.workers.frames import Frames, Word

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
count = st.integers(0, 2**40)
requests = st.builds(
    Request,
    id=st.integers(1, 2**60),
    model=st.none() | text,
    arrived_at=st.just(NOW),
    block_hashes=st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda all_: np.array(all_, dtype=np.uint64)),
    prompt_bytes=count,
    extra_bytes=count,
    prompt_tokens=st.none() | count,
    max_tokens=st.none() | count,
    priority=st.integers(-(2**31), 2**31),
    session=st.none() | text,
    streaming=st.booleans(),
    subset=st.none() | st.frozensets(text, max_size=3),
    exclude=st.frozensets(text, max_size=3),
    deadline=st.just(NOW + 1.0),
    headers=st.dictionaries(text, text, max_size=3),
)


def shown(request: Request) -> dict[str, Any]:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    return fields | {"block_hashes": request.block_hashes.tolist(), "headers": dict(request.headers)}


def carried(*messages: Word, cut: int = 1 << 20) -> list[bytes]:
    """The payloads after a way through a socket that cuts where it likes."""
    data, cutter = frames.frame([frames.encode(message) for message in messages]), Frames(1 << 20)
    return [payload for at in range(0, len(data), cut) for payload in cutter.feed(data[at : at + cut])]


def one_from_worker(message: Word) -> Any:
    ((found,),) = map(frames.from_worker, carried(message))
    return found


def one_from_decider(message: Word) -> Any:
    ((found,),) = map(frames.from_decider, carried(message))
    return found


@given(requests)
@settings(max_examples=60)
def test_a_request_arrives_as_it_was_prepared(request: Request) -> None:
    arrived = frames.request_of(one_from_worker(frames.ask(request, None)), NOW, NOW + 1.0)
    assert shown(arrived) == shown(request)


@given(st.lists(requests, min_size=1, max_size=4), st.integers(1, 40))
@settings(max_examples=40)
def test_frames_survive_being_cut_anywhere(sent: list[Request], cut: int) -> None:
    (payload,) = carried(*(frames.ask(request, None) for request in sent), cut=cut)
    assert [message.id for message in frames.from_worker(payload)] == [request.id for request in sent]  # type: ignore[union-attr]


def test_several_frames_may_come_at_once() -> None:
    data = frames.frame([frames.encode(frames.Pulse(3, 0.5))]) * 2 + b"\0\0"
    cutter = Frames(100)
    assert len(cutter.feed(data)) == 2
    assert len(cutter.feed(b"\0" + frames.frame([frames.encode(frames.Pulse())])[3:])) == 1


def test_a_frame_of_absurd_size_is_refused_before_it_is_buffered() -> None:
    with pytest.raises(ValueError, match="4294967295"):
        Frames(1000).feed(b"\xff\xff\xff\xff")


def test_numbers_that_only_json_can_hold_are_bounded() -> None:
    request = Request(1, None, NOW, max_tokens=10**40, prompt_tokens=3, priority=-(10**40))
    arrived = frames.request_of(one_from_worker(frames.ask(request, None)), NOW, None)
    assert (arrived.max_tokens, arrived.prompt_tokens, arrived.priority) == (2**63 - 1, 3, -(2**63 - 1))


def test_prompts_go_along_only_to_a_decider_that_reads_them_and_are_never_shown() -> None:
    call = Call(CallKind.CHAT, "m", b"prompt", salt="s", body=b'{"the": "prompt"}')
    request = Request(1, "m", NOW)
    assert b"prompt" not in frames.encode(frames.ask(request, None))
    ask = one_from_worker(frames.ask(request, call))
    assert "prompt" not in repr(ask)
    assert frames.call_of(ask) == Call(CallKind.CHAT, "m", salt="s")
    assert frames.call_of(ask).body == call.body


OUTCOMES = [
    Decision(7, endpoint("a", rank=1), (endpoint("b"), endpoint("c")), 3, 4, 700.5, 1000.0, 0.25, charged=False),
    Decision(8, endpoint("a"), matched_tokens=float(np.float64(2.5))),
    Rejection(9, RejectReason.SATURATED, 429, "Full.", 1.5),
    Rejection(9, RejectReason.UNKNOWN_MODEL, 404, "None."),
]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=repr)
def test_an_outcome_arrives_as_it_was_decided(outcome: Decision | Rejection) -> None:
    assert frames.outcome_of(one_from_decider(frames.answer(outcome))) == outcome


def test_what_numpy_has_computed_can_be_told() -> None:
    decision = Decision(1, endpoint("a"), matched_blocks=np.int64(3), matched_tokens=np.float64(2.5))  # type: ignore[arg-type]
    arrived = frames.outcome_of(one_from_decider(frames.answer(decision)))
    assert isinstance(arrived, Decision)
    assert (arrived.matched_blocks, arrived.matched_tokens) == (3, 2.5)


FACTS: list[Fact] = [
    ResponseStarted(1, 200, "10.0.0.1:8000"),
    FirstToken(1),
    Finished(1, 200, Usage(10, 20, None)),
    Finished(1, 500),
    *(Failed(1, reason) for reason in FailureReason),
]


@pytest.mark.parametrize("fact", FACTS, ids=repr)
def test_a_fact_of_a_request_arrives_as_it_was_told(fact: Fact) -> None:
    message = frames.told(fact)
    assert message is not None
    assert frames.fact_of(one_from_worker(message)) == fact


def test_facts_of_endpoints_are_no_workers_business() -> None:
    assert frames.told(EndpointRemoved("a")) is None


def test_an_entry_of_the_access_log_arrives_as_it_was() -> None:
    ended = Ended("7-secret", "id", 200, "10.0.0.1:8000", FailureReason.RESET, 0.25, None, 3)
    assert frames.ended_of(one_from_worker(frames.logged(ended))) == ended
