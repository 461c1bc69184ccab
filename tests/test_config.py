import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.config import POLICIES, Config, EndpointSpec, from_values, load_config, override, parse_config, schema
from picker.config import to_values as values_of
from picker.errors import ConfigError
from picker.request_limits import build_limits

EVERYTHING = """
endpoints:
  - http://10.0.0.1:8000
  - {address: "10.0.0.2:8000", name: two, models: [m], role: decode, rank: 1, labels: {zone: x}}
policy: weighted
scorers:
  - {name: queue-scorer, weight: 2}
  - {name: lora-affinity-scorer, parameters: {room_score: 0.5}}
picker: power-of-two
seed: 7
queue: {max_inflight: 4, size: 10, timeout_s: 2}
index: {block_bytes: 128}
proxy: {port: 0}
admin: {port: null, token: hush}
"""


def test_no_file_means_the_defaults() -> None:
    assert load_config(None) == Config() == parse_config("") == parse_config("# nothing\n")


def test_the_defaults_are_a_valid_configuration() -> None:
    assert from_values({}) == Config()


def test_every_kind_of_value_is_read() -> None:
    config = parse_config(EVERYTHING)
    assert config.endpoints == [
        "http://10.0.0.1:8000",
        EndpointSpec(address="10.0.0.2:8000", name="two", models=["m"], role="decode", rank=1, labels={"zone": "x"}),
    ]
    assert [(scorer.name, scorer.weight, scorer.parameters) for scorer in config.scorers] == [
        ("queue-scorer", 2.0, {}),
        ("lora-affinity-scorer", 1.0, {"room_score": 0.5}),
    ]
    assert (config.queue.max_inflight, config.queue.timeout_s, config.index.block_bytes) == (4, 2.0, 128)
    assert (config.admin.port, config.admin.token, config.seed) == (None, "hush", 7)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("polcy: picker", r"polcy: unknown key; did you mean 'policy'\?"),
        ("proxy: {prt: 1}", r"proxy\.prt: unknown key; did you mean 'port'\?"),
        ("zzz: 1", r"zzz: unknown key; known here: endpoints, .*admin"),
        ("endpoints: [{addres: x}]", r"endpoints.*: unknown key; did you mean 'address'\?"),
        ("exact: {tokenizers: {m: {foldr: x}}}", r"exact\.tokenizers.*: unknown key; did you mean 'folder'\?"),
        ("exact: {tokenizer: {foldr: x}}", r"exact\.tokenizer\.foldr: unknown key; did you mean 'folder'\?"),
        ("profiles: [{name: x, filters: [{nam: y}]}]", r"profiles.*filters.*: unknown key; did you mean 'name'\?"),
        ("kubernetes: {leader_election: {enabld: true}}", r"election\.enabld: unknown key; did you mean 'enabled'\?"),
        ("scorers: [{name: x, wait: 1}]", r"scorers.*: unknown key; did you mean 'weight'\?"),
        ("profiles: [{name: x, picks: 1}]", r"profiles.*: unknown key; did you mean 'picker'\?"),
        ("profiles: [{name: x, scorers: [{name: y, wait: 1}]}]", r"profiles.*scorers.*: .*did you mean 'weight'\?"),
        ("filters: [{nam: x}]", r"filters.*: unknown key; did you mean 'name'\?"),
        ("saturation: {detectr: x}", r"saturation\.detectr: unknown key; did you mean 'detector'\?"),
        ("endpoints: [{name: x}]", r"endpoints.*address"),
        ("endpoints: [3]", r"endpoints.*is a whole number"),
        ("endpoints: http://x", r"endpoints: must be a list, and is text"),
        ("queue: {size: many}", r"queue\.size: must be a whole number, and is text"),
        ("queue: {size: 1.5}", r"queue\.size: must be a whole number, and is a number"),
        ("queue: 3", r"queue: must be keys and values, and is a whole number"),
        ("seed: true", r"seed: must be a whole number or null, and is true or false"),
        ("- a\n- b", r"expected keys and values at the top, got list"),
        ("just text", r"expected keys and values at the top, got str"),
        ("a: [", r"not valid YAML: line 1, column 5: "),
        ("a: b: c", r"not valid YAML: "),
        ("!!python/object/apply:os.getcwd []", r"not valid YAML: "),
    ],
)
def test_what_is_wrong_is_named_with_its_place_and_the_nearest_right_word(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("policy: wieghted", r"policy: 'wieghted' is not one of .*; did you mean 'weighted'\?"),
        ("policy: weighted", r"policy: 'weighted' needs a list of scorers"),
        ("filters: [{name: decode-filter}]", r"filters: they are used by policy 'weighted' only"),
        ("profiles: [{name: a}]", r"profiles: they are used by policy 'weighted' only"),
        (
            "{policy: weighted, profiles: [{name: a}], scorers: [{name: queue-scorer}]}",
            r"profiles: with them, filters and scorers stand in the profiles",
        ),
        ("{policy: weighted, profiles: [{name: a}, {name: a}]}", r"profiles: two of them are called 'a'"),
        (
            "{policy: weighted, profiles: [{name: decode}], profile: decod}",
            r"profile: .*'decod'; did you mean 'decode'",
        ),
        ("{policy: weighted, profiles: [{name: a}], prefill_profile: b}", r"prefill_profile: there is no profile 'b'"),
        ("profile_header: EPP-Profile", r"profile_header: there are no profiles to name"),
        ("scorers: [{name: queue-scorer}]", r"scorers: they are used by policy 'weighted' only.*'picker'"),
        ("index: {block_bytes: 0}", r"index\.block_bytes: must be greater than 0, got 0"),
        ("index: {block_bytes: 6}", r"index\.block_bytes: must be a multiple of 4, got 6"),
        ("index: {budget_bytes: -1}", r"index\.budget_bytes: must be greater"),
        ("scrape: {interval_s: .nan}", r"scrape\.interval_s: must be greater"),
        ("limits: {max_attempts: 0}", r"limits\.max_attempts: must be greater"),
        ("limits: {max_body_bytes: 0}", r"limits\.max_body_bytes: must be greater"),
        ("queue: {timeout_s: 0}", r"queue\.timeout_s: must be greater"),
        ("queue: {max_inflight: 0}", r"queue\.max_inflight: must be at least 1 or null, got 0"),
        ("epp: {workers: 0}", r"epp\.workers: must be from 1 to 64, got 0"),
        ("proxy: {idle_timeout_s: -2}", r"proxy\.idle_timeout_s: must be greater"),
        ("proxy: {port: 70000}", r"proxy\.port: must be a port from 0 to 65535, got 70000"),
        ("epp: {mode: slim}", r"epp\.mode: 'slim' is not one of full, lean"),
        ("epp: {idle_timeout_s: 0}", r"epp\.idle_timeout_s: must be greater"),
        ("epp: {request_timeout_s: 0}", r"epp\.request_timeout_s: must be greater"),
        ("epp: {max_message_bytes: 0}", r"epp\.max_message_bytes: must be greater"),
        ("epp: {drain_delay_s: -1}", r"epp\.drain_delay_s: must not be negative"),
        ("epp: {grpc_port: -1}", r"epp\.grpc_port: must be a port"),
        ("epp: {grpc_health_port: 65536}", r"epp\.grpc_health_port: must be a port"),
        ("admin: {port: 99999}", r"admin\.port: must be a port"),
        ("health: {path: health}", r"health\.path: must begin with a slash, got 'health'"),
        ("health: {stall_s: 0}", r"health\.stall_s: must be greater"),
        ("health: {hang_floor_s: -1}", r"health\.hang_floor_s: must not be negative"),
        ("retry: {ratio: -0.1}", r"retry\.ratio: must not be negative"),
        ("retry: {statuses: [429]}", r"retry\.statuses: 429 is no fault of an endpoint; those are from 500 to 599"),
        ("retry: {ration: 1}", r"retry\.ration: unknown key; did you mean 'ratio'"),
        ("proxy: {drain_delay_s: -1}", r"proxy\.drain_delay_s: must not be negative"),
        ("health: {eject_after: 0}", r"health\.eject_after: must be greater"),
        ("health: {eject_s: -0.5}", r"health\.eject_s: must not be negative"),
        ("health: {eject_max_s: -1}", r"health\.eject_max_s: must not be negative"),
        ("queue: {size: -1}", r"queue\.size: must not be negative, got -1"),
        ("drain_timeout_s: -1", r"drain_timeout_s: must not be negative, got -1"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parse_config(text)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_accepted(policy: str) -> None:
    scorers = [{"name": "queue-scorer"}] if policy == "weighted" else []
    assert from_values({"policy": policy, "scorers": scorers}).policy == policy


def test_an_error_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "picker.yaml"
    path.write_text("polcy: x")
    with pytest.raises(ConfigError, match=r"picker\.yaml: polcy: unknown key"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read .*picker\.yaml"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "picker.yaml"
    path.write_text("proxy: {port: 81}")
    assert load_config(path).proxy.port == 81


def test_flags_win_over_the_file_where_they_are_given() -> None:
    config = override(
        parse_config("proxy: {port: 81, host: h}\npolicy: random"),
        {"proxy.port": 82, "proxy.host": None, "policy": None, "seed": 3},
    )
    assert (config.proxy.port, config.proxy.host, config.policy, config.seed) == (82, "h", "random", 3)


def test_flags_are_checked_like_the_file() -> None:
    with pytest.raises(ConfigError, match=r"proxy\.port: must be a port"):
        override(Config(), {"proxy.port": 70000})
    with pytest.raises(ConfigError, match=r"policy: 'x' is not one of"):
        override(Config(), {"policy": "x"})


def test_objectives_have_priorities_and_the_exchange_is_told_them() -> None:
    config = parse_config("objectives: {chat: 10, batch: -1}")
    assert build_limits(config).objectives == {"chat": 10, "batch": -1}
    with pytest.raises(ConfigError, match=r"objectives\[\.\.\.\]: must be a whole number"):
        parse_config("objectives: {chat: urgent}")


def test_the_oldest_version_of_tls_is_one_that_is_spoken() -> None:
    assert parse_config("epp: {tls_min_version: '1.3'}").epp.tls_min_version == "1.3"
    with pytest.raises(ConfigError, match=r"epp\.tls_min_version: '1\.1' is not one of 1\.2, 1\.3"):
        parse_config("epp: {tls_min_version: '1.1'}")


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().policy = "random"  # type: ignore[misc]


def test_what_is_shown_is_what_the_file_would_have_with_secrets_masked() -> None:
    config = parse_config(EVERYTHING)
    shown = values_of(config)
    assert shown["admin"]["token"] == "***"
    assert "hush" not in yaml.safe_dump(shown)
    shown["admin"]["token"] = "hush"
    assert from_values(yaml.safe_load(yaml.safe_dump(shown))) == config


def test_the_schema_is_json_and_knows_every_key() -> None:
    described = json.loads(json.dumps(schema()))
    keys = described["$defs"]["Config"]["properties"]
    assert set(keys) == {field.name for field in msgspec.structs.fields(Config)}
    assert described["$defs"]["Config"]["additionalProperties"] is False


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["endpoints", "queue", "size", "policy", "port", "proxy", "x"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(values)
def test_anything_else_is_refused_in_one_line_and_never_crashes(value: Any) -> None:
    assert "\n" not in complaint_about(value)


def complaint_about(value: Any) -> str:
    try:
        from_values(value)
    except ConfigError as error:
        return str(error)
    return ""
