"""The door of a data plane that is picker's own: who may come in, and what it tells of requests that have ended.

That Envoy is the only one who can reach picker's socket, and takes from clients what only picker may say: a request's
mark is its bare number, which clients may see. See `als` for what becomes of what it tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import msgspec

from picker.access_log import RequestLog
from picker.core.retry_budget import WINDOW_S
from picker.exchange import Headers, RequestHead, Respond
from picker.frontends.als import Feedback, Predict
from picker.frontends.keys import Key, KeyRefusal, Keyring
from picker.gate import Gate
from picker.types import FailureReason
from picker.wire import openai
from picker.wire.als import Ended


class OwnPorter:
    """Asks for keys before a body is read, and keeps the access log. journal: None without one."""

    def __init__(self, keys: Keyring, journal: RequestLog | None) -> None:
        self._keys = keys
        self._journal = journal
        self._guests: dict[int, Key] = {}

    def came(self, request_id: int, head: RequestHead) -> Respond | None:
        if self._journal is not None:
            # Envoy puts its own peer behind what clients say of whom they forward.
            client = head.headers.get("x-forwarded-for", "").rpartition(",")[2].strip() or None
            alias = head.headers.get("x-request-id")
            self._journal.begin(request_id, head.method, head.path, client=client, alias=alias)
        if self._keys.open:
            return None
        key = self._keys.admit((name.encode(), value.encode("latin-1")) for name, value in head.headers.items())
        if isinstance(key, KeyRefusal):
            return _refusal(head.path, key)
        self._guests[request_id] = key
        if self._journal is not None:
            self._journal.keyed(request_id, key.name)
        return None

    def body_limit(self, request_id: int) -> int | None:
        """Bytes that the body of a request may have by its key."""
        key = self._guests.get(request_id)
        return None if key is None else self._keys.body_limit(key)

    def answered(self, request_id: int, status: int) -> None:
        if self._journal is not None:
            self._journal.answered(request_id, status)

    def left(self, request_id: int) -> None:
        if self._journal is not None:
            self._journal.ended(request_id)
        if (key := self._guests.pop(request_id, None)) is not None:
            self._keys.leave(key)

    def measured(self, request_id: int, ended: Ended) -> None:
        """What Envoy says of a request that it has served."""
        if self._journal is not None:
            self._journal.measured(
                request_id, first_byte=ended.first_byte, duration=ended.duration, attempts=ended.attempts
            )


def _refusal(path: str, refusal: KeyRefusal) -> Respond:
    headers: Headers = (("content-type", "application/json"),)
    if refusal.status == 401:
        headers = (*headers, ("www-authenticate", "Bearer"))
    if refusal.status == 429:
        headers = (*headers, ("retry-after", "1"))
    return Respond(refusal.status, headers, openai.error_body_for(path, refusal.status, refusal.message))


class RetryWatch:
    """Whether Envoy may send requests a second time, by how many it has sent so of late.

    As `core.retry_budget` has it: `ratio` of requests, besides `floor` of them, within some ten seconds. What is under
    way when that is used up has been allowed its retries already, so that an endpoint's end costs nobody anything;
    what comes after it has not. allowances: ratio and floor, as they are at that time; a ratio of None: no limit.
    """

    def __init__(self, allowances: Callable[[], tuple[float | None, float]]) -> None:
        self._allowances = allowances
        self._requests = self._retries = 0.0
        self._at = 0.0

    def count(self, retries: int, now: float) -> None:
        """A request has ended that was sent so many times more than once."""
        self._fade(now)
        self._requests += 1.0
        self._retries += retries

    def allowed(self, now: float) -> bool:
        if not self._retries:
            return True
        ratio, floor = self._allowances()
        self._fade(now)
        return ratio is None or self._retries < floor + ratio * self._requests

    def _fade(self, now: float) -> None:
        kept = math.exp((self._at - now) / WINDOW_S)
        self._requests, self._retries, self._at = self._requests * kept, self._retries * kept, now


class OwnFeedback(Feedback):
    """names: of endpoints by their "ip:port", live, where they are known by name. retries: told of all there were."""

    def __init__(
        self, gate: Gate, predict: Predict, names: Mapping[str, str], porter: OwnPorter, retries: RetryWatch
    ) -> None:
        super().__init__(gate, predict)
        self.secret = ""
        self._retries = retries
        self._names = names
        self._porter = porter

    def mark(self, request_id: int) -> str:
        return str(request_id)

    def hear(self, ended: Ended) -> None:
        request_id = self._meant(ended)
        if ended.attempts is not None:
            self._retries.count(ended.attempts - 1, self.gate.clock())
        self._porter.measured(request_id, ended)
        if self._names and ended.upstream is not None:
            ended = msgspec.structs.replace(ended, upstream=self._names.get(ended.upstream, ended.upstream))
        super().hear(ended)
        self._porter.left(request_id)

    def sweep(self, now: float) -> None:
        waiting = list(self._waiting)
        super().sweep(now)
        self._tell(waiting)

    def close(self, reason: FailureReason) -> None:
        waiting = list(self._waiting)
        super().close(reason)
        self._tell(waiting)

    def _tell(self, waiting: list[int]) -> None:
        for request_id in waiting:
            if request_id not in self._waiting:
                self._porter.left(request_id)
