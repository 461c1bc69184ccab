"""Requests that come back: an endpoint's address that leads to this very gateway would have it call itself for ever.

Each request is sent on with a `via` field (RFC 9110 section 7.6.3) that bears a name of this process; one that comes
with it has been here before. Gateways in a row are no loop: each has a name of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

RawHeaders = Iterable[tuple[bytes, bytes]]

NAME, FIELD = "via", b"via"
STATUS = 508  # Loop Detected (RFC 5842 section 7.2)
MESSAGE = "This request has been here before: an endpoint's address leads back to this gateway."


class Via:
    """pseudonym: of this process, random unless given. mark: the field that is added to requests sent on."""

    def __init__(self, pseudonym: str | None = None) -> None:
        self._pseudonym = (pseudonym or f"picker-{os.urandom(6).hex()}").encode()
        self.mark = (FIELD, b"1.1 " + self._pseudonym)

    def has_passed(self, raw: RawHeaders) -> bool:
        """Whether a request with these fields has been sent on by this process."""
        return any(name == FIELD and self._pseudonym in value for name, value in raw)
