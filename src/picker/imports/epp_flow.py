"""The saturation detector and flow control, read as a detector and a queue of ours."""

from __future__ import annotations

from typing import Any

from picker.errors import ConfigError
from picker.imports.epp_draft import Draft, Named
from picker.imports.epp_plugins import KINDS, Part
from picker.imports.epp_schema import Band, Detector, Document, FlowControl, Plugin, quantity, seconds
from picker.imports.report import Fate

_DEFAULT_DETECTOR = "utilization-detector"
# Scraped every second, values are older than what the endpoint picker's default takes for stale.
_SCRAPE_S, _FRESH_SCRAPES = 1.0, 4.0


def read_detector(draft: Draft, document: Document) -> None:
    """The detector of the pool's saturation, which there always is one of."""
    flow = document.flow_control or FlowControl()
    reference = flow.saturation_detector or document.saturation_detector
    where = "flowControl.saturationDetector" if flow.saturation_detector else "saturationDetector"
    name = (reference.plugin_ref if reference else "") or _DEFAULT_DETECTOR
    if document.saturation_detector and document.saturation_detector.parameters:
        _old_detector(draft, document.saturation_detector)
    plugin = draft.find(name, where, known=(_DEFAULT_DETECTOR,))
    if plugin.kind.part is not Part.DETECTOR:
        raise ConfigError(f"{where}: {name!r} is no saturation detector")
    awaken(draft, plugin)
    draft.values["saturation"] = {"detector": plugin.type, "parameters": plugin.ours}


def _old_detector(draft: Draft, detector: Detector) -> None:
    """Thresholds in place of a reference are the plugin's that they later became parameters of."""
    if detector.plugin_ref or _DEFAULT_DETECTOR in draft.plugins:
        raise ConfigError(f"saturationDetector: thresholds here, or a plugin {_DEFAULT_DETECTOR} with them, not both")
    draft.add("saturationDetector", Plugin(type=_DEFAULT_DETECTOR, parameters=detector.parameters))


def awaken(draft: Draft, plugin: Named) -> None:
    """Make it patient enough for how often endpoints are scraped here."""
    stale = plugin.ours.get("stale_s")
    patience = _FRESH_SCRAPES * draft.values.get("scrape", {}).get("interval_s", _SCRAPE_S)
    if stale is None or stale >= patience:
        return
    plugin.ours["stale_s"] = patience
    if "metricsStalenessThreshold" in plugin.given:
        says = f"{stale:g} s is too short for scrapes every {patience / _FRESH_SCRAPES:g} s: {patience:g} s here"
        draft.say(f"{plugin.where}.parameters.metricsStalenessThreshold", Fate.PARTLY, says)


def read(draft: Draft, flow: FlowControl, *, gated: bool) -> None:
    """The queue. gated: whether flow control is on."""
    queue: dict[str, Any] = {}
    if flow.max_requests is not None:
        queue["size"] = quantity(flow.max_requests, "flowControl.maxRequests")
    if flow.default_request_ttl is not None:
        ttl = seconds(flow.default_request_ttl, "flowControl.defaultRequestTTL")
        queue["timeout_s"] = ttl or 86_400.0
    if gated:
        _gate(draft, queue)
    if queue:
        draft.values["queue"] = queue
    _tell_flow(draft, flow)


def _gate(draft: Draft, queue: dict[str, Any]) -> None:
    """Flow control lets requests go while the pool is not saturated; the queue here goes by endpoints."""
    saturation = draft.values["saturation"]
    where, parameters = "featureGates flowControl", saturation["parameters"]
    if saturation["detector"] == "concurrency-detector" and parameters.get("mode", "requests") == "requests":
        queue["max_inflight"] = parameters.get("requests", 100)
        says = f"requests wait here while every endpoint has {queue['max_inflight']} (queue.max_inflight)"
        draft.say(where, Fate.PARTLY, f"{says}; there, while the pool has as many times its endpoints")
    else:
        says = "requests wait in the engines, not here: set queue.max_inflight to have them wait here"
        draft.say(where, Fate.MISSING, says)


def _tell_flow(draft: Draft, flow: FlowControl) -> None:
    if flow.max_bytes is not None:
        quantity(flow.max_bytes, "flowControl.maxBytes")
        draft.say("flowControl.maxBytes", Fate.MISSING, "the queue is bounded by requests (queue.size)")
    if flow.no_endpoint_request_ttl is not None:
        seconds(flow.no_endpoint_request_ttl, "flowControl.noEndpointRequestTTL")
        says = "without endpoints requests are refused at once"
        draft.say("flowControl.noEndpointRequestTTL", Fate.MISSING, says)
    if flow.enable_eviction:
        draft.say("flowControl.enableEviction", Fate.MISSING, "running requests are not evicted")
    if flow.usage_limit_policy_plugin_ref:
        draft.find(flow.usage_limit_policy_plugin_ref, "flowControl.usageLimitPolicyPluginRef", known=KINDS)
    for where, band in _bands(flow):
        _band(draft, where, band)


def _band(draft: Draft, where: str, band: Band) -> None:
    for key, name in (
        ("fairnessPolicyRef", band.fairness_policy_ref),
        ("orderingPolicyRef", band.ordering_policy_ref),
    ):
        if name:
            draft.find(name, f"{where}.{key}", known=KINDS)
    for key, value in (("maxBytes", band.max_bytes), ("maxRequests", band.max_requests)):
        if value is not None:
            quantity(value, f"{where}.{key}")
            draft.say(f"{where}.{key}", Fate.MISSING, "the queue is bounded as a whole (queue.size)")


def _bands(flow: FlowControl) -> list[tuple[str, Band]]:
    named = [(f"flowControl.priorityBands[{number}]", band) for number, band in enumerate(flow.priority_bands or [])]
    for key, band in (
        ("defaultPriorityBand", flow.default_priority_band),
        ("defaultNegativePriorityBand", flow.default_negative_priority_band),
    ):
        if band is not None:
            named.append((f"flowControl.{key}", band))
    return named
