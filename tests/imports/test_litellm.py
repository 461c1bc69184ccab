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


def test_a_name_that_the_engine_does_not_serve_is_said_to_be_one() -> None:
    found = imported(model("fast"))
    assert fate(found, "model_list[0]") is Fate.PARTLY
    assert "--served-model-name fast" in found.lines[0].says


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
