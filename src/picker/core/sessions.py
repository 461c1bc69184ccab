"""Which endpoint served a session last."""

from __future__ import annotations

from collections import OrderedDict

from picker.core.pool import Pool


class Sessions:
    """most: how many are remembered; the one that was longest silent goes first."""

    def __init__(self, pool: Pool, most: int) -> None:
        self._pool = pool
        self._most = most
        self._names: OrderedDict[str, str] = OrderedDict()

    def row(self, session: str | None) -> int | None:
        """Where it was last; None where nobody knows, or the endpoint is gone."""
        name = self._names.get(session) if session else None
        return None if name is None else self._pool.row(name)

    def note(self, session: str | None, row: int) -> None:
        """It is served by this row now."""
        if not session:
            return
        self._names[session] = self._pool.endpoint(row).name
        self._names.move_to_end(session)
        if len(self._names) > self._most:
            self._names.popitem(last=False)
