"""Certificates by real handshakes in memory: what a client sees, and when."""

import shutil
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from picker.errors import ConfigError
from picker.frontends.certificates import Certificates, self_signed

pytest.importorskip("cryptography")


def write(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    certificate, key = self_signed(names or ("localhost",))
    (folder / "tls.crt").write_bytes(certificate)
    (folder / "tls.key").write_bytes(key)
    return folder


def client(trusts: Path | None = None, shows: Path | None = None) -> ssl.SSLContext:
    """Trusts the certificate in a folder; shows that of another."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if trusts is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(trusts / "tls.crt")
    if shows is not None:
        context.load_cert_chain(shows / "tls.crt", shows / "tls.key")
    return context


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> ssl.SSLObject:
    """The client's side after a handshake, and a byte each way: only then has a server spoken its mind of a client."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    ours = client.wrap_bio(to_client, to_server, server_hostname=name)
    pending: list[Callable[[], object]] = [
        ours.do_handshake,
        theirs.do_handshake,
        lambda: theirs.write(b"x"),
        lambda: ours.read(1),
    ]
    for _ in range(20):
        for step in list(pending[:2]):
            try:
                step()
                pending.remove(step)
            except ssl.SSLWantReadError:
                pass
        if not pending:
            return ours
    raise AssertionError("the handshake stands still")


def serial(peer: ssl.SSLObject) -> bytes:
    return peer.getpeercert(binary_form=True) or b""


def test_a_self_signed_certificate_serves_those_who_do_not_look() -> None:
    peer = shaken(Certificates(None).context, client())
    assert peer.selected_alpn_protocol() == "h2"
    assert peer.version() in ("TLSv1.2", "TLSv1.3")


def test_two_processes_do_not_share_a_self_signed_certificate() -> None:
    one, other = (serial(shaken(Certificates(None).context, client())) for _ in range(2))
    assert one != other


@pytest.mark.parametrize("name", ["localhost", "picker.example", "127.0.0.1", "fd00::1"])
def test_a_certificate_names_whom_it_is_for(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "own", name)
    shaken(Certificates(folder).context, client(folder), name)
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(Certificates(folder).context, client(folder), "elsewhere")


def test_a_new_certificate_is_shown_to_those_who_come_after_it(tmp_path: Path) -> None:
    server = Certificates(write(tmp_path / "own"))
    before = serial(shaken(server.context, client()))
    assert not server.refresh()
    write(tmp_path / "own")
    assert server.refresh()
    assert serial(shaken(server.context, client())) != before
    assert not server.refresh()


def test_a_certificate_that_is_swapped_by_a_link_is_seen(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    link = tmp_path / "current"
    link.symlink_to("one")
    server = Certificates(link)
    link.unlink()
    link.symlink_to("two")
    assert server.refresh()
    shaken(server.context, client(tmp_path / "two"))


def test_a_half_written_pair_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    server = Certificates(folder)
    before = serial(shaken(server.context, client()))
    other = write(tmp_path / "other")
    shutil.copy(other / "tls.crt", folder)
    assert not server.refresh()
    assert serial(shaken(server.context, client())) == before
    shutil.copy(other / "tls.key", folder)
    assert server.refresh()
    assert serial(shaken(server.context, client())) != before


def test_only_clients_of_the_given_authority_are_served(tmp_path: Path) -> None:
    folder, friend, stranger = (write(tmp_path / name) for name in ("own", "friend", "stranger"))
    server = Certificates(folder, client_ca=friend / "tls.crt").context
    shaken(server, client(shows=friend))
    for unwelcome in (client(), client(shows=stranger)):
        with pytest.raises(ssl.SSLError):
            shaken(server, unwelcome)


def test_old_versions_of_tls_are_not_spoken() -> None:
    old = client()
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        shaken(Certificates(None).context, old)


def test_older_versions_than_asked_for_are_not_spoken() -> None:
    old = client()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    shaken(Certificates(None).context, old)
    with pytest.raises(ssl.SSLError):
        shaken(Certificates(None, oldest=ssl.TLSVersion.TLSv1_3).context, old)


def test_a_folder_without_certificate_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        Certificates(tmp_path)


def test_a_key_that_does_not_fit_is_a_config_error(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "own"), write(tmp_path / "other")
    shutil.copy(other / "tls.key", folder)
    with pytest.raises(ConfigError, match=r"tls\.key"):
        Certificates(folder)


def test_an_encrypted_key_is_a_config_error_and_asks_nobody(tmp_path: Path) -> None:
    folder = write(tmp_path / "own")
    command = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", "tls.key", "-out", "locked.key"]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to lock a key with")
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "locked.key").replace(folder / "tls.key")
    with pytest.raises(ConfigError, match="encrypted"):
        Certificates(folder)


def test_an_authority_that_is_none_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(ConfigError, match=r"ca\.pem"):
        Certificates(None, client_ca=tmp_path / "ca.pem")


def test_without_the_library_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(ConfigError, match="--secure-serving false"):
        Certificates(None)
