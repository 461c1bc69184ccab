from __future__ import annotations

import itertools

from picker.sim.bounds import REFERENCES
from picker.sim.policies import POLICIES
from picker.sim.report.palette import Palette

NAMES = [*POLICIES, *REFERENCES]


def brightness(colour: str) -> float:
    """Relative luminance, 0..1, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: str, ground: str) -> float:
    low, high = sorted((brightness(colour), brightness(ground)))
    return (high + 0.05) / (low + 0.05)


def test_no_two_policies_look_alike_even_without_colour() -> None:
    palette = Palette(NAMES)
    shapes = [(palette[name].marker, palette[name].dash) for name in NAMES]
    assert len(set(shapes)) == len(NAMES)
    assert len({palette[name].light for name in POLICIES}) == len(POLICIES)


def test_lines_stand_out_on_light_and_on_dark_pages() -> None:
    palette = Palette([*NAMES, "new", "newer"])
    for name in [*NAMES, "new", "newer"]:
        assert contrast(palette[name].light, "#ffffff") >= 3.0, name
        assert contrast(palette[name].dark, "#15181c") >= 3.0, name


def test_picker_alone_is_strong_and_looks_the_same_everywhere() -> None:
    few, many = Palette(["picker"]), Palette(NAMES)
    assert few["picker"] == many["picker"]
    assert [name for name in NAMES if many[name].strong] == ["picker"]


def test_policies_we_do_not_know_have_looks_of_their_own() -> None:
    palette = Palette(["one", "other"])
    assert palette["one"] != palette["other"]


def test_stand_ins_become_the_colours_of_the_style_sheet() -> None:
    palette = Palette(NAMES)
    drawn = " ".join(palette.stand_in(name) for name in NAMES)
    assert palette.coloured(drawn).split() == [f"var(--policy-{n})" for n in range(len(NAMES))]
    assert all(a != b for a, b in itertools.pairwise(palette.properties(dark=dark) for dark in (False, True)))
