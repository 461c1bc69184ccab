"""Block hashes: equal exactly where prefixes are equal, and not to be foreseen without the secret."""

import hashlib
import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from picker.prefix.blocks import BlockHasher
from picker.types import UInt64Array

BLOCK = 16
HASHER = BlockHasher(b"secret", BLOCK)
PROMPTS = st.binary(max_size=12 * BLOCK)


def hashes(
    prompt: bytes, hasher: BlockHasher = HASHER, *, model: str | None = "m", salt: str | None = None
) -> list[int]:
    values: list[int] = hasher.hash(prompt, root=hasher.root(model, salt)).tolist()
    return values


def text(size: int, seed: int = 1) -> bytes:
    return hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)


def differing(one: list[int], other: list[int]) -> list[bool]:
    return [a != b for a, b in zip(one, other, strict=True)]


# --- equal prefixes ----------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(PROMPTS, PROMPTS, PROMPTS)
def test_hashes_are_equal_just_as_far_as_the_blocks_are(head: bytes, one: bytes, other: bytes) -> None:
    a, b = head + one, head + other
    pairs = zip(hashes(a), hashes(b), strict=False)
    for end, (left, right) in enumerate(pairs, 1):
        assert (left == right) == (a[: end * BLOCK] == b[: end * BLOCK])


@settings(max_examples=50)
@given(PROMPTS, PROMPTS)
def test_a_growing_prompt_keeps_the_hashes_it_had(prompt: bytes, more: bytes) -> None:
    kept = hashes(prompt)
    assert hashes(prompt + more)[: len(kept)] == kept


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 160])
def test_only_full_blocks_have_a_hash(size: int) -> None:
    assert len(hashes(text(size))) == size // BLOCK
    assert hashes(text(size)) == hashes(text(size - size % BLOCK))


def test_hashes_are_unsigned_64_bit_numbers_and_the_callers_own() -> None:
    made = HASHER.hash(text(64), root=7)
    assert [made.dtype, HASHER.hash(b"", root=7).dtype] == [np.dtype(np.uint64)] * 2
    assert made.shape == (4,)
    before = made.tolist()
    made += np.uint64(1)
    assert HASHER.hash(text(64), root=7).tolist() == before


def test_buffers_of_any_kind_and_alignment_hash_alike() -> None:
    prompt = text(10 * BLOCK)
    shifted = memoryview(b"x" + prompt)[1:]
    assert hashes(prompt) == hashes(bytes(shifted)) == HASHER.hash(shifted, root=HASHER.root("m", None)).tolist()  # type: ignore[arg-type]


def test_a_prompt_of_equal_blocks_repeats_no_hash() -> None:
    assert len(set(hashes(bytes(100 * BLOCK)))) == 100


def test_blocks_in_another_order_have_other_hashes_everywhere() -> None:
    """Sums do not care about order; positions do."""
    blocks = [text(BLOCK, seed) for seed in range(4)]
    straight = hashes(b"".join(blocks))
    for order in itertools.permutations(range(4)):
        if order != (0, 1, 2, 3):
            assert hashes(b"".join(blocks[i] for i in order))[-1] != straight[-1]


# --- every input counts ------------------------------------------------------------------------------------


def test_every_bit_of_every_byte_counts_in_its_block_and_in_all_later_ones() -> None:
    prompt = text(4 * BLOCK)
    plain = hashes(prompt)
    for bit in range(8 * len(prompt)):
        flipped = bytearray(prompt)
        flipped[bit // 8] ^= 1 << bit % 8
        block = bit // 8 // BLOCK
        assert differing(plain, hashes(bytes(flipped))) == [i >= block for i in range(4)]


def test_every_word_of_a_large_block_counts() -> None:
    hasher = BlockHasher(b"secret", 256)
    prompt = text(256)
    seen = {hasher.hash(prompt[:i] + bytes([prompt[i] ^ 1]) + prompt[i + 1 :], root=1).item() for i in range(256)}
    assert len(seen | {hasher.hash(prompt, root=1).item()}) == 257


def test_another_secret_gives_other_hashes() -> None:
    prompt = text(8 * BLOCK)
    assert set(hashes(prompt)).isdisjoint(hashes(prompt, BlockHasher(b"another", BLOCK)))
    assert hashes(prompt) == hashes(prompt, BlockHasher(b"secret", BLOCK))


def test_relations_between_hashes_do_not_carry_over_to_another_secret() -> None:
    """What a client could learn from one process (differences of hashes) says nothing about the next."""
    a, b = text(BLOCK, 1), text(BLOCK, 2)
    gaps = {
        hashes(a, hasher)[0] ^ hashes(b, hasher)[0] for hasher in (BlockHasher(bytes([i]), BLOCK) for i in range(20))
    }
    assert len(gaps) == 20


def test_pairs_of_model_and_salt_share_no_prefix() -> None:
    prompt = text(4 * BLOCK)
    parts = [None, "", "a", "b", "ab", "a\0", "\0", "\1", "ä", "\ud800"]
    seen = [h for model in parts for salt in parts for h in hashes(prompt, model=model, salt=salt)]
    assert len(set(seen)) == 4 * len(parts) ** 2


@settings(max_examples=100)
@given(*[st.one_of(st.none(), st.text(alphabet="ab\0\1", max_size=3))] * 4)
def test_roots_are_equal_only_for_equal_pairs(a: str | None, b: str | None, c: str | None, d: str | None) -> None:
    assert (HASHER.root(a, b) == HASHER.root(c, d)) == ((a, b) == (c, d))


def test_roots_stay_the_same_however_many_there_are() -> None:
    hasher = BlockHasher(b"secret", BLOCK)
    first = hasher.root("model", "salt")
    for number in range(5000):
        hasher.root("model", str(number))
    assert hasher.root("model", "salt") == first == HASHER.root("model", "salt")
    assert len(hasher._roots) <= 4096  # bounded: salts are the client's choice


# --- long prompts, other machines --------------------------------------------------------------------------


def test_a_long_prompt_agrees_with_what_was_hashed_before_it() -> None:
    short, long = text(3 * BLOCK), text(2000 * BLOCK)
    fresh = BlockHasher(b"secret", BLOCK)
    before = hashes(short)
    whole = hashes(long)
    assert (whole[:3], hashes(short), hashes(long, fresh)) == (before, before, whole)
    for blocks in (255, 256, 257, 511, 512, 513, 1999):
        assert hashes(long[: blocks * BLOCK]) == whole[:blocks]
    assert len(set(whole)) == 2000


def plainly(prompt: bytes, secret: bytes, block_bytes: int, root: int) -> list[int]:
    """The scheme of the docstring in plain integers, little endian."""

    def stream(purpose: bytes, count: int) -> list[int]:
        data = hashlib.shake_256(hashlib.blake2b(secret, digest_size=32).digest() + purpose).digest(8 * count)
        return [int.from_bytes(data[8 * i : 8 * i + 8], "little") for i in range(count)]

    def mixed(value: int) -> int:
        value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD % 2**64
        value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
        return value ^ value >> 33

    words, blocks = block_bytes // 4, len(prompt) // block_bytes
    keys, positions = stream(b"words", 2 * words), stream(b"positions", blocks)
    out, total = [], root
    for block in range(blocks):
        data = prompt[block * block_bytes : (block + 1) * block_bytes]
        text_words = [int.from_bytes(data[4 * j : 4 * j + 4], "little") for j in range(words)]
        high, low = (
            sum(w * k for w, k in zip(text_words, keys[half * words : (half + 1) * words], strict=True)) % 2**64 >> 32
            for half in (0, 1)
        )
        total += mixed((high << 32 | low) ^ positions[block])
        out.append(mixed(total % 2**64))
    return out


@pytest.mark.parametrize("block_bytes", [4, 12, 64, 256])
def test_every_machine_computes_what_plain_little_endian_integers_say(block_bytes: int) -> None:
    hasher = BlockHasher(b"k", block_bytes)
    prompt = text(20 * block_bytes + 3)
    root = hasher.root("m", None)
    assert hasher.hash(prompt, root=root).tolist() == plainly(prompt, b"k", block_bytes, root)


def test_another_block_size_divides_the_same_prompt_otherwise() -> None:
    hasher = BlockHasher(b"secret", 2 * BLOCK)
    assert (hasher.block_bytes, len(hashes(text(10 * BLOCK), hasher))) == (32, 5)


@pytest.mark.parametrize("block_bytes", [-4, 0, 1, 2, 3, 5, 255])
def test_a_block_size_that_is_no_positive_multiple_of_four_is_refused(block_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"positive multiple of 4, got {block_bytes}"):
        BlockHasher(b"secret", block_bytes)


# --- distribution ------------------------------------------------------------------------------------------


def bits(values: UInt64Array) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1)


@pytest.mark.parametrize("prompt", [bytes(4000 * BLOCK), b"\xff" * (4000 * BLOCK), b"the " * (1000 * BLOCK)])
def test_every_bit_is_set_half_of_the_time_even_for_monotonous_prompts(prompt: bytes) -> None:
    shares = bits(HASHER.hash(prompt, root=1)).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 0.05  # six standard deviations of 4000 fair coins


def test_one_flipped_bit_flips_half_of_the_bits() -> None:
    prompt = bytearray(text(BLOCK))
    plain = HASHER.hash(bytes(prompt), root=1)
    flips = []
    for bit in range(8 * BLOCK):
        prompt[bit // 8] ^= 1 << bit % 8
        flips.append(bits(HASHER.hash(bytes(prompt), root=1) ^ plain).mean())
        prompt[bit // 8] ^= 1 << bit % 8
    assert 0.45 < np.mean(flips) < 0.55
    assert 0.2 < min(flips) < max(flips) < 0.8


def test_neighbouring_blocks_do_not_collide() -> None:
    """Counters are the kind of text that weak sums confuse."""
    prompts = [number.to_bytes(4, "little") * (BLOCK // 4) for number in range(5000)]
    assert len({HASHER.hash(prompt, root=1).item() for prompt in prompts}) == 5000


@pytest.mark.parametrize("blocks", [1, 11, 12, 13, 40])
def test_few_blocks_hash_as_the_first_of_many(blocks: int) -> None:
    prompt = text(64 * BLOCK)
    assert hashes(prompt[: blocks * BLOCK]) == hashes(prompt)[:blocks]
