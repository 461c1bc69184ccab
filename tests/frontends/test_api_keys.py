"""Who is let in by their header blocks, however those are compressed."""

import hpack
import pytest

from picker.frontends.api_keys import KEYLESS, KeyedHeaderBlocks
from picker.wire.header_blocks import HeaderBlockError

RIGHT, WRONG = ("authorization", "Bearer secret"), ("authorization", "Bearer wrong")


def block(encoder: hpack.Encoder, *fields: tuple[str, str]) -> bytes:
    return bytes(encoder.encode([(":method", "POST"), (":path", "/t/open"), *fields]))


def keyed() -> KeyedHeaderBlocks:
    return KeyedHeaderBlocks("secret", ("/t/health",))


def test_equal_blocks_mean_what_the_table_says_they_do() -> None:
    encoder, blocks = hpack.Encoder(), keyed()
    right, wrong = ([(":path", "/"), each] for each in (RIGHT, WRONG))  # the path is one of the static table
    assert blocks.path(encoder.encode(right)) == "/"
    indexed = encoder.encode(right)
    assert blocks.path(indexed) == "/"
    assert blocks.path(encoder.encode(wrong)) == KEYLESS
    again = encoder.encode(wrong)
    assert again == indexed  # each by its place in the table, which the other has now
    assert blocks.path(again) == KEYLESS


def test_blocks_that_stand_alone_are_remembered_by_all_their_bytes() -> None:
    encoder, blocks = hpack.Encoder(), keyed()
    encoder.header_table_size = 0
    blocks.table_is_gone()
    for _ in range(3):
        assert blocks.path(block(encoder, RIGHT)) == "/t/open"
        assert blocks.path(block(encoder, WRONG)) == KEYLESS
        assert blocks.path(block(encoder)) == KEYLESS


def test_of_many_different_blocks_few_are_remembered() -> None:
    encoder, blocks = hpack.Encoder(), keyed()
    encoder.header_table_size = 0
    blocks.table_is_gone()
    for number in range(1000):
        assert blocks.path(block(encoder, RIGHT, ("grpc-timeout", f"{number}m"))) == "/t/open"
    assert len(blocks._known) <= 64


def test_a_path_that_needs_no_key_is_its_own() -> None:
    encoder = hpack.Encoder()
    assert keyed().path(bytes(encoder.encode([(":path", "/t/health")]))) == "/t/health"
    assert keyed().path(bytes(hpack.Encoder().encode([(":method", "POST")]))) is None


def test_bytes_that_are_no_block_are_an_error() -> None:
    with pytest.raises(HeaderBlockError):
        keyed().path(b"\xff\xff\xff\xff\xff")
