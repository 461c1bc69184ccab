"""All that facts change and decisions are made from, in one place: nobody else keeps any of it.

Who changes what: `core.observations` what is known of endpoints, `core.bookings` and `core.outcomes` what requests do
there; `core.scout` only reads.
"""

from __future__ import annotations

from collections import deque

from picker.core.calibration import Calibration
from picker.core.charges import Charges
from picker.core.estimate import Ratio
from picker.core.faults import Faults
from picker.core.learned import Learned
from picker.core.pool import Pool
from picker.core.retry_budget import RetryBudget
from picker.core.sessions import Sessions
from picker.core.settings import Settings
from picker.core.slow_start import SlowStart
from picker.prefix.approximate import ApproximateIndex
from picker.prefix.exact import Exact
from picker.types import Request

BLOCK_TOKENS = 16.0  # of an engine that does not say

# Prompt bytes per token before anyone has told: about right for English text and a BPE vocabulary.
_BYTES_PER_TOKEN = 4.0
_NOTICES = 100


class State:
    """exact: what KV events tell, None where nobody asks for them. notices: of late, in words for people."""

    def __init__(self, settings: Settings, index: ApproximateIndex, exact: Exact | None) -> None:
        self.settings = settings
        self.pool = Pool()
        self.index = index
        self.exact = exact
        self.learned = Learned(self.pool.rows)
        self.calibration = Calibration(self.pool.rows)
        self.charges = Charges(self.pool)
        self.faults = Faults(
            self.pool,
            eject_after=settings.eject_after,
            eject_s=settings.eject_s,
            eject_max_s=settings.eject_max_s,
        )
        self.retries = RetryBudget(settings.retry_ratio, settings.retry_floor)
        self.slow_start = SlowStart(self.pool, settings.slow_start_s)
        self.sessions = Sessions(self.pool, settings.sessions)
        self.bytes_per_token = Ratio(_BYTES_PER_TOKEN, prior_weight=2000.0, keep=0.99)
        self.notices: deque[str] = deque(maxlen=_NOTICES)
        index.grow_rows(self.pool.rows)

    def tokens(self, request: Request) -> tuple[float, float]:
        """(tokens of the whole request, tokens per byte of its leading prompt)."""
        learned = 1.0 / self.bytes_per_token.value
        extra = request.extra_bytes * learned
        if request.prompt_tokens is None:
            return request.prompt_bytes * learned + extra, learned
        return request.prompt_tokens + extra, request.prompt_tokens / max(request.prompt_bytes, 1)

    def note_verdict(self, row: int) -> None:
        """Say that predictions from a row's events have come true, or failed, often enough to change our mind."""
        name = self.pool.endpoint(row).name
        if self.calibration.doubted[row]:
            self.notices.append(f"{name}: its KV events are not believed: {self.calibration.complaint(row)}")
        else:
            self.notices.append(f"{name}: its KV events are believed again: the latest predictions came true")
