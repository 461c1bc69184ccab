"""Configurations of other projects, read as ours. One module a project; each says line by line what became of what.

Pure: values in, values and a report out. Nothing of a foreign file or command line is dropped without a line about it.
A document is what YAML makes of a file, or the list of words of a command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from picker.errors import ConfigError
from picker.imports import epp, litellm, production_stack
from picker.imports.flags import Program, after_command, command_rows, read
from picker.imports.report import Imported
from picker.imports.routers import SGLANG_ROUTER, SMG, VLLM_ROUTER


def _called(program: Program, document: Any) -> bool:
    return _is_words(document) and after_command(program, document) is not None


def _calls_production_stack(document: Any) -> bool:
    """Its command has the name of another's, too; then its own flags tell."""
    if not _is_words(document):
        return False
    own = any(word.partition("=")[0] in production_stack.OWN_FLAGS for word in document)
    return _called(production_stack.PROGRAM, document) or (_called(VLLM_ROUTER, document) and own)


def _read_words(program: Program, document: Any) -> Imported:
    if not _is_words(document):
        raise ConfigError(f"expected a command line of {program.name}, or a script with one")
    words = after_command(program, document)
    if words is None:  # flags alone, or behind a name that we do not know
        first = next((number for number, word in enumerate(document) if word.startswith("--")), len(document))
        words = document[first:]
    return read(program, words)


def _is_words(document: Any) -> bool:
    return isinstance(document, list) and bool(document) and all(isinstance(word, str) for word in document)


# name of --from -> (whether a document is one, how it is read)
IMPORTERS: Mapping[str, tuple[Callable[[Any], bool], Callable[[Any], Imported]]] = {
    "epp": (epp.is_one, epp.read),
    "litellm": (litellm.is_one, litellm.read),
    "production-stack": (_calls_production_stack, partial(_read_words, production_stack.PROGRAM)),
    **{
        program.name: (partial(_called, program), partial(_read_words, program))
        for program in (VLLM_ROUTER, SGLANG_ROUTER, SMG)
    },
}


def import_text(text: str, project: str | None = None) -> Imported:
    """A foreign configuration, of that project or of the one that it looks like; raises ConfigError."""
    return import_document(parse(text), project)


def import_words(words: Sequence[str], project: str | None = None) -> Imported:
    """A foreign command line, word by word, with or without the name of its program; raises ConfigError."""
    return import_document(list(words), project)


def import_document(document: Any, project: str | None = None) -> Imported:
    """The same of what was parsed before; see `parse`."""
    project = project or recognise(document)
    if project is None:
        raise ConfigError(f"this is no configuration of {', '.join(IMPORTERS)}: say whose with --from")
    return IMPORTERS[project][1](document)


def recognise(document: Any) -> str | None:
    """Whose configuration a parsed document is, None where it is nobody's that we know."""
    return next((name for name, (is_one, _) in IMPORTERS.items() if is_one(document)), None)


def parse(text: str) -> Any:
    """A document: of a YAML file, else the words of the command in a script."""
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        if (words := _command(text)) is not None:
            return words
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None
    return document if isinstance(document, dict | list) else _command(text) or document


def _command(text: str) -> list[str] | None:
    """The command in a script that we know, else the first with flags."""
    rows = command_rows(text)
    return next((row for row in rows if recognise(row) is not None), rows[0] if rows else None)
