import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fakes import endpoint
from picker.telemetry import CONTENT_TYPE, Telemetry
from picker.types import (
    Decision,
    EndpointRemoved,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    Rejection,
    RejectReason,
    ScrapeFailed,
    Usage,
)


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(CollectorRegistry())


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.registry.get_sample_value(name, labels)


def picked(name: str = "a", **changes: float) -> Decision:
    return Decision(1, endpoint(name), matched_tokens=changes.get("matched", 0.0), waited=changes.get("waited", 0.0))


def test_a_pick_is_counted_by_outcome_and_endpoint(telemetry: Telemetry) -> None:
    for name in "aab":
        telemetry.decision(picked(name, matched=10.0, waited=2.0), seconds=0.001)
    assert value(telemetry, "picker_decisions_total", outcome="picked") == 3
    assert value(telemetry, "picker_picks_total", endpoint="a") == 2
    assert value(telemetry, "picker_predicted_cached_tokens_total") == 30
    assert value(telemetry, "picker_decision_seconds_count") == 3
    assert value(telemetry, "picker_queue_wait_seconds_sum") == 6.0


@pytest.mark.parametrize("reason", RejectReason)
def test_a_rejection_is_counted_by_its_reason(telemetry: Telemetry, reason: RejectReason) -> None:
    telemetry.decision(Rejection(1, reason, 503, "no"), seconds=0.001)
    assert value(telemetry, "picker_decisions_total", outcome=reason.value) == 1
    assert value(telemetry, "picker_queue_wait_seconds_count") == 0


@pytest.mark.parametrize("reason", FailureReason)
def test_a_failure_is_counted_by_its_reason(telemetry: Telemetry, reason: FailureReason) -> None:
    telemetry.fact(Failed(1, reason))
    assert value(telemetry, "picker_requests_ended_total", how=reason.value) == 1


def test_tokens_are_counted_as_the_engines_report_them(telemetry: Telemetry) -> None:
    for usage in (Usage(100, 7, 60), Usage(50, 3, None), None):
        telemetry.fact(Finished(1, 200, usage))
    assert value(telemetry, "picker_requests_ended_total", how="finished") == 3
    counted = [value(telemetry, f"picker_{name}_tokens_total") for name in ("prompt", "output", "cached")]
    assert counted == [150, 10, 60]


def test_the_series_of_an_endpoint_end_with_it(telemetry: Telemetry) -> None:
    telemetry.decision(picked("a"), seconds=0.0)
    telemetry.fact(ScrapeFailed("a", 0.0, "timeout"))
    assert value(telemetry, "picker_scrape_errors_total", endpoint="a") == 1
    for _ in range(2):
        telemetry.fact(EndpointRemoved("a"))
    assert value(telemetry, "picker_picks_total", endpoint="a") is None
    assert value(telemetry, "picker_scrape_errors_total", endpoint="a") is None


def test_other_facts_count_nothing(telemetry: Telemetry) -> None:
    before = telemetry.text()
    telemetry.fact(FirstToken(1))
    assert telemetry.text() == before


def test_internal_errors_are_counted_by_where_they_happened(telemetry: Telemetry) -> None:
    telemetry.internal_error("submit")
    assert value(telemetry, "picker_internal_errors_total", where="submit") == 1


def test_a_gauge_is_read_when_it_is_scraped(telemetry: Telemetry) -> None:
    level = [3.0]
    telemetry.gauge("picker_level", "A level.", lambda: level[0])
    level[0] = 5.0
    assert value(telemetry, "picker_level") == 5.0


def test_the_text_is_what_prometheus_reads(telemetry: Telemetry) -> None:
    telemetry.decision(picked("a"), seconds=0.001)
    families = {family.name: family for family in text_string_to_metric_families(telemetry.text().decode())}
    assert families["picker_picks"].samples[0].labels == {"endpoint": "a"}
    assert all(name.startswith("picker_") and family.documentation for name, family in families.items())
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_two_registries_know_nothing_of_each_other(telemetry: Telemetry) -> None:
    Telemetry(CollectorRegistry()).internal_error("submit")
    assert value(telemetry, "picker_internal_errors_total", where="submit") is None


def test_a_time_on_a_bound_counts_within_it_and_one_beyond_all_counts_at_the_end(telemetry: Telemetry) -> None:
    for seconds in (2e-5, 2.1e-5, 3.0):
        telemetry.decision(picked(), seconds=seconds)
    counted = [value(telemetry, "picker_decision_seconds_bucket", le=le) for le in ("2e-05", "5e-05", "0.1", "+Inf")]
    assert counted == [1, 2, 2, 3]


def test_before_anything_happened_the_totals_are_there_at_zero(telemetry: Telemetry) -> None:
    assert value(telemetry, "picker_decisions_total", outcome="picked") == 0
    assert value(telemetry, "picker_requests_ended_total", how="finished") == 0
    assert value(telemetry, "picker_cached_tokens_total") == 0
