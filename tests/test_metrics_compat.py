from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fakes import NOW, ManualClock, endpoint, request, scheduler
from picker.core.saturation import Concurrency
from picker.core.scheduler import Scheduler
from picker.metrics_compat import CompatMetrics
from picker.rewrite_metrics import RewriteMetrics
from picker.rewrites import Choice, Rewriting
from picker.telemetry import Telemetry
from picker.types import (
    Decision,
    Fact,
    Failed,
    FailureReason,
    Finished,
    FirstToken,
    LoadObserved,
    Rejection,
    RejectReason,
    Rewritten,
    Usage,
)

M = {"model_name": "m", "target_model_name": "m", "fairness_id": "default-flow", "priority": "0"}
OLDER = {"model_name": "m", "target_model_name": "m"}


class Rig:
    """A scheduler, its telemetry and what watches both, on a clock of its own."""

    def __init__(self, **settings: Any) -> None:
        self.clock = ManualClock()
        self.scheduler: Scheduler = scheduler(endpoint("a", models=["m"]), endpoint("b", models=["m"]), **settings)
        self.telemetry = Telemetry(CollectorRegistry())
        self.compat = CompatMetrics(
            self.scheduler, self.clock, pool="qwen", namespace="llm", detector=Concurrency(requests=4)
        )
        self.telemetry.watch(self.compat)
        self.telemetry.registry.register(self.compat)

    def submit(self, request_id: int = 1, **changes: Any) -> Decision | Rejection:
        asked = request(request_id, model=changes.pop("model", "m"), **changes)
        outcome = self.scheduler.submit(asked, self.clock())
        assert isinstance(outcome, Decision | Rejection)
        self.telemetry.decision(outcome, 0.0003)
        return outcome

    def tell(self, fact: Fact, after: float = 0.0) -> None:
        self.clock.advance(after)
        self.scheduler.apply(fact, self.clock())
        self.telemetry.fact(fact)

    def value(self, name: str, /, **labels: str) -> float | None:
        return self.telemetry.registry.get_sample_value(name, labels)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_request_is_counted_under_todays_and_the_older_names(rig: Rig) -> None:
    rig.submit(1)
    rig.submit(2, priority=3)
    assert rig.value("llm_d_epp_request_total", **M) == 1
    assert rig.value("llm_d_epp_request_total", **M | {"priority": "3"}) == 1
    assert rig.value("inference_objective_request_total", **OLDER, priority="3") == 1
    assert rig.value("llm_d_epp_request_running", **M) == 1
    assert rig.value("inference_objective_running_requests", model_name="m") == 2


def test_the_model_asked_for_and_its_target_are_told_apart(rig: Rig) -> None:
    rig.submit(1, rewritten=Rewritten("chat", "canary"))
    rig.tell(Finished(1, 200, Usage(10, 2)))
    assert rig.value("llm_d_epp_request_total", **M | {"model_name": "chat"}) == 1
    assert rig.value("llm_d_epp_request_input_tokens_count", **M | {"model_name": "chat"}) == 1


def test_rewrites_are_counted_under_their_names_and_ours() -> None:
    rewriting, registry = Rewriting(lambda: 0.0, ()), CollectorRegistry()
    registry.register(RewriteMetrics(rewriting, compat=True))
    rewriting.count("chat", Choice("m", "canary"))
    ours = {"rewrite": "canary", "model": "chat", "target_model": "m"}
    theirs = {"model_rewrite_name": "canary", "model_name": "chat", "target_model": "m"}
    assert registry.get_sample_value("picker_model_rewrites_total", ours) == 1
    assert registry.get_sample_value("llm_d_epp_model_rewrite_decisions_total", theirs) == 1
    assert registry.get_sample_value("inference_extension_model_rewrite_decisions_total", theirs) == 1


def test_a_streamed_answer_gives_its_times_and_tokens(rig: Rig) -> None:
    rig.submit(1)
    rig.tell(FirstToken(1), after=0.5)
    rig.tell(Finished(1, 200, Usage(1000, 11, 600)), after=2.0)
    for name, total in (
        ("request_duration_seconds", 2.5),
        ("request_input_tokens", 1000.0),
        ("request_output_tokens", 11.0),
        ("request_cached_tokens", 600.0),
        ("request_streaming_tpot_seconds", 0.2),
    ):
        assert rig.value(f"llm_d_epp_{name}_sum", **M) == pytest.approx(total), name
        assert rig.value(f"llm_d_epp_{name}_count", **M) == 1
    assert rig.value("llm_d_epp_request_ttft_seconds_sum", **M, streaming="true") == pytest.approx(0.5)
    assert rig.value("llm_d_epp_request_ntpot_seconds_sum", **M) == pytest.approx(2.5 / 11)
    assert rig.value("inference_objective_normalized_time_per_output_token_seconds_count", **OLDER) == 1
    assert rig.value("inference_objective_prompt_cached_tokens_sum", **OLDER) == 600.0
    assert rig.value("llm_d_epp_request_running", **M) is None


def test_older_names_sum_over_the_labels_they_lack(rig: Rig) -> None:
    for number, priority in ((1, 0), (2, 5)):
        rig.submit(number, priority=priority)
        rig.tell(Finished(number, 200, Usage(100, 1, None)), after=1.0)
    assert rig.value("inference_objective_input_tokens_count", **OLDER) == 2
    assert rig.value("inference_objective_input_tokens_bucket", **OLDER, le="128.0") == 2
    assert rig.value("llm_d_epp_request_cached_tokens_count", **M) is None


@pytest.mark.parametrize(
    ("fact", "code"),
    [
        (Finished(1, 500), "ModelServerError"),
        (Failed(1, FailureReason.RESET), "ModelServerError"),
        (Failed(1, FailureReason.CLIENT_GONE), None),
    ],
)
def test_an_answer_that_failed_is_an_error_and_one_nobody_waited_for_is_none(
    fact: Fact, code: str | None, rig: Rig
) -> None:
    rig.submit(1)
    rig.tell(fact)
    assert rig.value("llm_d_epp_request_error_total", **M, error_code="ModelServerError") == (1 if code else None)


@pytest.mark.parametrize(
    ("reason", "status", "code", "outcome"),
    [
        (RejectReason.SATURATED, 429, "ResourceExhausted", "RejectedCapacity"),
        (RejectReason.NO_ENDPOINTS, 503, "ServiceUnavailable", "RejectedNoEndpoints"),
        (RejectReason.EXPIRED, 429, "ResourceExhausted", "EvictedTTL"),
        (RejectReason.UNKNOWN_MODEL, 404, "NotFound", "RejectedOther"),
    ],
)
def test_a_refusal_is_an_error_by_its_code(
    reason: RejectReason, status: int, code: str, outcome: str, rig: Rig
) -> None:
    rig.telemetry.decision(Rejection(1, reason, status, "no"), 0.001, request(1, model="m"))
    assert rig.value("llm_d_epp_request_error_total", **M, error_code=code) == 1
    assert rig.value("inference_objective_request_error_total", **OLDER, error_code=code) == 1
    flow = {"outcome": outcome, "priority": "0", "inference_pool": "qwen"}
    assert rig.value("llm_d_epp_flow_control_requests_total", **flow) == 1


def test_a_refusal_of_an_unnamed_request_has_no_model(rig: Rig) -> None:
    rig.submit(1, model="other")
    labels = M | {"model_name": "", "target_model_name": "", "error_code": "NotFound"}
    assert rig.value("llm_d_epp_request_error_total", **labels) == 1


def test_decisions_are_attempts_by_endpoint(rig: Rig) -> None:
    decision = rig.submit(1)
    assert isinstance(decision, Decision)
    where = {"status": "success", "target_model_name": "m", "namespace": "llm", "port": "8000"}
    name = decision.endpoint.name
    assert rig.value("llm_d_epp_scheduler_attempts_total", **where, endpoint_name=name) == 1
    assert rig.value("inference_extension_scheduler_attempts_total", **where, pod_name=name) == 1
    assert rig.value("llm_d_epp_scheduler_e2e_duration_seconds_bucket", le="0.0005") == 1
    assert rig.value("inference_extension_scheduler_e2e_duration_seconds_count") == 1


def test_the_pools_averages_are_of_what_was_scraped(rig: Rig) -> None:
    assert rig.value("llm_d_epp_average_queue_size", name="qwen") is None
    rig.tell(LoadObserved("a", NOW, waiting=2, running=4, kv_usage=0.25))
    rig.tell(LoadObserved("b", NOW, waiting=4, running=4, kv_usage=0.75))
    assert rig.value("llm_d_epp_average_queue_size", name="qwen") == 3.0
    assert rig.value("inference_pool_average_kv_cache_utilization", name="qwen") == 0.5
    assert rig.value("llm_d_epp_std_dev_kv_cache_utilization", name="qwen") == 0.25
    assert rig.value("inference_pool_average_running_requests", name="qwen") == 4.0
    assert (
        rig.value("llm_d_epp_ready_endpoints", name="qwen") == rig.value("inference_pool_ready_pods", name="qwen") == 2
    )
    assert rig.value("llm_d_epp_per_endpoint_queue_size", name="qwen", model_server_endpoint="b") == 4
    assert rig.value("inference_pool_per_pod_queue_size", name="qwen", model_server_pod="a") == 2


def test_saturation_is_the_detectors(rig: Rig) -> None:
    rig.submit(1)
    rig.submit(2)
    labels = {"inference_pool": "qwen", "stage": "effective"}
    assert rig.value("llm_d_epp_flow_control_pool_saturation", **labels) == 2 / 8
    assert rig.value("inference_extension_flow_control_pool_saturation", **labels) == 2 / 8


def test_what_waits_in_the_queue_is_seen() -> None:
    rig = Rig(max_inflight=1)
    rig.submit(1)
    rig.submit(2)
    rig.scheduler.submit(request(3, model="m", priority=7), NOW)
    labels = {**M, "priority": "7", "inference_pool": "qwen"}
    assert rig.value("llm_d_epp_flow_control_queue_size", **labels) == 1


def test_bookings_are_shown_by_endpoint(rig: Rig) -> None:
    decision = rig.submit(1)
    assert isinstance(decision, Decision)
    labels = {"namespace": "llm", "producer_name": "inflight-load-producer", "fairness_id": "", "priority": ""}
    assert rig.value("llm_d_epp_inflight_requests", endpoint_name=decision.endpoint.name, **labels) == 1
    assert rig.value("llm_d_epp_inflight_tokens", endpoint_name=decision.endpoint.name, **labels) == 1000


def test_beyond_a_thousand_models_all_are_one_other(rig: Rig) -> None:
    for number in range(1002):
        rig.telemetry.decision(
            Rejection(number, RejectReason.SATURATED, 429, "no"), 0.0, request(number, model=f"m{number}")
        )
    other = M | {"model_name": "other", "target_model_name": "other"}
    assert rig.value("llm_d_epp_request_total", **other) == 2


def test_the_text_is_what_prometheus_reads_and_no_name_comes_twice(rig: Rig) -> None:
    rig.submit(1)
    rig.tell(FirstToken(1), after=0.5)
    rig.tell(Finished(1, 200, Usage(1000, 11, 600)), after=2.0)
    families = [family.name for family in text_string_to_metric_families(rig.telemetry.text().decode())]
    assert len(families) == len(set(families))
    prefixes = ("picker_", "llm_d_epp_", "inference_objective_", "inference_pool_", "inference_extension_")
    assert all(name.startswith(prefixes) for name in families)
