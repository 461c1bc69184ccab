"""Which other gateways are here, and what starts them."""

import sys
from pathlib import Path

import pytest

from picker.bench import peers
from picker.bench.peers import Peer


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(peers.ENVIRONMENT, str(tmp_path / "nowhere"))
    return tmp_path


def install(folder: Path, name: str, content: bytes) -> str:
    script = folder / name
    script.write_bytes(content)
    script.chmod(0o755)
    return str(script)


def test_without_any_peer_there_is_none(on_path: Path) -> None:
    assert peers.installed() == {}


def test_an_executable_on_path_is_a_peer(on_path: Path) -> None:
    script = install(on_path, "smg", b"#!/usr/bin/python\nfrom smg.cli import main\n")
    binary = install(on_path, "vllm-router", b"\x7fELF")
    assert peers.installed() == {"vllm-router": [binary], "smg": [script, "launch"]}


def test_a_package_without_its_script_is_started_as_a_module(on_path: Path) -> None:
    assert Peer("not-on-path", "json").command() == [sys.executable, "-m", "json.launch_router"]


def test_the_script_of_another_package_is_not_the_peer(on_path: Path) -> None:
    install(on_path, "smg", b"#!/usr/bin/python\nfrom sglang_router.cli import main\n")
    assert peers.installed() == {}


def test_an_environment_of_their_own_comes_first_and_needs_no_scripts(
    on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = on_path / "peers"
    for name in ("sglang_router", "smg"):
        package = folder / "lib" / "python3.11" / "site-packages" / name
        package.mkdir(parents=True)
        package.joinpath("launch_router.py").touch()
    folder.joinpath("bin").mkdir()
    python = install(folder / "bin", "python", b"")
    install(on_path, "smg", b"#!/usr/bin/python\nfrom smg.cli import main\n")
    monkeypatch.setenv(peers.ENVIRONMENT, str(folder))
    assert peers.installed() == {
        "sglang-router": [python, "-m", "sglang_router.launch_router"],
        "smg": [python, "-m", "smg.launch_router"],
    }


def test_an_environment_without_python_is_none(on_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = on_path / "peers" / "lib" / "python3.11" / "site-packages" / "smg"
    package.mkdir(parents=True)
    package.joinpath("launch_router.py").touch()
    monkeypatch.setenv(peers.ENVIRONMENT, str(on_path / "peers"))
    assert peers.installed() == {}
