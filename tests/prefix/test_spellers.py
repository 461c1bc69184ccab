"""Stored blocks as an index takes them, also those of an engine that does not tell the truth."""

from __future__ import annotations

import dataclasses

import pytest

from picker.prefix.spellers import ByBytes, ByTokens, Speller
from picker.prefix.spelling import PrefixHasher, Vocabulary
from picker.types import BlocksStored

HASHER = PrefixHasher(b"secret")
BY_BYTES = ByBytes(HASHER, lambda name: Vocabulary([b"a", b"bc", b"", None]) if name == "known" else None)
BY_TOKENS = ByTokens(HASHER)
FACT = BlocksStored("known", (1, 2), None, (0, 1, 2, 0), 2)


@pytest.mark.parametrize(("speller", "ends"), [(BY_BYTES, [3, 4]), (BY_TOKENS, [2, 4])])
def test_blocks_spelled_at_once_are_those_spelled_one_by_one(speller: Speller, ends: list[int]) -> None:
    both = speller.spell(FACT, speller.origin)
    first = speller.spell(dataclasses.replace(FACT, hashes=(1,), tokens=(0, 1)), speller.origin)
    assert both is not None
    assert first is not None
    assert list(both.ends) == ends
    assert (list(first.ends), list(first.keys)) == (ends[:1], [int(both.keys[0])])


@pytest.mark.parametrize("speller", [BY_BYTES, BY_TOKENS])
@pytest.mark.parametrize(("hashes", "tokens", "size"), [((1,), (), 0), ((1, 2), (0, 1, 0), 2), ((1,), (0, 1), 1)])
def test_ids_that_do_not_fill_their_blocks_spell_nothing(
    speller: Speller, hashes: tuple[int, ...], tokens: tuple[int, ...], size: int
) -> None:
    told = BlocksStored("known", hashes, None, tokens, size)
    assert speller.spell(told, speller.origin) is None


@pytest.mark.parametrize("tokens", [(0, 3), (0, 9)])
def test_ids_that_are_not_known_spell_nothing(tokens: tuple[int, int]) -> None:
    assert BY_BYTES.spell(dataclasses.replace(FACT, hashes=(1,), tokens=tokens), BY_BYTES.origin) is None


def test_an_endpoint_without_a_vocabulary_spells_nothing() -> None:
    assert BY_BYTES.spell(dataclasses.replace(FACT, name="other"), BY_BYTES.origin) is None
