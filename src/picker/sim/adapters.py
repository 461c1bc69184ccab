"""Which LoRA adapters one engine runs and keeps on its GPU, and what that costs a step. No requests, no time."""

from __future__ import annotations

from collections import Counter, OrderedDict


class AdapterSlots:
    """At most `slots` distinct adapters in one batch; the least recently started one makes room for a new one.

    load_s: seconds a step is held up by an adapter that is not on the GPU (0.2 s from page cache, 2 s from an object
    store: assumptions). overhead: what each active adapter adds to a step, as a fraction, up to a tenth in all.
    """

    _OVERHEAD_LIMIT = 0.1

    def __init__(self, slots: int, *, load_s: float = 0.0, overhead: float = 0.02) -> None:
        self.slots = slots
        self.loads = 0
        self._load_s = load_s
        self._overhead = overhead
        self._running: Counter[str] = Counter()
        self._resident: OrderedDict[str, None] = OrderedDict()

    @property
    def factor(self) -> float:
        """What the active adapters multiply a step's time by."""
        return 1.0 + min(self._OVERHEAD_LIMIT, self._overhead * len(self._running))

    def admits(self, adapter: str | None) -> bool:
        """Whether a sequence of `adapter` may join the batch; without an adapter always."""
        return adapter is None or adapter in self._running or len(self._running) < self.slots

    def start(self, adapter: str | None) -> float:
        """A sequence joins the batch. Returns the seconds its adapter takes to load, 0 when it is there."""
        if adapter is None:
            return 0.0
        self._running[adapter] += 1
        if adapter in self._resident:
            self._resident.move_to_end(adapter)
            return 0.0
        if len(self._resident) >= self.slots:
            del self._resident[next(a for a in self._resident if a not in self._running)]
        self._resident[adapter] = None
        self.loads += 1
        return self._load_s

    def stop(self, adapter: str | None) -> None:
        """A sequence left the batch."""
        if adapter is None:
            return
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
