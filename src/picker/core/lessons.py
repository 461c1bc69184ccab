"""What one scheduler has learned, for another that has just begun; and its own from what another has learned. Pure.

Speeds, lengths, rates, and how far the index may be believed. Of each quantity the one counts that rests on more: what
a newcomer has found out itself is not talked out of it by somebody who has seen less.
"""

from __future__ import annotations

import math

from picker.core.estimate import Ratio
from picker.core.learned import Learned
from picker.core.pool import RECENT_S, Pool
from picker.prefix.approximate import ApproximateIndex
from picker.types import EndpointLessons, Lessons


def teach(pool: Pool, learned: Learned, bytes_per_token: Ratio, index: ApproximateIndex, now: float) -> Lessons:
    """Everything learned that is not told request by request."""
    ratios = {**learned.ratios, "bytes_per_token": bytes_per_token}
    return Lessons(
        prefill=learned.prefill.samples,
        decode=learned.decode.samples,
        ratios={name: ratio.sums for name, ratio in ratios.items()},
        rates=learned.watched(now),
        endpoints=tuple(_of_endpoint(pool, learned, index, row, endpoint.name, now) for row, endpoint in pool),
    )


def _of_endpoint(
    pool: Pool, learned: Learned, index: ApproximateIndex, row: int, name: str, now: float
) -> EndpointLessons:
    trust, announced, effective = index.retention(row)
    return EndpointLessons(
        name=name,
        prefill=learned.prefill_speed.sums(row),
        decode=learned.decode_speed.sums(row),
        trust=trust,
        announced=announced,
        effective=effective,
        recent=_recent(pool, row, now),
    )


def learn(
    lessons: Lessons, pool: Pool, learned: Learned, bytes_per_token: Ratio, index: ApproximateIndex, now: float
) -> None:
    """Take over what rests on more than ours. Endpoints that are not known here are left out."""
    learned.prefill.learn(lessons.prefill)
    learned.decode.learn(lessons.decode)
    for name, ratio in {**learned.ratios, "bytes_per_token": bytes_per_token}.items():
        if name in lessons.ratios:
            ratio.learn(lessons.ratios[name])
    learned.watch(lessons.rates, now)
    for each in lessons.endpoints:
        if (row := pool.row(each.name)) is None:
            continue
        learned.prefill_speed.learn(row, each.prefill)
        learned.decode_speed.learn(row, each.decode)
        index.learn_retention(row, each.trust, each.announced, each.effective)
        if each.recent > _recent(pool, row, now):
            pool.recent[row], pool.recent_at[row] = each.recent, now


def _recent(pool: Pool, row: int, now: float) -> float:
    """Requests of about the last half minute."""
    return pool.recent.item(row) * math.exp((pool.recent_at.item(row) - now) / RECENT_S)
