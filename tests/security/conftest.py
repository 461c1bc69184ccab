from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that `picker proxy` runs on, whose transports behave a little differently."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that end wait for their clients no longer than the tests do."""
    monkeypatch.setattr("picker.frontends.proxy._LINGER_PAUSE", 0.02)
    monkeypatch.setattr("picker.frontends.client_connection._PARTING_SECONDS", 0.02)
