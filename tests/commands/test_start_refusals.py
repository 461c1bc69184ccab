"""What does not start says so in words, whether the file, a flag or the environment has said it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from picker.commands.config import command as config
from picker.commands.epp import command as epp
from picker.commands.proxy import command as proxy
from picker.config import from_values
from picker.errors import ConfigError
from picker.frontends.certificates import Pair, check_pair
from picker.replicas.service import read_secret
from picker.sources.kubernetes.credentials import find_access
from picker.tokenizers.folder import read_folder

ENDPOINT = ("--endpoint", "http://127.0.0.1:1")


class StartedError(Exception):
    """It would serve now."""


@pytest.fixture(autouse=True)
def _nothing_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(main: Coroutine[Any, Any, Any]) -> None:
        main.close()
        raise StartedError

    for module in ("proxy", "epp"):
        monkeypatch.setattr(f"picker.commands.{module}.run", start)


def start(command: Any, *arguments: str, env: dict[str, str] | None = None) -> BaseException:
    done = CliRunner().invoke(command, arguments, env=env)
    assert done.exception is not None
    return done.exception


# --- keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_key_of_the_environment_does_not_open_the_gateway(text: str) -> None:
    refused = start(proxy, *ENDPOINT, env={"PICKER_API_KEY": text})
    assert isinstance(refused, ConfigError)
    assert str(refused) == "PICKER_API_KEY: it is set and empty, which keeps nobody out; unset it, or give a key"


def test_a_key_of_the_environment_does_and_so_does_none_and_so_does_one_of_the_command_line() -> None:
    assert isinstance(start(proxy, *ENDPOINT, env={"PICKER_API_KEY": "sk-1"}), StartedError)
    assert isinstance(start(proxy, *ENDPOINT), StartedError)
    assert isinstance(start(proxy, *ENDPOINT, "--api-key", "sk-2", env={"PICKER_API_KEY": ""}), StartedError)


@pytest.mark.parametrize("command", [proxy, epp])
def test_an_empty_admin_key_does_not_open_the_admin_api(command: Any) -> None:
    refused = start(command, *ENDPOINT, env={"PICKER_ADMIN_KEY": ""})
    assert isinstance(refused, ConfigError)
    assert str(refused).startswith("PICKER_ADMIN_KEY: it is set and empty")


# --- values that no start can use --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": -1}, "seed: must not be negative, got -1"),
        ({"index": {"block_bytes": 100_000_000_000}}, "index.block_bytes: must be 1048576 (1 MiB) at most, got 1000"),
        ({"endpoints": [{"address": "a:1", "rank": -1}]}, "endpoints[0].rank: must be a whole number, 0 or more"),
        ({"exact": {"by": "bytes", "events": "foo"}}, "exact.events: 'foo' is no tcp://host:port; write tcp://{host}:"),
        ({"exact": {"by": "bytes", "replay": "tcp://{host}"}}, "exact.replay: 'tcp://{host}' is no tcp://host:port"),
        ({"exact": {"by": "bytes", "events": "tcp://{hots}:5557"}}, "exact.events: 'tcp://{hots}:5557' is no tcp://"),
        ({"exact": {"by": "bytes", "events": "tcp://{host}:0"}}, "exact.events: 'tcp://{host}:0' is no tcp://"),
        ({"exact": {"events": "tcp://{host}:5557"}}, "exact.events: nothing is followed there: give exact.tokenizer"),
        ({"proxy": {"host": ""}}, "proxy.host: it is empty; give an address of this machine, or 0.0.0.0 for all"),
        ({"epp": {"host": " "}}, "epp.host: it is empty"),
        ({"admin": {"host": ""}}, "admin.host: it is empty"),
    ],
)
def test_what_cannot_be_meant_is_told_in_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_values(values)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("events", ["tcp://{host}:5557", "tcp://*:5557", "tcp://10.0.0.1:1", "tcp://[::1]:65535"])
def test_where_engines_publish_may_be_said_in_all_these_ways(events: str) -> None:
    assert from_values({"exact": {"by": "bytes", "events": events}}).exact.events == events
    assert from_values({"exact": {"by": "off", "events": events}}).exact.mode == "off"  # it may stay written down


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "-1"), "seed: must not be negative"),
        (("--kv-events", "foo"), "exact.events: 'foo' is no tcp://host:port"),
        (("--host", ""), "host: it is empty"),
    ],
)
@pytest.mark.parametrize("command", [proxy, epp])
def test_flags_are_checked_as_the_file_is(command: Any, flags: tuple[str, ...], words: str) -> None:
    refused = start(command, *ENDPOINT, *flags)
    assert isinstance(refused, ConfigError)
    assert words in str(refused)


@pytest.mark.parametrize(
    ("command", "flags", "words"),
    [
        (proxy, ("--port", "9090"), "proxy.port and admin.port are both 9090; each .* see --port, --admin-port"),
        (proxy, ("--port", "9005", "--peer", "a"), "proxy.port and replicas.port are both 9005"),
        (proxy, ("--host", "0.0.0.0", "--admin-host", "localhost", "--port", "9090"), "are both 9090"),
        (epp, ("--grpc-health-port", "9002"), "epp.grpc_port and epp.grpc_health_port are both 9002; each .* --grpc-"),
        (epp, ("--grpc-port", "8", "--api-port", "8"), "epp.grpc_port and api.port are both 8"),
    ],
)
def test_two_doors_on_one_port_are_not_blamed_on_another_program(
    command: Any, flags: tuple[str, ...], words: str
) -> None:
    refused = start(command, *ENDPOINT, *flags)
    assert isinstance(refused, ConfigError)
    assert re.search(words, str(refused))


@pytest.mark.parametrize(
    "flags", [("--port", "0", "--admin-port", "0"), ("--host", "10.0.0.1", "--port", "9090"), ("--port", "9005")]
)
def test_doors_that_are_not_in_each_others_way_open(flags: tuple[str, ...]) -> None:
    assert isinstance(start(proxy, *ENDPOINT, *flags), StartedError)


# --- config validate ---------------------------------------------------------------------------------------


def validate(tmp_path: Path, text: str, *flags: str, env: dict[str, str] | None = None) -> Any:
    (tmp_path / "picker.yaml").write_text(text)
    return CliRunner().invoke(config, ["validate", str(tmp_path / "picker.yaml"), *flags], env=env)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("replicas: {secret: short, peers: [a]}", "replicas: a secret of less than 16 characters"),
        ("replicas: {secret: 0123456789abcdef, peers: ['a:b']}", "replicas.peers: 'a:b' is not HOST:PORT"),
        ("replicas: {secret_file: FOLDER/short, peers: [a]}", "replicas: a secret of less than 16 characters"),
        ("endpoints: ['a:1', 'http://a:1']", "endpoint 'a:1' is listed 2 times"),
        ("endpoints_file: FOLDER/short", "short"),
        ("{endpoints: [a:1], keys: {file: FOLDER/short}}", "short: line 1: write name:key"),
        ("{endpoints: [a:1], seed: -1}", "seed: must not be negative"),
    ],
)
def test_validate_refuses_what_the_start_refuses(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "short").write_text("x\n")
    done = validate(tmp_path, text.replace("FOLDER", str(tmp_path)))
    assert isinstance(done.exception, ConfigError)
    assert words in str(done.exception)


def test_what_the_start_needs_beside_the_file_is_told_as_a_note(tmp_path: Path) -> None:
    done = validate(tmp_path, "")
    assert (done.exit_code, done.output.splitlines()[0]) == (
        0,
        f"{tmp_path}/picker.yaml: valid; 0 endpoints, policy picker",
    )
    assert "no endpoints: they have to come by flags" in done.output
    beside = "{endpoints: ['a:1'], replicas: {peers: [b]}, keys: {file: /nowhere/keys}}"
    unset: dict[str, Any] = {"PICKER_REPLICAS_SECRET": None}
    told = json.loads(validate(tmp_path, beside, "--json", env=unset).output)
    assert told["valid"]
    assert told["notes"] == [
        "replicas: their secret has to come by PICKER_REPLICAS_SECRET, which is not set here",
        "keys.file: /nowhere/keys is not on this machine",
    ]


def test_validate_looks_at_a_secret_of_the_environment_that_is_here(tmp_path: Path) -> None:
    done = validate(tmp_path, "{endpoints: ['a:1'], replicas: {peers: [b]}}", env={"PICKER_REPLICAS_SECRET": "short"})
    assert isinstance(done.exception, ConfigError)
    assert validate(tmp_path, "endpoints: ['a:1']").output.count("\n") == 1  # and nothing to note


# --- files that are not there ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (config, ("import", "nope.yaml"), "cannot read nope.yaml: No such file or directory"),
        (config, ("validate", "nope.yaml"), "cannot read nope.yaml: No such file or directory"),
        (epp, ("--config", "nope.yaml"), "cannot read nope.yaml: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_named_without_the_systems_number(
    command: Any, arguments: tuple[str, ...], words: str
) -> None:
    assert str(start(command, *arguments)) == words


def test_whatever_else_reads_files_speaks_so_too(tmp_path: Path) -> None:
    nope = tmp_path / "nope"
    readers: dict[str, Callable[[], object]] = {
        f"replicas.secret_file: cannot read {nope}: No such": lambda: read_secret(
            from_values({"replicas": {"peers": ["a"], "secret_file": str(nope)}}).replicas
        ),
        f"{nope}: the kubeconfig cannot be read: No such": lambda: find_access(str(nope)),
        f"cannot read {nope / 'tokenizer.json'}: No such": lambda: read_folder(nope),
        f"cannot use {nope} and {tmp_path}/x/key: there is no {nope} and no {tmp_path}/x/key": lambda: check_pair(
            Pair(nope, tmp_path / "x" / "key")
        ),
        "cannot use nope and x: there is no nope and no x": lambda: check_pair(Pair(Path("nope"), Path("x"))),
    }
    for words, read in readers.items():
        with pytest.raises(ConfigError, match=re.escape(words)):
            read()


def test_the_flag_that_names_a_pool_is_in_the_help() -> None:
    page = CliRunner().invoke(epp, ["--help"]).output
    assert "--pool-name" in page
    assert "--pool-namespace" in page
    assert "--zap-encoder" not in page
