"""Command lines of other routers, read as configurations: words to flags, and what each flag becomes here.

A project is a table of its flags; `read` walks a command line along it. What the table does not know is reported with
the nearest flag that it does, never dropped. Values of secrets are not repeated.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from picker.errors import ConfigError
from picker.imports.report import Fate, Imported, Line

_OPERATOR = re.compile(r"[|&;]|\d?[<>]")
_PORT = re.compile(r":\d+$|/")  # or a path, which is refused elsewhere
_VARIABLE = re.compile(r"\$(\w+|\{)")


@dataclass(slots=True)
class Draft:
    """An import while it is made. values: a configuration in picker's words."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)

    def say(self, where: str, fate: Fate, says: str) -> None:
        self.lines.append(Line(where, fate, says))

    def set(self, key: str, value: Any) -> None:
        """key: dotted, as `proxy.port`."""
        *sections, name = key.split(".")
        at = self.values
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value

    def rewrite(self, alias: str, models: Sequence[str]) -> None:
        """Have requests for an alias get one of these models instead."""
        rules: list[Any] = self.values.setdefault("models", {}).setdefault("rewrites", [])
        targets = [{"modelRewrite": model} for model in models]
        rules.append({"name": alias, "matches": [{"model": {"value": alias}}], "targets": targets})

    def endpoints(self, urls: Sequence[str], where: str) -> list[Any]:
        """Add endpoints by URL; what cannot be one is reported."""
        found: list[Any] = self.values.setdefault("endpoints", [])
        for url in urls:
            root = _with_port(url.rstrip("/"))
            if root.startswith(("grpc://", "grpcs://")):
                self.say(where, Fate.MISSING, f"{url}: picker speaks HTTP to engines, not gRPC")
            elif root not in found:
                found.append(root)
        return found


def _with_port(url: str) -> str:
    """As clients of HTTP read it, without one."""
    scheme, separator, rest = url.partition("://")
    default = {"http": ":80", "https": ":443"}.get(scheme)
    return url if default is None or not rest or _PORT.search(rest) else f"{scheme}{separator}{rest}{default}"


Meaning = Callable[[Draft, str, Sequence[str]], None]
"""What becomes of a flag: (draft, the flag, its values)."""


@dataclass(frozen=True, slots=True)
class Flag:
    """arity: how many values it takes, as argparse has it: a number, "*" or "+"."""

    arity: int | str
    means: Meaning


@dataclass(frozen=True, slots=True)
class Program:
    """A project's command line. name: of --from; version: that its flags were read from.

    commands: how the program is called: words that stand together before its flags. finish: looks at the whole when all
    flags have been read.
    """

    name: str
    version: str
    commands: Sequence[tuple[str, ...]]
    flags: Mapping[str, Flag]
    finish: Callable[[Draft], None] = lambda draft: None


def read(program: Program, words: Sequence[str]) -> Imported:
    """The configuration that a command line stands for; words: without what comes before the flags."""
    draft = Draft()
    for name, values in _flags(program, words):
        flag = _find(program, name)
        if flag is None:
            draft.say(name, Fate.MISSING, f"no flag of {program.name} {program.version}{_near(name, program)}")
        elif any(_VARIABLE.search(value) for value in values):
            draft.say(name, Fate.MISSING, "its value is a variable of the shell: import it again with the value")
        else:
            flag.means(draft, name, values)
    program.finish(draft)
    return Imported(program.name, draft.values, tuple(draft.lines))


def _flags(program: Program, words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with its values; raises ConfigError for one that lacks them."""
    at = 0
    while at < len(words):
        name, given, value = words[at].partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"{words[at]!r} belongs to no flag of {program.name}")
        flag = _find(program, name)
        until = at + 1
        while until < len(words) and not words[until].startswith("--"):
            until += 1
        values = [value] if given else list(words[at + 1 : until])
        if flag is not None and isinstance(flag.arity, int) and not given:
            if len(values) < flag.arity:
                raise ConfigError(f"{name} of {program.name} lacks its value")
            until, values = at + 1 + flag.arity, values[: flag.arity]
        yield name, values
        at = at + 1 if given else until


def _find(program: Program, name: str) -> Flag | None:
    """By its name, or by a beginning that only one has: argparse takes these."""
    if name in program.flags:
        return program.flags[name]
    fitting = [flag for known, flag in program.flags.items() if known.startswith(name)]
    return fitting[0] if len(fitting) == 1 else None


def _near(name: str, program: Program) -> str:
    near = difflib.get_close_matches(name, program.flags, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# --- what flags mean ---------------------------------------------------------------------------------------


def number(text: str) -> float:
    """A number, whole where it is."""
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{text!r} is not a number") from None
    return int(value) if value.is_integer() else value


def to(key: str, convert: Callable[[str], Any] = str, fate: Fate = Fate.SAME, says: str = "") -> Meaning:
    """The value goes to this key of picker's configuration."""

    def means(draft: Draft, name: str, values: Sequence[str]) -> None:
        try:
            value = convert(values[0])
        except (ConfigError, IndexError) as error:
            raise ConfigError(f"{name}: {error}") from None
        draft.set(key, value)
        draft.say(name, fate, f"{key}: {value}" + (f"; {says}" if says else ""))

    return means


def log_level(draft: Draft, name: str, values: Sequence[str]) -> None:
    """A level of theirs, as the nearest of ours."""
    ours = _LEVELS.get(values[0].lower())
    if ours is None:
        draft.say(name, Fate.MISSING, f"log_level: {values[0]} is none of {', '.join(dict.fromkeys(_LEVELS.values()))}")
        return
    draft.set("log_level", ours)
    draft.say(name, Fate.SAME if ours == values[0] else Fate.PARTLY, f"log_level: {ours}")


_LEVELS = {
    **dict.fromkeys(("trace", "debug"), "debug"),
    "info": "info",
    **dict.fromkeys(("warn", "warning"), "warning"),
    **dict.fromkeys(("error", "critical"), "error"),
}


def is_here(says: str) -> Meaning:
    """Its work is done by something of picker's own."""
    return lambda draft, name, values: draft.say(name, Fate.REPLACED, says)


def is_partly(says: str) -> Meaning:
    return lambda draft, name, values: draft.say(name, Fate.PARTLY, says)


def is_missing(says: str) -> Meaning:
    return lambda draft, name, values: draft.say(name, Fate.MISSING, says)


def policy(known: Mapping[str, tuple[str, Fate, str]]) -> Meaning:
    """A policy by name; known: theirs -> (ours, fate, what to say)."""

    def means(draft: Draft, name: str, values: Sequence[str]) -> None:
        theirs = values[0]
        if theirs not in known:
            raise ConfigError(f"{name}: {theirs!r} is not one of {', '.join(known)}")
        ours, fate, says = known[theirs]
        draft.set("policy", ours)
        draft.say(name, fate, f"policy: {ours}; {says}")

    return means


# --- where the words are -----------------------------------------------------------------------------------


def command_rows(text: str) -> list[list[str]]:
    """The words of every command with flags in a text: a command line, or a shell script."""
    rows = []
    for row in re.sub(r"\\\r?\n", " ", text).splitlines():
        try:
            words = shlex.split(row, comments=True)
        except ValueError:
            continue
        if any(word.startswith("--") for word in words):
            rows.append(words)
    return rows


def after_command(program: Program, words: Sequence[str]) -> list[str] | None:
    """The flags behind the program's name; None where it is not called."""
    called = [word.rpartition("/")[2] for word in words]
    for command in program.commands:
        size = len(command)
        for end in range(size, len(called) + 1):
            if tuple(called[end - size : end]) == command:
                return _until_operator(words[end:])
    return None


def _until_operator(words: Sequence[str]) -> list[str]:
    """Without what the shell does beside the command: pipes, redirections, the next command."""
    end = next((number for number, word in enumerate(words) if _OPERATOR.match(word)), len(words))
    return list(words[:end])
