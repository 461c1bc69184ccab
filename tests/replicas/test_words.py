"""What is said arrives as it was meant, whatever else comes is refused."""

import contextlib

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import NOW, blocks, request, scheduler
from picker.replicas import words
from picker.replicas.words import Alive, Greeting, Handed, Held, Node, Standing, Wanted
from picker.types import (
    Decision,
    EndpointRemoved,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    ResponseStarted,
    Usage,
)

LARGE = 1 << 70  # JSON has integers of any length


def said(word: words.Word) -> words.FromReplica:
    (heard,) = words.unbatch(words.batch([words.encode(word)]))
    return heard


@pytest.mark.parametrize(
    "fact",
    [
        ResponseStarted(7, 200, "10.0.0.1:8000"),
        ResponseStarted(7, 503),
        FirstToken(7),
        Finished(7, 200),
        Finished(7, 200, Usage(100, 20, 64)),
        Finished(7, 500, Usage(100, 20)),
        *(Failed(7, reason) for reason in FailureReason),
    ],
)
def test_a_fact_of_a_request_arrives_under_another_id(fact: Fact) -> None:
    word = words.told(fact)
    assert word is not None
    heard = said(word)
    assert isinstance(heard, words.Began | words.Token | words.Ended | words.Broke)
    assert heard.id == 7
    assert words.fact_of(heard, 7) == fact


def test_what_all_see_by_themselves_is_not_told() -> None:
    assert words.told(EndpointRemoved("a")) is None


def test_a_booking_arrives_as_it_was_made() -> None:
    subject = scheduler("a", "b")
    asked = request(7, blocks(system=30), session="s", prompt_tokens=1900, extra_bytes=12, model="m")
    decision = subject.submit(asked, NOW)
    assert isinstance(decision, Decision)
    charge = subject.charges.get(7)
    assert charge is not None
    heard = said(words.routed(charge, decision.endpoint.name, fresh=True))
    assert isinstance(heard, words.Routed)
    fact = words.booked(heard, -1)
    assert (fact.name, fact.uncached, fact.tokens) == (decision.endpoint.name, charge.tokens, charge.context)
    assert fact.others == charge.others
    assert np.array_equal(fact.request.block_hashes, asked.block_hashes)
    for field in ("model", "session", "prompt_bytes", "extra_bytes", "prompt_tokens", "streaming"):
        assert getattr(fact.request, field) == getattr(asked, field), field


def test_what_an_engine_reports_may_be_of_any_size() -> None:
    word = words.told(Finished(7, 200, Usage(LARGE, LARGE, LARGE)))
    assert word is not None
    assert said(word)


@pytest.mark.parametrize(
    "word",
    [Greeting(1, "one", 256, 9), Standing([]), Alive(3), Wanted(), Node(1, 0, b"12345678"), Held("a", 1), Handed()],
)
def test_every_other_word_arrives(word: words.FromReplica) -> None:
    assert said(word) == word


def test_several_words_are_one_piece() -> None:
    encoded = [words.encode(word) for word in (Alive(1), Wanted(), Alive(2))]
    assert words.unbatch(words.batch(encoded)) == [Alive(1), Wanted(), Alive(2)]


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_what_is_no_piece_is_refused(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(words.unbatch(data), list)


def test_a_word_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid value 99"):
        words.unbatch(b"\x91\x92\x63\x01")


def test_hashes_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of element size"):
        words.blocks(b"123")


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ([30, 1, "old", 256, 7], words.Greeting(1, "old", 256, 7)),
        ([33, 7], words.Alive(7)),
        ([34], words.Wanted()),
        # And one that will be: what it says beyond is for those who know of it.
        ([33, 7, 1, 2.0, {}, "news"], words.Alive(7, 1, 2.0)),
    ],
)
def test_a_replica_of_another_version_is_understood(said: list[object], heard: words.Word) -> None:
    assert words.unbatch(words.batch([msgspec.msgpack.encode(said)])) == [heard]
