"""What comes of requests through a cluster's gateway: measured, so that "cache-aware routing" is no claim.

Prompts that nobody has sent before go through the gateway, and each once again. The engine's own report of cached
tokens tells whether a repetition came where the first had been; where it is silent, the endpoint that picker names.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass

import aiohttp

from picker.check.cluster import Cluster, Json, listed
from picker.check.verdict import Finding, failed, passed, skipped

ENDPOINT = "x-picker-endpoint"
# One repetition each: a second could find what the first has cached by chance. That 20 of 24 do on two pods by chance
# has a probability of 0.08 %.
PROMPTS = 24
# A repetition by chance finds its cache on one of n pods; below this share nobody can speak of knowing.
ENOUGH = 0.8
_WORDS = ("river", "stone", "lamp", "cloud", "seven", "under", "paper", "window", "green", "march", "often", "quiet")
_LONG = 600  # words of a prompt: dozens of blocks
_HALF = 0.5


@dataclass(frozen=True, slots=True)
class Sent:
    """One request.

    prompt: its number. again: a repetition. pod: as picker names it. prompt_tokens, cached_tokens: as the engine
    reports.
    """

    prompt: int
    again: bool
    status: int
    seconds: float
    pod: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


async def answers(cluster: Cluster) -> Finding:
    entrance = await cluster.entrance()
    if entrance is None:
        return skipped("no Gateway tells an address: name where requests enter with --gateway URL")
    try:
        model = await _model(cluster, entrance)
        sent = await _send(cluster, entrance, model, 0, False, f"Say hello. {time.time_ns()}")
    except OSError as error:
        return skipped(f"{entrance} cannot be reached from here: {error}")
    cluster.evidence["entrance"] = {"url": entrance, "model": model, "status": sent.status}
    return passed(f"{entrance}, {model}") if sent.status == 200 else failed(f"{entrance} answers {sent.status}")


async def affinity(cluster: Cluster) -> Finding:
    sent = await _measured(cluster)
    if isinstance(sent, Finding):
        return sent
    again = [each for each in sent if each.again]
    found, known = _found(sent)
    if not known:
        return skipped("answers tell neither cached_tokens nor who gave them: nothing can be measured")
    share = found / known
    cluster.evidence["affinity"] = {"repetitions": len(again), "known": known, "found": found, "share": round(share, 4)}
    words = f"{found} of {known} repetitions found their prompt cached"
    if len({each.pod for each in sent if each.pod}) < 2 and await _pods(cluster) < 2:
        return skipped(f"{words}, but there is only one pod: that proves nothing")
    return passed(words) if share >= ENOUGH else failed(f"{words}; {ENOUGH:.0%} would be")


async def spread(cluster: Cluster) -> Finding:
    sent = await _measured(cluster)
    if isinstance(sent, Finding):
        return sent
    pods = Counter(each.pod for each in sent if each.pod is not None and not each.again)
    if not pods:
        return skipped(f"answers do not name the pod ({ENDPOINT}): picker does unless limits.name_endpoint is false")
    if await _pods(cluster) < 2:
        return skipped("there is only one pod")
    cluster.evidence["spread"] = dict(pods)
    return (
        passed(", ".join(f"{pod} {count}" for pod, count in pods.most_common()))
        if len(pods) > 1
        else failed(f"all {pods.total()} prompts went to {next(iter(pods))}")
    )


# --- measuring ---------------------------------------------------------------------------------------------


async def _measured(cluster: Cluster) -> list[Sent] | Finding:
    """All requests, sent once a run."""
    if "requests" not in cluster.evidence:
        entrance = await cluster.entrance()
        if entrance is None:
            return skipped("no Gateway tells an address: name where requests enter with --gateway URL")
        try:
            cluster.evidence["requests"] = await _sent(cluster, entrance)
        except OSError as error:
            return skipped(f"{entrance} cannot be reached from here: {error}")
    sent: list[Sent] = cluster.evidence["requests"]
    wrong = Counter(each.status for each in sent if each.status != 200)
    return failed(f"requests were answered {dict(wrong)}") if wrong else sent


async def _sent(cluster: Cluster, entrance: str) -> list[Sent]:
    model, rng = await _model(cluster, entrance), random.Random(time.time_ns())
    prompts = [f"{rng.getrandbits(64):x} " + " ".join(rng.choice(_WORDS) for _ in range(_LONG)) for _ in range(PROMPTS)]
    sent: list[Sent] = []
    for again in (False, True):
        order = list(range(PROMPTS))
        rng.shuffle(order)
        # Side by side: alone, every prompt could go to one pod that is never busy.
        sent += await asyncio.gather(*(_send(cluster, entrance, model, each, again, prompts[each]) for each in order))
    return sent


async def _send(cluster: Cluster, entrance: str, model: str, prompt: int, again: bool, text: str) -> Sent:
    body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0}
    status, seconds, headers, answer = await _ask(cluster, "POST", f"{entrance}/v1/completions", body)
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Sent(
        prompt,
        again,
        status,
        round(seconds, 4),
        headers.get(ENDPOINT),
        _number(usage.get("prompt_tokens")),
        _number(cached),
    )


async def _model(cluster: Cluster, entrance: str) -> str:
    """As told, or the first that the gateway knows of."""
    if cluster.asked.model is not None:
        return cluster.asked.model
    _, _, _, answer = await _ask(cluster, "GET", f"{entrance}/v1/models", None)
    return next((str(each["id"]) for each in listed(answer, "data") if "id" in each), "model")


async def _ask(cluster: Cluster, method: str, url: str, body: Json | None) -> tuple[int, float, dict[str, str], Json]:
    """(status, seconds, headers, the answer's object). Raises OSError where nobody answers."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(10 * cluster.patience), cluster.session.request(method, url, json=body) as response:
            data = await response.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from None
    cluster.trace.send(f"{method} {url}")
    cluster.trace.receive(f"{response.status}, {len(data)} bytes")
    try:
        answer = json.loads(data)
    except ValueError:
        answer = {}
    headers = {name.lower(): value for name, value in response.headers.items()}
    return response.status, time.monotonic() - began, headers, answer if isinstance(answer, dict) else {}


def _found(sent: list[Sent]) -> tuple[int, int]:
    """(repetitions that came where the prompt had been, repetitions of which that is known)."""
    first = {each.prompt: each.pod for each in sent if not each.again}
    found = known = 0
    for each in (each for each in sent if each.again):
        if each.cached_tokens is not None and each.prompt_tokens:
            known += 1
            found += each.cached_tokens > _HALF * each.prompt_tokens
        elif each.pod is not None:
            known += 1
            found += each.pod == first[each.prompt]
    return found, known


async def _pods(cluster: Cluster) -> int:
    return sum(each.ready for each in await cluster.servers(await cluster.pool()))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def rows(evidence: Json) -> list[Json]:
    """The requests, as the evidence files have them."""
    return [asdict(each) for each in evidence.get("requests", ())]
