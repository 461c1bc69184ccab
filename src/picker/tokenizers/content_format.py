"""Whether a chat template wants the content of a message as a string or as a list of parts.

vLLM guesses it from the template's syntax tree (`renderers/hf.py` of 0.32, `_detect_content_format`): a template that
loops over a message's content wants parts. We must guess as it guesses, so this follows it rule by rule.
Imports jinja2 at its top: import it from within functions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jinja2 import nodes


def wants_parts(tree: nodes.Template) -> bool:
    """Whether vLLM detects "openai" (parts), not "string"."""
    try:
        return next(_loops_over_content(tree), None) is not None
    except AssertionError:  # a loop into several names, where vLLM stops too
        return False


def _is_name(node: nodes.Node | None, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == name


def _is_field(node: nodes.Node, name: str, key: str) -> bool:
    match node:
        case nodes.Getitem(node=owner, arg=nodes.Const(value=value)):
            return _is_name(owner, name) and value == key
        case nodes.Getattr(node=owner, attr=attribute):
            return _is_name(owner, name) and attribute == key
    return False


def _is_or_within(node: nodes.Node, name: str, key: str | None = None) -> bool:
    """The variable (or its field) itself, filtered, tested or sliced."""
    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_or_within(node.node, name, key)
    if isinstance(node, nodes.Test):
        return _is_or_within(node.node, name, key)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _is_or_within(node.node, name, key)
    return _is_field(node, name, key) if key else _is_name(node, name)


def _names_of_messages(tree: nodes.Template) -> list[str]:
    found, related = ["messages"], deque(["messages"])
    while related:
        name = related.popleft()
        for assign in tree.find_all(nodes.Assign):
            if not _is_or_within(assign.node, name):
                continue
            assert isinstance(assign.target, nodes.Name)
            found.append(assign.target.name)
            if assign.target.name not in (name, *related) and len(found) < 100:
                related.append(assign.target.name)
    return found


def _names_of_a_message(tree: nodes.Template) -> list[str]:
    messages = _names_of_messages(tree)
    found = []
    for loop in tree.find_all(nodes.For):
        if any(_is_or_within(loop.iter, name) for name in messages):
            assert isinstance(loop.target, nodes.Name)
            found.append(loop.target.name)
    return found


def _parameters_of_content(tree: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    """Parameters of a macro that are given a message's content somewhere."""
    names = [argument.name for argument in macro.args]
    found = set()
    for call in tree.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given = [*zip(names, call.args, strict=False), *((each.key, each.value) for each in call.kwargs)]
        for name, value in given:
            if name in names and any(_is_or_within(value, message, "content") for message in messages):
                found.add(name)
    return found


def _loops_over_content(tree: nodes.Template) -> Iterator[nodes.For]:
    messages = _names_of_a_message(tree)
    in_macros: dict[int, set[str]] = {}
    for macro in tree.find_all(nodes.Macro):
        parameters = _parameters_of_content(tree, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros[id(loop)] = parameters or in_macros.get(id(loop), set())
    for loop in tree.find_all(nodes.For):
        names = in_macros.get(id(loop), {"content"})
        over_content = any(_is_or_within(loop.iter, name, "content") for name in messages)
        if over_content or (isinstance(loop.iter, nodes.Name) and loop.iter.name in names):
            assert isinstance(loop.target, nodes.Name)
            yield loop
