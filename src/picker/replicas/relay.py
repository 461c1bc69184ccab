"""Access-log entries that came to one replica and are about another's requests. Knows no wire.

A gateway's log goes to one of the replicas behind it, whichever has decided. Each says which marks are its own by a
fingerprint of the secret in them, and hands on what is not its own to whose it is. An entry that cannot be handed on is
lost: the request's end is then predicted, as where there is no log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from picker.replicas import words
from picker.types import FailureReason
from picker.wire.als import Ended


class Owner(Protocol):
    """Who has sent requests on and waits for their ends (`frontends.als.Feedback`). secret: in its marks."""

    secret: str

    def settle(self, ended: Ended) -> bool:
        """Take an entry; whether it is about a request of ours."""
        ...

    def others_hear(self, logs: int) -> None:
        """So many logs are open at other replicas, who hand on what is ours."""
        ...


@dataclass(slots=True)
class _Other:
    """marks: the fingerprint of its secret, "" where it sends nothing on by itself. logs: that are open there."""

    marks: str
    logs: int


class Relay:
    """send: tells one replica a word, or loses it. passed, unclaimed: entries handed on, and those that are nobody's.

    logs: that are open here.
    """

    def __init__(self, send: Callable[[str, words.Word], None]) -> None:
        self.on_logs: Callable[[], None] = lambda: None
        self.logs = self.passed = self.taken = self.unclaimed = 0
        self._send = send
        self._owner: Owner | None = None
        self._others: dict[str, _Other] = {}

    def serve(self, owner: Owner) -> None:
        """Have entries that others hand on given to this one."""
        self._owner = owner

    @property
    def marks(self) -> str:
        """By which others know what is ours; "" where nothing is."""
        return "" if self._owner is None else fingerprint(self._owner.secret)

    # what the log tells here

    def hears(self, logs: int) -> None:
        self.logs = logs
        self.on_logs()

    def pass_on(self, ended: Ended) -> None:
        """Hand on an entry that is not about a request of ours."""
        owners = self._owners(ended)
        self.passed += len(owners)
        self.unclaimed += ended.mark is not None and not owners
        for replica in owners:
            self._send(replica, logged(ended))

    def _owners(self, ended: Ended) -> list[str]:
        if ended.mark is not None:
            marks = fingerprint(ended.mark.partition("-")[2])
            return [replica for replica, other in self._others.items() if other.marks == marks]
        if ended.failure is FailureReason.CLIENT_GONE and ended.request_id:
            # Without a mark only who has sent it on knows it.
            return [replica for replica, other in self._others.items() if other.marks]
        return []

    # what others say

    def met(self, replica: str, greeting: words.Greeting) -> None:
        """One is there, or there again: what it had to hand on meanwhile is lost."""
        self.left(replica)
        self._others[replica] = _Other(greeting.marks, greeting.logs)
        self._count()

    def heard(self, replica: str, logs: int) -> None:
        other = self._others.get(replica)
        if other is not None and other.logs != logs:
            other.logs = logs
            self._count()

    def left(self, replica: str) -> None:
        """Nothing comes from there just now."""
        self.heard(replica, 0)

    def forget(self, replica: str) -> None:
        self.left(replica)
        self._others.pop(replica, None)

    def take(self, word: words.Logged) -> None:
        """An entry that another has handed on to us."""
        if self._owner is not None:
            self.taken += self._owner.settle(ended_of(word))

    def _count(self) -> None:
        if self._owner is not None:
            self._owner.others_hear(sum(other.logs for other in self._others.values()))


def fingerprint(secret: str) -> str:
    """Tells secrets apart without telling them."""
    return hashlib.blake2b(secret.encode(), digest_size=8, person=b"picker-marks").hexdigest()


def logged(ended: Ended) -> words.Logged:
    return words.Logged(**msgspec.structs.asdict(ended))


def ended_of(word: words.Logged) -> Ended:
    return Ended(**msgspec.structs.asdict(word))
