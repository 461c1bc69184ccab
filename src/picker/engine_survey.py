"""What an endpoint says of its engine when it is asked once: kind, models, sizes, and what is switched on.

For people, at the start: nothing is decided by it. Asks the routes that engines have for it, and has one token made to
see whether answers say how much of a prompt was cached. What is not said is None.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from picker.errors import WireError
from picker.sources.scrape import MAX_BODY_BYTES, Manners, plainly, root_of
from picker.types import Endpoint, ModelsObserved
from picker.wire.metrics_text import MetricsPage, decode_models, scan_metrics

VLLM, SGLANG, TRTLLM, LLAMA_CPP = "vLLM", "SGLang", "TensorRT-LLM", "llama.cpp"
# How their metrics begin, and whom they call the owner of their models.
_PREFIXES = {"vllm:": VLLM, "sglang:": SGLANG, "trtllm_": TRTLLM}
_OWNERS = {"vllm": VLLM, "sglang": SGLANG, "tensorrt_llm": TRTLLM, "llamacpp": LLAMA_CPP}
# Longer than a block of any engine, so that the second of two equal prompts has something cached.
_PROBE = "picker asks what this engine says of its cache. " * 2

LOOP = 508  # what picker's own front end answers to a request of its own

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    """One endpoint. problem: why nothing is known of it, else None. loaded: it has metrics of load.

    max_model_len, kv_tokens: tokens; block_size: tokens of a block. caching: prefixes are cached; events: it publishes
    KV events; told: its answers say how much of a prompt was cached.
    """

    name: str
    problem: str | None = None
    kind: str | None = None
    version: str | None = None
    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    max_model_len: int | None = None
    block_size: int | None = None
    kv_tokens: int | None = None
    caching: bool | None = None
    events: bool | None = None
    told: bool | None = None
    loaded: bool = False


class Surveyor:
    """Asks endpoints. Use as `async with survey(...) as surveyor`."""

    def __init__(
        self, session: aiohttp.ClientSession, *, timeout: float, probe: bool, manners: Manners = plainly
    ) -> None:
        self._session = session
        self._manners = manners
        self._timeout = timeout
        self._probe = probe

    async def ask(self, endpoint: Endpoint) -> Found:
        """What it says, within the timeout; never raises for what an endpoint does."""
        url = root_of(endpoint)
        try:
            async with asyncio.timeout(self._timeout):
                return await self._found(endpoint, url)
        except TimeoutError:
            return Found(endpoint.name, f"no answer within {self._timeout:g} s")
        except aiohttp.ClientConnectorDNSError:
            return Found(endpoint.name, "no such host")
        except aiohttp.ClientSSLError:
            return Found(endpoint.name, "its certificate is not to be trusted (--endpoint-ca), or it speaks no TLS")
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, ConnectionRefusedError)
            return Found(endpoint.name, "connection refused" if refused else "cannot be reached")
        except (aiohttp.ClientError, OSError) as error:
            return Found(endpoint.name, f"no HTTP answer ({type(error).__name__})")

    async def _found(self, endpoint: Endpoint, url: str) -> Found:
        status, body = await self._get(url, "/v1/models")
        if status == 401:
            return Found(endpoint.name, "asks for an API key: give it by --endpoint-key-file, or as its api_key")
        if status in (503, LOOP) and (status == LOOP or (await self._get(url, "/metrics"))[0] == LOOP):
            return Found(endpoint.name, "its address leads back to this gateway")
        if status == 503:
            return Found(endpoint.name, "says that it cannot serve (503)")
        models, owner = _models(body, endpoint.name) if status == 200 else (None, None)
        (_, page), (_, version), (_, server), (events_status, events) = await asyncio.gather(
            *(self._get(url, path) for path in ("/metrics", "/version", "/get_server_info", "/kv_event_sources"))
        )
        metrics = _metrics(page)
        told = _object(server)
        kind = (None if metrics is None else _PREFIXES.get(metrics.engine.prefix)) or owner or _by_words(page, told)
        load = None if metrics is None else metrics.load(name=endpoint.name, observed_at=0.0, rank=endpoint.rank)
        labels = {} if metrics is None else next(iter(metrics.info.values()), {})
        return Found(
            endpoint.name,
            None if models is not None or metrics is not None else "it answers, and lists no models: is it an engine?",
            kind,
            _text(_object(version).get("version")) or _text(told.get("version")),
            () if models is None else tuple(sorted(models.models - models.adapters)),
            () if models is None else tuple(sorted(models.adapters)),
            (None if models is None else models.max_model_len) or _whole(told.get("context_length")),
            (None if load is None else load.block_size) or _whole(told.get("page_size")),
            (None if load is None else load.kv_capacity_tokens) or _whole(told.get("max_total_num_tokens")),
            _caching(labels, told),
            _events(events_status, events, told),
            await self._tells(url, kind, models, told),
            loaded=load is not None,
        )

    async def _tells(self, url: str, kind: str | None, models: ModelsObserved | None, told: Json) -> bool | None:
        """Whether usage has the cached tokens, which engines leave out unless asked for them at their start."""
        if kind == SGLANG and isinstance(reports := told.get("enable_cache_report"), bool):
            return reports
        if not self._probe or kind not in (VLLM, SGLANG) or models is None or not models.models:
            return None
        base = sorted(models.models - models.adapters) or sorted(models.models)
        asked = {"model": base[0], "prompt": _PROBE, "max_tokens": 1, "temperature": 0}
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(self._timeout / 2),
                self._session.post(f"{url}/v1/completions", json=asked, **self._manners(url).arguments(url)) as got,
            ):
                usage = _object(await got.read()).get("usage") if got.status == 200 else None
                return isinstance(usage.get("prompt_tokens_details"), dict) if isinstance(usage, dict) else None
        return None  # busy; its answers will show

    async def _get(self, url: str, path: str) -> tuple[int, bytes]:
        given = self._manners(url).arguments(url)
        async with self._session.get(url + path, allow_redirects=False, **given) as response:
            return response.status, await response.content.read(MAX_BODY_BYTES) if response.status == 200 else b""


@contextlib.asynccontextmanager
async def survey(*, timeout: float = 2.5, manners: Manners = plainly, probe: bool = True) -> AsyncIterator[Surveyor]:
    """timeout: seconds for one endpoint. manners: how each is asked. probe: have a token made."""
    async with aiohttp.ClientSession(
        headers={"User-Agent": "picker"},
        connector=aiohttp.TCPConnector(limit=64),
        read_bufsize=MAX_BODY_BYTES,
        timeout=aiohttp.ClientTimeout(total=timeout),
    ) as session:
        yield Surveyor(session, timeout=timeout, probe=probe, manners=manners)


def _models(body: bytes, name: str) -> tuple[ModelsObserved | None, str | None]:
    try:
        models = decode_models(body, name=name)
    except WireError:
        return None, None
    owners = (entry.get("owned_by") for entry in _object(body).get("data") or [] if isinstance(entry, dict))
    return models, next((_OWNERS[owner] for owner in owners if owner in _OWNERS), None)


def _metrics(page: bytes) -> MetricsPage | None:
    try:
        return scan_metrics(page) if page else None
    except WireError:
        return None


def _by_words(page: bytes, told: Json) -> str | None:
    if b"llamacpp:" in page:
        return LLAMA_CPP
    return SGLANG if "disable_radix_cache" in told else None


def _caching(labels: Mapping[str, str], told: Json) -> bool | None:
    said = labels.get("enable_prefix_caching")
    if said in ("True", "False"):
        return said == "True"
    disabled = told.get("disable_radix_cache")
    return not disabled if isinstance(disabled, bool) else None


def _events(status: int, body: bytes, told: Json) -> bool | None:
    """vLLM tells where it publishes, for each rank; SGLang what it was started with."""
    if "disable_radix_cache" in told:
        return bool(told.get("kv_events_config"))
    if status != 200:
        return None
    places = [each for each in _object(body).values() if isinstance(each, dict)]
    return any(each.get("endpoint") and each.get("enable_kv_cache_events", True) for each in places)


def _object(body: bytes) -> Json:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
