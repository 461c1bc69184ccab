import hpack
import pytest

from picker.wire.header_blocks import HeaderBlockError, HeaderBlocks


def block(path: str, *, extra: str = "") -> bytes:
    """As a client without a header table sends it."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    fields = [(":method", "POST", True), (":path", path, True), ("x-extra", extra, True)]
    # The encoder says first that it keeps no table; what is sent later does not.
    return bytes(encoder.encode(fields)).removeprefix(b"\x20")


def settled() -> HeaderBlocks:
    made = HeaderBlocks()
    made.table_is_gone()
    return made


def test_a_block_that_comes_again_says_the_same() -> None:
    blocks = settled()
    for _ in range(3):
        assert blocks.path(block("/a.Service/One")) == "/a.Service/One"
        assert blocks.path(block("/a.Service/Two")) == "/a.Service/Two"


def test_a_block_without_a_path_says_so_each_time() -> None:
    blocks = settled()
    assert [blocks.path(b"\x83"), blocks.path(b"\x83")] == [None, None]


def test_a_block_that_cannot_be_read_is_refused_each_time() -> None:
    blocks = settled()
    for _ in range(2):
        with pytest.raises(HeaderBlockError):
            blocks.path(b"\x04\x7f")


def test_memory_is_bounded_whatever_a_peer_sends() -> None:
    blocks = settled()
    for number in range(1000):
        assert blocks.path(block("/a.Service/One", extra=str(number))) == "/a.Service/One"
    assert blocks.path(block("/a.Service/One", extra="x" * 5000)) == "/a.Service/One"
    assert len(blocks._blocks) <= 100
    assert max(map(len, blocks._blocks)) <= 1024


def test_a_block_means_what_it_says_while_the_peer_may_keep_a_table() -> None:
    blocks, encoder = HeaderBlocks(), hpack.Encoder()
    first = encoder.encode([(":method", "POST"), (":path", "/a.Service/One")])
    again = encoder.encode([(":method", "POST"), (":path", "/a.Service/One")])
    assert first != again
    assert blocks.path(first) == blocks.path(again) == "/a.Service/One"
