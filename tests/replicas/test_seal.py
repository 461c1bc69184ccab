"""Only who knows the secret can speak, and nothing that was said can be said again."""

import pytest

from picker.replicas.seal import Seal, derive

KEY = derive(b"secret", "to caller", b"1")


def test_what_is_sealed_opens_in_order() -> None:
    out, into = Seal(KEY), Seal(KEY)
    messages = [out.close(text) for text in (b"one", b"two")]
    assert [into.open(message) for message in messages] == [b"one", b"two"]
    assert b"one" not in messages[0]


@pytest.mark.parametrize("other", [derive(b"another", "to caller", b"1"), derive(b"secret", "to called", b"1")])
def test_another_secret_or_direction_opens_nothing(other: bytes) -> None:
    with pytest.raises(ValueError, match="not sealed with our secret"):
        Seal(other).open(Seal(KEY).close(b"text"))


def test_a_message_counts_once() -> None:
    out, into = Seal(KEY), Seal(KEY)
    message = out.close(b"text")
    into.open(message)
    with pytest.raises(ValueError, match="out of turn"):
        into.open(message)


def test_numbers_go_only_forward() -> None:
    out, into = Seal(KEY), Seal(KEY)
    lost, message = out.close(b"lost"), out.close(b"text")
    into.skip_to(1)
    assert into.open(message) == b"text"
    with pytest.raises(ValueError, match="comes again"):
        into.skip_to(0)
    assert lost


@pytest.mark.parametrize("data", [b"", b"short", bytes(40)])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"too short|not sealed"):
        Seal(KEY).open(data)
