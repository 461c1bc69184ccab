"""Engines that store and remove blocks at random, and a naive account of what each of them holds."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.prefix.precise import Match, PreciseIndex
from picker.prefix.spelling import PrefixHasher
from picker.types import Reading, Tier

HASHER = PrefixHasher(b"a secret")
TEXTS = (b"a", b"b", b"ab", b"ba", b"aab")  # several ways to spell the same
BLOCK = 16
_TIERS = (Tier.GPU,) * 4 + (Tier.CPU, Tier.DISK)


@dataclass(frozen=True)
class Chain:
    """Blocks that continue each other, as an engine names them and as they are spelled."""

    root: str
    hashes: tuple[int, ...]
    texts: tuple[bytes, ...]

    @property
    def text(self) -> bytes:
        return b"".join(self.texts)

    def longer(self, texts: Sequence[bytes]) -> Chain:
        hashes = list(self.hashes)
        for text in texts:
            said = repr((self.root, hashes[-1] if hashes else None, text)).encode()
            hashes.append(int.from_bytes(hashlib.blake2b(said, digest_size=8).digest()))
        return Chain(self.root, tuple(hashes), (*self.texts, *texts))

    def cut(self, blocks: int) -> Chain:
        return Chain(self.root, self.hashes[:blocks], self.texts[:blocks])


def chain(*texts: bytes, root: str = "root") -> Chain:
    return Chain(root, (), ()).longer(texts)


def store(
    index: PreciseIndex, row: int, told: Chain, start: int = 0, stop: int | None = None, tier: Tier = Tier.GPU
) -> int:
    """An engine says that it has stored blocks start..stop of a chain."""
    part = slice(start, len(told.hashes) if stop is None else stop)
    ends = np.cumsum([len(text) for text in told.texts], dtype=np.int64)
    keys = HASHER.hashes(told.text)[ends]
    parent = told.hashes[start - 1] if start else None
    return index.stored(row, (told.root, BLOCK), told.hashes[part], parent, ends[part], keys[part], BLOCK, tier)


def match(index: PreciseIndex, prompt: bytes, root: str = "root") -> Match:
    return index.match(Reading(HASHER.hashes(prompt)), root)


@dataclass
class _Block:
    parent: int | None
    text: bytes
    root: str
    copies: dict[Tier, int] = field(default_factory=dict)


class Account:
    """What rows hold, kept block by block in dicts."""

    def __init__(self, rows: int) -> None:
        self.rows: list[dict[int, _Block]] = [{} for _ in range(rows)]

    def store(self, row: int, told: Chain, start: int, stop: int, tier: Tier) -> None:
        mine, parent = self.rows[row], told.hashes[start - 1] if start else None
        if parent is not None and parent not in mine:
            return
        for number, text in zip(told.hashes[start:stop], told.texts[start:stop], strict=True):
            block = mine.setdefault(number, _Block(parent, text, told.root))
            block.copies[tier] = block.copies.get(tier, 0) + 1
            parent = number

    def remove(self, row: int, hashes: Sequence[int], tier: Tier) -> None:
        for number in hashes:
            block = self.rows[row].get(number)
            if block is not None and block.copies.get(tier):
                block.copies[tier] -= 1
                self._settle(row, number)

    def clear(self, row: int, tier: Tier | None) -> None:
        for number, block in list(self.rows[row].items()):
            for each in Tier if tier is None else (tier,):
                block.copies.pop(each, None)
            self._settle(row, number)

    def match(self, row: int, prompt: bytes, root: str) -> int:
        """The longest chain of held blocks that spells the beginning of a prompt."""
        longest = 0
        ways: list[tuple[int | None, int, int]] = [(None, 0, 0)]
        while ways:
            parent, position, depth = ways.pop()
            longest = max(longest, depth)
            ways += [
                (number, position + len(block.text), depth + 1)
                for number, block in self.rows[row].items()
                if (block.parent, block.root) == (parent, root) and prompt[position:].startswith(block.text)
            ]
        return longest

    def _settle(self, row: int, number: int) -> None:
        if not any(self.rows[row][number].copies.values()):
            del self.rows[row][number]


class Story:
    """Random events of several engines, told to an index and to an account of the same."""

    def __init__(self, seed: int, index: PreciseIndex, rows: int, longest: int) -> None:
        self.index = index
        self.account = Account(rows)
        self._rng = random.Random(seed)
        self._rows = rows
        self._longest = longest
        self._known: list[Chain] = []

    def step(self) -> None:
        row, tier, dice = self._rng.randrange(self._rows), self._rng.choice(_TIERS), self._rng.random()
        if dice < 0.6 or not self._known:
            self._store(row, tier)
        elif dice < 0.94:
            self._remove(row, tier)
        else:
            only = tier if dice < 0.97 else None
            self.account.clear(row, only)
            self.index.clear(row, only)

    def prompt(self) -> tuple[bytes, str]:
        told = self._rng.choice(self._known)
        tail = bytes(self._rng.choices(b"ab", k=self._rng.randrange(8)))
        return told.cut(self._rng.randrange(len(told.texts) + 1)).text + tail, self._rng.choice(("r", "s", told.root))

    def _store(self, row: int, tier: Tier) -> None:
        told = chain(root=self._rng.choice("rs"))
        if self._known and self._rng.random() < 0.7:
            other = self._rng.choice(self._known)
            told = other.cut(self._rng.randrange(len(other.texts) + 1))
        words = TEXTS[: self._rng.randrange(1, len(TEXTS) + 1)]
        told = told.longer(self._rng.choices(words, k=self._rng.randrange(1, self._longest)))
        self._known = [*self._known[-11:], told]
        start = self._rng.randrange(len(told.hashes)) if self._rng.random() < 0.4 else 0
        stop = self._rng.randrange(start, len(told.hashes)) + 1
        self.account.store(row, told, start, stop, tier)
        store(self.index, row, told, start, stop, tier)

    def _remove(self, row: int, tier: Tier) -> None:
        told = self._rng.choice(self._known)
        start = self._rng.randrange(len(told.hashes))
        hashes = list(told.hashes[start : self._rng.randrange(start, len(told.hashes)) + 1])
        if self._rng.random() < 0.6:
            hashes.reverse()
        if self._rng.random() < 0.2:
            self._rng.shuffle(hashes)
        self.account.remove(row, hashes, tier)
        self.index.removed(row, hashes, tier)


def assert_sound(index: PreciseIndex) -> None:
    """What the index counts as it goes is what it would count anew."""
    tree, sets = index.tree, index.sets
    assert tree.live == np.count_nonzero(tree.up)
    users = np.bincount(tree.held[tree.up != 0], minlength=1)
    assert {number: sets.users(number) for number in sets.numbers()} == {
        number: int(users[number]) for number in np.flatnonzero(users).tolist() if number
    }
    assert index.nbytes == tree.nbytes + sets.nbytes + sum(row.nbytes for row in index.rows)
