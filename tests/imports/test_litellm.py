"""LiteLLM's config.yaml: engines of one's own are endpoints, and the rest has a line each."""

from typing import Any

import pytest
import yaml

from picker.config import from_values
from picker.errors import ConfigError
from picker.imports import import_text
from picker.imports.report import Fate, Imported


def model(name: str = "qwen", **params: Any) -> dict[str, Any]:
    given = {"model": "hosted_vllm/qwen", "api_base": "http://10.0.0.1:8000/v1"} | params
    return {"model_name": name, "litellm_params": {key: value for key, value in given.items() if value is not None}}


def imported(*models: dict[str, Any], **sections: Any) -> Imported:
    found = import_text(yaml.safe_dump({"model_list": list(models), **sections}))
    assert found.project == "litellm"
    from_values(dict(found.values))
    return found


def fate(found: Imported, where: str) -> Fate:
    (line,) = [each for each in found.lines if each.where == where]
    return line.fate


def test_an_engine_of_ones_own_is_an_endpoint_once() -> None:
    found = imported(model(), model("other", model="hosted_vllm/other"))
    assert found.values == {"endpoints": ["http://10.0.0.1:8000"]}
    assert [line.fate for line in found.lines] == [Fate.SAME, Fate.SAME]


def rules(found: Imported) -> dict[str, list[str]]:
    """The models that requests for a name get."""
    specs = from_values(dict(found.values)).models.rewrites
    assert all([match.model and match.model.value for match in spec.matches] == [spec.name] for spec in specs)
    return {spec.name: [target.model_rewrite for target in spec.targets] for spec in specs}


def test_a_name_that_the_engine_does_not_serve_is_rewritten() -> None:
    found = imported(model("fast"), model())
    assert fate(found, "model_list[0]") is Fate.SAME
    assert rules(found) == {"fast": ["qwen"]}


def test_a_name_for_several_models_is_rewritten_to_either() -> None:
    found = imported(model("chat"), model("chat", model="hosted_vllm/llama", api_base="http://b:1/v1"))
    assert rules(found) == {"chat": ["qwen", "llama"]}


def test_names_by_pattern_are_not_rewritten() -> None:
    assert rules(imported(model("*", model="hosted_vllm/*"))) == {}
    found = imported(model("team/*", model="hosted_vllm/*"))
    assert (fate(found, "model_list[0]"), rules(found)) == (Fate.PARTLY, {})


def test_an_alias_of_a_group_is_rewritten_to_what_its_engines_serve() -> None:
    aliases = {"small": "fast", "plain": {"model": "qwen", "hidden": True}, "odd": 3}
    found = imported(model("fast"), model(), router_settings={"model_group_alias": aliases})
    assert rules(found) == {"fast": ["qwen"], "small": ["qwen"], "plain": ["qwen"]}
    assert fate(found, "router_settings.model_group_alias.odd") is Fate.MISSING


def test_weights_are_those_of_endpoints() -> None:
    found = imported(model(weight=2), model(api_base="http://b:1/v1"), model(api_base="http://c:1/v1", weight=0))
    assert found.values["endpoints"] == [{"address": "http://10.0.0.1:8000", "weight": 2}, "http://b:1", "http://c:1"]
    assert fate(found, "model_list[0].litellm_params.weight") is Fate.PARTLY
    assert fate(found, "model_list[2].litellm_params.weight") is Fate.MISSING


@pytest.mark.parametrize("params", [{"model": "anthropic/claude"}, {"model": "openai/gpt", "api_base": None}])
def test_a_model_at_a_provider_is_missing(params: dict[str, Any]) -> None:
    found = imported(model(**params))
    assert fate(found, "model_list[0]") is Fate.MISSING
    assert "endpoints" not in found.values


def test_a_base_with_a_path_is_no_endpoint() -> None:
    assert fate(imported(model(), model(api_base="http://b:1/team/v1")), "model_list[1]") is Fate.MISSING


@pytest.mark.parametrize(
    ("base", "root"),
    [
        ("https://vllm.example/v1/", "https://vllm.example:443"),
        ("http://user:secret@[fd00::1]:8000", "http://[fd00::1]:8000"),
    ],
)
def test_the_root_of_an_engine_has_a_port_and_no_credentials(base: str, root: str) -> None:
    found = imported(model(api_base=base))
    assert found.values["endpoints"] == [root]
    assert "secret" not in str(found)


def test_settings_that_picker_has_are_taken_over() -> None:
    found = imported(
        model(),
        router_settings={"routing_strategy": "least-busy", "num_retries": 2, "allowed_fails": 5, "cooldown_time": 7},
        litellm_settings={"request_timeout": 90},
        general_settings={"max_request_size_mb": 2},
    )
    assert found.values["limits"] == {"max_attempts": 3, "max_body_bytes": 2 * 1024 * 1024}
    assert found.values["health"] == {"eject_after": 5, "eject_max_s": 7}
    assert found.values["proxy"] == {"first_byte_timeout_s": 90}


def test_secrets_are_pointed_at_and_never_repeated() -> None:
    found = imported(
        model(api_key="sk-secret"),
        general_settings={"master_key": "sk-secret", "database_url": "postgres://u:sk-secret@h"},
    )
    assert "sk-secret" not in str(found)
    assert fate(found, "general_settings.master_key") is Fate.PARTLY


def test_every_part_has_a_line() -> None:
    found = imported(
        model(rpm=3, temperature=1),
        guardrails=[],
        litellm_settings={"something_new": 1},
        environment_variables={"A": "b"},
    )
    missing = {line.where for line in found.lines if line.fate is Fate.MISSING}
    assert missing == {
        "model_list[0].litellm_params.rpm",
        "model_list[0].litellm_params.temperature",
        "guardrails",
        "litellm_settings.something_new",
        "environment_variables",
    }


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"router_settings": {"routing_strategy": "best"}}, "routing_strategy: 'best' is not one of"),
        ({"router_settings": {"num_retries": "two"}}, "num_retries: 'two' is not a number"),
        ({"litellm_settings": []}, None),
        ({"general_settings": [1]}, "general_settings: expected keys and values"),
    ],
)
def test_what_litellm_would_not_take_is_refused(sections: dict[str, Any], message: str | None) -> None:
    if message is None:
        imported(model(), **sections)
        return
    with pytest.raises(ConfigError, match=message):
        imported(model(), **sections)
