"""Figures of a comparison as people read them."""

from __future__ import annotations

from picker.load.report import in_words


def figure(value: float | None, unit: str) -> str:
    """unit: `s`, `share` or `/s`. A dash for what is not known."""
    match value, unit:
        case None, _:
            return "–"
        case float(), "s":
            return in_words("_s", value)
        case float(), "share":
            return f"{value:.1%}"
        case _:
            return f"{value:,.1f}"


def interval(low: float | None, high: float | None) -> str:
    return "–" if low is None or high is None else f"{low:.3f} to {high:.3f}"
