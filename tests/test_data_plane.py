"""What picker's own Envoy is told, as data; Envoy's own opinion of it where a binary is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from picker import envoy
from picker.data_plane import Asking, Door, Folder, Serving, certificate, gateway, members, write_whole
from picker.data_plane_usage import reading
from picker.envoy import validate
from picker.errors import ConfigError
from picker.frontends.certificates import self_signed
from picker.types import Endpoint

try:
    envoy.find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)
needs_envoy = pytest.mark.skipif(bool(missing), reason=missing)


def door(**options: Any) -> Door:
    known: dict[str, Any] = {
        "host": "127.0.0.1",
        "connect_timeout": 2.0,
        "silence": 600.0,
        "attempts": 3,
        "elsewhere": (502, 503),
        "max_body_bytes": 1000,
        "connections": 500,
    }
    return Door(**(known | options))


def made(tmp_path: Path, port: int = 8080, **options: Any) -> dict[str, Any]:
    return gateway(door(**options), port, Folder(tmp_path))


def manager(config: dict[str, Any]) -> dict[str, Any]:
    (listener,) = config["static_resources"]["listeners"]
    found = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert isinstance(found, dict)
    return found


def virtual_host(config: dict[str, Any]) -> dict[str, Any]:
    (found,) = manager(config)["route_config"]["virtual_hosts"]
    assert isinstance(found, dict)
    return found


def test_nothing_but_the_gateway_listens_on_a_port(tmp_path: Path) -> None:
    assert json.dumps(made(tmp_path)).count("port_value") == 1


def test_what_clients_could_tell_envoy_or_picker_by_header_is_stripped(tmp_path: Path) -> None:
    (extension,) = manager(made(tmp_path))["early_header_mutation_extensions"]
    matches = [each.get("remove_on_match") for each in extension["typed_config"]["mutations"]]
    prefixes = [each["key_matcher"]["prefix"] for each in matches if each]
    assert prefixes == ["x-gateway-destination-endpoint", "x-picker-", "x-envoy-"]
    names = {each["remove"] for each in extension["typed_config"]["mutations"] if "remove" in each}
    assert {"x-data-parallel-rank", "x-prefiller-host-port"} <= names


def test_what_clients_say_to_picker_no_endpoint_hears(tmp_path: Path) -> None:
    removed = virtual_host(made(tmp_path))["request_headers_to_remove"]
    assert {"x-llm-d-inference-objective", "x-gateway-inference-objective", "x-slo-ttft-ms"} <= {*removed}
    assert not [name for name in removed if name.startswith(("x-picker-", "x-data-"))]


def test_requests_that_are_sure_to_have_a_body_are_told_in_one_message_where_nobody_asks_for_keys(
    tmp_path: Path,
) -> None:
    (everything,) = virtual_host(made(tmp_path))["routes"]
    assert "typed_per_filter_config" not in everything
    whole, everything = virtual_host(made(tmp_path, asked=("x-session-id",), max_body_bytes=1000))["routes"]
    assert whole["match"]["headers"][1]["range_match"] == {"start": 1, "end": 1001}
    asking = whole["typed_per_filter_config"]["envoy.filters.http.ext_proc"]["overrides"]["processing_mode"]
    assert (asking["request_header_mode"], asking["request_body_mode"]) == ("SKIP", "BUFFERED")
    assert everything["match"] == {"prefix": "/"}
    asking, holding, *_ = manager(made(tmp_path, asked=("x-session-id",)))["http_filters"]
    assert "request.headers['x-session-id']" in asking["typed_config"]["request_attributes"]
    assert holding["disabled"]


def test_another_endpoint_is_tried_as_often_as_configured_and_not_at_all_with_one_attempt(tmp_path: Path) -> None:
    (route,) = virtual_host(made(tmp_path, attempts=3))["routes"]
    assert route["route"]["retry_policy"]["num_retries"] == 2
    assert route["route"]["retry_policy"]["retriable_status_codes"] == [502, 503]
    (route,) = virtual_host(made(tmp_path, attempts=1))["routes"]
    assert "retry_policy" not in route["route"]


def test_a_body_is_kept_for_another_try_up_to_the_limit_of_bodies(tmp_path: Path) -> None:
    assert virtual_host(made(tmp_path, max_body_bytes=12345))["request_body_buffer_limit"] >= 12345


def test_the_endpoint_is_named_unless_that_is_off(tmp_path: Path) -> None:
    named = [each["header"]["key"] for each in virtual_host(made(tmp_path))["response_headers_to_add"]]
    assert named == ["x-picker-endpoint", "x-picker-request-id"]
    assert "response_headers_to_add" not in virtual_host(made(tmp_path, name_endpoint=False))


def test_ranks_of_one_engine_are_one_member() -> None:
    ranks = [Endpoint(f"10.0.0.1:8000#{rank}", "10.0.0.1:8000", rank=rank) for rank in (0, 1)]
    (resource,) = members([*ranks, Endpoint("b", "[fd00::2]:8000")], {}, {})["resources"]
    found = resource["endpoints"][0]["lb_endpoints"]
    assert [each["endpoint"]["address"]["socket_address"]["address"] for each in found] == ["10.0.0.1", "fd00::2"]
    assert [each["metadata"]["filter_metadata"]["picker"]["name"] for each in found] == ["10.0.0.1:8000", "b"]


def test_https_members_are_spoken_to_by_tls_under_their_name() -> None:
    endpoints = [Endpoint("a", "10.0.0.1:443", scheme="https"), Endpoint("b", "10.0.0.2:80")]
    (resource,) = members(endpoints, {"a": "a.example"}, {})["resources"]
    first, second = resource["endpoints"][0]["lb_endpoints"]
    assert first["endpoint"]["hostname"] == "a.example"
    assert first["metadata"]["filter_metadata"]["envoy.transport_socket_match"] == {"tls": True}
    assert "envoy.transport_socket_match" not in second["metadata"]["filter_metadata"]


def test_what_shares_an_address_is_shown_one_key_under_the_name_it_belongs_to() -> None:
    """A client's key never goes where there is one, nor a key to another's name."""
    endpoints = [Endpoint(name, "10.0.0.1:443", scheme="https") for name in "abc"]
    hosts = {name: f"{name}.example" for name in "abc"}
    (resource,) = members(endpoints, hosts, {"b": "Bearer b", "c": "Bearer c"})["resources"]
    (found,) = resource["endpoints"][0]["lb_endpoints"]
    assert found["metadata"]["filter_metadata"]["picker"] == {"name": "10.0.0.1:443", "authorization": "Bearer b"}
    assert found["endpoint"]["hostname"] == "b.example"


def test_what_clients_show_is_remembered_only_where_it_may_go_on(tmp_path: Path) -> None:
    def names(config: dict[str, Any]) -> tuple[list[str], list[str]]:
        pool = config["static_resources"]["clusters"][0]
        (options,) = pool["typed_extension_protocol_options"].values()
        found = (
            [each["name"] for each in filters] for filters in (manager(config)["http_filters"], options["http_filters"])
        )
        return next(found), next(found)

    mutation, codec = "envoy.filters.http.header_mutation", "envoy.filters.http.upstream_codec"
    coming, each_try = names(made(tmp_path, pass_on=False))
    assert "envoy.filters.http.set_filter_state" not in coming
    assert each_try == [mutation, codec]
    coming, each_try = names(made(tmp_path))
    assert coming[-2:] == ["envoy.filters.http.set_filter_state", "envoy.filters.http.router"]
    assert each_try == [mutation, "unless-keyed", codec]


@pytest.mark.parametrize(("kept", "digits"), [(99_998, 4), (99_999, 5), (2**20, 6), (2**30, 6)])
def test_answers_are_read_that_fit_into_what_envoy_keeps(kept: int, digits: int) -> None:
    _, small = reading(kept)
    (large,) = small["typed_config"]["xds_matcher"]["matcher_list"]["matchers"]
    length = large["predicate"]["not_matcher"]["single_predicate"]["value_match"]["safe_regex"]["regex"]
    assert length == f"[0-9]{{1,{digits}}}"


def test_answers_are_read_for_a_recording_alone(tmp_path: Path) -> None:
    filters = [each["name"] for each in manager(made(tmp_path, usage=True))["http_filters"]]
    assert filters[-3:] == ["envoy.filters.http.sse_to_metadata", "if-small", "envoy.filters.http.router"]
    assert "to_metadata" not in json.dumps(made(tmp_path))


def test_files_are_for_nobody_else_to_read(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    path.with_name("pool.json.new").touch(0o644)
    for _ in range(2):
        write_whole(path, {})
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "pool.json"
    write_whole(path, {"resources": []})
    before = path.stat().st_ino
    write_whole(path, {"resources": [1]})
    assert path.stat().st_ino != before
    assert json.loads(path.read_text()) == {"resources": [1]}
    assert [each.name for each in tmp_path.iterdir()] == ["pool.json"]


@needs_envoy
@pytest.mark.parametrize("host", ["127.0.0.1", "::", "0.0.0.0"])
def test_envoy_accepts_it(tmp_path: Path, host: str) -> None:
    write_whole(Folder(tmp_path).pool, members([Endpoint("a", "10.0.0.1:443")], {}, {"a": "Bearer k"}))
    validate(made(tmp_path, host=host))
    validate(made(tmp_path, host=host, asked=("x-session-id",), pass_on=False))


@needs_envoy
def test_envoy_accepts_tls_both_ways(tmp_path: Path) -> None:
    endpoint = Endpoint("a", "10.0.0.1:443", scheme="https")
    write_whole(Folder(tmp_path).pool, members([endpoint], {"a": "a.example"}, {}))
    chain, key = (text.decode() for text in self_signed(["localhost"]))
    write_whole(Folder(tmp_path).secret, certificate(chain, key))
    ca, own = tmp_path / "ca.pem", tmp_path / "own.pem"
    ca.write_text(chain)
    own.write_text(key)
    serving = Serving(client_ca=str(ca), oldest="1.3")
    for asking in (
        Asking(str(ca)),
        Asking(str(ca), cert=str(ca), key=str(own), server_name="a.example"),
        Asking(insecure=True),
    ):
        validate(made(tmp_path, serving=serving, asking=asking))
