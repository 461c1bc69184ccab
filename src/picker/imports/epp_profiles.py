"""Scheduling profiles and their handlers, read as profiles of ours."""

from __future__ import annotations

from typing import Any

from picker.errors import ConfigError
from picker.imports.epp_draft import Draft, Named
from picker.imports.epp_plugins import KINDS, Part
from picker.imports.epp_schema import SchedulingProfile, Weighed
from picker.imports.report import Fate

_DEFAULT_PICKER = "max-score-picker"


def read(draft: Draft, profiles: list[SchedulingProfile]) -> None:
    """The profiles, and which of them a request goes by; where there is none, one of all plugins."""
    _predictions(draft)
    names = _profiles(draft, profiles or [_whole_profile(draft)])
    _handler(draft, names)


def _predictions(draft: Draft) -> None:
    """What a producer of predictions was told counts for those who use them."""
    producers = draft.of_type("predicted-latency-producer")
    given = producers[0].given if producers else {}
    for plugin in draft.of_type("latency-scorer", "slo-headroom-tier-filter"):
        plugin.ours["tokens"] = bool(given.get("streamingMode", False))
        plugin.ours["buffer"] = float(given.get("sloBufferFactor", 1.0))


def _whole_profile(draft: Draft) -> SchedulingProfile:
    """Plugins without a profile: one of all that filter, score or pick, each of weight 1."""
    names = [plugin.name for plugin in draft.plugins.values() if plugin.kind.part.schedules]
    draft.say("schedulingProfiles", Fate.SAME, f"none is named: one of {', '.join(names) or 'nothing'}")
    return SchedulingProfile(name="default", plugins=[Weighed(plugin_ref=name) for name in names])


def _profiles(draft: Draft, profiles: list[SchedulingProfile]) -> list[str]:
    names, made = [], []
    for number, profile in enumerate(profiles):
        where = f"schedulingProfiles[{number}]"
        if not profile.name:
            raise ConfigError(f"{where}: the name is missing")
        if profile.name in names:
            raise ConfigError(f"{where}: two profiles are called {profile.name!r}")
        names.append(profile.name)
        made.append(_profile(draft, profile, where))
    draft.values["profiles"] = made
    # A data plane that takes one address must not be given a list of them.
    most = max(profile["max_endpoints"] for profile in made)
    draft.values["epp"] = {"fallbacks": most > 1}
    return names


def _profile(draft: Draft, profile: SchedulingProfile, where: str) -> dict[str, Any]:
    filters, scorers, picker = [], [], None
    for number, weighed in enumerate(profile.plugins):
        plugin = draft.find(weighed.plugin_ref, f"{where}.plugins[{number}]", known=(_DEFAULT_PICKER,))
        part, missing = plugin.kind.part, plugin.kind.fate is Fate.MISSING
        if part is Part.PICKER:
            picker = plugin
        elif part.schedules and missing:
            continue
        elif part is Part.BOTH:
            scorers.append(_scorer(plugin, weighed))
            if plugin.given.get("enableFiltering"):
                filters.append(plugin.spec)
        elif part.scores:
            scorers.append(_scorer(plugin, weighed))
        elif part.filters:
            filters.append(plugin.spec)
    chosen = picker or next(iter(draft.of(Part.PICKER)), None) or draft.find(_DEFAULT_PICKER, where, known=KINDS)
    draft.used.add(chosen.name)
    most = chosen.given.get("maxNumOfEndpoints", 1)
    return {
        "name": profile.name,
        "filters": filters,
        "scorers": scorers,
        "picker": chosen.type,
        "max_endpoints": most if isinstance(most, int) and most > 0 else 1,
    }


def _scorer(plugin: Named, weighed: Weighed) -> dict[str, Any]:
    return {**plugin.spec, "weight": 1.0 if weighed.weight is None else weighed.weight}


def _handler(draft: Draft, profiles: list[str]) -> None:
    handlers = draft.of(Part.HANDLER)
    if len(handlers) > 1:
        raise ConfigError(f"plugins: one profile handler may be named, not {' and '.join(h.name for h in handlers)}")
    type_ = handlers[0].type if handlers else "single-profile-handler"
    if not handlers and len(profiles) > 1:
        raise ConfigError("schedulingProfiles: several profiles need a profile handler, and no plugin is one")
    if type_ in ("single-profile-handler", "data-parallel-profile-handler"):
        if len(profiles) > 1:
            raise ConfigError(f"schedulingProfiles: {type_} runs one profile, and there are {len(profiles)}")
        draft.values["profile"] = profiles[0]
    elif type_ == "header-profile-handler":
        _by_header(draft, handlers[0], profiles)
    else:
        _disaggregated(draft, handlers[0], profiles)


def _by_header(draft: Draft, handler: Named, profiles: list[str]) -> None:
    default = str(handler.given.get("defaultProfile") or "decode").strip()
    if len(profiles) == 1:
        draft.values["profile"] = profiles[0]
        return
    if default not in profiles:
        raise ConfigError(f"{handler.where}.parameters.defaultProfile: no profile is called {default!r}")
    draft.values["profile"] = default
    draft.values["profile_header"] = str(handler.given.get("headerName") or "EPP-Profile").strip()


def _disaggregated(draft: Draft, handler: Named, profiles: list[str]) -> None:
    """The decode profile routes; the prefill profile waits for requests that are to be prefilled only."""
    given = handler.given
    named = given.get("profiles") or {}
    decode = str(named.get("decode") or given.get("decodeProfile") or "decode")
    prefill = str(named.get("prefill") or given.get("prefillProfile") or "prefill")
    encode = str(named.get("encode") or given.get("encodeProfile") or "encode")
    if decode not in profiles:
        raise ConfigError(f"{handler.where}: no profile is called {decode!r}, which is the one that decodes")
    draft.values["profile"] = decode
    if prefill in profiles:
        draft.values["prefill_profile"] = prefill
        says = "requests are not split: each runs whole where the decode profile sends it, and no prefiller is named"
        draft.say(f"schedulingProfiles {prefill}", Fate.PARTLY, says)
    if encode in profiles:
        draft.say(f"schedulingProfiles {encode}", Fate.MISSING, "requests are not split into encode and decode")
