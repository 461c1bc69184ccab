"""Two `picker epp --mode lean` behind one real Envoy, whose access log goes to one of them."""

from pathlib import Path

import pytest

from e2e.replica_world import SERVER, Figures, envoy_missing, two
from echo_upstream import EchoUpstream

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(bool(envoy_missing()), reason=envoy_missing())]


def idle(figures: Figures) -> bool:
    """Of its own requests and of the other's."""
    own = figures["picker_unheard_requests"] == figures["picker_inflight_requests"] == 0
    return own and figures["picker_replicas_requests"] == 0


@pytest.mark.parametrize("bus", ["direct", "redis"])
async def test_both_hear_how_their_requests_ended(tmp_path: Path, bus: str) -> None:
    if bus == "redis" and SERVER is None:
        pytest.skip("there is no redis-server or valkey-server on PATH")
    async with EchoUpstream("a").running() as up, two(tmp_path, up.address, bus=bus, mode="lean") as this:
        await this.ask(40)
        figures = [await each.until(idle) for each in (this.one, this.two)]
        decided = [each['picker_decisions_total{outcome="picked"}'] for each in figures]
        finished = [each.get('picker_requests_ended_total{how="finished"}', 0) for each in figures]
        assert sum(decided) == 40
        assert decided == finished
        assert min(decided) > 10
        # None of them was over because its time was: that is a failure that nobody is blamed for.
        assert [each.get('picker_requests_ended_total{how="unheard"}', 0) for each in figures] == [0, 0]
        passed = [each["picker_replicas_entries_passed_on_total"] for each in figures]
        taken = [each["picker_replicas_entries_taken_total"] for each in figures]
        assert passed == taken[::-1]
        assert sorted(taken) == [0, decided[taken.index(max(taken))]]
        for each in (this.one, this.two):  # NaN before both have had time to speak and to answer
            await each.until(lambda figures: 0.0 <= figures["picker_replicas_late_seconds"] < 1.0)
