"""The `picker` command. Each subcommand lives in `picker.commands` and is imported only when it is called."""

from __future__ import annotations

import importlib
import sys
import traceback

import click

from picker import __version__
from picker.errors import ConfigError

# name -> (module under picker.commands, one line for --help)
COMMANDS = {
    "demo": ("demo", "Simulated vLLM pods behind a real Envoy: cache-unaware routing against picker."),
    "proxy": ("proxy", "Standalone reverse proxy in front of vLLM servers."),
    "epp": ("epp", "Envoy ext-proc service: an endpoint picker."),
    "sim": ("sim", "Simulated vLLM pods over HTTP."),
    "simulate": ("simulate", "Policies against each other on modelled pods, in virtual time."),
    "regret": ("regret", "Single decisions of a policy against the best that could have been made."),
    "load": ("load", "Open-loop load against any OpenAI-compatible server."),
    "bench": ("bench", "This machine's performance figures, each against its baseline."),
    "check": ("check", "Conformance of an endpoint picker, a gateway around it and their files."),
    "config": ("config", "Show, validate or describe the configuration."),
}


class Commands(click.Group):
    """A group whose members are imported when called: `picker --help` needs no gRPC."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _ = COMMANDS[cmd_name]
        command: click.Command = importlib.import_module(f"picker.commands.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="picker")
@click.option("--verbose", is_flag=True, help="Show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """picker routes each LLM request to the endpoint where it costs least."""
    ctx.obj = {"verbose": verbose}


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 ran and the answer is bad, 2 wrong usage or configuration."""
    verbose = "--verbose" in sys.argv
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except ConfigError as error:
        _fail(str(error), 2, verbose)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except (OSError, RuntimeError) as error:
        _fail(str(error) or type(error).__name__, 1, verbose)


def _fail(message: str, status: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    click.echo(f"picker: {message}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
