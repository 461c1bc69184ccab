from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontends.fake_upstream import upstream
from picker.app import App
from picker.commands.proxy_control import Doors, ProxyControl, fixed_keys, passes_on
from picker.config import Config, from_values, load_config
from picker.errors import ConfigError
from picker.frontends.proxy import Proxy
from picker.frontends.serving import listen, port_of

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


def test_what_needs_a_restart_is_named_and_left() -> None:
    running = Running({"endpoints": ["a:1"]})
    told = running.reload(
        {"endpoints": ["a:1"], "proxy": {"port": 1}, "queue": {"max_inflight": 5}, "admin": {"token": "x"}}
    )
    assert told["needs_restart"] == ["queue.max_inflight", "proxy.port", "admin.token"]
    assert running.control.app.runtime.scheduler.settings.max_inflight is None


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
            f"endpoints: ['{one.address}', '{three.address}']\npolicy: round-robin\n",
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
                await asyncio.sleep(0)

        async def load() -> None:
            async with httpx.AsyncClient(timeout=20) as client, asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(ask(client))
                group.create_task(change())
            stop.set()

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(app.run([lambda stop: proxy.serve(listener, stop)], stop))
            group.create_task(load())
        assert statuses == [200] * 240
        assert all(endpoint.seen for endpoint in (one, two, three))
