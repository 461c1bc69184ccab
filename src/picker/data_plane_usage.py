"""What Envoy is to read of answers while they pass: the tokens that engines have counted, for the access log to tell.

Owns the filters that do. Streams are read event by event, and held back by nobody; of other answers those that say
they are small enough, since Envoy keeps them until it has read them and refuses what is more than it may keep. What
is found, and how it is told, is `wire.told_usage`'s.
"""

from __future__ import annotations

from picker.envoy import EXTENSIONS, Json, router_filter, socket_address, typed
from picker.wire.told_usage import IN_EVENTS, IN_JSON, NAMESPACE

# Bytes of an event, which tools and log probabilities make long; what is longer is passed on unread, with a complaint.
_LONGEST_EVENT = 1024 * 1024
# Digits of the length of an answer that is read: below a mebibyte, which Envoy keeps of one unless told otherwise.
_MOST_DIGITS = 6
_CONTENT_TYPES = ("application/json", "application/json; charset=utf-8", "application/json;charset=utf-8")
_HEADER = "type.googleapis.com/envoy.type.matcher.v3.HttpResponseHeaderMatchInput"
_SKIP = EXTENSIONS + "filters.common.matcher.action.v3.SkipFilter"


def reading(kept: int) -> list[Json]:
    """Filters for all answers. Envoy 1.40 has them, 1.37 has not.

    kept: bytes that Envoy keeps of a request, which it then takes for the limit of what it keeps of an answer, too.
    """
    return [_events(), _if_small(_json(), min(_MOST_DIGITS, len(str(kept + 1)) - 1))]


def trial() -> Json:
    """A configuration that only an Envoy accepts which has them."""
    manager = typed(
        "envoy.filters.network.http_connection_manager",
        "filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix=NAMESPACE,
        route_config={},
        http_filters=[*reading(kept=2**20), router_filter()],
    )
    listener = {"address": socket_address("127.0.0.1:0"), "filter_chains": [{"filters": [manager]}]}
    return {"static_resources": {"listeners": [listener]}}


def _events() -> Json:
    rules = [{"rule": _rule(path, name)} for name, path in IN_EVENTS.items()]
    parser = typed("envoy.content_parsers.json", "content_parsers.json.v3.JsonContentParser", rules=rules)
    found = {"content_parser": parser, "max_event_size": _LONGEST_EVENT}
    message = "filters.http.sse_to_metadata.v3.SseToMetadata"
    return typed("envoy.filters.http.sse_to_metadata", message, response_rules=found)


def _json() -> Json:
    rules = [_rule(path, name) for name, path in IN_JSON.items()]
    message = "filters.http.json_to_metadata.v3.JsonToMetadata"
    found = {"rules": rules, "allow_content_types": list(_CONTENT_TYPES)}
    return typed("envoy.filters.http.json_to_metadata", message, response_rules=found)


def _rule(path: tuple[str, ...], name: str) -> Json:
    selectors = [{"key": key} for key in path]
    return {"selectors": selectors, "on_present": {"metadata_namespace": NAMESPACE, "key": name}}


def _if_small(extension: Json, digits: int) -> Json:
    """The filter, for answers whose length is told and has no more digits."""
    length = {"name": "length", "typed_config": {"@type": _HEADER, "header_name": "content-length"}}
    small = {"input": length, "value_match": {"safe_regex": {"google_re2": {}, "regex": f"[0-9]{{1,{digits}}}"}}}
    skip = {"name": "skip", "typed_config": {"@type": _SKIP}}
    large = {"predicate": {"not_matcher": {"single_predicate": small}}, "on_match": {"action": skip}}
    fields = {"extension_config": extension, "xds_matcher": {"matcher_list": {"matchers": [large]}}}
    return typed("if-small", "common.matching.v3.ExtensionWithMatcher", **fields)
