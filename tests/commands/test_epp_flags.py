"""The flags that charts pass, and configuration files of the endpoint picker's own kind."""

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from picker.commands import epp
from picker.commands.epp_flags import FLAGS
from picker.config import Config
from picker.errors import ConfigError

FIXTURES = Path(__file__).parent.parent / "fixtures" / "epp"
# What the llm-d router chart passes, a leader election and some of `router.epp.flags` included.
CHART = (
    *("--pool-name", "qwen", "--pool-namespace", "llm", "--pool-group", "inference.networking.k8s.io"),
    *("--zap-encoder", "json", "--config-file", str(FIXTURES / "chart-default.yaml"), "--ha-enable-leader-election"),
    *("--grpc-health-port", "9003", "--v=4", "--secure-serving=false", "--refresh-metrics-interval=50ms"),
    *("--tracing=false", "--metrics-endpoint-auth=false"),
)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[Config]:
    """The configurations that would have been served."""
    caplog.set_level(logging.WARNING)
    served: list[Config] = []
    monkeypatch.setattr(epp, "serve", served.append)
    monkeypatch.setattr(epp, "run", lambda made: made)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    return served


def call(*arguments: str) -> Any:
    return CliRunner().invoke(epp.command, ["--endpoint", "http://127.0.0.1:1", *arguments], catch_exceptions=False)


def test_the_flags_of_a_chart_start_it_and_those_without_effect_say_so(
    started: list[Config], caplog: pytest.LogCaptureFixture
) -> None:
    assert call(*CHART).exit_code == 0
    config = started[0]
    assert (config.epp.pool_name, config.epp.pool_namespace) == ("qwen", "llm")
    assert config.kubernetes.leader_election.enabled
    assert (config.epp.secure_serving, config.scrape.interval_s) == (False, 0.05)
    assert [scorer.weight for scorer in config.profiles[0].scorers] == [2.0, 2.0, 3.0]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(":")[0] for line in warned] == [
        "--zap-encoder has no effect",
    ]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.name)
def test_every_flag_is_accepted_and_at_most_one_line_is_said(
    flag: Any, started: list[Config], caplog: pytest.LogCaptureFixture
) -> None:
    value = "10s" if flag.key.endswith("_s") else "true" if flag.takes == "switch" else "x"
    value = {"--tls-min-version": "VersionTLS10", "--endpoint-target-ports": "8000"}.get(flag.name, value)
    assert call(f"{flag.name}={value}").exit_code == 0
    said = [record for record in caplog.records if flag.name in record.getMessage()]
    assert len(said) == (1 if flag.why and value not in flag.fine else 0)


def test_the_flags_of_discovery_say_what_to_look_for(started: list[Config]) -> None:
    call("--pool-name", "a", "--pool", "b", "--pool", "a", "--pool-namespace", "llm", "--kubeconfig", "k")
    call("--endpoint-selector", "app=vllm,tier in (a)", "--endpoint-target-ports", "8000, 8001")
    pools, selected = (config.kubernetes for config in started)
    assert (pools.pools, pools.namespace, pools.kubeconfig) == (["a", "b"], "llm", "k")
    assert (selected.selector, selected.target_ports) == ("app=vllm,tier in (a)", [8000, 8001])
    assert started[0].epp.pool_name == "a"
    with pytest.raises(ConfigError, match="--endpoint-target-ports: 'http' is not a port"):
        call("--endpoint-target-ports", "http")


@pytest.mark.parametrize("value", ["", "=true", "=false", "=T", "=0"])
def test_a_switch_needs_no_value_and_takes_gos(value: str, started: list[Config]) -> None:
    assert call(f"--tracing{value}", "--enable-pprof=false").exit_code == 0


def test_secure_serving_needs_no_value_either(started: list[Config]) -> None:
    call("--secure-serving", "--grpc-port", "1")
    call("--secure-serving=false")
    assert [config.epp.secure_serving for config in started] == [True, False]


def test_draining_takes_a_go_duration(started: list[Config]) -> None:
    call("--drain-timeout", "1m30s")
    assert started[0].drain_timeout_s == 90.0


def test_a_flag_of_the_line_wins_over_the_imported_file(started: list[Config]) -> None:
    call("--config", str(FIXTURES / "pd.yaml"), "--fallbacks", "true", "--scrape-interval", "3")
    assert (started[0].epp.fallbacks, started[0].scrape.interval_s, started[0].profile) == (True, 3.0, "decode")


def test_pickers_own_policy_can_take_the_place_of_imported_profiles(
    started: list[Config], caplog: pytest.LogCaptureFixture
) -> None:
    call("--config", str(FIXTURES / "pd.yaml"), "--policy", "picker")
    assert (started[0].policy, started[0].profiles, started[0].saturation.detector) == (
        "picker",
        [],
        "utilization-detector",
    )
    assert "--policy picker takes the place of 2 imported profiles" in caplog.text


def test_what_has_no_counterpart_is_named_when_it_starts(
    started: list[Config], caplog: pytest.LogCaptureFixture
) -> None:
    call("--config", str(FIXTURES / "pd.yaml"))
    assert "imported configuration, missing: plugins[7] prefix-based-pd-decider: requests are not split" in caplog.text


def test_the_configuration_may_be_on_the_line(started: list[Config]) -> None:
    text = (FIXTURES / "optimized-baseline.yaml").read_text(encoding="utf-8")
    call("--config-text", text)
    call("--config-text", "policy: round-robin")
    assert [config.policy for config in started] == ["weighted", "round-robin"]


def test_compatible_metrics_are_off_until_asked_for(started: list[Config]) -> None:
    call()
    call("--metrics-compat")
    assert [config.epp.metrics_compat for config in started] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--config", "a", "--config-file", "b"), "give one of --config, --config-file and --config-text"),
        (("--config-text", "kind: EndpointPickerConfig"), "--config-text: .*apiVersion"),
        (("--config", "/no/such/file"), "cannot read /no/such/file"),
        (("--tracing=maybe",), "--tracing: 'maybe' is neither true nor false"),
        (("--drain-timeout", "30"), "--drain-timeout: '30' is not a duration"),
        (
            ("--tls-min-version", "VersionTLS14"),
            "--tls-min-version: 'VersionTLS14' is not VersionTLS12 or VersionTLS13",
        ),
        (("-v", "loud"), "log level: 'loud' is neither a number"),
    ],
)
def test_a_value_that_is_none_is_refused_by_its_flag(
    arguments: tuple[str, ...], complaint: str, started: list[Config]
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        call(*arguments)
    assert not started


@pytest.mark.parametrize(
    ("said", "version"),
    [("VersionTLS13", "1.3"), ("1.3", "1.3"), ("VersionTLS12", "1.2"), ("VersionTLS11", "1.2"), ("", "1.2")],
)
def test_the_oldest_version_of_tls_is_said_as_kubernetes_says_it(
    said: str, version: str, started: list[Config]
) -> None:
    assert call("--tls-min-version", said).exit_code == 0
    assert started[0].epp.tls_min_version == version


def test_lean_mode_does_not_record_what_nobody_tells(started: list[Config], tmp_path: Path) -> None:
    config = tmp_path / "picker.yaml"
    config.write_text("record: trace.jsonl\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="record: in lean mode nobody tells how long answers are; take --mode full"):
        call("--config", str(config), "--mode", "lean")
    assert call("--config", str(config)).exit_code == 0
    assert [each.record for each in started] == ["trace.jsonl"]


def test_an_unknown_flag_is_an_error_with_the_nearest_name(started: list[Config]) -> None:
    done = call("--metrics-prot", "9090")
    assert done.exit_code == 2
    assert "No such option '--metrics-prot'" in done.output
    assert "--metrics-port" in done.output


@pytest.mark.parametrize(
    ("arguments", "level"),
    [((), "info"), (("-v", "2"), "info"), (("-v=5",), "debug"), (("--zap-log-level", "error"), "error")],
)
def test_verbosity_is_a_log_level(
    arguments: tuple[str, ...], level: str, started: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr("picker.commands.options.start_logging", levels.append)
    call(*arguments)
    assert levels == [level]
