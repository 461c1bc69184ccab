"""Tier T2: a real Envoy around an honest picker, and around what is wrong in one way for each check."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from check.campaign import outcome, trials, wanted
from check.detours import MUTANTS
from check.envoys import rig
from picker.check import certificate, registry, runner
from picker.check.verdict import Outcome, Verdict
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
HONEST = [f"{topology.value}, {which}" for topology in Topology for which in ("installed", "other")]


async def honest(name: str) -> Sequence[Verdict]:
    """Every check around an honest picker."""
    word, _, which = name.partition(", ")
    binary = Path(OTHER) if which == "other" else None
    async with rig(Topology(word), binary=binary) as this:
        checks = [check for check in registry.T2 if word in check.variants]
        return await runner.run(checks, this, this.trace, variant=word)


async def mutated(name: str) -> Sequence[Verdict]:
    """The one check that is to find what is wrong."""
    mutant = MUTANTS[name]
    async with rig(mutant.topology, mutant.make, mutant.change, tls=mutant.tls) as this:
        return await runner.run(runner.chosen(registry.T2, [name]), this, this.trace)


Found = Mapping[str, Sequence[Verdict] | Exception]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def passes(request: pytest.FixtureRequest) -> Found:
    return await trials([name for name in wanted(request, "honest_name") if OTHER or "other" not in name], honest)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def catches(request: pytest.FixtureRequest) -> Found:
    names = [name for name in wanted(request, "name") if certificate.available() or not MUTANTS[name].tls]
    return await trials(names, mutated)


@pytest.mark.parametrize("honest_name", HONEST)
def test_an_honest_picker_passes_every_check(honest_name: str, passes: Found) -> None:
    if honest_name not in passes:
        pytest.skip("PICKER_OTHER_ENVOY names no Envoy")
    verdicts = outcome(passes, honest_name)
    right = {Outcome.PASS} if certificate.available() else {Outcome.PASS, Outcome.SKIP}
    assert {verdict.name: verdict.why for verdict in verdicts if verdict.outcome not in right} == {}


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.id for check in registry.T2}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, catches: Found) -> None:
    if name not in catches:
        pytest.skip("there is no openssl program here")
    (verdict,) = outcome(catches, name)
    assert verdict.outcome is Outcome.FAIL, (verdict.outcome, verdict.why)
