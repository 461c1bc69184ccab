"""A command whose `--help` fits a screen: options in groups, and rarely used ones behind `--help-all`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

_ALL = "picker.help_all"


class GroupedCommand(click.Command):
    """groups: title -> names of options, as they are shown by `--help`; `--help-all` shows those in no group, too.

    hint: what to say to somebody who gives a word that belongs to no option.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], hint: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups
        self.hint = hint
        unknown = {name for names in groups.values() for name in names} - {name for name, _ in self._named()}
        if unknown:
            raise ValueError(f"no such options: {', '.join(sorted(unknown))}")
        self.params.append(
            click.Option(
                ["--help-all"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_show_all,
                help="Show every option and exit.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if self.hint is None or not error.message.startswith("Got unexpected extra argument"):
                raise
            raise click.UsageError(f"{error.message}\n{self.hint}", ctx) from None

    def _named(self) -> list[tuple[str, click.Parameter]]:
        return [(each.opts[-1], each) for each in self.params if isinstance(each, click.Option)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        named = dict(self._named())
        for title, names in self.groups.items():
            _section(ctx, formatter, title, [named[name] for name in names])
        grouped = {name for names in self.groups.values() for name in names}
        rest = [each for name, each in named.items() if name not in grouped and name != "--help-all"]
        if ctx.meta.get(_ALL):
            _section(ctx, formatter, "More", rest)
        else:
            formatter.write_paragraph()
            formatter.write_text(f"--help-all shows {len(rest)} more; a file (--config) can say all of it and more.")


def _section(
    ctx: click.Context, formatter: click.HelpFormatter, title: str, options: Sequence[click.Parameter]
) -> None:
    records = [record for each in options if (record := each.get_help_record(ctx)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)


def _show_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()
