"""A `config.yaml` of LiteLLM's proxy, read as a configuration: the models that run on engines of one's own.

Keys are those of LiteLLM 1.109. picker routes between engines that serve the same models; what LiteLLM does besides
(providers, virtual keys, budgets, callbacks, rewriting of names) has no counterpart, and each is said to have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from picker.errors import ConfigError
from picker.imports.flags import Draft
from picker.imports.report import Fate, Imported

# Providers that are a server at `api_base`.
_OWN = ("hosted_vllm", "vllm", "openai", "text-completion-openai", "custom_openai", "openai_like", "litellm_proxy")
_SECTIONS = ("model_list", "router_settings", "litellm_settings", "general_settings", "environment_variables")
_STRATEGIES = (
    *("simple-shuffle", "least-busy", "usage-based-routing", "usage-based-routing-v2", "latency-based-routing"),
    *("cost-based-routing", "lowest-tpm-rpm", "provider-budget-routing"),
)
_LIMITS = ("rpm", "tpm", "max_parallel_requests", "max_budget", "budget_duration", "order")
_LIGHTEST, _HEAVIEST = 0.01, 100.0  # weights of endpoints here


def is_one(document: Any) -> bool:
    """Whether a parsed document is LiteLLM's: nobody else has a list of models at the top."""
    return isinstance(document, dict) and isinstance(document.get("model_list"), list)


def read(document: Any) -> Imported:
    """The configuration in picker's words, and what became of each part; raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError("a configuration of LiteLLM has keys and values at the top")
    draft, names, weights = Draft(), dict[str, list[str]](), dict[str, float]()
    for number, entry in enumerate(document.get("model_list") or []):
        _model(draft, f"model_list[{number}]", entry, names, weights)
    _rename(draft, names)
    if weights:
        listed = draft.values["endpoints"]
        draft.values["endpoints"] = [_weighed(root, weights) for root in listed]
    _settings(draft, "router_settings", document, _ROUTER)
    _settings(draft, "litellm_settings", document, _LITELLM)
    _settings(draft, "general_settings", document, _GENERAL)
    for key in document:
        if key not in _SECTIONS:
            draft.say(str(key), Fate.MISSING, "picker has nothing of the kind")
    if "environment_variables" in document:
        draft.say("environment_variables", Fate.MISSING, "set them where picker is started")
    if not draft.values.get("endpoints"):
        draft.say("model_list", Fate.MISSING, "no model runs on an engine of yours: there are no endpoints")
    return Imported("litellm", draft.values, tuple(draft.lines))


# --- models ------------------------------------------------------------------------------------------------


def _model(draft: Draft, where: str, entry: Any, names: dict[str, list[str]], weights: dict[str, float]) -> None:
    """names: of the models that clients ask for, those that engines serve by them; weights: of endpoints."""
    given = entry.get("litellm_params") if isinstance(entry, dict) else None
    if not isinstance(given, dict) or not isinstance(given.get("model"), str):
        raise ConfigError(f"{where}: litellm_params.model is missing")
    provider, _, served = given["model"].partition("/")
    base = given.get("api_base") or given.get("base_url")
    if provider not in _OWN or not served:
        draft.say(where, Fate.MISSING, f"{given['model']} is not at an engine of yours: picker knows no providers")
        return
    if not isinstance(base, str) or base.startswith("os.environ/"):
        draft.say(where, Fate.MISSING, f"{given['model']}: without api_base it is at a provider, and picker knows none")
        return
    root = _root(base)
    if root is None:
        draft.say(where, Fate.MISSING, f"api_base has a path beside /v1, which picker cannot put before others: {base}")
        return
    draft.endpoints([root], where)
    name = str(entry.get("model_name", served))
    served_by = names.setdefault(name, [])
    if served not in served_by:
        served_by.append(served)
    draft.say(where, *_naming(name, served, root))
    if "weight" in given:
        _weight(draft, f"{where}.litellm_params.weight", given["weight"], root, weights)
    _parameters(draft, f"{where}.litellm_params", given)


def _root(base: str) -> str | None:
    """The engine's root, without credentials; None where there is a path."""
    parts = urlsplit(base if "://" in base else f"http://{base}")
    if parts.path.rstrip("/") not in ("", "/v1") or parts.hostname is None:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://{host}:{port}"


def _naming(name: str, served: str, root: str) -> tuple[Fate, str]:
    if name == served:
        return Fate.SAME, f"endpoint {root}; its models are asked from it"
    if "*" in name or "*" in served:
        return Fate.PARTLY, f"endpoint {root}; names by pattern are not rewritten: clients ask for what engines serve"
    return Fate.SAME, f"endpoint {root}; models.rewrites: {name} becomes {served}"


def _rename(draft: Draft, names: Mapping[str, list[str]]) -> None:
    """Names that engines do not serve are rewritten to one that they do."""
    for name, served in names.items():
        if served != [name] and not any("*" in each for each in (name, *served)):
            draft.rewrite(name, served)


def _weight(draft: Draft, where: str, value: Any, root: str, weights: dict[str, float]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _LIGHTEST <= value <= _HEAVIEST:
        draft.say(where, Fate.MISSING, f"weights are from {_LIGHTEST} to {_HEAVIEST:g}")
        return
    weights[root] = value
    draft.say(where, Fate.PARTLY, f"endpoints: weight: {value}; the endpoint is taken for so many times as fast")


def _weighed(root: str, weights: Mapping[str, float]) -> Any:
    return {"address": root, "weight": weights[root]} if root in weights else root


def _parameters(draft: Draft, where: str, given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        match key:
            case "model" | "api_base" | "base_url" | "weight":
                pass
            case "api_key" if value in (None, "", "none", "None", "fake", "EMPTY", "dummy"):
                draft.say(f"{where}.{key}", Fate.SAME, "none is needed")
            case "api_key":
                draft.say(
                    f"{where}.{key}", Fate.PARTLY, "put it into a file and name it as the endpoint's api_key_file"
                )
            case "timeout" | "stream_timeout":
                draft.say(f"{where}.{key}", Fate.PARTLY, "for all endpoints: proxy.first_byte_timeout_s")
            case _ if key in _LIMITS:
                draft.say(f"{where}.{key}", Fate.MISSING, "load is balanced by cost, and limited by queue.max_inflight")
            case _:
                draft.say(f"{where}.{key}", Fate.MISSING, "requests are passed on as clients send them")


# --- settings ----------------------------------------------------------------------------------------------

# key -> (key of ours, fate, words), or (None, fate, words)
_Known = Mapping[str, tuple[str | None, Fate, str]]

_RETRIES = ("limits.max_attempts", Fate.PARTLY, "each on another endpoint, before the first byte")
_TIMEOUT = ("proxy.first_byte_timeout_s", Fate.PARTLY, "until a response begins")
_REDIS = (None, Fate.MISSING, "replicas tell each other what they decide (replicas.peers, replicas.redis)")
_FALLBACK = (None, Fate.MISSING, "another endpoint with the same model is tried, never another model")
_ROUTER: _Known = {
    "routing_strategy": (None, Fate.REPLACED, "policy: picker; where the prefix is cached unless waiting costs more"),
    "num_retries": _RETRIES,
    "timeout": _TIMEOUT,
    "stream_timeout": _TIMEOUT,
    "allowed_fails": ("health.eject_after", Fate.PARTLY, "faults in a row; what clients do wrong is none"),
    "cooldown_time": ("health.eject_max_s", Fate.PARTLY, "the rest begins with a second and doubles"),
    "fallbacks": _FALLBACK,
    "context_window_fallbacks": _FALLBACK,
    "content_policy_fallbacks": _FALLBACK,
    "default_fallbacks": _FALLBACK,
    "redis_host": _REDIS,
    "redis_port": _REDIS,
    "redis_password": _REDIS,
    "redis_url": _REDIS,
    "enable_pre_call_checks": (None, Fate.REPLACED, "engines without the model are never tried"),
    "retry_policy": (None, Fate.REPLACED, "retry.statuses are answers that another endpoint may better"),
}
_LITELLM: _Known = {
    "num_retries": _RETRIES,
    "request_timeout": _TIMEOUT,
    "allowed_fails": _ROUTER["allowed_fails"],
    "fallbacks": _FALLBACK,
    "context_window_fallbacks": _FALLBACK,
    "default_fallbacks": _FALLBACK,
    "drop_params": (None, Fate.MISSING, "requests are passed on as clients send them"),
    "cache": (None, Fate.MISSING, "answers are not cached; prefixes are, by the engines"),
    "cache_params": (None, Fate.MISSING, "answers are not cached; prefixes are, by the engines"),
    "callbacks": (None, Fate.MISSING, "--access-log has a JSON line for each request"),
    "success_callback": (None, Fate.MISSING, "--access-log has a JSON line for each request"),
    "failure_callback": (None, Fate.MISSING, "--access-log has a JSON line for each request"),
    "json_logs": (None, Fate.PARTLY, "--access-log has a JSON line for each request"),
    "set_verbose": (None, Fate.PARTLY, "give --log-level debug"),
}
_GENERAL: _Known = {
    "master_key": (None, Fate.PARTLY, "give clients' keys in a file (keys.file), or the only one as PICKER_API_KEY"),
    "database_url": (None, Fate.MISSING, "there is no database: keys are in keys.file"),
    "max_parallel_requests": (None, Fate.PARTLY, "keys.max_concurrent is by key"),
    "max_request_size_mb": ("limits.max_body_bytes", Fate.SAME, ""),
    "background_health_checks": (None, Fate.REPLACED, "metrics are asked every second"),
    "health_check_interval": (None, Fate.REPLACED, "metrics are asked every second"),
}
_MIB = 1024 * 1024


def _settings(draft: Draft, section: str, document: Mapping[str, Any], known: _Known) -> None:
    settings = document.get(section) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{section}: expected keys and values")
    for key, value in settings.items():
        key_of_ours, fate, says = known.get(key, (None, Fate.MISSING, "picker has nothing of the kind"))
        where = f"{section}.{key}"
        if key == "model_group_alias" and isinstance(value, dict):
            _group_aliases(draft, where, value)
            continue
        if key == "routing_strategy" and value not in _STRATEGIES:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(_STRATEGIES)}")
        if key_of_ours is None:
            draft.say(where, fate, says)
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{where}: {value!r} is not a number")
        ours = value + 1 if key == "num_retries" else round(value * _MIB) if key == "max_request_size_mb" else value
        draft.set(key_of_ours, ours)
        draft.say(where, fate, f"{key_of_ours}: {ours}" + (f"; {says}" if says else ""))


def _group_aliases(draft: Draft, where: str, aliases: Mapping[str, Any]) -> None:
    for alias, group in aliases.items():
        model = group.get("model") if isinstance(group, dict) else group
        if not isinstance(model, str):
            draft.say(f"{where}.{alias}", Fate.MISSING, "it names no model")
            continue
        targets = _targets(draft, model)
        draft.rewrite(str(alias), targets)
        draft.say(f"{where}.{alias}", Fate.SAME, f"models.rewrites: {alias} becomes {' or '.join(targets)}")


def _targets(draft: Draft, model: str) -> list[str]:
    """What a name that clients ask for has become already: rules are not applied to what rules have made."""
    rules = draft.values.get("models", {}).get("rewrites", [])
    found = [[each["modelRewrite"] for each in rule["targets"]] for rule in rules if rule["name"] == model]
    return found[0] if found else [model]
