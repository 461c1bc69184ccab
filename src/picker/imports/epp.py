"""An `EndpointPickerConfig` of llm-d or of the Gateway API Inference Extension, read as a configuration of picker.

Structure, defaults and errors are the endpoint picker's: what it refuses to start with is refused here, too.
"""

from __future__ import annotations

from typing import Any

from picker.errors import ConfigError
from picker.imports import epp_flow, epp_profiles, epp_sources
from picker.imports.epp_draft import Draft
from picker.imports.epp_plugins import KINDS, Part
from picker.imports.epp_schema import (
    API_VERSIONS,
    KIND,
    DataLayer,
    Document,
    FlowControl,
    Plugin,
    SchedulingProfile,
    Weighed,
    convert,
    near,
)
from picker.imports.report import Fate, Imported

# What an empty configuration means there.
_DEFAULTS = (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0))
# Feature gates, now and formerly, and what each is here.
_GATES = {
    "flowControl": "",
    "haPopulateNonLeaderDatastore": "every replica of picker follows the pool, whether it leads or not",
    "dataLayer": "the data layer is always on",
    "prepareDataPlugins": "what plugins need is always prepared",
}


def is_one(document: Any) -> bool:
    """Whether a parsed document is an EndpointPickerConfig, by its kind and group."""
    return isinstance(document, dict) and document.get("kind") == KIND


def read(document: Any) -> Imported:
    """The configuration in picker's words, and what became of each part; raises ConfigError."""
    draft = Draft()
    whole = _with_defaults(draft, convert(document))
    _head(draft, whole)
    for number, plugin in enumerate(whole.plugins or []):
        draft.add(f"plugins[{number}]", plugin)
    gated = _gates(draft, whole.feature_gates or [])
    epp_sources.read(draft, whole.data_layer or DataLayer())
    for detector in draft.of(Part.DETECTOR):
        epp_flow.awaken(draft, detector)
    epp_profiles.read(draft, whole.scheduling_profiles or [])
    epp_flow.read_detector(draft, whole)
    epp_flow.read(draft, whole.flow_control or FlowControl(), gated=gated)
    _parsers(draft, whole)
    draft.tell_plugins()
    return Imported("epp", draft.values, tuple(draft.lines))


def _with_defaults(draft: Draft, document: Document) -> Document:
    """An empty configuration is the default one."""
    if document.plugins or document.scheduling_profiles:
        return document
    plugins = [Plugin(type=name) for name, _ in _DEFAULTS]
    weighed = [Weighed(plugin_ref=name, weight=weight) for name, weight in _DEFAULTS]
    draft.say("plugins", Fate.SAME, "none are named: the default profile, queue 2, KV cache 2, prefix 3")
    return Document(
        **{name: getattr(document, name) for name in document.__struct_fields__}
        | {"plugins": plugins, "scheduling_profiles": [SchedulingProfile(name="default", plugins=weighed)]}
    )


def _head(draft: Draft, document: Document) -> None:
    if document.api_version != API_VERSIONS[0]:
        draft.say("apiVersion", Fate.SAME, f"{document.api_version} is the older name of {API_VERSIONS[0]}")
    if document.metadata:
        draft.say("metadata", Fate.SAME, "describes the file, nothing else")


def _gates(draft: Draft, gates: list[str]) -> bool:
    """Whether flow control is on."""
    flow = False
    for number, gate in enumerate(gates):
        name, given, value = gate.partition("=")
        where = f"featureGates[{number}]"
        if name not in _GATES:
            raise ConfigError(f"{where}: there is no feature gate {name!r}{near(name, list(_GATES))}")
        if given and value not in ("true", "false"):
            raise ConfigError(f"{where}: {value!r} is neither true nor false")
        if name == "flowControl":
            flow = value != "false"
        else:
            draft.say(f"{where} {name}", Fate.REPLACED, _GATES[name])
    return flow


def _parsers(draft: Draft, document: Document) -> None:
    for number, parser in enumerate((document.request_handler and document.request_handler.parsers) or []):
        draft.find(parser.plugin_ref, f"requestHandler.parsers[{number}]", known=KINDS)
    if document.parser is not None:
        draft.find(document.parser.plugin_ref, "parser", known=KINDS)
