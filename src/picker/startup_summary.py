"""What is said at the start: of each endpoint what was found, and what is missing with the flag that sets it.

Follows the pool by the facts it is shown, asks every endpoint once, and those that do not answer until they do. In
the way of nothing: requests are served meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from picker.engine_survey import LLAMA_CPP, SGLANG, VLLM, Found
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact

log = logging.getLogger("picker.summary")

_AGAIN = 5.0
_TOGETHER = 0.05  # seconds in which endpoints that come at once have come
_MOST_ROWS = 20
_MOST_MODELS = 3

_METRICS: Mapping[str | None, str] = {
    SGLANG: "--enable-metrics",
    LLAMA_CPP: "--metrics",
    VLLM: "start it without --disable-log-stats",
}

Ask = Callable[[Endpoint], Awaitable[Found]]


@dataclass(frozen=True, slots=True)
class Advice:
    """Something that an engine could do for routing and does not. flag: of its command line."""

    what: str
    flag: str


def advice(found: Found) -> list[Advice]:
    """What is missing, the most useful first."""
    if found.problem is not None:
        return []
    sglang = found.kind == SGLANG
    missing = []
    if found.caching is False:
        flag = "start it without --disable-radix-cache" if sglang else "--enable-prefix-caching"
        missing.append(Advice("prefix caching is off: nothing to route by but load", flag))
    if not found.loaded:
        missing.append(
            Advice("no metrics: its load is known only by what goes through here", _METRICS.get(found.kind, ""))
        )
    if found.told is False:
        flag = "--enable-cache-report" if sglang else "--enable-prompt-tokens-details"
        missing.append(Advice("answers do not say what was cached: predictions cannot be checked", flag))
    if found.events is False:
        flag = """--kv-events-config '{"enable_kv_cache_events":true,"publisher":"zmq"}'"""
        missing.append(Advice("KV events are off: what is cached is estimated, not known", flag))
    return missing


class Summary:
    """ask: asks one endpoint. say: shows people a batch; the first holds all that are known at the start."""

    def __init__(self, ask: Ask, say: Callable[[Sequence[Found]], None], *, again: float = _AGAIN) -> None:
        self._ask = ask
        self._say = say
        self._again = again
        self._new: dict[str, Endpoint] = {}
        self._silent: dict[str, Endpoint] = {}
        self._come = asyncio.Event()
        self._known: dict[str, Endpoint] = {}

    def observe(self, fact: Fact) -> None:
        """To be shown every fact."""
        match fact:
            case EndpointAdded(endpoint):
                self._look_for_twins(endpoint)
                self._known[endpoint.name] = self._new[endpoint.name] = endpoint
                self._come.set()
            case EndpointRemoved(name):
                self._known.pop(name, None)
                self._new.pop(name, None)
                self._silent.pop(name, None)
            case _:
                pass

    def _look_for_twins(self, endpoint: Endpoint) -> None:
        """One server under two names is taken for two, with twice the room."""
        if endpoint.rank is not None or self._known.get(endpoint.name) == endpoint:
            return
        for each in self._known.values():
            if each.address == endpoint.address and each.name != endpoint.name and each.rank is None:
                log.warning(
                    "endpoints %s and %s have the same address: list it once, or give each a rank if they are ranks",
                    *(each.name, endpoint.name),
                )

    async def run(self) -> None:
        """Ask and tell until cancelled."""
        while True:
            await self._wait()
            try:
                await self._round()
            except Exception:
                # Supervision: words for people are worth no request.
                log.exception("the endpoints could not be described")

    async def _round(self) -> None:
        fresh, self._new = self._new, {}
        asked = self._silent | fresh
        found = await asyncio.gather(*(self._ask(endpoint) for endpoint in asked.values()))
        # Of those that are still silent it has been said.
        news = [each for each in found if each.problem is None or each.name in fresh]
        self._silent = {each.name: asked[each.name] for each in found if each.problem is not None}
        if news:
            self._say(news)

    async def _wait(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._again if self._silent else None):
                await self._come.wait()
                await asyncio.sleep(_TOGETHER)
        self._come.clear()


# --- for people --------------------------------------------------------------------------------------------


def show(console: Console, batch: Sequence[Found]) -> None:
    """A table on a terminal, else a line for each endpoint; then what is missing, once for all that lack it."""
    shown = batch[:_MOST_ROWS]
    if console.is_terminal:
        console.print(_table(shown))
    else:
        for found in shown:
            console.print(Text(line(found)), soft_wrap=True)
    if len(batch) > len(shown):
        console.print(Text(f"and {len(batch) - len(shown)} more endpoints"), soft_wrap=True)
    for text in hints(batch):
        console.print(Text(text), soft_wrap=True)


def hints(batch: Sequence[Found]) -> list[str]:
    """A line for each thing that is missing, with the endpoints that lack it."""
    lacking: dict[Advice, list[str]] = {}
    for found in batch:
        for each in advice(found):
            lacking.setdefault(each, []).append(found.name)
    return [_hint(each, names, len(batch)) for each, names in lacking.items()]


def _hint(missing: Advice, names: Sequence[str], of: int) -> str:
    who = "all endpoints" if len(names) == of > 1 else _some(names)
    way = f" (set {missing.flag})" if missing.flag.startswith("--") else f" ({missing.flag})" if missing.flag else ""
    return f"hint: {who}: {missing.what}{way}"


def line(found: Found) -> str:
    """One endpoint in one line."""
    if found.problem is not None:
        return f"endpoint {found.name}: {found.problem}; it is asked again"
    return f"endpoint {found.name}: {', '.join(text for text in _cells(found) if text)}"


def _cells(found: Found) -> list[str]:
    engine = " ".join(filter(None, (found.kind or "unknown engine", found.version)))
    adapters = f" (+ {len(found.adapters)} LoRA)" if found.adapters else ""
    return [
        engine,
        f"model {_some(found.models)}{adapters}" if found.models else "",
        _amount(found.max_model_len, "context"),
        _amount(found.kv_tokens, "KV cache"),
        "" if found.block_size is None else f"blocks of {found.block_size}",
        "" if found.caching is None else f"prefix caching {_on(found.caching)}",
        "" if found.events is None else f"KV events {_on(found.events)}",
    ]


def _table(batch: Sequence[Found]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("endpoint", "engine", "models", "context", "KV cache", "block", "caching", "events"):
        table.add_column(title, overflow="fold")
    for found in batch:
        if found.problem is not None:
            table.add_row(found.name, Text(found.problem, style="red"))
            continue
        engine = " ".join(filter(None, (found.kind or "unknown", found.version)))
        cells = (engine, _some(found.models), _number(found.max_model_len), _number(found.kv_tokens))
        state = (_number(found.block_size), _known(found.caching), _known(found.events))
        table.add_row(*(Text(text) for text in (found.name, *cells, *state)))
    return table


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_MODELS
    return ", ".join(names[:_MOST_MODELS]) + (f" and {more} more" if more > 0 else "")


def _amount(tokens: int | None, what: str) -> str:
    return "" if tokens is None else f"{what} {tokens} tokens"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _known(value: bool | None) -> str:
    return "?" if value is None else _on(value)


def _on(value: bool) -> str:
    return "on" if value else "off"
