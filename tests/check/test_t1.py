"""Tier T1 on an honest picker, and on one that is wrong in one way for each check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import pytest_asyncio

from check.campaign import outcome, trials, wanted
from check.mutants import MUTANTS
from check.stage import subject
from picker.check import certificate, registry, runner
from picker.check.verdict import Outcome, Verdict

# Deviations in the transport, which have tests of their own.
TRANSPORT = {check.id for check in registry.T1 if check.id.startswith("SEC-3.")}
# What else runs would count as slowness of the picker.
TIMED = frozenset(name for name in MUTANTS if name.startswith("EPP-7."))

Found = Mapping[str, Sequence[Verdict] | Exception]


async def mutated(name: str) -> Sequence[Verdict]:
    """The check that is to find what is wrong and the rest of its family, which is to find nothing."""
    mutant = MUTANTS[name]
    only = [name] if mutant.also is None else [name.partition(".")[0]]
    async with subject(mutant.make, tls=False) as this:
        return await runner.run(runner.chosen(registry.T1, only), this, this.trace)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def catches(request: pytest.FixtureRequest) -> Found:
    return await trials(wanted(request, "name"), mutated, alone=TIMED)


async def test_an_honest_picker_passes_every_check() -> None:
    async with subject() as this:
        verdicts = await runner.run(registry.T1, this, this.trace)
    right = {Outcome.PASS} if certificate.available() else {Outcome.PASS, Outcome.SKIP}
    assert {verdict.name: verdict.why for verdict in verdicts if verdict.outcome not in right} == {}


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.id for check in registry.T1} - TRANSPORT


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_by_its_check_and_by_no_other_of_the_family(name: str, catches: Found) -> None:
    verdicts = outcome(catches, name)
    failures = {verdict.id: verdict.why for verdict in verdicts if verdict.outcome is not Outcome.PASS}
    assert set(failures) == {name, *(MUTANTS[name].also or ())}, failures
