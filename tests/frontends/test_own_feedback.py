"""Whoever comes through picker's own Envoy leaves once, however the request ends, and takes the key along."""

import json
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from picker.access_log import RequestLog
from picker.exchange import RequestHead
from picker.frontends.keys import Allowance, Keyring, named_key
from picker.frontends.own_feedback import OwnFeedback, OwnPorter, RetryWatch
from picker.types import Decision, Endpoint, Fact, FailureReason, Finished, ResponseStarted, Usage
from picker.wire.als import Counted, Ended

SECRET = "sesame-sesame-sesame"


class Gate:
    """The clock and ears that feedback has."""

    def __init__(self) -> None:
        self.now = 0.0
        self.facts: list[Fact] = []

    def clock(self) -> float:
        return self.now

    def emit(self, fact: Fact) -> None:
        self.facts.append(fact)


def head(**headers: str) -> RequestHead:
    return RequestHead("POST", "/v1/chat/completions", {"authorization": f"Bearer {SECRET}"} | headers)


def keyring(**options: Any) -> Keyring:
    return Keyring([named_key("team", SECRET)], allowance=Allowance(**options))


def ended(mark: str = "1", **more: Any) -> Ended:
    known: dict[str, Any] = {"request_id": "", "status": 200, "upstream": "10.0.0.1:80", "failure": None}
    return Ended(mark=mark, **(known | {"first_byte": 0.1, "duration": 1.0} | more))


def feedback(gate: Gate, porter: OwnPorter, names: dict[str, str] | None = None) -> OwnFeedback:
    made = OwnFeedback(cast(Any, gate), lambda decision: 1.0, names or {}, porter, RetryWatch(lambda: (0.2, 10.0)))
    made.expect(Decision(1, Endpoint("a", "a:80")), "", 0.0)
    return made


@pytest.mark.parametrize("headers", [{"authorization": "Bearer wrong"}, {"authorization": ""}])
def test_a_wrong_key_is_answered_and_counts_for_nothing(headers: dict[str, str]) -> None:
    keys = keyring()
    answer = OwnPorter(keys, None).came(1, head(**headers))
    assert answer is not None
    assert answer.status == 401
    assert ("www-authenticate", "Bearer") in answer.headers
    assert not keys.running


def test_without_keys_everybody_comes_in() -> None:
    assert OwnPorter(Keyring(), None).came(1, head(authorization="")) is None


def test_a_key_has_as_many_requests_as_it_may_until_one_has_ended() -> None:
    keys, gate = keyring(max_concurrent=1), Gate()
    porter = OwnPorter(keys, None)
    assert porter.came(1, head()) is None
    refused = porter.came(2, head())
    assert refused is not None
    assert refused.status == 429
    porter.left(2)
    feedback(gate, porter).hear(ended())
    assert porter.came(3, head()) is None


def test_the_tokens_of_an_answer_are_told_where_the_data_plane_has_read_them() -> None:
    for usage in (Usage(9, 3, 8), None):
        gate = Gate()
        told = Counted(**msgspec.structs.asdict(ended(upstream="10.0.0.1:80")), usage=usage)
        feedback(gate, OwnPorter(Keyring(), None), {"10.0.0.1:80": "a:80"}).hear(told)
        assert gate.facts == [ResponseStarted(1, 200, "a:80"), Finished(1, 200, usage)]


def test_a_request_that_nobody_tells_the_end_of_leaves_too() -> None:
    for end in ("sweep", "close"):
        keys, gate = keyring(), Gate()
        porter = OwnPorter(keys, None)
        porter.came(1, head())
        made = feedback(gate, porter)
        if end == "sweep":
            made.sweep(1e9)
        else:
            made.close(FailureReason.SHUTDOWN)
        assert not keys.running


def test_an_endpoint_is_told_by_its_name() -> None:
    gate = Gate()
    feedback(gate, OwnPorter(Keyring(), None), {"10.0.0.1:80": "a:80"}).hear(ended())
    (started,) = [fact for fact in gate.facts if isinstance(fact, ResponseStarted)]
    assert started.served_by == "a:80"


def test_a_mark_is_the_bare_number_of_the_request() -> None:
    gate = Gate()
    made = feedback(gate, OwnPorter(Keyring(), None))
    assert made.mark(7) == "7"
    made.hear(ended(mark="2"))
    assert not gate.facts
    made.hear(ended(mark="1"))
    assert gate.facts


def test_the_access_log_has_what_envoy_measured(tmp_path: Path) -> None:
    journal = RequestLog(str(tmp_path / "log"))
    porter = OwnPorter(keyring(), journal)
    porter.came(1, head(**{"x-forwarded-for": "spoofed, 10.0.0.9", "x-request-id": "abc"}))
    feedback(Gate(), porter).hear(ended(attempts=2))
    journal.close()
    (line,) = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (line["client"], line["request_id"], line["key"]) == ("10.0.0.9", "abc", "team")
    assert (line["ttft_s"], line["duration_s"], line["attempts"]) == (0.1, 1.0, 2)


# --- retries -----------------------------------------------------------------------------------------------


def test_retries_are_for_a_share_of_the_requests_of_late_and_a_few_besides() -> None:
    watch = RetryWatch(lambda: (0.2, 10.0))
    assert watch.allowed(0.0)
    for _ in range(100):
        watch.count(0, 1.0)
    for _ in range(29):
        watch.count(1, 1.0)
    assert watch.allowed(1.0)
    for _ in range(9):
        watch.count(1, 1.0)
    assert not watch.allowed(1.0)
    assert watch.allowed(60.0)


def test_no_ratio_is_no_limit_and_a_new_one_is_in_force_at_once() -> None:
    allowances: list[tuple[float | None, float]] = [(None, 0.0)]
    watch = RetryWatch(lambda: allowances[0])
    watch.count(50, 0.0)
    assert watch.allowed(0.0)
    allowances[0] = (0.0, 10.0)
    assert not watch.allowed(0.0)


def test_what_the_log_tells_of_attempts_is_counted() -> None:
    gate, watch = Gate(), RetryWatch(lambda: (0.0, 2.0))
    heard = OwnFeedback(cast(Any, gate), lambda decision: 1.0, {}, OwnPorter(keyring(), None), watch)
    heard.hear(ended(attempts=1))
    assert watch.allowed(0.0)
    heard.hear(ended(attempts=3))
    assert not watch.allowed(0.0)


def test_the_limit_of_a_body_is_that_of_its_key() -> None:
    porter = OwnPorter(keyring(max_body_bytes=5), None)
    assert porter.body_limit(1) is None
    assert porter.came(1, head()) is None
    assert porter.body_limit(1) == 5
