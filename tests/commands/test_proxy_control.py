from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontends.fake_upstream import upstream
from picker.app import ENDPOINTS_FILE, App
from picker.commands.proxy_control import FIXED, ProxyControl
from picker.commands.proxy_doors import Doors, fixed_keys, passes_on
from picker.config import Config, Part, from_values, load_config
from picker.core import flow
from picker.errors import ConfigError
from picker.frontends.admin_control import MisunderstoodError
from picker.frontends.certificates import self_signed
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of
from picker.sources.file import Terms
from picker.sources.static import parse_endpoint
from picker.types import EndpointAdded

QUIET: dict[str, Any] = {"scrape": {"interval_s": 1000.0}}


def control_of(values: dict[str, Any], load: Callable[[], Config] | None = None) -> ProxyControl:
    config = from_values(QUIET | values)
    app, doors = App(config), Doors(config)
    return ProxyControl(app, Proxy(app.runtime, keys=doors.keys, trust=doors.trust), doors, load)


class Running:
    """A control whose roster tells the pool, without sockets."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.next = from_values(QUIET | values)
        self.control = control_of(values, lambda: self.next)
        self.control.app.roster._emit = self.control.app.runtime.emit
        self.control.app.roster._settle(list(self.control.app.roster.all()))

    def reload(self, values: dict[str, Any]) -> dict[str, Any]:
        self.next = from_values(QUIET | values)
        return self.control.reload()

    @property
    def pool(self) -> set[str]:
        return {endpoint.name for _, endpoint in self.control.app.runtime.scheduler.pool}


# --- doors -------------------------------------------------------------------------------------------------


def test_an_open_admin_api_refuses_to_start() -> None:
    open_to_all = {"endpoints": ["a:1"], "admin": {"host": "0.0.0.0", "port": 0}}
    with pytest.raises(ConfigError, match="everybody could operate this gateway"):
        Doors(from_values(open_to_all))
    Doors(from_values(open_to_all | {"admin": {"host": "0.0.0.0", "port": 0, "read_only": True}}))
    Doors(from_values(open_to_all | {"admin": {"host": "0.0.0.0", "port": 0, "token": "t"}}))
    Doors(from_values(open_to_all | {"admin": {"host": "0.0.0.0", "port": None}}))


def test_keys_come_from_the_command_line_and_the_environment() -> None:
    names = [key.name for key in fixed_keys("one", "alice:two,bob:three concurrent=1\ncarol:four")]
    assert names == ["default", "alice", "bob", "carol"]
    with pytest.raises(ConfigError, match="PICKER_API_KEYS"):
        fixed_keys(None, "nonsense")


@pytest.mark.parametrize("text", ["", " ", "# none", ",\n"])
def test_a_variable_without_a_key_does_not_open_the_gateway(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PICKER_API_KEYS", text)
    with pytest.raises(ConfigError, match=r"PICKER_API_KEYS: it is set and .*keeps nobody out; unset it, or give"):
        Doors(from_values({"endpoints": ["a:1"]}))


def test_clients_keys_are_passed_on_only_where_they_may_be_the_endpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes_on(from_values({}))
    assert not passes_on(from_values({"keys": {"file": "f"}}))
    assert passes_on(from_values({"keys": {"file": "f", "pass_on": True}}))
    monkeypatch.setenv("PICKER_API_KEYS", "a:b")
    assert not passes_on(from_values({}))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"connections": {"tls_cert": "c"}}, "tls_cert and connections.tls_key go together"),
        ({"connections": {"tls_client_ca": "c"}}, "set tls_cert and tls_key"),
        ({"upstream": {"key": "k"}}, "set upstream.cert"),
        ({"upstream": {"insecure": True, "ca": "c"}}, "nothing is verified"),
        ({"upstream": {"api_key": "a", "api_key_file": "f"}}, "given twice"),
        ({"admin": {"token": ""}}, "keeps nobody out"),
        ({"keys": {"max_concurrent": 0}}, "greater than 0"),
        ({"connections": {"max_connections": 0}}, "greater than 0"),
        ({"log_level": "loud"}, "not one of debug"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_values(values)


# --- endpoints ---------------------------------------------------------------------------------------------


def test_endpoints_are_added_drained_weighed_and_removed() -> None:
    running = Running({"endpoints": ["a:1"]})
    control = running.control
    shown = control.add({"address": "b:2", "weight": 2.0, "api_key": "sk-b", "models": ["m"]})
    assert (shown["name"], shown["owners"], shown["weight"]) == ("b:2", ["operator"], 2.0)
    assert "sk-b" not in str(control.endpoints()) + str(control.config())
    assert control.doors.trust.keys == {"b:2": "sk-b"}
    assert running.pool == {"a:1", "b:2"}
    assert control.drain("b:2", draining=True)["draining"]
    assert not control.drain("b:2", draining=False)["draining"]
    assert control.weigh("a:1", 0.5)["weight"] == 0.5
    assert "listed by configuration" in control.remove("a:1")["note"]
    assert control.remove("b:2")["note"] is None
    assert running.pool == set()
    assert control.doors.trust.keys == {}


@pytest.mark.parametrize(
    "values",
    [{}, {"address": "no port"}, {"address": "b:2", "extra": 1}, {"address": "b:2", "weight": 0}, {"address": "a:1"}],
)
def test_what_cannot_be_added_is_refused_and_leaves_nothing(values: dict[str, Any]) -> None:
    running = Running({"endpoints": ["a:1"]})
    with pytest.raises(ConfigError):
        running.control.add(values)
    assert running.pool == {"a:1"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "endpoint: .*missing required field `address`"),
        ({"adress": "b:2"}, "adress: unknown key; did you mean 'address'"),
        ({"address": "b"}, "the port is missing"),
        ({"address": "b:2", "weight": 500}, r"a weight is a number from 0\.01 to 100"),
        ({"address": "b:2", "weight": "2"}, "weight: must be a number, and is text"),
        ({"address": "b:2", "rank": -1}, "rank: must be a whole number, 0 or more"),
        ({"address": "b:2", "role": "both ways"}, "is not one of"),
        ({"address": "b:2", "api_key": "two words"}, "characters that no header can have"),
        ({"address": "b:2", "api_key_file": "f"}, "the key itself is given"),
    ],
)
def test_what_is_written_wrongly_is_told_from_what_is_in_the_way(values: dict[str, Any], words: str) -> None:
    control = Running({"endpoints": ["a:1"]}).control
    with pytest.raises(MisunderstoodError, match=words):
        control.add(values)
    with pytest.raises(MisunderstoodError, match="a weight is a number"):
        control.weigh("a:1", 500.0)
    for taken in ("a:1", "127.0.0.1:8080"):
        with pytest.raises(ConfigError) as refused:
            control.add({"address": taken})
        assert not isinstance(refused.value, MisunderstoodError)


@pytest.mark.parametrize("where", ["127.0.0.1:8080", "localhost:8080", "http://localhost:9090"])
def test_the_gateway_is_no_endpoint_of_its_own(where: str) -> None:
    with pytest.raises(ConfigError, match="this gateway"):
        control_of({"endpoints": [where]})
    running = Running({"endpoints": ["a:1"]})
    with pytest.raises(ConfigError, match="this gateway"):
        running.control.add({"address": where})
    assert "this gateway" in running.reload({"endpoints": ["a:1", where]})["error"]
    assert running.pool == {"a:1"}


# --- reloading ---------------------------------------------------------------------------------------------


def test_what_can_change_live_does() -> None:
    running = Running({"endpoints": ["a:1"], "queue": {"max_inflight": 5}})
    told = running.reload(
        {
            "endpoints": ["b:2", {"address": "c:3", "api_key": "sk-c", "weight": 3.0}],
            "queue": {"max_inflight": 9, "size": 77},
            "limits": {"max_body_bytes": 123},
            "objectives": {"batch": -1},
            "policy": "weighted",
            "scorers": [{"name": "queue-scorer", "weight": 2.0}],
            "proxy": {"first_byte_timeout_s": 7.0},
            "connections": {"max_headers": 33, "body_timeout_s": 3.0},
            "keys": {"max_concurrent": 4},
            "upstream": {"api_key": "sk-all"},
            "drain_timeout_s": 5.0,
        }
    )
    assert told["error"] is None
    assert told["needs_restart"] == []
    app, control = running.control.app, running.control
    assert running.pool == {"b:2", "c:3"}
    assert app.roster.standing("c:3").weight == 3.0
    assert control.doors.trust.keys == {"c:3": "sk-c"}
    assert (app.runtime.scheduler.settings.max_inflight, app.runtime.scheduler.queue.capacity) == (9, 77)
    assert app.runtime.limits.max_body_bytes == 123
    assert app.runtime.limits.objectives == {"batch": -1}
    assert type(app.policy.profile).__name__ == "Plan"
    assert (control.proxy.first_byte_timeout, control.proxy.body_timeout, control.proxy.grace) == (7.0, 3.0, 5.0)
    assert control.doors.data.limits.max_headers == 33
    assert control.doors.keys.allowance.max_concurrent == 4
    assert control.doors.trust.key == "sk-all"


def test_what_needs_a_restart_is_named_with_its_reason_and_left() -> None:
    running = Running({"endpoints": ["a:1"]})
    told = running.reload(
        {"endpoints": ["a:1"], "proxy": {"port": 1, "access_log": "-"}, "limits": {"max_attempts": 9}}
    )
    assert told["applied"] == ["limits.max_attempts"]
    assert told["needs_restart"] == ["proxy.port", "proxy.access_log"]
    assert told["why"] == {"proxy.port": "it is open", "proxy.access_log": "requests under way are in it, or are not"}
    assert "only after a restart: proxy.port (it is open)" in told["words"]
    assert running.control.app.config.proxy.port == 8080
    assert running.control.app.config.limits.max_attempts == 9, "what is in force is what the application shows"


def test_every_key_can_change_at_once_or_says_why_not() -> None:
    control = control_of({"endpoints": ["a:1"]})
    live = {key for keys in control._live() for key in keys}
    for key in every_key():
        sections = {key, key.rpartition(".")[0]}
        assert (sections & live) or (sections & FIXED.keys()), f"{key}: nobody says what becomes of it"


def every_key() -> list[str]:
    """All keys of the configuration, dotted."""
    found = []
    for name in Config.__struct_fields__:
        part = getattr(Config(), name)
        found += [f"{name}.{each}" for each in part.__struct_fields__] if isinstance(part, Part) else [name]
    return found


def test_health_retries_and_queue_change_without_forgetting_what_was_counted() -> None:
    running = Running({"endpoints": ["a:1", "b:2"]})
    runtime = running.control.app.runtime
    scheduler, row = runtime.scheduler, runtime.scheduler.pool.row("a:1")
    assert row is not None
    for _ in range(2):
        scheduler.faults.failed(row, runtime.clock())
    told = running.reload(
        {
            "endpoints": ["a:1", "b:2"],
            "health": {"eject_after": 9, "hang_floor_s": 0.0, "slow_start_s": 3.0, "stall_s": 4.0, "path": "/health"},
            "retry": {"ratio": 0.0, "floor": 1.0, "statuses": [503]},
            "queue": {"max_inflight": 2, "timeout_s": 5.0, "hold_s": 6.0},
            "proxy": {"connect_timeout_s": 7.0, "drain_delay_s": 0.0},
        }
    )
    assert told["needs_restart"] == []
    assert scheduler.pool.failures[row] == 2
    settings = scheduler.settings
    assert (settings.eject_after, settings.hold_s, settings.max_inflight, settings.slow_start_s) == (9, 6.0, 2, 3.0)
    assert (runtime.patience, runtime.queue_timeout) == (math.inf, 5.0)
    assert runtime.headers >= flow.HEADERS, "who waits is told apart by them"
    assert runtime.limits.retry_statuses == {503}
    assert running.control.proxy.stall_timeout == 4.0
    assert [scheduler.retries.take(0, runtime.clock()) for _ in range(2)] == [True, False]


def test_a_policy_that_asks_for_headers_gets_them_from_then_on() -> None:
    running = Running({"endpoints": ["a:1"]})
    assert "x-profile" not in running.control.app.runtime.headers
    profiles = [{"name": "one", "scorers": [{"name": "queue-scorer"}]}, {"name": "two"}]
    policy = {"policy": "weighted", "profiles": profiles, "profile_header": "x-profile"}
    assert running.reload({"endpoints": ["a:1"]} | policy)["needs_restart"] == []
    assert "x-profile" in running.control.app.runtime.headers


def test_who_operates_can_be_changed_and_never_becomes_everybody(tmp_path: Path) -> None:
    token, admin = tmp_path / "token", {"host": "0.0.0.0", "port": 0}
    token.write_text("one")
    running = Running({"endpoints": ["a:1"], "admin": admin | {"token_file": str(token)}})
    control, ring = running.control, running.control.doors.admin_keys
    assert ring.find(b"one")
    token.write_text("other one")
    control.reloading.look()
    assert ring.find(b"one"), "what is no key leaves the old one"
    token.write_text("other")
    control.reloading.look()
    assert ring.find(b"other")
    assert not ring.find(b"one")
    assert "admin.host" in running.reload({"endpoints": ["a:1"], "admin": admin})["error"]
    assert not ring.open
    assert running.reload({"endpoints": ["a:1"], "admin": admin | {"token": "third"}})["needs_restart"] == []
    assert ring.find(b"third")


def test_clients_keys_can_be_taken_from_another_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("alice:one")
    second.write_text("bob:two")
    running = Running({"endpoints": ["a:1"], "keys": {"file": str(first)}})
    ring = running.control.doors.keys
    assert running.reload({"endpoints": ["a:1"], "keys": {"file": str(second)}})["applied"] == ["keys.file"]
    assert [key.name for key in ring.keys] == ["bob"]
    second.write_text("carol:three")
    running.control.reloading.look()
    assert [key.name for key in ring.keys] == ["carol"]
    assert running.reload({"endpoints": ["a:1"], "keys": {"file": str(tmp_path / "none")}})["error"]
    assert [key.name for key in ring.keys] == ["carol"]


def test_keys_of_endpoints_are_read_again_when_their_files_change(tmp_path: Path) -> None:
    every, own = tmp_path / "every", tmp_path / "own"
    every.write_text("sk-every")
    own.write_text("sk-own")
    spec = {"address": "b:2", "api_key_file": str(own)}
    running = Running({"endpoints": ["a:1", spec], "upstream": {"api_key_file": str(every)}})
    trust = running.control.doors.trust
    assert (trust.key, trust.keys) == ("sk-every", {"b:2": "sk-own"})
    own.write_text("sk-new-own")
    every.write_text("sk-new")
    running.control.reloading.look()
    assert (trust.key, trust.keys) == ("sk-new", {"b:2": "sk-new-own"})
    assert running.control.reload()["applied"] == [], "once"


def test_of_weights_and_keys_those_of_the_first_who_lists_an_endpoint_count() -> None:
    running = Running({"endpoints": ["a:1", {"address": "b:2", "weight": 2.0, "api_key": "sk-b"}]})
    control, app = running.control, running.control.app
    control.doors.export(app)
    control.add({"address": "d:4", "weight": 5.0, "api_key": "sk-d"})
    terms = {"a:1": Terms(7.0, "sk-a"), "b:2": Terms(7.0, "other"), "c:3": Terms(3.0, "sk-c"), "d:4": Terms(1.0)}
    app._note_terms(terms)
    for name in ("c:3", "d:4"):
        app.roster._hear(ENDPOINTS_FILE, EndpointAdded(parse_endpoint(name)))
    assert control.doors.trust.keys == {"b:2": "sk-b", "c:3": "sk-c"}
    weights = {each["name"]: each["weight"] for each in control.endpoints()}
    assert weights == {"a:1": 1.0, "b:2": 2.0, "c:3": 3.0, "d:4": 5.0}
    assert control.weigh("c:3", 4.0)["weight"] == 4.0
    assert {name: app.policy.weights.get(name, 1.0) for name in weights} == weights | {"c:3": 4.0}
    control.remove("d:4")
    assert control.doors.trust.keys == {"b:2": "sk-b", "c:3": "sk-c"}


def test_an_open_port_can_change_its_certificate_and_never_begin_with_tls(tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    for name in ("one", "two"):
        certificate, key = self_signed((name,))
        (tmp_path / f"{name}.crt").write_bytes(certificate)
        (tmp_path / f"{name}.key").write_bytes(key)

    def tls(name: str, **more: str) -> dict[str, Any]:
        files = {"tls_cert": str(tmp_path / f"{name}.crt"), "tls_key": str(tmp_path / f"{name}.key")}
        return {"endpoints": ["a:1"], "connections": files | more}

    running = Running(tls("one"))
    context = running.control.doors.data.tls
    assert context is not None
    assert running.reload(tls("two", tls_min_version="1.3"))["needs_restart"] == []
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert "cannot use" in running.reload(tls("three"))["error"]
    told = running.reload({"endpoints": ["a:1"]})
    assert told["why"]["connections.tls_cert"] == "an open port speaks TLS from the start or never"
    assert Running({"endpoints": ["a:1"]}).reload(tls("one"))["applied"] == []


def test_beside_envoy_keys_of_endpoints_change_and_whether_clients_are_passed_on_does_not(tmp_path: Path) -> None:
    file, values = tmp_path / "keys", {"endpoints": ["a:1"], "proxy": {"data_plane": "envoy"}}
    file.write_text("team:sk-team")
    running = Running(values)
    trust, told = running.control.doors.trust, []
    trust.listen(lambda: told.append((trust.authorization("a:1"), trust.authorization("b:2"))))
    running.control.add({"address": "b:2", "api_key": "sk-b"})
    assert running.reload(values | {"upstream": {"api_key": "sk-all"}})["applied"] == ["upstream.api_key"]
    assert told == [(None, "Bearer sk-b"), ("Bearer sk-all", "Bearer sk-b")]
    because = "whether clients' keys go to endpoints is told to Envoy at its start"
    found = running.reload(values | {"upstream": {"api_key": "sk-all"}, "keys": {"file": str(file)}})
    assert found["why"] == {"keys.file": because}
    assert running.control.doors.keys.open


def test_envoy_has_been_told_most_at_its_start() -> None:
    values = {"endpoints": ["a:1"], "proxy": {"data_plane": "envoy"}}
    running = Running(values)
    told = running.reload(values | {"limits": {"max_attempts": 1}, "objectives": {"x": 1}, "health": {"stall_s": 1.0}})
    assert told["needs_restart"] == ["limits.max_attempts"]
    assert told["why"] == {"limits.max_attempts": "Envoy is told at its start"}
    assert running.control.app.runtime.limits.max_attempts == 3, "nor does picker go by it, beside Envoy"
    assert running.control.app.runtime.limits.objectives == {"x": 1}


@pytest.mark.parametrize(
    "bad",
    [
        {"endpoints": ["a:1", "a:1"]},
        {"endpoints": ["a"]},
        {"endpoints": []},
        {"policy": "weighted", "scorers": [{"name": "no-such-scorer"}]},
        {"upstream": {"ca": "/no/such/file"}},
    ],
)
def test_one_bad_part_keeps_all_of_the_old(bad: dict[str, Any]) -> None:
    running = Running({"endpoints": ["a:1"]})
    told = running.reload({"endpoints": ["b:2"], "limits": {"max_body_bytes": 1}} | bad)
    assert told["error"]
    assert running.pool == {"a:1"}
    assert running.control.app.runtime.limits.max_body_bytes != 1


def test_what_was_added_by_hand_survives_a_reload() -> None:
    running = Running({"endpoints": ["a:1"]})
    running.control.add({"address": "mine:9", "api_key": "sk-mine"})
    running.control.drain("a:1", draining=True)
    assert running.reload({"endpoints": ["a:1", "b:2"]})["applied"] == ["endpoints"]
    assert running.pool == {"a:1", "b:2", "mine:9"}
    assert running.control.doors.trust.keys == {"mine:9": "sk-mine"}
    assert running.control.endpoint("a:1")["draining"]


async def test_no_request_fails_while_the_configuration_changes_again_and_again(tmp_path: Path) -> None:
    """Endpoints come and go, limits change and files break under a load of requests."""
    path = tmp_path / "config.yaml"
    async with upstream() as one, upstream() as two, upstream() as three:
        texts = [
            f"endpoints: ['{one.address}', '{two.address}']\nscrape: {{interval_s: 1000.0}}\n",
            f"endpoints: ['{two.address}', '{three.address}']\nlimits: {{max_body_bytes: 5000}}\n",
            "endpoints: [oops\n",
            f"endpoints: ['{three.address}']\npolicy: least-request\n",
            f"endpoints: ['{one.address}', '{three.address}']\npolicy: round-robin\nscrape: {{interval_s: 0.01}}\n",
            f"endpoints: ['{one.address}']\nhealth: {{eject_after: 1, path: /health, slow_start_s: 0}}\n",
            f"endpoints: ['{one.address}', '{two.address}']\nretry: {{ratio: 0}}\nqueue: {{max_inflight: 2}}\n",
        ]
        path.write_text(texts[0])
        config = load_config(path)
        app, doors = App(config), Doors(config)
        proxy = Proxy(app.runtime, keys=doors.keys, trust=doors.trust, door=doors.data)
        control = ProxyControl(app, proxy, doors, lambda: load_config(path), path)
        listener, stop = listen("127.0.0.1", 0), asyncio.Event()
        port, statuses = port_of(listener), []

        async def ask(client: httpx.AsyncClient) -> None:
            for _ in range(60):
                answer = await client.post(
                    f"http://127.0.0.1:{port}/v1/completions", json={"model": "m", "prompt": "p"}
                )
                statuses.append(answer.status_code)

        async def change() -> None:
            for round_ in range(40):
                path.write_text(texts[round_ % len(texts)])
                control.reloading.again()
                answered = len(statuses)
                while len(statuses) < min(answered + 4, 240):  # noqa: ASYNC110
                    await asyncio.sleep(0)

        async def load() -> None:
            async with httpx.AsyncClient(timeout=60) as client, asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(ask(client))
                group.create_task(change())
            stop.set()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(app.run([lambda stop: proxy.serve(listener, stop)], stop))
            group.create_task(load())
        assert statuses == [200] * 240
        assert all(endpoint.seen for endpoint in (one, two, three))
