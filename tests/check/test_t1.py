"""Tier T1 on an honest picker, and on one that is wrong in one way for each check."""

from __future__ import annotations

import pytest

from check.mutants import MUTANTS
from check.stage import subject
from picker.check import certificate, registry, runner
from picker.check.verdict import Outcome

# Deviations in the transport, which have tests of their own.
TRANSPORT = {check.id for check in registry.T1 if check.id.startswith("SEC-3.")}


async def test_an_honest_picker_passes_every_check() -> None:
    async with subject() as this:
        verdicts = await runner.run(registry.T1, this, this.trace)
    wanted = {Outcome.PASS} if certificate.available() else {Outcome.PASS, Outcome.SKIP}
    assert {verdict.name: verdict.why for verdict in verdicts if verdict.outcome not in wanted} == {}


def test_every_check_has_a_mutant() -> None:
    assert set(MUTANTS) == {check.id for check in registry.T1} - TRANSPORT


@pytest.mark.parametrize("name", MUTANTS)
async def test_a_mutant_is_caught_by_its_check_and_by_no_other_of_the_family(name: str) -> None:
    mutant = MUTANTS[name]
    only = [name] if mutant.also is None else [name.partition(".")[0]]
    async with subject(mutant.make, patience=0.7, tls=False) as this:
        verdicts = await runner.run(runner.chosen(registry.T1, only), this, this.trace)
    failures = {verdict.id: verdict.why for verdict in verdicts if verdict.outcome is not Outcome.PASS}
    assert set(failures) == {name, *(mutant.also or ())}, failures
