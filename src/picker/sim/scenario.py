"""Scenarios: which pods, what is asked of them, what happens meanwhile, how much is too much. Read from TOML files.

The files lie beside this module in an installed package and in `bench/scenarios` of a checkout. A mistake in one is a
ConfigError that names the key and the nearest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from picker.errors import ConfigError
from picker.sim import latency
from picker.sim.cluster import Incident, Trouble
from picker.sim.sessions import DRAWS, Documents, Sessions
from picker.sim.workload import Adapters, Bursts, Recorded, Replay, SharedPrefix, Workload

T = TypeVar("T")

WORKLOADS: Mapping[str, type[Any]] = {
    "shared-prefix": SharedPrefix,
    "sessions": Sessions,
    "documents": Documents,
    "adapters": Adapters,
}
_DRAWN = ("turns", "context", "question", "output", "pause")
_CHECKOUT = Path(__file__).parents[3] / "bench" / "scenarios"


@dataclass(frozen=True, slots=True)
class Pods:
    """The modelled pods. None: as the profile has it.

    block_tokens: of the engines' blocks; larger ones than the real 16 make a run faster and change little.
    speeds: of successive pods, repeated as often as needed. max_loras, lora_load_s: adapter slots, and seconds a step
    waits for an adapter that is in none.
    """

    count: int = 8
    profile: str = "qwen3-32b-2xh100"
    kv_tokens: int | None = None
    block_tokens: int = 64
    max_num_seqs: int | None = None
    speeds: tuple[float, ...] = (1.0,)
    max_loras: int | None = None
    lora_load_s: float = 0.2

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"pod-{i}" for i in range(self.count))

    @property
    def published(self) -> latency.Profile:
        """The profile with this scenario's limits, at its published speed."""
        profile = latency.profile(self.profile)
        return replace(
            profile,
            block_size=self.block_tokens,
            kv_tokens=self.kv_tokens or profile.kv_tokens,
            max_num_seqs=self.max_num_seqs or profile.max_num_seqs,
        )

    def speed(self, pod: int) -> float:
        return self.speeds[pod % len(self.speeds)]

    @property
    def total_speed(self) -> float:
        return sum(self.speed(pod) for pod in range(self.count))


@dataclass(frozen=True, slots=True)
class Event:
    """An incident as the file words it: `trouble` happens to pod number `pod` at `at` seconds and lasts to `until`."""

    at: float
    trouble: str
    pod: int = 0
    until: float | None = None
    factor: float = 1.0

    def incidents(self) -> list[Incident]:
        name = f"pod-{self.pod}"
        try:
            trouble = Trouble(self.trouble)
        except ValueError:
            raise ConfigError(f"trouble {_unknown(self.trouble, [t.value for t in Trouble])}") from None
        seconds = 0.0 if self.until is None else self.until - self.at
        started = Incident(self.at, trouble, name, seconds=seconds, factor=self.factor)
        over = {Trouble.KILL: Trouble.REVIVE, Trouble.BLIND: Trouble.SEE, Trouble.SLOW: Trouble.SLOW}.get(trouble)
        if self.until is None or over is None:
            return [started]
        return [started, Incident(self.until, over, name)]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One experiment. number and name: how it is called for. unit: of what the rates count.

    rate: the scenario's own. load: the level it is run at when nobody asks for another, None: at its own rate.
    stable_rate: the highest rate at which the pooled oracle keeps up (`sim.capacity`), for `pods.count` pods;
    stable_source: how it was found. warmup: the first share of the run that is not measured.
    """

    number: str
    name: str
    title: str
    pods: Pods
    workload: Workload
    rate: float = 1.0
    unit: str = "requests/s"
    load: float | None = 0.7
    stable_rate: float | None = None
    stable_source: str = ""
    warmup: float = 0.2
    scrape_interval: float = 0.05
    events: tuple[Event, ...] = field(default_factory=tuple)

    @property
    def incidents(self) -> list[Incident]:
        return sorted((i for event in self.events for i in event.incidents()), key=lambda incident: incident.at)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self.workload.names if isinstance(self.workload, Adapters) else ()

    def with_pods(
        self, *, count: int | None = None, model: str | None = None, kv_tokens: int | None = None
    ) -> Scenario:
        """The same on other pods. More of the same pods stand proportionally more; of other pods nobody knows yet."""
        pods = replace(
            self.pods,
            count=count or self.pods.count,
            profile=model or self.pods.profile,
            # A cache size that goes with the scenario's model says nothing about another.
            kv_tokens=kv_tokens or (self.pods.kv_tokens if model in (None, self.pods.profile) else None),
        )
        scale = pods.total_speed / self.pods.total_speed
        closed = isinstance(self.workload, Documents)
        workload: Workload = (
            replace(self.workload, users=round(self.workload.users * scale))
            if isinstance(self.workload, Documents)
            else self.workload
        )
        stable = self.stable_rate
        if (pods.profile, pods.kv_tokens) != (self.pods.profile, self.pods.kv_tokens) and not closed:
            stable = None
        elif stable is not None and not closed:
            stable *= scale
        return replace(self, pods=pods, workload=workload, stable_rate=stable)

    def at_load(self) -> Scenario:
        """The scenario at one level: a ladder of rates gives way to a single stage."""
        if isinstance(self.workload, SharedPrefix) and self.workload.stages:
            return replace(self, workload=replace(self.workload, stages=()))
        return self

    def replaying(self, requests: Sequence[Recorded], *, name: str) -> Scenario:
        """The same pods under a recorded trace, at its own rate."""
        return replace(
            self,
            title=f"{name} on {self.pods.count} x {self.pods.profile}",
            workload=Replay(requests),
            rate=1.0,
            unit="x the recorded rate",
            load=None,
            stable_rate=None,
            stable_source="",
        )


def trace_scenario() -> Scenario:
    """Pods for a trace that comes without a scenario: everything counts, at the recorded rate."""
    pods = Pods(block_tokens=512, max_num_seqs=256)
    return Scenario(number="", name="trace", title="", pods=pods, workload=Replay(()), load=None, warmup=0.0)


# --- files ---------------------------------------------------------------------------------------------------


@functools.cache
def scenarios() -> Mapping[str, str]:
    """Number -> name of all scenarios there are, in order."""
    found = {table["number"]: table["name"] for table in _tables().values()}
    return MappingProxyType(dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0]))))


def scenario(called: str, *, short: bool = False) -> Scenario:
    """The scenario of that number or name, in any case. short: its cut-down form for tests. Raises ConfigError."""
    tables = _tables()
    wanted = called.lower()
    for stem, table in tables.items():
        if wanted in (table["number"].lower(), table["name"].lower()):
            return _parse(stem, table, short=short)
    names = [name for pair in scenarios().items() for name in pair]
    raise ConfigError(f"scenario {_unknown(called, names)}")


def read(path: Path) -> Scenario:
    """A scenario of the user's own. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None
    return _parse(str(path), _inherited(table, _tables()), short=False)


@functools.cache
def _tables() -> Mapping[str, Mapping[str, Any]]:
    """File stem -> its table, with what it extends filled in."""
    raw = {
        entry.name.removesuffix(".toml"): tomllib.loads(entry.read_text(encoding="utf-8"))
        for entry in sorted(_folder().iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".toml")
    }
    return MappingProxyType({stem: _inherited(table, raw) for stem, table in raw.items()})


def _folder() -> Traversable:
    packaged = resources.files("picker.sim").joinpath("scenarios")
    return packaged if packaged.is_dir() else _CHECKOUT


def _inherited(table: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    parent = table.get("extends")
    own = {key: value for key, value in table.items() if key != "extends"}
    if parent is None:
        return own
    if parent not in known:
        raise ConfigError(f"extends {_unknown(parent, list(known))}")
    # What was measured holds for the parent alone.
    inherited = {k: v for k, v in _inherited(known[parent], known).items() if k not in ("stable_rate", "stable_source")}
    return _merged(inherited, own)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, tables by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        # Another distribution has other parameters: it replaces the table whole.
        merged[key] = _merged(below, value) if both and "draw" not in value else value  # type: ignore[arg-type]
    return merged


def _parse(source: str, table: Mapping[str, Any], *, short: bool) -> Scenario:
    table = dict(table)
    cut = table.pop("short", {})
    if short:
        table = _merged(table, cut)
    try:
        table["pods"] = _build(Pods, table.get("pods", {}))
        table["workload"] = _workload(table.get("workload", {}))
        table["events"] = tuple(_build(Event, event) for event in table.get("events", ()))
        parsed = _build(Scenario, table)
        latency.profile(parsed.pods.profile)
        _ = parsed.incidents
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return parsed


def _workload(table: Mapping[str, Any]) -> Workload:
    fields = dict(table)
    kind = fields.pop("kind", None)
    if kind not in WORKLOADS:
        raise ConfigError(f"workload.kind {_unknown(kind, list(WORKLOADS))}")
    for name in _DRAWN:
        if isinstance(fields.get(name), Mapping):
            fields[name] = _draw(name, fields[name])
    if isinstance(fields.get("bursts"), Mapping):
        fields["bursts"] = _build(Bursts, fields["bursts"])
    built: Workload = _build(WORKLOADS[kind], fields)
    return built


def _draw(name: str, table: Mapping[str, Any]) -> Any:
    fields = dict(table)
    kind = fields.pop("draw", None)
    if kind not in DRAWS:
        raise ConfigError(f"workload.{name}.draw {_unknown(kind, list(DRAWS))}")
    return _build(DRAWS[kind], fields)


def _build(kind: type[T], table: Mapping[str, Any]) -> T:
    """A dataclass of the table's keys; lists become tuples."""
    known = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in known:
            raise ConfigError(f"{kind.__name__.lower()}: key {_unknown(key, known)}")
    try:
        return kind(**{key: _frozen(value) for key, value in table.items()})
    except TypeError as error:
        raise ConfigError(f"{kind.__name__.lower()}: {error}") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _unknown(word: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=2, cutoff=0.4)
    return f"{word!r} is unknown; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}")
