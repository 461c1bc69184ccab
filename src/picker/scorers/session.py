"""Prefers the endpoint that served this session last."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import session_candidate
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class Session:
    """1 for the endpoint of the session's previous request, 0 for the others (llm-d's `session-affinity-scorer`).

    token_header: where clients send back which endpoint that was, in base64; the endpoint is remembered by the
    session's id where this is empty.
    """

    token_header: str = ""
    name: str = "session-affinity-scorer"

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (self.token_header.lower(),) if self.token_header else ()

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return session_candidate(view, request, self.token_header).astype(np.float32)
