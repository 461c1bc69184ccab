"""Requests that carry headers, and endpoints that carry labels: what plugins of policies ask about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fakes import request
from picker.types import Endpoint, Request


def headed(headers: Mapping[str, str], request_id: int = 1, **changes: Any) -> Request:
    """A request as `fakes.request` makes it, with headers by their names in lower case."""
    return request(request_id, headers=headers, **changes)


def labelled(name: str, **labels: str) -> Endpoint:
    """An endpoint with labels; `role_` stands for the label `llm-d.ai/role`."""
    named = {"llm-d.ai/role" if key == "role_" else key: value for key, value in labels.items()}
    return Endpoint(name, f"{name}:8000", labels=named)
