"""The pool's file follows facts, and names are looked up again and again."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from picker.data_plane import Folder
from picker.pool_file import PoolFile
from picker.types import Endpoint, EndpointAdded, EndpointRemoved, Fact


class Names:
    """A name server of the test's."""

    def __init__(self, **known: list[str]) -> None:
        self.known = known
        self.asked = asyncio.Event()

    async def find(self, host: str) -> list[str]:
        self.asked.set()
        return self.known.get(host, [])


@asynccontextmanager
async def pool(
    tmp_path: Path, names: Names, *facts: Fact, keys: dict[str, str] | None = None
) -> AsyncIterator[PoolFile]:
    made = PoolFile(Folder(tmp_path), shown=(keys or {}).get, find=names.find, again=0.001)
    for fact in facts:
        made.observe(fact)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(made.run())
        await made.written.wait()
        yield made
        task.cancel()


def shown(tmp_path: Path) -> list[str]:
    (assignment,) = json.loads((tmp_path / "pool.json").read_text())["resources"]
    sockets = [each["endpoint"]["address"]["socket_address"] for each in assignment["endpoints"][0]["lb_endpoints"]]
    return [f"{each['address']}:{each['port_value']}" for each in sockets]


async def becomes(tmp_path: Path, wanted: list[str]) -> None:
    async with asyncio.timeout(60):
        while shown(tmp_path) != wanted:  # noqa: ASYNC110 a file makes no event
            await asyncio.sleep(0)


async def test_endpoints_come_and_go(tmp_path: Path) -> None:
    a, b = (EndpointAdded(Endpoint(name, f"10.0.0.{number}:80")) for number, name in ((1, "a"), (2, "b")))
    async with pool(tmp_path, Names(), a) as made:
        assert shown(tmp_path) == ["10.0.0.1:80"]
        made.observe(b)
        made.observe(EndpointRemoved("a"))
        await becomes(tmp_path, ["10.0.0.2:80"])


async def test_an_empty_pool_is_a_file_too(tmp_path: Path) -> None:
    async with pool(tmp_path, Names()):
        assert shown(tmp_path) == []


async def test_names_are_written_as_addresses_both_ways(tmp_path: Path) -> None:
    names = Names(pod=["10.0.0.7", "fd00::7"])
    async with pool(tmp_path, names, EndpointAdded(Endpoint("pod:80", "pod:80"))) as made:
        assert shown(tmp_path) == ["10.0.0.7:80"]
        assert made.addresses == {"pod:80": "10.0.0.7:80"}
        assert made.names == {"10.0.0.7:80": "pod:80"}


async def test_a_name_that_moves_is_followed(tmp_path: Path) -> None:
    names = Names(pod=["10.0.0.7"])
    async with pool(tmp_path, names, EndpointAdded(Endpoint("pod:80", "pod:80"))) as made:
        held = made.names
        names.known["pod"] = ["10.0.0.8"]
        await becomes(tmp_path, ["10.0.0.8:80"])
        assert held == {"10.0.0.8:80": "pod:80"}


async def test_a_name_with_several_addresses_stays_with_one(tmp_path: Path) -> None:
    names = Names(pod=["10.0.0.7", "10.0.0.8"])
    async with pool(tmp_path, names, EndpointAdded(Endpoint("pod:80", "pod:80"))):
        names.known["pod"] = ["10.0.0.8", "10.0.0.7"]
        names.asked.clear()
        await names.asked.wait()
        names.asked.clear()
        await names.asked.wait()
        assert shown(tmp_path) == ["10.0.0.7:80"]


async def test_a_name_that_is_gone_keeps_its_address(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = Names(pod=["10.0.0.7"])
    async with pool(tmp_path, names, EndpointAdded(Endpoint("pod:80", "pod:80"))):
        del names.known["pod"]
        for _ in range(3):
            names.asked.clear()
            await names.asked.wait()
        assert shown(tmp_path) == ["10.0.0.7:80"]
    assert [record.message for record in caplog.records] == ["pod has no address: 10.0.0.7:80 is used on"]


async def test_a_name_that_is_not_known_yet_is_left_out_until_it_is(tmp_path: Path) -> None:
    names = Names()
    async with pool(tmp_path, names, EndpointAdded(Endpoint("pod:80", "pod:80"))):
        assert shown(tmp_path) == []
        names.known["pod"] = ["fd00::7"]
        await becomes(tmp_path, ["fd00::7:80"])


def keys_shown(tmp_path: Path) -> list[str | None]:
    (assignment,) = json.loads((tmp_path / "pool.json").read_text())["resources"]
    told = [each["metadata"]["filter_metadata"]["picker"] for each in assignment["endpoints"][0]["lb_endpoints"]]
    return [each.get("authorization") for each in told]


async def test_keys_are_written_and_written_again_when_they_change(tmp_path: Path) -> None:
    a, b = (EndpointAdded(Endpoint(name, f"10.0.0.{number}:80")) for number, name in ((1, "a"), (2, "b")))
    keys = {"b": "Bearer one"}
    async with pool(tmp_path, Names(), a, b, keys=keys) as made:
        assert keys_shown(tmp_path) == [None, "Bearer one"]
        keys |= {"a": "Bearer two", "b": "Bearer three"}
        made.look_again()
        async with asyncio.timeout(60):
            while keys_shown(tmp_path) != ["Bearer two", "Bearer three"]:  # noqa: ASYNC110 a file makes no event
                await asyncio.sleep(0)


async def test_different_keys_at_one_address_are_told_once_and_not_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = Names(one=["10.0.0.7"], two=["10.0.0.7"])
    facts = [EndpointAdded(Endpoint(f"{name}:80", f"{name}:80")) for name in ("one", "two")]
    keys = {"one:80": "Bearer sesame", "two:80": "Bearer other"}
    async with pool(tmp_path, names, *facts, keys=keys):
        names.asked.clear()
        await names.asked.wait()
        names.asked.clear()
        await names.asked.wait()
    told = "one:80, two:80 are all at 10.0.0.7:80 and have different keys: it is shown the first of them"
    assert [record.message for record in caplog.records] == [told]
    assert keys_shown(tmp_path) == ["Bearer sesame"]
