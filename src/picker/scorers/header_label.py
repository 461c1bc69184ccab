"""Prefers endpoints with a label that is what a header of the request says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from picker.core.profile import header, labels
from picker.core.view import PoolView
from picker.types import Request, ScoreArray


@dataclass(frozen=True, slots=True)
class HeaderLabel:
    """1 where the endpoint's label equals the request's header, else 0 (llm-d's `header-label-affinity-scorer`)."""

    header_name: str = ""
    label_key: str = ""
    name: str = "header-label-affinity-scorer"

    @property
    def headers(self) -> tuple[str, ...]:
        """The request headers it looks at."""
        return (self.header_name.lower(),) if self.header_name else ()

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        wanted = header(request, self.header_name)
        if wanted is None:
            return np.zeros(view.n, dtype=np.float32)
        return np.array([label == wanted for label in labels(view, self.label_key)], dtype=np.float32)
