"""Gateways side by side. The one run here is short, real, and says nothing about speed."""

import pytest

from picker.bench import compare, peers
from picker.errors import ConfigError
from picker.sim.scenario import scenario
from picker.sim.sessions import Sessions


def test_a_gateway_that_nobody_knows_is_named() -> None:
    with pytest.raises(ConfigError, match="'nginx' is no gateway known here: picker, round-robin"):
        compare.Setup(scenario("S3"), ("picker", "nginx"))


def test_a_gateway_that_is_not_installed_is_named_with_what_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "installed", dict)
    with pytest.raises(ConfigError, match="smg is not installed: `make bench-peers` gets it"):
        compare.Setup(scenario("S3"), ("picker", "smg"))


def test_adapters_are_refused_since_not_every_gateway_knows_them() -> None:
    with pytest.raises(ConfigError, match="S6: the gateways compared here do not all know LoRA adapters"):
        compare.Setup(scenario("S6"), ("picker",))


def test_a_closed_loop_is_shortened_by_requests_and_not_by_seconds() -> None:
    with pytest.raises(ConfigError, match="S9 has no seconds: shorten it with --limit"):
        compare.Setup(scenario("S9"), ("picker",), seconds=10.0).chosen()


def test_seconds_and_load_are_those_that_were_asked_for() -> None:
    chosen = compare.Setup(scenario("S3"), ("picker",), load=0.5, seconds=20.0).chosen()
    assert isinstance(chosen.scenario.workload, Sessions)
    assert chosen.scenario.workload.seconds == 20.0
    assert chosen.rate == pytest.approx(0.5 * (chosen.scenario.stable_rate or 0.0))


@pytest.mark.e2e
async def test_each_gateway_gets_the_same_requests() -> None:
    short = scenario("S3", short=True)
    setup = compare.Setup(short, ("picker", "round-robin"), seconds=40.0, time_scale=20.0)
    first, second = await compare.rows(setup)
    assert (first["gateway"], second["gateway"]) == ("picker", "round-robin")
    assert first["failed"] == second["failed"] == 0
    assert first["requests"] > 0
    assert first["cpu_us_per_request"] > 0
    assert "proxy --port 0" in first["command"]
    assert "--policy round-robin" in second["command"]
    assert set(compare.COLUMNS) <= set(first)
