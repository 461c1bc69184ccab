"""Numbers on a command line: what Click's own types let through, such as nan and inf, is refused."""

from __future__ import annotations

import math
from typing import Any

import click


class Finite(click.FloatRange):
    """A finite number within bounds."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


POSITIVE = Finite(0, min_open=True)
AT_LEAST_ONE = click.IntRange(1)
# What random generators take.
SEED = click.IntRange(0)
PORT = click.IntRange(0, 65_535)
