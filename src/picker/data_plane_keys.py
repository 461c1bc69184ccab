"""Which key a request bears on its way through Envoy: that of the endpoint it goes to, else what its client shows.

Owns the filters that see to it, and where they find an endpoint's key: with what Envoy knows of the endpoint, which
changes while it runs. Envoy may try several endpoints for one request, and has one head for all of these tries: each
takes out what the one before has put in.
"""

from __future__ import annotations

from picker.envoy import EXTENSIONS, Json, typed

METADATA = "picker"
"""Under what name picker tells Envoy more of an endpoint than its address."""

AUTHORIZATION = "authorization"
"""Its value there, for an endpoint that has a key."""

_FIELDS = (AUTHORIZATION, "x-api-key")
_BEARER = "Bearer "
_HEADER = "type.googleapis.com/envoy.type.matcher.v3.HttpRequestHeaderMatchInput"
_SKIP = EXTENSIONS + "filters.common.matcher.action.v3.SkipFilter"


def put_aside() -> Json:
    """A filter for requests that come: it remembers what their clients show, out of reach of any endpoint."""
    kept: list[Json] = []
    for name in _FIELDS:
        text = {"text_format_source": {"inline_string": f"%REQ({name})%"}, "omit_empty_values": True}
        kept.append({"object_key": _aside(name), "factory_key": "envoy.string", "format_string": text})
        kept[-1]["skip_if_empty"] = True
    message = "filters.http.set_filter_state.v3.Config"
    return typed("envoy.filters.http.set_filter_state", message, on_request_headers=kept)


def of_each_try(*, pass_on: bool) -> list[Json]:
    """All filters that a cluster runs once it is known where a try goes.

    pass_on: endpoints without a key get what has been `put_aside`. What is not there sets no header.
    """
    own: list[Json] = [{"remove": name} for name in _FIELDS]
    own.append(_set(AUTHORIZATION, f"%UPSTREAM_METADATA({METADATA}:{AUTHORIZATION})%"))
    filters = [_mutation(own)]
    if pass_on:
        clients = [_set(name, f"%FILTER_STATE({_aside(name)}:PLAIN)%") for name in _FIELDS]
        filters.append(_unless_keyed(_mutation(clients)))
    return [*filters, typed("envoy.filters.http.upstream_codec", "filters.http.upstream_codec.v3.UpstreamCodec")]


def _aside(name: str) -> str:
    return f"picker.{name}"


def _set(name: str, value: str) -> Json:
    return {"append": {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}


def _mutation(mutations: list[Json]) -> Json:
    message = "filters.http.header_mutation.v3.HeaderMutation"
    return typed("envoy.filters.http.header_mutation", message, mutations={"request_mutations": mutations})


def _unless_keyed(extension: Json) -> Json:
    """The filter, for tries at endpoints without a key."""
    where = {"name": "header", "typed_config": {"@type": _HEADER, "header_name": AUTHORIZATION}}
    keyed = {"single_predicate": {"input": where, "value_match": {"prefix": _BEARER}}}
    skip = {"name": "skip", "typed_config": {"@type": _SKIP}}
    matcher = {"matcher_list": {"matchers": [{"predicate": keyed, "on_match": {"action": skip}}]}}
    fields = {"extension_config": extension, "xds_matcher": matcher}
    return typed("unless-keyed", "common.matching.v3.ExtensionWithMatcher", **fields)
