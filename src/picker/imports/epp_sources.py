"""Discovery, metric sources and KV events of the data layer, read as sources of ours."""

from __future__ import annotations

from typing import Any

from picker.imports.epp_draft import Draft
from picker.imports.epp_schema import DataLayer, seconds
from picker.imports.report import Fate


def read(draft: Draft, layer: DataLayer) -> None:
    """Where endpoints, metrics and KV events come from."""
    if layer.discovery is not None:
        plugin = draft.find(layer.discovery.plugin_ref, "dataLayer.discovery")
        if plugin.type == "file-discovery" and plugin.given.get("path"):
            draft.values["endpoints_file"] = str(plugin.given["path"])
    if layer.peer_discovery or layer.cross_replica_syncer_plugin_ref or layer.cross_replica_sync_interval:
        draft.say("dataLayer", Fate.MISSING, "replicas do not share state")
    if layer.inject_defaults is False:
        draft.say("dataLayer.injectDefaults", Fate.PARTLY, "endpoints are scraped all the same")
    for number, source in enumerate(layer.sources or []):
        where = f"dataLayer.sources[{number}]"
        draft.find(source.plugin_ref, where)
        for extractor in source.extractors or []:
            draft.find(extractor.plugin_ref, f"{where}.extractors")
    _scraping(draft)
    _exactness(draft)


def _scraping(draft: Draft) -> None:
    for plugin in draft.of_type("metrics-data-source"):
        given = plugin.given
        if given.get("interval"):
            interval = seconds(str(given["interval"]), f"{plugin.where}.parameters.interval")
            draft.values["scrape"] = {"interval_s": interval}
        if given.get("path", "/metrics") not in ("/metrics", ""):
            draft.say(f"{plugin.where}.parameters.path", Fate.MISSING, "metrics are scraped from /metrics")
        if given.get("port") is not None:
            says = "metrics are scraped from the port that serves requests"
            draft.say(f"{plugin.where}.parameters.port", Fate.MISSING, says)
        if given.get("scheme", "http") != "http":
            says = "metrics are scraped by the scheme of the endpoint's address"
            draft.say(f"{plugin.where}.parameters.scheme", Fate.PARTLY, says)
    for plugin in draft.of_type("core-metrics-extractor"):
        if plugin.given.get("engineConfigs"):
            says = "metrics have the names of vLLM, SGLang or TensorRT-LLM"
            draft.say(f"{plugin.where}.parameters.engineConfigs", Fate.MISSING, says)


def _exactness(draft: Draft) -> None:
    precise = draft.of_type("precise-prefix-cache-producer", "precise-prefix-cache-scorer")
    if not precise:
        return
    exact: dict[str, Any] = {"by": "bytes"}
    for plugin in precise:
        events = plugin.given.get("kvEventsConfig") or {}
        pods = events.get("podDiscoveryConfig") or {}
        if pods.get("socketPort"):
            exact["events"] = f"tcp://{{host}}:{pods['socketPort']}"
        if pods.get("replaySocketPort"):
            exact["replay"] = f"tcp://{{host}}:{pods['replaySocketPort']}"
        if events.get("zmqEndpoint"):
            says = "engines are not waited for on an address of ours: each one's own is subscribed to"
            draft.say(f"{plugin.where}.parameters.kvEventsConfig.zmqEndpoint", Fate.MISSING, says)
    draft.values["exact"] = exact
