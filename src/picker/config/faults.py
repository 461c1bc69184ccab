"""What is wrong with a file, said so that it can be mended: the key, its place, and the nearest valid one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

import msgspec

from picker.config.sections import Config, Part

_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>[^`]*)`(?: - at `\$\.?(?P<where>[^`]*)`)?")
_TYPES = re.compile(r"Expected `(?P<wanted>[^`]*)`, got `(?P<got>[^`]*)`")
_BOUNDS = re.compile(r"Expected `(?P<wanted>[^`|]*)(?: \| [^`]*)?` >= (?P<least>[0-9]+)")
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "keys and values",
    "null": "null",
}
_WITHIN = re.compile(r"\[[^\]]*\]")  # of a list or a table, some entry
_PLACE = re.compile(r" - at `\$\.?(?P<where>[^`]*)`")


def explain(message: str, whole: type[Part] = Config, name: str = "configuration") -> str:
    """What msgspec says of a value, with the names of this file. whole: what it was to be; name: how to call that."""
    unknown = _UNKNOWN.search(message)
    if unknown:
        where, key = unknown["where"] or "", unknown["key"]
        place = f"{where}.{key}" if where else key
        return f"{place}: unknown key{near(key, _keys_at(where, whole))}"
    place_of = _PLACE.search(message)
    where = place_of["where"] if place_of else ""
    said = _PLACE.sub("", message)
    if typed := _TYPES.fullmatch(said):
        wanted = " or ".join(_WORDS.get(each, each) for each in typed["wanted"].split(" | "))
        said = f"must be {wanted}, and is {_WORDS.get(typed['got'], typed['got'])}"
    elif bound := _BOUNDS.fullmatch(said):
        said = f"must be {_WORDS.get(bound['wanted'], bound['wanted'])}, {bound['least']} or more"
    return f"{where or name}: {said}"


def _keys_at(where: str, whole: type[Part]) -> list[str]:
    """Keys of the section at a place as msgspec names it, such as `profiles[...].filters[...]`."""
    part = whole
    for name in filter(None, _WITHIN.sub("", where).split(".")):
        types = {field.encode_name: field.type for field in msgspec.structs.fields(part)}
        part = next(_sections(types.get(name)), whole)
    return [field.encode_name for field in msgspec.structs.fields(part)]


def _sections(of: Any) -> Iterator[type[Part]]:
    """The sections among what a type is made of: lists, tables and choices of them."""
    if get_origin(of) is None and isinstance(of, type) and issubclass(of, Part):
        yield of
    for each in get_args(of):
        yield from _sections(each)


def near(word: str, words: list[str] | tuple[str, ...]) -> str:
    """To put behind a name that is not known: the one that is probably meant, else all that could be."""
    return nearest(word, words) or f"; known here: {', '.join(words)}"


def nearest(word: str, words: list[str] | tuple[str, ...]) -> str:
    """The one that is probably meant, or nothing."""
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
