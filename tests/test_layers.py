"""Who may import whom, stated once. Reads every module of `src/picker` and names the line that breaks a rule."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "picker"
GENERATED = "wire.pb"

NOUNS = ("types", "errors")
PURE_SIM = (
    *("sim.adapters", "sim.blocks", "sim.kernel", "sim.engine", "sim.latency", "sim.workload", "sim.sessions"),
    *("sim.cluster", "sim.policies", "sim.bounds", "sim.greedy_oracle", "sim.regret"),
)
# What Kubernetes objects mean; how they get here is for the rest of the folder.
PURE_KUBERNETES = tuple(
    f"sources.kubernetes.{name}"
    for name in ("objects", "members", "groups", "roster", "objectives", "rewrites", "overlaps", "scope", "leases")
)
PURE_REPLICAS = tuple(f"replicas.{name}" for name in ("words", "guests", "handover"))
DECIDING = (*NOUNS, "core", "prefix", "scorers")
SHELL = (
    *(*DECIDING, "wire", "rewrites", "exchange", "gate", "runtime", "tokenizers", "telemetry", "config"),
    "access_log",
)

# Room -> what of picker it may import besides itself. A room is a module or a package with all within; the longest
# name that fits is the room. What has no room of its own is a shell.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "types": (),
    "errors": (),
    "core": (*NOUNS, "prefix"),
    "prefix": NOUNS,
    "scorers": (*NOUNS, "core.view", "core.profile"),
    "wire": NOUNS,
    # Envoy's messages are translated straight into what an exchange takes and gives.
    "wire.extproc": (*NOUNS, "wire", "exchange"),
    "wire.api": (*NOUNS, "wire", "exchange"),
    # Which model a request gets instead of the one it names.
    "rewrites": (),
    "exchange": (*NOUNS, "wire", "rewrites"),
    # What front ends know of picker, wherever it decides.
    "gate": (*NOUNS, "prefix.blocks", "exchange"),
    "config": (*NOUNS, "rewrites"),
    "telemetry": NOUNS,
    "access_log": NOUNS,
    "record": NOUNS,
    "tokenizers": (*NOUNS, "prefix", "wire"),
    "runtime": tuple(room for room in SHELL if room != "config"),
    "frontends": SHELL,
    "sources": SHELL,
    **dict.fromkeys(PURE_KUBERNETES, (*NOUNS, *PURE_KUBERNETES, "sources.static", "rewrites")),
    **dict.fromkeys(PURE_SIM, (*DECIDING, *PURE_SIM)),
    "sim": (*SHELL, *PURE_SIM),
    # Several schedulers, in the words that replicas have.
    "sim.replicated": (*DECIDING, *PURE_SIM, *PURE_REPLICAS),
    "load": (*NOUNS, "wire"),
    "load.scenario": (*NOUNS, "load", "sim", *PURE_SIM),
    # Its plots look like those of `picker simulate`.
    "load.plots": (*NOUNS, "load", "sim.report"),
    # Reads frames by rules of its own: of what it checks it uses neither the wire nor the front ends.
    "check": (
        *(*NOUNS, "children", "config", "envoy", "sources.file"),
        *("sources.kubernetes.client", "sources.kubernetes.credentials"),
    ),
    "prediction_metrics": (*NOUNS, "core"),
    "metrics_names": ("telemetry",),
    "rewrite_metrics": ("metrics_names", "rewrites"),
    "metrics_compat": (*NOUNS, "core", "telemetry", "metrics_names"),
    "imports": ("errors",),
    # The bus between processes that serve together; what they run is put together elsewhere.
    "workers": (*SHELL, "frontends.als", "children"),
    "workers.frames": (*NOUNS, "wire.als", "rewrites"),
    # The bus between pickers that serve one pool.
    "replicas": SHELL,
    "replicas.words": (*NOUNS, "core"),
    "replicas.guests": (*NOUNS, "replicas.words"),
    "replicas.handover": (*NOUNS, "prefix", "replicas.words"),
    "exact_mode": (*SHELL, "sources"),
    "api_service": (*SHELL, "frontends"),
    # For programs that are not picker: it brings nothing of picker along but the messages.
    "client": ("wire.pb",),
    # Parts of the composition, each what a configuration says of one thing.
    "deciders": (*DECIDING, "config", "live_policy"),
    "discovery": (*NOUNS, "config", "gate", "sources"),
    "request_limits": (*NOUNS, "config", "exchange", "rewrites"),
    "signals": (),
    "app": (
        *(*SHELL, "prediction_metrics", "metrics_compat", "exact_mode", "api_service", "frontends", "sources"),
        *("replicas", "record", "live_policy", "rewrite_metrics", "deciders", "discovery", "request_limits", "signals"),
    ),
    "live_policy": (*NOUNS, "core"),
    "reload": (*NOUNS, "config"),
}

# Who alone may import these; everything else in the table is open to whoever lists it.
IMPORTED_ONLY_BY: dict[str, tuple[str, ...]] = {
    "app": ("commands", "__main__"),
    "commands": ("commands", "__main__"),
    "__main__": (),
}

PURE = (
    "live_policy",
    "types",
    "errors",
    "core",
    "prefix",
    "scorers",
    "wire",
    "rewrites",
    "exchange",
    "imports",
    "workers.frames",
    "sim.replicated",
    *PURE_REPLICAS,
    *PURE_SIM,
    *PURE_KUBERNETES,
)
IMPURE_MODULES = (
    *("aiohttp", "asyncio", "datetime", "grpc", "logging", "multiprocessing", "os", "random", "secrets", "select"),
    *("signal", "socket", "subprocess", "threading", "time", "uuid", "zmq"),
)
# All others are handed their generator.
OWNERS_OF_A_SEED = ("core.scheduler", "sim.cluster", "sim.policies")

MEANINGLESS = frozenset(("base", "common", "helper", "helpers", "manager", "misc", "util", "utils"))

Offence = tuple[int, str]


def modules() -> dict[str, Path]:
    """Every module by its name within picker, the package itself as ""."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if not within(name, GENERATED)}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> str | None:
    return max((room for room in MAY_IMPORT if within(module, room)), key=len, default=None)


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere; of `from x import y` it is x.y."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module, names, level):
                yield from ((node.lineno, "." * level + f"{module or ''}.{name.name}") for name in names)


def ours(name: str, known: dict[str, Path]) -> str | None:
    """The module of picker that an imported name is or belongs to; None for anybody else's."""
    if not within(name, "picker"):
        return None
    inside = name.removeprefix("picker").removeprefix(".")
    return inside if inside in known else inside.rpartition(".")[0]


def offences(module: str, source: str, known: dict[str, Path]) -> list[Offence]:
    """What this text does that the table does not allow it as this module: (line, complaint)."""
    tree = ast.parse(source)
    pure = any(within(module, room) for room in PURE)
    found: list[Offence] = []
    for line, name in imports(tree):
        target = ours(name, known)
        if name.startswith("."):
            found.append((line, "imports are absolute"))
        elif target is not None:
            found += [(line, complaint) for complaint in _forbidden(module, target)]
        elif pure and name.partition(".")[0] in IMPURE_MODULES:
            found.append((line, f"{module} is pure and must not import {name.removesuffix('.*')}"))
        elif pure and within(name, "numpy.random"):
            found.append((line, f"{module} is pure: name np.random.Generator, import nothing of numpy.random"))
    return found + (list(_global_randomness(module, tree)) if pure else [])


def _forbidden(module: str, target: str) -> Iterator[str]:
    room = room_of(module)
    allowed = target == "" or room is None or any(within(target, other) for other in (room, *MAY_IMPORT[room]))
    if not allowed:
        yield f"{module} must not import {target}: {room} may import {', '.join(MAY_IMPORT[room or ''])}"
    for guarded, importers in IMPORTED_ONLY_BY.items():
        if within(target, guarded) and not any(within(module, importer) for importer in importers):
            yield f"{module} must not import {target}: only {', '.join(importers) or 'nobody'} may"


def _global_randomness(module: str, tree: ast.AST) -> Iterator[Offence]:
    allowed = {"Generator", "default_rng"} if module in OWNERS_OF_A_SEED else {"Generator"}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Attribute(ast.Name("np" | "numpy"), "random"), name) if name not in allowed:
                yield node.lineno, f"{module} is pure and must not use np.random.{name}: take a generator"
            case ast.Call(ast.Attribute(_, "default_rng"), [], []):
                yield node.lineno, f"{module} is pure and must not use np.random.default_rng without a seed"


KNOWN = modules()


@pytest.mark.parametrize("module", [pytest.param(module, id=module or "picker") for module in KNOWN])
def test_a_module_imports_only_what_its_room_allows(module: str) -> None:
    path = KNOWN[module]
    found = offences(module, path.read_text(encoding="utf-8"), KNOWN)
    where = path.relative_to(ROOT.parent.parent)
    assert not found, "\n".join(f"{where}:{line}: {complaint}" for line, complaint in found)


@pytest.mark.parametrize("module", [pytest.param(module, id=module or "picker") for module in KNOWN])
def test_a_module_says_what_it_owns(module: str) -> None:
    tree = ast.parse(KNOWN[module].read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree), f"{KNOWN[module]} has no docstring"


def test_no_module_is_called_after_nothing() -> None:
    named = {module: set(module.replace(".", "_").split("_")) for module in KNOWN}
    assert [module for module, words in named.items() if words & MEANINGLESS] == []


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module: {
            target
            for _, name in imports(ast.parse(path.read_text(encoding="utf-8")))
            if (target := ours(name, KNOWN)) and target != module
        }
        for module, path in KNOWN.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_the_table_speaks_of_rooms_that_exist() -> None:
    assert {room for room in MAY_IMPORT if room not in KNOWN} == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("core.cost", "import time", "core.cost is pure and must not import time"),
        ("core.cost", "def f():\n    from asyncio import sleep", "core.cost is pure and must not import asyncio.sleep"),
        ("exchange", "import logging.handlers", "exchange is pure and must not import logging.handlers"),
        ("core.pick", "import numpy as np\nnp.random.seed(1)", "must not use np.random.seed"),
        ("core.pick", "import numpy as np\nr = np.random.default_rng()", "must not use np.random.default_rng"),
        ("core.scheduler", "import numpy as np\nr = np.random.default_rng()", "default_rng without a seed"),
        ("core.pick", "from numpy.random import rand", "import nothing of numpy.random"),
        ("core.pick", "from numpy import random", "import nothing of numpy.random"),
        ("core.pool", "from picker.wire import openai", "core.pool must not import wire.openai"),
        ("core.pool", "import picker.exchange", "core.pool must not import exchange"),
        ("scorers.running", "from picker.core.scheduler import Scheduler", "must not import core.scheduler"),
        ("exchange", "from picker.core.pool import Pool", "exchange must not import core.pool"),
        ("wire.sse", "from picker.exchange import Event", "wire.sse must not import exchange"),
        ("frontends.proxy", "from picker.sources import scrape", "must not import sources.scrape"),
        ("sources.file", "from picker.frontends.headers import x", "must not import frontends.headers"),
        ("runtime", "from picker.app import App", "runtime must not import app"),
        ("demo", "from picker import app", "demo must not import app: only commands, __main__ may"),
        ("app", "from picker.commands import proxy", "app must not import commands.proxy"),
        ("commands.proxy", "import picker.__main__", "must not import __main__: only nobody may"),
        ("sim.engine", "from picker.sim.pod import Pod", "sim.engine must not import sim.pod"),
        ("sim.pod", "from picker.frontends.serving import serve", "sim.pod must not import frontends.serving"),
        ("core.pool", "from . import view", "imports are absolute"),
    ],
)
def test_an_offence_is_seen(module: str, source: str, complaint: str) -> None:
    found = offences(module, source, KNOWN)
    assert found
    assert complaint in found[0][1]
    assert found[0][0] == source.count("\n") + 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core.pick", "import numpy as np\ndef f(rng: np.random.Generator) -> None: ..."),
        ("core.scheduler", "import numpy as np\nr = np.random.default_rng(1)"),
        ("core.scheduler", "from picker.prefix.approximate import ApproximateIndex"),
        ("wire.extproc", "from picker.exchange import Event"),
        ("commands.proxy", "from picker.app import App\nfrom picker.commands.options import run"),
        ("runtime", "import asyncio, logging, time"),
        ("demo", "from picker import __version__"),
    ],
)
def test_what_is_allowed_is_not_an_offence(module: str, source: str) -> None:
    assert offences(module, source, KNOWN) == []
