from __future__ import annotations

import logging
from pathlib import Path

import pytest

from picker.config import Config, from_values, load_config
from picker.errors import ConfigError
from picker.reload import Commit, NeedsRestartError, Reload, changes

BEFORE = from_values({"endpoints": ["a:1"], "limits": {"max_body_bytes": 10}, "queue": {"size": 5}})


class Rig:
    """Keys that are live: `limits`, and `queue.size` up to 100."""

    def __init__(self, config: Config = BEFORE) -> None:
        self.next: Config | ConfigError = config
        self.made: list[str] = []
        self.reload = Reload(config, self._load, {("limits",): self._limits, ("queue.size",): self._size}, {})

    def _load(self) -> Config:
        if isinstance(self.next, ConfigError):
            raise self.next
        return self.next

    def _limits(self, config: Config) -> Commit:
        return lambda: self.made.append(f"limits {config.limits.max_body_bytes}")

    def _size(self, config: Config) -> Commit:
        if config.queue.size == 13:
            raise ConfigError("queue.size: 13 brings bad luck")
        if config.queue.size > 100:
            raise NeedsRestartError
        return lambda: self.made.append(f"size {config.queue.size}")


def test_what_can_be_in_force_is_and_the_rest_is_named() -> None:
    rig = Rig()
    rig.next = from_values(
        {"endpoints": ["a:1"], "limits": {"max_body_bytes": 20}, "queue": {"size": 7}, "scrape": {"interval_s": 9}}
    )
    result = rig.reload.again()
    assert rig.made == ["limits 20", "size 7"]
    assert result.applied == ["limits.max_body_bytes", "queue.size"]
    assert result.needs_restart == ["scrape.interval_s"]
    assert result.words == "in force: limits.max_body_bytes, queue.size; only after a restart: scrape.interval_s"
    assert rig.reload.again().needs_restart == ["scrape.interval_s"], "it still is"
    assert rig.made == ["limits 20", "size 7"], "what is in force is not done again"


def test_nothing_changes_when_a_part_of_it_does_not_do() -> None:
    rig = Rig()
    rig.next = from_values({"limits": {"max_body_bytes": 20}, "queue": {"size": 13}})
    result = rig.reload.again()
    assert (result.applied, rig.made) == ([], [])
    assert result.error == "queue.size: 13 brings bad luck"
    assert rig.reload.config is BEFORE


def test_a_file_that_cannot_be_read_leaves_the_old_one_in_force(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig()
    rig.next = ConfigError("f.yaml: limts: unknown key")
    with caplog.at_level(logging.ERROR):
        assert rig.reload.again().words == "the configuration stays as it is: f.yaml: limts: unknown key"
    assert "limts: unknown key" in caplog.text
    assert rig.reload.config is BEFORE
    rig.next = from_values({"endpoints": ["a:1"], "limits": {"max_body_bytes": 30}, "queue": {"size": 5}})
    assert rig.reload.again().applied == ["limits.max_body_bytes"]


def test_a_value_that_only_a_new_process_can_have_is_named_as_such() -> None:
    rig = Rig()
    rig.next = from_values({"endpoints": ["a:1"], "limits": {"max_body_bytes": 11}, "queue": {"size": 101}})
    result = rig.reload.again()
    assert (result.applied, result.needs_restart) == (["limits.max_body_bytes"], ["queue.size"])


def test_a_file_is_read_again_when_it_changes_and_not_before(tmp_path: Path) -> None:
    path, reads = tmp_path / "config.yaml", []
    path.write_text("limits: {max_body_bytes: 10}\n")

    def load() -> Config:
        reads.append(path)
        return load_config(path)

    reload = Reload(load_config(path), load, {("limits",): lambda config: lambda: None}, {}, path)
    reload.look()
    assert reads == []
    path.write_text("limits: {max_body_bytes: 123}\n")
    reload.look()
    reload.look()
    assert len(reads) == 1
    assert reload.config.limits.max_body_bytes == 123


def test_keys_and_certificates_are_read_again_with_it() -> None:
    looked: list[str] = []

    def refresh() -> bool:
        looked.append("keys")
        return len(looked) == 2

    reload = Reload(BEFORE, lambda: BEFORE, {}, {"keys": refresh})
    reload.look()
    assert reload.again().applied == ["keys"]
    assert looked == ["keys", "keys"]


def test_changes_are_told_by_their_keys() -> None:
    after = from_values({"endpoints": ["b:1"], "limits": {"max_body_bytes": 10}, "queue": {"size": 6}, "seed": 1})
    assert changes(BEFORE, after) == ["endpoints", "seed", "queue.size"]
