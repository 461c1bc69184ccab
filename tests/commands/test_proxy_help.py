"""`picker proxy --help` fits a screen, and nothing is out of reach."""

import click
import pytest
from click.testing import CliRunner

from picker.commands.grouped_help import GroupedCommand
from picker.commands.proxy import command


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(command, arguments, env={"COLUMNS": "80"})
    assert done.exit_code == 0
    return done.output


def test_it_fits_a_screen() -> None:
    page = shown("--help")
    assert len(page.splitlines()) <= 40
    assert max(map(len, page.splitlines())) <= 80


def test_everything_is_in_the_long_one() -> None:
    page = shown("--help-all")
    names = {option for each in command.params for option in each.opts} - {"--help-all"}
    assert {name for name in names if name not in page} == set()
    assert "--help-all shows" not in page


def test_a_group_of_options_that_do_not_exist_is_a_bug() -> None:
    with pytest.raises(ValueError, match="no such options: --none"):
        GroupedCommand("x", params=[click.Option(["--one"])], groups={"A": ("--one", "--none")})
