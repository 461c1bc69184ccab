"""The environment chat templates run in: Hugging Face's settings, and an end to what a template may cost.

Templates come from model repositories, and loops in them run over what clients send. Attribute access is Jinja's
sandbox's affair. Beyond that, every step (a turn of a loop, a call, a filter, a look-up) is counted and the clock is
looked at; no text or list grows past a limit. Imports jinja2 at its top: import it from within functions.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
from jinja2.compiler import CodeGenerator
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LOOK_AT_CLOCK = 256  # steps between two looks
_BITS = 4096  # of an integer's power
_OF_DICTS = frozenset(dir(dict))
_WIDE = re.compile(r"\d{5,}|\*")  # a field width that pads by tens of thousands, or one taken from an argument


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may cost: steps, seconds, and characters (or elements) of its output and of any value."""

    steps: int = 1_000_000
    seconds: float = 0.5
    size: int = 8 << 20


class TooCostly(jinja2.TemplateError):
    """A rendering went past its limits."""


class _Spent(threading.local):
    """What the rendering that runs in this thread has used."""

    steps = 0
    until = float("inf")


class _Generator(CodeGenerator):
    """Has `a ~ b` checked like every other growth."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:  # noqa: N802 - jinja's name
        self.write("environment.concatenated((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what a model wrote, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja's declaration

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders under limits. `seconds` is the clock that they are measured by, `today` the one that templates see."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Generator

    def __init__(self, limits: Limits, *, seconds: Callable[[], float], today: Callable[[], datetime]) -> None:
        extensions: list[type[jinja2.ext.Extension]] = [_Generation, jinja2.ext.loopcontrols]
        # Not optimized: folding constants would run parts of the template when it is compiled, outside the limits.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self._limits, self._seconds, self._spent = limits, seconds, _Spent()
        self._most_steps = limits.steps
        self.filters = {name: self._checked(function) for name, function in self.filters.items()}
        self.filters["replace"] = self._checked(_replace, self._replacing)
        self.filters["tojson"] = self._checked(_to_json)
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: today().strftime(form)

    def rendered(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The whole output. Raises jinja2.TemplateError for what the template refuses, TooCostly past a limit."""
        spent = self._spent
        spent.steps, spent.until = 0, self._seconds() + self._limits.seconds
        out, size = [], 0
        for piece in template.generate(**variables):
            size += len(piece)
            self._fits(size)
            out.append(piece)
        return "".join(out)

    # --- what the compiled template calls ------------------------------------------------------------------

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._step()
        # The sandbox hands out `str.format` in a wrapper of its own.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str):
            self._growing(__obj.__name__, owner, args)
        return self._sized(super().call(__context, __obj, *args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._step()
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICTS:
            return obj[attribute]  # what the sandbox finds too, after two exceptions
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "+" and type(left) is str and type(right) is str:
            return self._sized(left + right)  # nearly all there is; what follows comes to the same
        if operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > _BITS:
            raise TooCostly("a power in the chat template is too large")
        if operator == "*":
            self._multiplied(left, right)
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TooCostly("a field in the chat template is too wide")
        return self._sized(super().call_binop(context, operator, left, right))

    def concatenated(self, values: tuple[Any, ...]) -> str:
        """What `~` makes of its operands; without any it is one turn of a loop (see `_parse`)."""
        self._step()
        if not values:
            return ""
        texts = [str(value) for value in values]
        self._fits(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.body.insert(0, jinja2.nodes.ExprStmt(jinja2.nodes.Concat([])).set_lineno(loop.lineno))
        return tree

    # --- limits --------------------------------------------------------------------------------------------

    def _step(self) -> None:
        spent = self._spent
        spent.steps = steps = spent.steps + 1  # an attribute of a thread is dear
        if steps > self._most_steps:
            raise TooCostly("the chat template takes too many steps")
        if steps % _LOOK_AT_CLOCK == 0 and self._seconds() > spent.until:
            raise TooCostly("the chat template takes too long")

    def _fits(self, size: int) -> None:
        if size > self._limits.size:
            raise TooCostly("the chat template makes too much text")

    def _sized(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self._fits(len(value))
        return value

    def _multiplied(self, left: Any, right: Any) -> None:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple) and isinstance(other, int):
                self._fits(len(one) * max(other, 0))

    def _growing(self, method: str, owner: str, args: tuple[Any, ...]) -> None:
        """Methods of a string that make a longer one."""
        self._counts(args)
        if method == "replace" and len(args) >= 2:
            self._replacing(owner, *args)
        elif method == "join" and args and isinstance(args[0], list | tuple):
            self._fits(len(owner) * len(args[0]) + sum(len(each) for each in args[0] if isinstance(each, str)))
        elif method in ("format", "format_map") and _WIDE.search(owner):
            raise TooCostly("a field in the chat template is too wide")

    def _replacing(self, text: Any, old: Any, new: Any, *_count: Any) -> None:
        if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
            self._fits(len(text) + (text.count(old) if len(new) > len(old) else 0) * len(new))

    def _counts(self, args: Iterable[Any]) -> None:
        for each in args:
            if isinstance(each, int):
                self._fits(each)

    def _checked(self, function: Any, before: Callable[..., None] | None = None) -> Any:
        """A filter that counts as a step, takes no vast number and gives no vast value."""

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            self._step()
            self._counts(args)
            self._counts(kwargs.values())
            if before is not None:
                before(*args)
            return self._sized(function(*args, **kwargs))

        return checked


def undeclared(tree: jinja2.nodes.Template) -> set[str]:
    """The variables a template takes from outside."""
    return jinja2.meta.find_undeclared_variables(tree)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    return str(text).replace(str(old), str(new), -1 if count is None else count)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape what HTML cannot hold; transformers replaces it by this one."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
