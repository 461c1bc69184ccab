"""The `x-request-id` of each request: the client's where it can stand in headers and logs as it is, else one of ours.

Ours are a prefix that is random for the process and a count: unique, and nothing to read in them. A client's is taken
for what it says, and proves nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

NAME, FIELD = "x-request-id", b"x-request-id"
ANTHROPIC_NAME = "request-id"  # where Anthropic's clients look for it
RawHeaders = Sequence[tuple[bytes, bytes]]

# What UUIDs, ULIDs, trace ids and the ids of Envoy, nginx, AWS and Heroku are made of, and of what else has no meaning
# in a header, in JSON, in a shell or in HTML.
_FIT = re.compile(r"[A-Za-z0-9._:=+/@,;~-]{1,128}")
_PREFIX_BYTES = 6
_MESSAGES = ("/v1/messages", "/v1/messages/count_tokens")


class RequestIds:
    """Gives ids. prefix: of those it makes; random unless given."""

    def __init__(self, prefix: str | None = None) -> None:
        self._prefix = f"{os.urandom(_PREFIX_BYTES).hex()}-" if prefix is None else prefix

    def of(self, headers: Mapping[str, str], raw: RawHeaders, number: int) -> tuple[str, bool]:
        """The id of a request, and whether its client has given it. number: another one for each request."""
        given = headers.get(NAME)
        if given is not None and _FIT.fullmatch(given) and (len(headers) == len(raw) or _once(raw)):
            return given, True
        return f"{self._prefix}{number:x}", False


def _once(raw: RawHeaders) -> bool:
    return sum(name == FIELD for name, _ in raw) == 1


def told(path: str, request_id: str) -> tuple[tuple[str, str], ...]:
    """The response fields that tell a client the id, in the dialect of the path."""
    if path.endswith(_MESSAGES):
        return (NAME, request_id), (ANTHROPIC_NAME, request_id)
    return ((NAME, request_id),)


def told_in_body(path: str, request_id: str, status: int, body: bytes) -> bytes:
    """An error's body with the id, where errors have a place for it: at the end of Anthropic's."""
    if status < 400 or not path.endswith(_MESSAGES) or not (body.startswith(b'{"type":"error",') and body[-1:] == b"}"):
        return body
    return body[:-1] + b',"request_id":"%b"}' % request_id.encode()
