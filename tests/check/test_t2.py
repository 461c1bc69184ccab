"""Tier T2: a real Envoy around an honest picker, and around what is wrong in one way for each check."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from check.detours import MUTANTS
from check.envoys import rig
from picker.check import certificate, registry, runner
from picker.check.verdict import Outcome
from picker.envoy import Topology, find_envoy
from picker.errors import ConfigError

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(missing), reason=missing)]

# Another version of Envoy, for those who have one.
OTHER = os.environ.get("PICKER_OTHER_ENVOY", "")
BINARIES = [
    pytest.param(None, id="installed"),
    pytest.param(
        Path(OTHER), id="other", marks=pytest.mark.skipif(not OTHER, reason="PICKER_OTHER_ENVOY names no Envoy")
    ),
]


@pytest.mark.parametrize("binary", BINARIES)
@pytest.mark.parametrize("topology", Topology)
async def test_an_honest_picker_passes_every_check(topology: Topology, binary: Path | None) -> None:
    checks = [check for check in registry.T2 if topology.value in check.variants]
    async with rig(topology, binary=binary) as this:
        verdicts = await runner.run(checks, this, this.trace, variant=topology.value)
    wanted = {Outcome.PASS} if certificate.available() else {Outcome.PASS, Outcome.SKIP}
    assert {verdict.name: verdict.why for verdict in verdicts if verdict.outcome not in wanted} == {}


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.id for check in registry.T2}


@pytest.mark.parametrize("name", MUTANTS)
async def test_a_mutant_is_caught(name: str) -> None:
    mutant = MUTANTS[name]
    if mutant.tls and not certificate.available():
        pytest.skip("there is no openssl program here")
    async with rig(mutant.topology, mutant.make, mutant.change, tls=mutant.tls) as this:
        (verdict,) = await runner.run(runner.chosen(registry.T2, [name]), this, this.trace)
    assert verdict.outcome is Outcome.FAIL, verdict
