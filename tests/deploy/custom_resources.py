"""Strict schemas of the custom resources that are shipped: the fields used here, as their projects define them.

An unknown field is an error, as it is for an API server that is asked to be strict. Written after the definitions of
InferencePool v1 (Gateway API Inference Extension 1.6), Gateway API 1.6, Prometheus operator 0.93 (monitoring v1), Istio
1.30 (networking v1), Envoy Gateway (v1alpha1, August 2026), GKE's Gateway policies (networking.gke.io/v1, April 2026),
Google's managed Prometheus (monitoring v1) and llm-d's InferenceObjective v1alpha2. Rules in CEL are left to
`picker check`, which has those of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def closed(required: str = "", /, **fields: Json) -> Json:
    """An object of these fields and no others. required: names, with spaces between."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(item: Json, least: int = 1, most: int = 64) -> Json:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def one_of(*values: str) -> Json:
    return {"enum": list(values)}


NAME: Json = {"type": "string", "minLength": 1, "maxLength": 253}
TEXT: Json = {"type": "string"}
FLAG: Json = {"type": "boolean"}
PORT: Json = {"type": "integer", "minimum": 1, "maximum": 65535}
WHOLE: Json = {"type": "integer"}
HEADER: Json = {"type": "string", "pattern": r"^[A-Za-z0-9!#$%&'*+\-.^_`|~]+$", "maxLength": 256}
GATEWAY_SECONDS: Json = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
PROMETHEUS_SECONDS: Json = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}
LABEL: Json = {"type": "string", "maxLength": 63, "pattern": r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$"}
LABELS: Json = {"type": "object", "additionalProperties": LABEL}
SELECTOR = closed("matchLabels", matchLabels=LABELS | {"minProperties": 1, "maxProperties": 64})
METADATA = closed("name", name=NAME, namespace=NAME, labels=LABELS, annotations={"type": "object"})
TARGET = closed("group kind name", group=TEXT, kind=NAME, name=NAME)

_POOL = closed(
    "selector targetPorts",
    selector=SELECTOR,
    targetPorts=many(closed("number", number=PORT), most=8),
    appProtocol=one_of("http", "kubernetes.io/h2c"),
    endpointPickerRef=closed(
        "name port",
        group=TEXT,
        kind=NAME,
        name=NAME,
        port=closed("number", number=PORT),
        failureMode=one_of("FailOpen", "FailClose"),
    ),
)
_MATCH = closed(
    path=closed(type=one_of("Exact", "PathPrefix", "RegularExpression"), value=TEXT),
    headers=many(closed("name value", type=one_of("Exact", "RegularExpression"), name=HEADER, value=TEXT), most=16),
)
_REFERENCE = closed("name", group=TEXT, kind=NAME, name=NAME, namespace=NAME, port=PORT, weight=WHOLE)
_ROUTE = closed(
    parentRefs=many(closed("name", group=TEXT, kind=NAME, name=NAME, namespace=NAME, sectionName=NAME), most=32),
    hostnames=many(NAME, most=16),
    rules=many(
        closed(
            matches=many(_MATCH),
            backendRefs=many(_REFERENCE, most=16),
            timeouts=closed(request=GATEWAY_SECONDS, backendRequest=GATEWAY_SECONDS),
        ),
        most=16,
    ),
)
_GATEWAY = closed(
    "gatewayClassName listeners",
    gatewayClassName=NAME,
    listeners=many(closed("name port protocol", name=NAME, port=PORT, protocol=NAME, hostname=NAME)),
)
_SERVICE_MONITOR = closed(
    "endpoints selector",
    selector=SELECTOR,
    endpoints=many(closed(port=NAME, path=TEXT, interval=PROMETHEUS_SECONDS, scheme=one_of("http", "https"))),
)
_RULE = closed(
    "expr",
    alert=NAME,
    record=NAME,
    expr=NAME | {"maxLength": 10_000},
    labels=LABELS,
    annotations={"type": "object", "additionalProperties": TEXT},
    **{"for": PROMETHEUS_SECONDS},
)
_RULES = closed("groups", groups=many(closed("name rules", name=NAME, rules=many(_RULE))))
_TLS = closed(
    mode=one_of("DISABLE", "SIMPLE", "MUTUAL", "ISTIO_MUTUAL"),
    insecureSkipVerify=FLAG,
    caCertificates=TEXT,
    credentialName=TEXT,
    subjectAltNames=many(TEXT),
    sni=TEXT,
)
_DESTINATION = closed(
    "host", host=NAME, trafficPolicy=closed(tls=_TLS, connectionPool={"type": "object", "properties": {}})
)
_CLIENTS = closed(
    targetRefs=many(TARGET),
    headers=closed(
        earlyRequestHeaders=closed(
            remove=many(HEADER),
            removeOnMatch=many(
                closed("value", type=one_of("Exact", "Prefix", "Suffix", "RegularExpression"), value=NAME)
            ),
        )
    ),
    timeout=closed(http=closed(streamIdleTimeout=GATEWAY_SECONDS, idleTimeout=GATEWAY_SECONDS)),
)
_HEALTH = closed(
    "targetRef",
    targetRef=TARGET,
    default=closed(
        timeoutSec=WHOLE,
        checkIntervalSec=WHOLE,
        config=closed(
            type=one_of("HTTP", "GRPC"),
            httpHealthCheck=closed("portSpecification", portSpecification=one_of("USE_SERVING_PORT"), requestPath=TEXT),
            grpcHealthCheck=closed(portSpecification=one_of("USE_FIXED_PORT"), port=PORT, grpcServiceName=TEXT),
        ),
    ),
)
_BACKEND = closed("targetRef", targetRef=TARGET, default=closed(timeoutSec=WHOLE, logging=closed(enabled=FLAG)))
_POD_MONITORING = closed(
    "endpoints selector",
    selector=SELECTOR,
    endpoints=many(closed("port interval", port=NAME, path=TEXT, interval=PROMETHEUS_SECONDS)),
)
_OBJECTIVE = closed("poolRef", priority=WHOLE, poolRef=closed("name", group=TEXT, kind=NAME, name=NAME))

SPECS: Mapping[tuple[str, str], Json] = {
    ("inference.networking.k8s.io/v1", "InferencePool"): _POOL,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _ROUTE,
    ("gateway.networking.k8s.io/v1", "Gateway"): _GATEWAY,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _SERVICE_MONITOR,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _RULES,
    ("networking.istio.io/v1", "DestinationRule"): _DESTINATION,
    ("gateway.envoyproxy.io/v1alpha1", "ClientTrafficPolicy"): _CLIENTS,
    ("networking.gke.io/v1", "HealthCheckPolicy"): _HEALTH,
    ("networking.gke.io/v1", "GCPBackendPolicy"): _BACKEND,
    ("monitoring.googleapis.com/v1", "PodMonitoring"): _POD_MONITORING,
    ("llm-d.ai/v1alpha2", "InferenceObjective"): _OBJECTIVE,
}


def schema(api: str, kind: str) -> Json | None:
    """The schema of a whole object, None for kinds that are Kubernetes' own or nobody's."""
    spec = SPECS.get((api, kind))
    if spec is None:
        return None
    return closed("apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=METADATA, spec=spec)
