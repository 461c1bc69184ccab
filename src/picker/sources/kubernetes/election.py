"""Which of several replicas is the one that serves: a Lease that one of them holds, as client-go elects leaders.

Clocks of machines are never compared. A replica waits until it has seen nobody write the Lease for as long as the
Lease says, by its own clock; the holder gives up when it has not been able to write for `renew`, which is shorter,
counted from before it asked. So there are never two, whatever is slow, as long as clocks run at the same speed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from picker.errors import ConfigError, WireError
from picker.sources.kubernetes import leases
from picker.sources.kubernetes.client import ApiError
from picker.sources.kubernetes.leases import GROUP_VERSION, Lease

log = logging.getLogger("picker.leader")

_JITTER = 1.2  # client-go's JitterFactor: candidates ask every 1 to 2.2 retries, so that they do not meet
_LEAST_PAUSE = 0.01  # seconds: a timer may fire a rounding error early, and its time must pass all the same
_RELEASE_WITHIN = 2.0  # seconds that a replica on its way out spends on letting others in at once
_NOT_FOUND, _CONFLICT = 404, 409


class Api(Protocol):
    """What of `Client` is needed; its methods raise ApiError."""

    async def get(self, path: str, query: Mapping[str, str]) -> bytes: ...
    async def write(self, method: str, path: str, body: bytes) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, client-go's defaults. duration: of the Lease. renew: until a leader gives up. retry: between tries."""

    duration: int = 15
    renew: float = 10.0
    retry: float = 2.0

    def check(self) -> None:
        """Raise ConfigError for what would let two lead, or nobody."""
        if not 0 < _JITTER * self.retry < self.renew < self.duration:
            raise ConfigError(
                "kubernetes.leader_election: duration_s must be more than renew_s, "
                f"and renew_s more than {_JITTER:g} times retry_s, which must be more than 0"
            )


class Election:
    """One candidate. connect: a way to the API server. identity: nobody else's. clock: seconds, of the event loop.

    on_change: told True on leading and False on not leading any more, each once; never while it runs on.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Api]],
        namespace: str,
        name: str,
        identity: str,
        *,
        clock: Callable[[], float],
        rng: random.Random,
        timing: Timing | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.namespace, self.name, self.identity = namespace, name, identity
        self.timing = timing or Timing()
        self.timing.check()
        self.on_change: Callable[[bool], None] = _unheard
        self.problem: str | None = None
        self.gone = asyncio.Event()
        self._connect = connect
        self._clock = clock
        self._rng = rng
        self._sleep = sleep
        self._collection = f"/apis/{GROUP_VERSION}/namespaces/{namespace}/leases"
        self._path = f"{self._collection}/{name}"
        self._resigned = asyncio.Event()
        self._seen: Lease | None = None
        self._seen_at = 0.0
        self._until: float | None = None  # to when it leads; None: it does not
        self._told = False
        self._since = clock()

    @property
    def leading(self) -> bool:
        """Whether it leads at this moment, also after the process has been stopped for a while."""
        return self._until is not None and self._clock() < self._until

    def report(self) -> dict[str, Any]:
        """For people."""
        return {
            "leading": self.leading,
            "leader": None if self._seen is None else self._seen.spec.holder or None,
            "identity": self.identity,
            "lease": f"{self.namespace}/{self.name}",
            "since_s": self._clock() - self._since,
            "problem": self.problem,
        }

    def resign(self) -> None:
        """Lead no more, let the others know, and take no part from here on; `gone` is set when they know."""
        self._resigned.set()

    async def run(self, after: Callable[[], Awaitable[object]] | None = None) -> None:
        """Take part until resigned or cancelled. after: what to wait for first: who knows nothing must not lead."""
        try:
            async with self._connect() as api:
                await self._until_resigned(self._take_part(api, after))
                await self._leave(api)
        finally:
            self._until = None
            self._settle()
            self.gone.set()

    async def _until_resigned(self, part: Coroutine[Any, Any, None]) -> None:
        async with asyncio.TaskGroup() as group:
            task, wait = group.create_task(part), group.create_task(self._resigned.wait())
            await asyncio.wait((task, wait), return_when=asyncio.FIRST_COMPLETED)
            task.cancel()
            wait.cancel()

    async def _take_part(self, api: Api, after: Callable[[], Awaitable[object]] | None) -> None:
        if after is not None:
            await after()
        while True:
            await self._try(api)
            self._settle()
            await self._sleep(self._pause())
            self._settle()

    def _pause(self) -> float:
        """A leader that cannot write looks at the clock when its time is over, a candidate at random."""
        if self._until is not None:
            return min(self.timing.retry, max(_LEAST_PAUSE, self._until - self._clock()))
        return self.timing.retry * (1 + _JITTER * self._rng.random())

    async def _try(self, api: Api) -> None:
        """Take the Lease or keep it, if that may be; no longer than it is good for."""
        began = self._clock()
        limit = self.timing.renew if self._until is None else self._until - began
        try:
            async with asyncio.timeout(limit):
                won = await self._take(api)
        except TimeoutError:
            self._note("the API server does not answer in time")
        except (ApiError, WireError) as error:
            self._note(str(error))
        else:
            self._note(None)
            self._until = began + self.timing.renew if won else None

    async def _take(self, api: Api) -> bool:
        """Whether the Lease is ours now. False: it is somebody's. Raises where that is not known."""
        if self._until is not None and self._seen is not None:
            try:
                return await self._write(api, self._seen)
            except ApiError as error:
                if error.status not in (_NOT_FOUND, _CONFLICT):
                    raise
        try:
            lease = leases.read_lease(await api.get(self._path, {}))
        except ApiError as error:
            if error.status != _NOT_FOUND:
                raise
            return await self._create(api)
        self._see(lease)
        if self._is_anothers(lease):
            return False
        try:
            return await self._write(api, lease)
        except ApiError as error:
            if error.status != _CONFLICT:
                raise
            return False  # somebody was faster

    def _see(self, lease: Lease) -> None:
        """Its time begins anew whenever anything of it has changed."""
        if self._seen is None or self._seen.spec != lease.spec:
            self._seen_at = self._clock()
        self._seen = lease

    def _is_anothers(self, lease: Lease) -> bool:
        if lease.spec.holder in ("", self.identity):
            return False
        return self._clock() < self._seen_at + (lease.spec.lease_duration_seconds or 0)

    async def _write(self, api: Api, before: Lease) -> bool:
        spec = leases.claim(before.spec, self.identity, self.timing.duration, _now())
        self._see(leases.read_lease(await api.write("PUT", self._path, leases.over(before, spec))))
        return True

    async def _create(self, api: Api) -> bool:
        spec = leases.claim(leases.Spec(), self.identity, self.timing.duration, _now())
        made = leases.first(self.namespace, self.name, spec)
        try:
            self._see(leases.read_lease(await api.write("POST", self._collection, made)))
        except ApiError as error:
            if error.status != _CONFLICT:
                raise
            return False
        return True

    async def _leave(self, api: Api) -> None:
        """Not ready first, then free for others: what is asked here meanwhile is still answered."""
        led, self._until = self.leading, None
        self._settle()
        if not led:
            return
        try:
            async with asyncio.timeout(_RELEASE_WITHIN):
                lease = leases.read_lease(await api.get(self._path, {}))
                if lease.spec.holder == self.identity:
                    await api.write("PUT", self._path, leases.over(lease, leases.release(lease.spec, _now())))
        except (ApiError, WireError, TimeoutError) as error:
            log.warning("the lease %s was not released, and ends in %d s: %s", self.name, self.timing.duration, error)

    def _settle(self) -> None:
        """Tell what has become of it."""
        if self._until is not None and not self.leading:
            self._until = None
        if (leading := self._until is not None) is self._told:
            return
        self._told, self._since = leading, self._clock()
        if leading:
            log.info("this replica leads: %s holds the lease %s", self.identity, self.name)
        else:
            log.warning("this replica leads no more%s", f": {self.problem}" if self.problem else "")
        self.on_change(leading)

    def _note(self, problem: str | None) -> None:
        if problem != self.problem and problem is not None:
            log.warning("the lease %s: %s", self.name, problem)
        self.problem = problem


def _now() -> str:
    """As the API writes times in microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _unheard(leading: bool) -> None:
    """Where changes go while nobody listens."""
