"""Command lines of other routers: every flag has a line, and what can be done here is done."""

from typing import Any

import pytest

from picker.config import from_values
from picker.errors import ConfigError
from picker.imports import import_text, import_words, parse, recognise
from picker.imports.flags import Program
from picker.imports.production_stack import PROGRAM as PRODUCTION_STACK
from picker.imports.report import Fate, Imported
from picker.imports.routers import SGLANG_ROUTER, SMG, VLLM_ROUTER

PROGRAMS = [VLLM_ROUTER, SGLANG_ROUTER, SMG, PRODUCTION_STACK]
VALUES = {
    "--policy": "cache_aware",
    "--routing-logic": "prefixaware",
    "--worker-urls": "http://a:8000",
    "--static-backends": "http://a:8000",
    "--static-models": "m",
}


def fates(imported: Imported) -> dict[str, Fate]:
    return {line.where: line.fate for line in imported.lines}


def imported(line: str, project: str = "vllm-router") -> Imported:
    return import_words(line.split(), project)


def words(program: Program, name: str) -> list[str]:
    arity = program.flags[name].arity
    value = VALUES.get(name, "static" if (program.name, name) == ("production-stack", "--service-discovery") else "3")
    return [name, *([value] * (1 if isinstance(arity, str) else arity))]


@pytest.mark.parametrize(
    ("program", "name"),
    [pytest.param(each, name, id=f"{each.name} {name}") for each in PROGRAMS for name in each.flags],
)
def test_every_flag_is_told_of(program: Program, name: str) -> None:
    base = ["--static-backends" if program is PRODUCTION_STACK else "--worker-urls", "http://a:8000"]
    found = import_words([*base, *words(program, name)], program.name)
    told = [line for line in found.lines if line.where == name]
    assert told
    assert all("no flag of" not in line.says for line in told)


@pytest.mark.parametrize(
    ("program", "count"), [(VLLM_ROUTER, 71), (SGLANG_ROUTER, 98), (SMG, 221), (PRODUCTION_STACK, 53)]
)
def test_the_tables_are_those_of_the_named_versions(program: Program, count: int) -> None:
    assert len(program.flags) == count


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("--worker-urls http://a:8000 http://b:8000/", {"endpoints": ["http://a:8000", "http://b:8000"]}),
        ("--worker-urls http://a https://[::1]", {"endpoints": ["http://a:80", "https://[::1]:443"]}),
        ("--worker-urls http://a:1 --host 0.0.0.0 --port=30000", {"proxy": {"host": "0.0.0.0", "port": 30000}}),
        ("--worker-urls http://a:1 --policy round_robin", {"policy": "round-robin"}),
        ("--worker-urls http://a:1 --policy power_of_two", {"policy": "least-request"}),
        ("--worker-urls http://a:1 --retry-max-retries 5", {"limits": {"max_attempts": 6}}),
        ("--worker-urls http://a:1 --disable-retries", {"limits": {"max_attempts": 1}}),
        ("--worker-urls http://a:1 --max-payload-size 1000", {"limits": {"max_body_bytes": 1000}}),
        ("--worker-urls http://a:1 --request-timeout-secs 1.5", {"proxy": {"first_byte_timeout_s": 1.5}}),
        ("--worker-urls http://a:1 --cb-failure-threshold 4", {"health": {"eject_after": 4}}),
        ("--worker-urls http://a:1 --log-level critical", {"log_level": "error"}),
        ("--worker-urls http://a:1 --prometheus-host localhost", {"admin": {"host": "localhost"}}),
        ("--worker-urls http://a:1 --prometheus-host 0.0.0.0", {"admin": {"host": "0.0.0.0", "read_only": True}}),
        ("--worker-urls http://a:1 --queue-size 7 --queue-timeout-secs 9", {"queue": {"size": 7, "timeout_s": 9}}),
        (
            "--service-discovery --selector app=x role=y --service-discovery-port 8000",
            {"kubernetes": {"selector": "app=x,role=y", "target_ports": [8000]}},
        ),
        (
            "--worker-urls http://a:1 --intra-node-data-parallel-size 2",
            {"endpoints": [{"address": "http://a:1", "rank": 0}, {"address": "http://a:1", "rank": 1}]},
        ),
    ],
)
def test_what_can_be_done_here_is(line: str, values: dict[str, Any]) -> None:
    found = imported(line)
    assert {key: found.values[key] for key in values} == values
    from_values(dict(found.values))


@pytest.mark.parametrize(
    ("line", "project", "found"),
    [
        ("--worker-urls http://a:1 --model-alias fast=qwen --model-alias slow=llama", "smg", ["fast", "slow"]),
        ("--static-backends http://a:1 --static-aliases fast:qwen,slow:llama", "production-stack", ["fast", "slow"]),
        ("--worker-urls http://a:1 --model-alias fast", "smg", []),
        ("--static-backends http://a:1 --static-aliases fast", "production-stack", []),
    ],
)
def test_aliases_of_models_are_rewritten(line: str, project: str, found: list[str]) -> None:
    config = from_values(dict(imported(line, project).values))
    assert [spec.name for spec in config.models.rewrites] == found
    targets = [target.model_rewrite for spec in config.models.rewrites for target in spec.targets]
    assert targets == ["qwen", "llama"][: len(found)]


def test_ids_of_requests_are_those_of_one_header() -> None:
    assert (
        fates(imported("--worker-urls http://a:1 --request-id-headers X-Request-Id"))["--request-id-headers"]
        is Fate.SAME
    )
    found = imported("--worker-urls http://a:1 --request-id-headers x-request-id x-trace-id")
    assert fates(found)["--request-id-headers"] is Fate.PARTLY


def test_an_unknown_flag_is_named_with_the_nearest() -> None:
    (line,) = [each for each in imported("--worker-urls http://a:1 --polcy random").lines if each.where == "--polcy"]
    assert (line.fate, line.says) == (Fate.MISSING, "no flag of vllm-router 0.1.17; did you mean --policy?")


def test_a_beginning_that_only_one_flag_has_is_that_flag() -> None:
    assert imported("--worker-u http://a:1").values["endpoints"] == ["http://a:1"]


def test_a_flag_without_its_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--port of vllm-router lacks its value"):
        imported("--port --policy random")


@pytest.mark.parametrize("line", ["--port x", "--policy best"])
def test_a_value_that_the_router_would_refuse_is_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=line.split()[0]):
        imported(line)


def test_no_secret_is_repeated() -> None:
    found = imported("--worker-urls http://a:1 --api-key sesame --control-plane-api-keys a:b:admin:sesame", "smg")
    assert "sesame" not in str(found)


def test_a_variable_of_the_shell_is_not_taken_for_a_value() -> None:
    found = imported("--worker-urls http://a:1 --port $PORT")
    assert "proxy" not in found.values
    assert fates(found)["--port"] is Fate.MISSING


def test_engines_that_speak_grpc_are_left_out_with_a_word() -> None:
    found = imported("--worker-urls grpc://a:1 http://b:1", "smg")
    assert found.values["endpoints"] == ["http://b:1"]
    assert any("not gRPC" in line.says for line in found.lines)


def test_without_endpoints_that_is_said() -> None:
    assert fates(imported("--policy random"))["--worker-urls"] is Fate.MISSING


SCRIPT = """#!/bin/sh
mkdir --parents /var/log/router   # first
exec python3 -m sglang_router.launch_router \\
  --worker-urls http://a:1 http://b:1 \\
  --policy 'cache_aware' 2>&1 | tee --append log
"""


def test_a_script_is_read_from_its_commands_name_to_the_pipe() -> None:
    found = import_text(SCRIPT)
    assert found.project == "sglang-router"
    assert [line.where for line in found.lines] == ["--worker-urls", "--policy"]


@pytest.mark.parametrize(
    ("text", "project"),
    [
        ("vllm-router --worker-urls http://a:1", "vllm-router"),
        ("/opt/venv/bin/vllm-router --worker-urls http://a:1", "vllm-router"),
        ("vllm-router --static-backends http://a:1", "production-stack"),
        ("python3 -m vllm_router.app --port 1", "production-stack"),
        ("smg launch --worker-urls http://a:1", "smg"),
        ("docker run --rm image smg launch --worker-urls http://a:1", "smg"),
        ("[smg, launch, --worker-urls, 'http://a:1']", "smg"),
        ("curl --silent http://a", None),
        ("endpoints: [http://a:1]", None),
    ],
)
def test_whose_a_text_is_is_seen(text: str, project: str | None) -> None:
    assert recognise(parse(text)) == project


def test_models_go_with_backends_by_their_order() -> None:
    found = imported("--static-backends http://a:1,http://b:1 --static-models x,y", "production-stack")
    assert found.values["endpoints"] == [
        {"address": "http://a:1", "models": ["x"]},
        {"address": "http://b:1", "models": ["y"]},
    ]
    with pytest.raises(ConfigError, match="3 models for 1 backends"):
        imported("--static-backends http://a:1 --static-models x,y,z", "production-stack")


def test_pods_of_a_cluster_are_found_as_there() -> None:
    line = "--service-discovery k8s --k8s-label-selector app=x --k8s-port 8000 --k8s-namespace n"
    kubernetes = imported(line, "production-stack").values["kubernetes"]
    assert kubernetes == {"selector": "app=x", "target_ports": [8000], "namespace": "n"}
