"""A few seconds of what `bench/soak.py` does for hours: nothing is lost, nothing is left."""

import pytest
from bench.soak import soak

from picker.envoy import find_envoy
from picker.errors import ConfigError

try:
    find_envoy()
    missing = ""
except ConfigError as error:
    missing = str(error)


@pytest.mark.e2e
@pytest.mark.skipif(bool(missing), reason=missing)
@pytest.mark.parametrize("mode", ["full", "lean"])
async def test_churn_kills_and_clients_that_leave_lose_no_request_and_leave_nothing_in_flight(mode: str) -> None:
    figures = await soak(seconds=6.0, mode=mode, pods=2, rate=20.0, seed=1, restarts=False)
    assert figures.lost == []
    assert figures.left
    assert not any(figures.left.values()), figures.left
    assert figures.whole > 0
    assert figures.kills > 0
    assert figures.changes > 0
