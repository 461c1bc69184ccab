"""Who may be picked at all: boolean masks over pool rows, and the reasons when nobody may."""

from __future__ import annotations

import numpy as np

from picker.core.pool import Pool
from picker.types import BoolArray, Rejection, RejectReason, Request

_RETRY_AFTER_S = 1.0
# How long a good answer outweighs failing probes; several scrape intervals.
_BENEFIT_S = 10.0


def candidates(pool: Pool, request: Request, now: float) -> BoolArray | Rejection:
    """(rows,) which may take this request, or why none may.

    Ejected endpoints count one at a time when fewer than half are left, and all of them when nobody is: then trying one
    is better than refusing all.
    """
    if request.model and len(pool) and not pool.has_model(request.model):
        return unknown_model(pool, request)
    serving = pool.serving(request.model)
    living = alive(pool, now) & serving
    wanted = living & asked_for(pool, request)
    rested = wanted & (pool.ejected_until <= now)
    if left := np.count_nonzero(rested):
        few = 2 * left < np.count_nonzero(wanted)
        return rested | (wanted & (pool.probe_at <= now)) if few else rested
    if not living.any():
        living = vouched_for(pool, now) & serving
        if not living.any():
            return nobody(pool, request)
        wanted = living & asked_for(pool, request)
    if wanted.any():
        return wanted
    message = "No endpoint of the pool is within the given subset, role and attempts."
    return Rejection(request.id, RejectReason.NO_MATCH, 503, message, _RETRY_AFTER_S)


def unknown_model(pool: Pool, request: Request) -> Rejection:
    """As vLLM says it."""
    message = f"The model `{request.model}` does not exist. Valid aliases: {', '.join(pool.models())}."
    return Rejection(request.id, RejectReason.UNKNOWN_MODEL, 404, message)


def nobody(pool: Pool, request: Request) -> Rejection:
    message = "No healthy endpoint." if len(pool) else "No endpoints are known."
    return Rejection(request.id, RejectReason.NO_ENDPOINTS, 503, message, _RETRY_AFTER_S)


def alive(pool: Pool, now: float) -> BoolArray:
    """Present, not draining, and answering: probes say so, or requests did a moment ago, whatever probes say.

    An engine whose metrics page is broken still serves; one that serves no more loses the benefit with its first fault.
    """
    answering = pool.healthy | (pool.succeeded_at > now - _BENEFIT_S)
    return pool.present & answering & ~pool.draining


def vouched_for(pool: Pool, now: float) -> BoolArray:
    """Present, not draining, and perhaps answering: somebody does, and the data plane does not say who."""
    return pool.present & (pool.vouched_at > now - _BENEFIT_S) & ~pool.draining


def asked_for(pool: Pool, request: Request) -> BoolArray:
    """Within the subset hint, able to play the role, and not tried already."""
    mask = pool.can(request.role)
    if request.subset is not None:
        mask = mask & in_subset(pool, request.subset)
    if request.exclude:
        mask = mask & ~named(pool, request.exclude)
    return mask


def in_subset(pool: Pool, subset: frozenset[str]) -> BoolArray:
    """Address in the subset, which holds "ip:port" or bare "ip" entries (GIE protocol 004; both forms occur)."""
    mask = np.zeros(pool.rows, dtype=bool)
    for row, endpoint in pool:
        host = endpoint.address.rpartition(":")[0]
        mask[row] = endpoint.address in subset or host in subset or host.strip("[]") in subset
    return mask


def named(pool: Pool, names: frozenset[str]) -> BoolArray:
    mask = np.zeros(pool.rows, dtype=bool)
    for name in names:
        row = pool.row(name)
        if row is not None:
            mask[row] = True
    return mask


def below_limit(pool: Pool, max_inflight: int | None) -> BoolArray | None:
    """Fewer requests in flight than the limit; None where there is no limit."""
    return None if max_inflight is None else pool.inflight < max_inflight
