"""What watchers of the API are told of endpoints: all of them first, then what has changed since the last update.

Nothing is kept for a reader that is slow: an update is made when it can be sent, from what is true then, so that what
it costs does not depend on how many changes were missed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from picker.core.snapshot import EndpointState
from picker.runtime import Runtime
from picker.types import EndpointAdded, EndpointDraining, EndpointRemoved, Fact, HealthObserved, ModelsObserved
from picker.wire import api
from picker.wire.pb import picker_pb2 as pb

_AT_ONCE = (EndpointAdded, EndpointRemoved, EndpointDraining, HealthObserved, ModelsObserved)
# Seconds within which facts that come together (a scrape of all, a rollout) make one update.
_TOGETHER = 0.05


class Board:
    """The endpoints as messages, made once however many watch."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._states: dict[str, Any] = {}
        self._at = float("-inf")
        self._news = asyncio.Event()
        self.changes = 0  # of membership or health
        runtime.listen(self._observe)

    def states(self) -> dict[str, Any]:
        """`EndpointState` messages by name, at most `_TOGETHER` seconds old."""
        now = self._runtime.clock()
        if now - self._at >= _TOGETHER:
            pool = self._runtime.scheduler.pool
            snapshot = {state.name: state for state in self._runtime.scheduler.snapshot(now)}
            self._states = {each.name: _message(api.endpoint(each), snapshot[each.name]) for _, each in pool}
            self._at = now
        return self._states

    async def news(self, seen: int, timeout: float) -> None:
        """Wait until there have been more `changes` than those seen, at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                if self.changes == seen:
                    await self._news.wait()
                await asyncio.sleep(_TOGETHER)
        except TimeoutError:
            pass

    def _observe(self, fact: Fact) -> None:
        if isinstance(fact, _AT_ONCE):
            self.changes += 1
            event, self._news = self._news, asyncio.Event()
            event.set()


class Watch:
    """What one watcher has been told."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._told: dict[str, Any] | None = None
        self._seen = 0

    async def news(self, timeout: float) -> None:
        """Wait until an update may be due: at once for who is there and well, `timeout` seconds for load."""
        await self._board.news(self._seen, timeout)

    def update(self) -> bytes | None:
        """The next message for it; None when nothing has changed."""
        self._seen = self._board.changes
        before, states = self._told, self._board.states()
        self._told = states
        if before is None:
            return api.update(list(states.values()), (), snapshot=True)
        if before is states:
            return None
        changed = [state for name, state in states.items() if before.get(name) != state]
        removed = [name for name in before if name not in states]
        return api.update(changed, removed, snapshot=False) if changed or removed else None


def _message(endpoint: Any, state: EndpointState) -> Any:
    return pb.EndpointState(
        endpoint=endpoint,
        models=state.models,
        role=state.role,
        healthy=state.healthy,
        draining=state.draining,
        resting=state.ejected_for_s is not None,
        inflight_requests=state.inflight_requests,
        backlog_tokens=state.backlog_tokens,
        waiting=state.waiting,
        running=state.running,
        kv_usage=state.kv_usage,
        kv_capacity_tokens=state.kv_capacity_tokens,
        labels=state.labels,
    )
