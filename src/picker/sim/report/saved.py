"""Files that `picker simulate --json` wrote, read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from picker.errors import ConfigError

Row = dict[str, object]

_NEEDED = ("policy", "scenario", "load", "seed", "requests", "failed", "ttft_mean_s", "ttft_p95_s", "e2e_mean_s")


@dataclass(frozen=True, slots=True)
class Saved:
    """runs: of all files, in order. commands and versions: what they were made by, each once."""

    runs: list[Row]
    commands: tuple[str, ...]
    versions: tuple[str, ...]


def load(paths: Sequence[Path]) -> Saved:
    """Read and join. Raises ConfigError, which names the file and says what it should be."""
    payloads = [_payload(path) for path in paths]
    return Saved(
        [run for payload in payloads for run in payload["runs"]],
        tuple(dict.fromkeys(str(payload.get("command", "unknown")) for payload in payloads)),
        tuple(dict.fromkeys(str(payload.get("version", "unknown")) for payload in payloads)),
    )


def _payload(path: Path) -> dict[str, Any]:
    try:
        payload: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(payload, dict) or not isinstance(runs := payload.get("runs"), list) or not runs:
        raise ConfigError(f"{path}: holds no runs: give what `picker simulate --json` printed")
    for number, run in enumerate(runs):
        complaint = _complaint(run)
        if complaint:
            raise ConfigError(f"{path}: run {number + 1} {complaint}: give what `picker simulate --json` printed")
    return payload


def _complaint(run: object) -> str | None:
    """Why this is no run, as the end of a sentence about it; None when it is one."""
    if not isinstance(run, dict):
        return "is no object"
    missing = [key for key in _NEEDED if key not in run]
    if missing:
        return f"lacks {', '.join(missing)}"
    if not isinstance(run["seed"], int):
        return "has a seed that is no whole number"
    if not isinstance(run["load"], (int, float, type(None))):
        return "has a load that is no number"
    return None
