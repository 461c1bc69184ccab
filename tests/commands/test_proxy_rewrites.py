"""`models.rewrites` of a configuration file: read, checked, and exchanged while the proxy runs."""

from __future__ import annotations

from typing import Any

import pytest

from picker.app import App
from picker.commands.proxy_control import Doors, ProxyControl
from picker.config import Config, from_values, parse_config, schema, to_values
from picker.errors import ConfigError
from picker.frontends.proxy import Proxy
from picker.request_limits import build_limits
from picker.types import NO_HEADERS

CANARY = """
endpoints: [a:1]
seed: 1
models:
  rewrites:
  - name: canary
    matches:
    - model: {type: Exact, value: chat}
    targets:
    - {modelRewrite: v1, weight: 90}
    - {modelRewrite: v2, weight: 10}
"""


def rules(**targets: int) -> dict[str, Any]:
    written = [{"modelRewrite": name, "weight": weight} for name, weight in targets.items()]
    return {"models": {"rewrites": [{"matches": [{"model": {"value": "chat"}}], "targets": written}]}}


def chosen(app: App, model: str = "chat") -> str | None:
    rewriting = app.runtime.limits.rewriting
    choice = None if rewriting is None else rewriting.choose(model, NO_HEADERS)
    return None if choice is None else choice.model


class Running:
    """A control whose file is `next`."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.next = self._config(values)
        self.app, doors = App(self.next), Doors(self.next)
        proxy = Proxy(self.app.runtime, keys=doors.keys, trust=doors.trust)
        self.control = ProxyControl(self.app, proxy, doors, lambda: self.next)

    def reload(self, values: dict[str, Any]) -> dict[str, Any]:
        self.next = self._config(values)
        return self.control.reload()

    def _config(self, values: dict[str, Any]) -> Config:
        return from_values({"endpoints": ["a:1"], "seed": 1} | values)


def test_rules_are_those_of_an_inference_model_rewrite() -> None:
    config = parse_config(CANARY)
    (spec,) = config.models.rewrites
    rule = spec.rule
    assert (rule.name, rule.models, rule.targets, rule.until) == ("canary", {"chat"}, ("v1", "v2"), (90, 100))  # type: ignore[comparison-overlap]
    assert from_values(to_values(config)) == config
    assert "modelRewrite" in str(schema())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{targets: []}]", r"models\.rewrites\[0\]: a rule has no targets"),
        ("[{targets: [{modelRewrite: a, weight: 0}]}]", "the weight 0 of 'a' is not from 1 to 1,000,000"),
        ("[{targets: [{modelRewrite: a, weight: 1}, {modelRewrite: b}]}]", "some targets of a rule have a weight"),
        ("[{matches: [{model: {type: Regex, value: a}}], targets: [{modelRewrite: b}]}]", "only Exact is known"),
        ("[{targets: [{modelRewrit: a}]}]", "unknown key; did you mean 'modelRewrite'"),
        ("[{match: [], targets: [{modelRewrite: a}]}]", "unknown key; did you mean 'matches'"),
        ("[{matches: [{modle: {value: a}}], targets: []}]", "unknown key; did you mean 'model'"),
    ],
)
def test_what_does_not_do_is_told_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config(f"models: {{rewrites: {text}}}")


def test_where_nobody_speaks_of_models_requests_are_not_looked_at() -> None:
    assert build_limits(from_values({"endpoints": ["a:1"]})).rewriting is None
    assert App(from_values({"endpoints": ["a:1"]})).runtime.limits.rewriting is None


@pytest.mark.parametrize("heeded", [True, False])
def test_a_process_that_only_reads_requests_has_the_rules_of_the_configuration(heeded: bool) -> None:
    rewriting = build_limits(from_values(rules(v1=1) | {"kubernetes": {"pools": ["p"]} if heeded else {}})).rewriting
    assert rewriting is not None
    assert rewriting.heeds_header is heeded


def test_rules_are_exchanged_while_the_proxy_runs() -> None:
    running = Running({})
    assert chosen(running.app) is None
    for values, target in ((rules(v1=1), "v1"), (rules(v2=1), "v2"), ({}, None)):
        told = running.reload(values)
        assert (told["error"], told["needs_restart"]) == (None, [])
        assert chosen(running.app) == target


def test_a_reload_of_something_else_keeps_the_rules_and_a_bad_one_changes_nothing() -> None:
    running = Running(rules(v1=1))
    running.reload(rules(v1=1) | {"limits": {"max_body_bytes": 123}})
    assert (chosen(running.app), running.app.runtime.limits.max_body_bytes) == ("v1", 123)
    rewriting = running.app.runtime.limits.rewriting
    running.reload(rules(v2=1))
    assert running.app.runtime.limits.rewriting is rewriting
