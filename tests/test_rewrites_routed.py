"""Where requests go that are for another model than they name: to who serves the target, and has it cached."""

from __future__ import annotations

import json

from prometheus_client import CollectorRegistry

from fakes import ManualClock, endpoint, scheduler
from picker.exchange import Forward, Limits, RequestBody, RequestHead, Respond, ResponseBody, ResponseHead
from picker.prefix.blocks import BlockHasher
from picker.rewrites import Rewriting, build_rule
from picker.runtime import Runtime
from picker.telemetry import Telemetry
from picker.types import Endpoint, ModelsObserved, Rewritten

JSON = {"content-type": "application/json"}


def runtime(*endpoints: Endpoint, target: str = "lora") -> Runtime:
    rewriting = Rewriting(lambda: 0.0, ("configuration",))
    rewriting.put("configuration", [build_rule("alias", ("chat",), [(target, None)])])
    made = Runtime(
        scheduler(*endpoints),
        BlockHasher(b"a secret"),
        Telemetry(CollectorRegistry()),
        clock=ManualClock(),
        limits=Limits(rewriting=rewriting),
    )
    for each in endpoints:
        adapters = each.models & {"lora"}
        made.emit(ModelsObserved(each.name, each.models, adapters=adapters))
    return made


async def ask(of: Runtime, model: str, text: str = "Once upon a time " * 100) -> Forward | Respond:
    """The verdict on a request, which is then answered."""
    exchange = of.open()
    await of.receive(exchange, RequestHead("POST", "/v1/completions", {}))
    body = json.dumps({"model": model, "prompt": text}).encode()
    (verdict,) = await of.receive(exchange, RequestBody(body, end=True))
    assert isinstance(verdict, Forward | Respond)
    if isinstance(verdict, Forward):
        of.follow(exchange, ResponseHead(200, JSON))
        of.follow(exchange, ResponseBody(b'{"choices":[],"usage":null}', end=True))
    return verdict


def went_to(verdict: Forward | Respond) -> str:
    assert isinstance(verdict, Forward), verdict
    return verdict.decision.endpoint.name


async def test_a_request_for_an_adapter_by_another_name_goes_where_the_adapter_is() -> None:
    of = runtime(endpoint("a", models=["base"]), endpoint("b", models=["base", "lora"]), endpoint("c", models=["base"]))
    for number in range(6):
        assert went_to(await ask(of, "chat", f"{number} " * 200)) == "b"


async def test_an_adapter_that_one_has_loaded_is_asked_for_there_under_either_name() -> None:
    of = runtime(*(endpoint(name, models=["base", "lora"]) for name in "abcd"))
    first = went_to(await ask(of, "lora", "one " * 200))
    assert of.scheduler.is_adapter("lora")
    assert went_to(await ask(of, "chat", "one " * 200)) == first


async def test_what_is_cached_of_the_target_is_known_to_be_under_either_name() -> None:
    of = runtime(*(endpoint(name, models=["base", "lora"]) for name in "abcd"))
    first = await ask(of, "lora")
    second = await ask(of, "chat")
    assert isinstance(first, Forward)
    assert isinstance(second, Forward)
    assert second.decision.endpoint == first.decision.endpoint
    assert second.decision.matched_blocks == second.decision.total_blocks > 0


async def test_the_record_of_a_decision_tells_both_models() -> None:
    of = runtime(endpoint("a", models=["lora"]))
    await ask(of, "chat")
    (record,) = of.recent()
    assert (record.request.model, record.request.rewritten) == ("lora", Rewritten("chat", "alias"))


async def test_a_target_that_nobody_serves_is_refused_with_both_names() -> None:
    of = runtime(endpoint("a", models=["base"]), target="gone")
    answer = await ask(of, "chat")
    assert isinstance(answer, Respond)
    assert answer.status == 404
    message = json.loads(answer.body)["error"]["message"]
    assert "`gone`" in message
    assert "names `chat`; the rewrite 'alias'" in message


async def test_without_any_endpoint_it_is_503_as_ever() -> None:
    answer = await ask(runtime(), "chat")
    assert isinstance(answer, Respond)
    assert answer.status == 503
