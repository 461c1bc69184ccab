from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from picker.errors import ConfigError
from picker.frontends.keys import Allowance, Key, KeyFile, KeyMetrics, KeyRefusal, Keyring, load_keys, parse_keys

SECRET = "sk-4711-never-shown"


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"h"), (b"authorization", f"Bearer {key}".encode())]


def ring(text: str = f"alice:{SECRET}", **options: Allowance) -> Keyring:
    return Keyring(parse_keys(text, origin="keys"), **options)  # type: ignore[arg-type]


def refused(answer: Key | KeyRefusal) -> int:
    assert isinstance(answer, KeyRefusal)
    return answer.status


def name_of(answer: Key | KeyRefusal) -> str:
    assert isinstance(answer, Key)
    return answer.name


# --- who is let in -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        bearer(SECRET),
        [(b"authorization", b"bearer  " + SECRET.encode() + b" ")],
        [(b"x-api-key", SECRET.encode())],
        [(b"authorization", b"Bearer other"), (b"x-api-key", SECRET.encode())],
    ],
)
def test_a_key_is_taken_as_openais_and_as_anthropics_clients_send_it(headers: list[tuple[bytes, bytes]]) -> None:
    assert name_of(ring().admit(headers)) == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", SECRET.encode())],
        [(b"authorization", b"Basic " + SECRET.encode())],
        bearer(SECRET[:-1]),
        bearer(SECRET + "x"),
        bearer(SECRET.upper()),
        bearer(hashlib.sha256(SECRET.encode()).hexdigest()),
        bearer("sha256=" + hashlib.sha256(SECRET.encode()).hexdigest()),
        bearer(SECRET) + bearer(SECRET),
        [(b"x-api-key", b"wrong"), (b"x-api-key", SECRET.encode())],
        [(b"proxy-authorization", b"Bearer " + SECRET.encode())],
    ],
)
def test_nothing_else_is(headers: list[tuple[bytes, bytes]]) -> None:
    assert refused(ring().admit(headers)) == 401


def test_a_hashed_key_lets_in_whoever_has_what_was_hashed() -> None:
    hashed = ring(f"alice:sha256={hashlib.sha256(SECRET.encode()).hexdigest()}")
    assert name_of(hashed.admit(bearer(SECRET))) == "alice"


def test_a_key_that_is_switched_off_is_known_and_forbidden() -> None:
    assert refused(ring(f"alice:{SECRET} disabled").admit(bearer(SECRET))) == 403


def test_a_key_has_as_many_requests_at_once_as_it_may() -> None:
    keys = ring(f"alice:{SECRET} concurrent=2\nbob:other")
    one = keys.admit(bearer(SECRET))
    keys.admit(bearer(SECRET))
    assert refused(keys.admit(bearer(SECRET))) == 429
    assert name_of(keys.admit(bearer("other"))) == "bob"
    assert isinstance(one, Key)
    keys.leave(one)
    assert name_of(keys.admit(bearer(SECRET))) == "alice"


def test_what_a_key_does_not_say_holds_for_all_keys() -> None:
    keys = ring(f"alice:{SECRET} body=4KiB\nbob:other concurrent=7", allowance=Allowance(3, 1000))
    alice, bob = keys.keys
    assert (keys.most_of(alice), keys.body_limit(alice)) == (3, 4096)
    assert (keys.most_of(bob), keys.body_limit(bob)) == (7, 1000)


def test_without_keys_a_ring_is_open_and_a_closed_one_is_not() -> None:
    assert Keyring().open
    assert not Keyring(closed=True).open
    assert refused(Keyring(closed=True).admit(bearer(SECRET))) == 401


# --- reading -----------------------------------------------------------------------------------------------


def test_comments_and_empty_lines_are_no_keys() -> None:
    assert [key.name for key in parse_keys("# keys\n\nalice:a\n  # more\n bob:b \n", origin="f")] == ["alice", "bob"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SECRET, "line 1: write name:key"),
        ("alice:", "line 1: write name:key"),
        (f"a b:{SECRET}", "line 1: write name:key"),
        (f"a/b:{SECRET}", "line 1: a name is of letters"),
        (f"x:y\nalice:sha256={SECRET}", "line 2: after sha256= there must be 64"),
        (f"alice:{SECRET} {SECRET}", "line 1: what follows the key is no option"),
        (f"alice:{SECRET} concurrent=0", "concurrent"),
        (f"alice:{SECRET} body=much", "body"),
        (f"alice:{SECRET}\nalice:other", "the name 'alice' comes twice"),
        (f"alice:{SECRET}\nbob:{SECRET}", "two names have the same key"),
        (f"alice:{SECRET}ä", "characters that no header can have"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_without_the_key(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as told:
        parse_keys(text, origin="keys")
    assert SECRET not in str(told.value)


def test_a_key_is_never_shown() -> None:
    (key,) = ring().keys
    assert SECRET not in repr(key)
    assert key.digest.hex() not in repr(key)


def test_who_can_read_everybodys_keys_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(f"alice:{SECRET}")
    path.chmod(0o644)
    load_keys(path)
    assert "chmod 600" in caplog.text
    caplog.clear()
    path.chmod(0o600)
    load_keys(path)
    assert caplog.text == ""


# --- watching ----------------------------------------------------------------------------------------------


def written(path: Path, text: str) -> None:
    """A new file in place of the old one, with another identity whatever the clock's grain."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o600)
    os.replace(fresh, path)


def test_a_file_that_changes_changes_who_is_let_in(tmp_path: Path) -> None:
    path, keys = tmp_path / "keys", Keyring()
    written(path, f"alice:{SECRET}")
    file = KeyFile(keys, path)
    running = keys.admit(bearer(SECRET))
    assert not file.refresh()
    written(path, "bob:other")
    assert file.refresh()
    assert refused(keys.admit(bearer(SECRET))) == 401
    assert name_of(keys.admit(bearer("other"))) == "bob"
    assert isinstance(running, Key)
    keys.leave(running)
    assert keys.running == {"bob": 1}


@pytest.mark.parametrize("broken", [None, f"alice {SECRET}", "alice:x\nalice:y"])
def test_a_file_that_breaks_leaves_the_keys_as_they_are(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path, keys = tmp_path / "keys", Keyring()
    written(path, f"alice:{SECRET}")
    file = KeyFile(keys, path)
    if broken is None:
        path.unlink()
    else:
        written(path, broken)
    with caplog.at_level(logging.WARNING):
        assert not file.refresh()
        assert not file.refresh()
    assert len(caplog.messages) == 1
    assert SECRET not in caplog.text
    assert name_of(keys.admit(bearer(SECRET))) == "alice"


def test_a_file_that_loses_its_last_key_opens_nothing(tmp_path: Path) -> None:
    path, keys = tmp_path / "keys", Keyring()
    written(path, f"alice:{SECRET}")
    file = KeyFile(keys, path)
    written(path, "# nobody\n")
    assert file.refresh()
    assert not keys.open
    assert refused(keys.admit(bearer(SECRET))) == 401
    assert refused(keys.admit([])) == 401


def test_keys_from_elsewhere_stay_beside_the_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    fixed = parse_keys("default:fixed", origin="flag")
    written(path, f"alice:{SECRET}")
    keys = Keyring(fixed)
    KeyFile(keys, path, fixed)
    assert {key.name for key in keys.keys} == {"default", "alice"}


def test_metrics_tell_names_and_no_keys() -> None:
    keys = ring(f"alice:{SECRET} concurrent=1")
    keys.admit(bearer(SECRET))
    keys.admit(bearer(SECRET))
    keys.admit(bearer("guess"))
    registry = CollectorRegistry()
    registry.register(KeyMetrics(keys))
    text = generate_latest(registry).decode()
    assert 'picker_key_running_requests{key="alice"} 1.0' in text
    assert 'picker_key_requests_total{key="alice"} 1.0' in text
    assert 'picker_key_refusals_total{key="alice",reason="busy"} 1.0' in text
    assert 'picker_key_refusals_total{key="",reason="wrong"} 1.0' in text
    assert SECRET not in text
    assert "guess" not in text
