from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from picker.commands import bench, demo, load, load_compare, regret, sim, simulate
from picker.commands.numbers import POSITIVE, Finite

COMMANDS: dict[str, click.Command] = {
    "load": load.command,
    "load compare": load_compare.compare_command,
    "sim": sim.command,
    "simulate": simulate.command,
    "regret": regret.command,
    "demo": demo.command,
    **{f"bench {name}": each for name, each in bench.command.commands.items()},
}


def options(kind: type[click.ParamType[float]]) -> Iterator[tuple[str, click.Option]]:
    for name, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option) and isinstance(option.type, kind):
                yield name, option


def refused(name: str, option: click.Option, value: str) -> bool:
    ctx = click.Context(COMMANDS[name])
    try:
        option.type_cast_value(ctx, (value,) if option.multiple else value)
    except click.BadParameter:
        return True
    return False


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
def test_no_command_takes_a_number_that_is_none(value: str) -> None:
    found = [*options(click.FloatRange), *options(click.types.FloatParamType)]
    assert len(found) > 20
    assert [(name, *option.opts) for name, option in found if not refused(name, option, value)] == []


def test_no_command_takes_a_count_below_zero() -> None:
    found = [*options(click.IntRange), *options(click.types.IntParamType)]
    assert len(found) > 40
    assert [(name, *option.opts) for name, option in found if not refused(name, option, "-1")] == []


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("load", "--duration"),
        ("load", "--rate"),
        ("load", "--timeout"),
        ("sim", "--block-size"),
        ("sim", "--max-num-seqs"),
        ("sim", "--max-model-len"),
        ("sim", "--time-scale"),
        ("demo", "--duration"),
        ("bench pick", "--repeats"),
    ],
)
def test_what_would_be_nothing_is_refused(name: str, flag: str) -> None:
    (option,) = (each for each in COMMANDS[name].params if flag in each.opts)
    assert isinstance(option, click.Option)
    assert refused(name, option, "0")


def test_a_refusal_says_what_was_given() -> None:
    with pytest.raises(click.BadParameter, match="'nan' is not a finite number"):
        Finite(0).convert("nan", None, None)
    with pytest.raises(click.BadParameter, match=r"not in the range x>0"):
        POSITIVE.convert("0", None, None)
    assert POSITIVE.convert("0.5", None, None) == 0.5
