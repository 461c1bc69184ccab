"""A measured run in a file: the row of `picker load --json`, where it comes from, and every request.

One JSON object. Requests are columns of equal length, times in microsecond steps; endpoints and errors are numbers
into lists of names, so that a hundred thousand requests stay some megabytes. Prompts and answers are never in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from picker.errors import ConfigError
from picker.load.measured import Measured, Origin, Requests, Stage

FORMAT = "picker-load/1"
_TIMES = ("intended", "sent", "first", "ended", "longest_gap")
_COUNTS = ("conversation", "turn", "prompt_tokens", "output_tokens")
_ABOUT = ("workload", "time_scale", "planned", "cancelled", "processes", "rate", "gaps", "notes")


def dump(measured: Measured) -> str:
    """The file's text."""
    about = {name: getattr(measured, name) for name in _ABOUT}
    about |= {"origin": dataclasses.asdict(measured.origin), "errors": dict(measured.errors)}
    about |= {"stages": [dataclasses.astuple(stage) for stage in measured.stages]}
    payload = {**measured.figures, "format": FORMAT, "about": about, "columns": _columns(measured.requests)}
    return json.dumps(payload, allow_nan=False, separators=(",", ":")) + "\n"


def _columns(requests: Requests) -> dict[str, Any]:
    endpoints, errors = list(dict.fromkeys(requests.endpoint)), list(dict.fromkeys(requests.error))
    return {
        **{name: [_number(value) for value in getattr(requests, name)] for name in _TIMES},
        **{name: getattr(requests, name).tolist() for name in _COUNTS},
        "cached_tokens": [None if math.isnan(value) else int(value) for value in requests.cached_tokens],
        "endpoints": endpoints,
        "endpoint": [endpoints.index(name) for name in requests.endpoint],
        "errors": errors,
        "error": [errors.index(error) for error in requests.error],
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)


# --- read again ----------------------------------------------------------------------------------------------


def load(path: Path) -> Measured:
    """Read a file that `dump` wrote. Raises ConfigError, which names the file and says what it should be."""
    try:
        payload: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: is not JSON ({error})") from None
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        raise ConfigError(f"{path}: is no saved run: give what `picker load --save FILE` wrote")
    try:
        return _measured(payload)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"{path}: is damaged ({error!r}): give what `picker load --save FILE` wrote") from None


def _measured(payload: dict[str, Any]) -> Measured:
    about, columns = payload.pop("about"), payload.pop("columns")
    payload.pop("format")
    plain: dict[str, Any] = {name: about[name] for name in _ABOUT} | {"notes": tuple(about["notes"])}
    return Measured(
        figures=payload,
        requests=_requests(columns),
        origin=Origin(**about["origin"]),
        errors={kind: (int(count), str(words)) for kind, (count, words) in about["errors"].items()},
        stages=tuple(Stage(*stage) for stage in about["stages"]),
        **plain,
    )


def _requests(columns: dict[str, Any]) -> Requests:
    count = len(columns["intended"])
    numbers: dict[str, Any] = {name: _floats(columns[name]) for name in (*_TIMES, "cached_tokens")}
    numbers |= {name: np.array(columns[name], dtype=np.int64) for name in _COUNTS}
    names, kinds = columns["endpoints"], columns["errors"]
    endpoint = tuple(names[number] for number in columns["endpoint"])
    error = tuple(kinds[number] for number in columns["error"])
    if any(len(column) != count for column in (*numbers.values(), endpoint, error)):
        raise ValueError("columns of unequal length")
    return Requests(**numbers, endpoint=endpoint, error=error)


def _floats(values: Sequence[float | None]) -> Any:
    return np.array([np.nan if value is None else value for value in values], dtype=float)
