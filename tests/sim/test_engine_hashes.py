"""The constants are those of a vLLM 0.32 engine: its log line for the seed, and frames of its event socket."""

import pytest

from picker.sim.engine_hashes import BlockHasher, HashAlgorithm, as_number, cbor, extra_keys, told_keys

FIVES = "c33a091773b60c20a6678b6ac0c66b9c521e0b64fcbee249b658ee8b441f5869"


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        (HashAlgorithm.SHA256, "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198"),
        (HashAlgorithm.SHA256_CBOR, "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"),
    ],
)
def test_the_seed_of_every_chain_is_vllms(algorithm: HashAlgorithm, expected: str) -> None:
    assert BlockHasher(algorithm).none_hash.hex() == expected


def test_a_block_has_the_hash_that_vllm_gave_it() -> None:
    digest = BlockHasher().block(None, [5] * 32)
    assert digest.hex() == FIVES
    assert as_number(digest) == 13139514194764191849


def test_a_salted_block_has_the_hash_that_vllm_gave_it() -> None:
    keys = extra_keys(0, salt="saltA")
    assert as_number(BlockHasher().block(None, [7] * 32, keys)) == 13078815043443355033


def test_a_block_depends_on_its_parent_and_on_the_seed() -> None:
    hasher = BlockHasher()
    first = hasher.block(None, [5] * 32)
    assert hasher.block(first, [5] * 32) != first
    assert BlockHasher(seed="0").block(None, [5] * 32) != first


def test_keys_come_in_vllms_order_and_the_salt_on_the_first_block_only() -> None:
    first, second = (extra_keys(i, adapter="ad1", path="/a/ad1", salt="s") for i in (0, 1))
    assert first == (("lora", "ad1", "/a/ad1"), ("cache_salt", "s"))
    assert second == (("lora", "ad1", "/a/ad1"),)
    assert (told_keys(first), told_keys(second), told_keys(())) == (("ad1", "s"), ("ad1",), None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [  # RFC 8949, appendix A
        (None, "f6"),
        (0, "00"),
        (23, "17"),
        (24, "1818"),
        (255, "18ff"),
        (256, "190100"),
        (1000000, "1a000f4240"),
        (1000000000000, "1b000000e8d4a51000"),
        (-1, "20"),
        (-100, "3863"),
        (b"\1\2\3\4", "4401020304"),
        ("IETF", "6449455446"),
        ("\u00fc", "62c3bc"),
        ((1, (2, 3), ()), "8301820203" + "80"),
    ],
)
def test_cbor_is_canonical(value: object, expected: str) -> None:
    assert cbor(value).hex() == expected


def test_cbor_knows_nothing_else() -> None:
    with pytest.raises(TypeError, match="float is not part of a block hash"):
        cbor(1.5)
