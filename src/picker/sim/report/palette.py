"""How a policy looks in every plot: a colour for light and for dark pages, a marker and a dash.

Hues are of Tol's muted scheme and Okabe and Ito's, which colour-blind people can tell apart, lightened or darkened to
stand out on either page; markers and dashes tell them apart without any colour.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from picker.sim.compare import OURS

# Stand-ins for the colours of text and of lines behind a plot.
INK, RULE = "#a0c000", "#a0c001"


@dataclass(frozen=True, slots=True)
class Look:
    """marker and dash: matplotlib's. strong: drawn on top of the others, and thicker."""

    light: str
    dark: str
    marker: str
    dash: str = "-"
    strong: bool = False


_LOOKS = {
    OURS: Look("#d1430b", "#ff7a3d", "o", strong=True),
    "random": Look("#8a8a8a", "#8f8f8f", "x", ":"),
    "round-robin": Look("#5f6670", "#a9b1bc", "s"),
    "least-request": Look("#9a8a1e", "#d8c860", "^"),
    "longest-prefix": Look("#882255", "#cf6f9f", "v", "--"),
    "consistent-hash": Look("#aa4499", "#d98bcc", "D", "--"),
    "llm-d-legacy": Look("#117733", "#4fb873", "P"),
    "llm-d-affinity": Look("#1f9e8c", "#5fd0bf", "X"),
    "dynamo": Look("#332288", "#9f93ee", "<", "-."),
    "sglang-cache-aware": Look("#3d8fc4", "#88ccee", ">", "-."),
    "lmetric": Look("#b0566a", "#e59aa8", "h"),
    "pooled-fcfs": Look("#222222", "#eeeeee", "", ":"),
    "floor": Look("#222222", "#eeeeee", "", "-"),
    "greedy-oracle": Look("#222222", "#eeeeee", "*", "--"),
}
_OTHERS = (
    Look("#7a5c2e", "#c9a66b", "p"),
    Look("#4f6d2f", "#a3c76d", "d"),
    Look("#6b4fa0", "#b79be0", "*"),
    Look("#2f6d6d", "#7fc4c4", "1"),
)


class Palette:
    """The looks of the policies of one page. Plots are drawn in stand-ins that the style sheet gives their colours."""

    def __init__(self, policies: Sequence[str]) -> None:
        others = itertools.cycle(_OTHERS)
        self._looks = {policy: _LOOKS.get(policy) or next(others) for policy in policies}
        self._numbers = {policy: number for number, policy in enumerate(policies)}

    def __getitem__(self, policy: str) -> Look:
        return self._looks[policy]

    def stand_in(self, policy: str) -> str:
        """A colour that stands for this policy's."""
        return f"#a0b0{self._numbers[policy]:02x}"

    def variable(self, policy: str) -> str:
        """The custom property of the style sheet that holds its colour."""
        return f"--policy-{self._numbers[policy]}"

    def coloured(self, svg: str) -> str:
        """The drawing with the style sheet's colours in place of the stand-ins."""
        for policy in self._numbers:
            svg = svg.replace(self.stand_in(policy), f"var({self.variable(policy)})")
        return svg.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")

    def properties(self, *, dark: bool) -> str:
        """The custom properties, for the style sheet."""
        looks = self._looks.items()
        return " ".join(f"{self.variable(name)}: {look.dark if dark else look.light};" for name, look in looks)
