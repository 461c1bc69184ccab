"""What is written about a run: results.json, junit.xml and a page to read. Counts and words; no checks."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

from picker import __version__
from picker.check.verdict import Outcome, Verdict

Json = dict[str, object]


def document(verdicts: Sequence[Verdict], *, subject: str, envoy: Sequence[str], seed: int) -> Json:
    """The whole run as one JSON object."""
    counts = counted(verdicts)
    return {
        "subject": subject,
        "passed": counts[Outcome.PASS],
        "failed": counts[Outcome.FAIL],
        "skipped": counts[Outcome.SKIP],
        "errors": counts[Outcome.ERROR],
        "envoy": list(envoy),
        "seed": seed,
        "version": __version__,
        "command": shlex.join(["picker", *sys.argv[1:]]),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "results": [row(verdict) for verdict in verdicts],
    }


def counted(verdicts: Sequence[Verdict]) -> Counter[Outcome]:
    return Counter(verdict.outcome for verdict in verdicts)


def row(verdict: Verdict) -> Json:
    return {
        "id": verdict.id,
        "variant": verdict.variant or None,
        "tier": verdict.tier.value,
        "level": verdict.level.value,
        "requirement": verdict.requirement,
        "source": verdict.source,
        "sent": list(verdict.sent),
        "received": list(verdict.received),
        "verdict": verdict.outcome.value,
        "why": verdict.why or None,
        "seconds": verdict.seconds,
    }


def junit(verdicts: Sequence[Verdict]) -> bytes:
    """The same for CI systems: one test case for each verdict, a suite for each tier."""
    root = Xml.Element("testsuites", name="picker check")
    for tier in sorted({verdict.tier.value for verdict in verdicts}):
        of_tier = [verdict for verdict in verdicts if verdict.tier.value == tier]
        counts = counted(of_tier)
        suite = Xml.SubElement(
            root,
            "testsuite",
            name=f"picker check {tier}",
            tests=str(len(of_tier)),
            failures=str(counts[Outcome.FAIL]),
            errors=str(counts[Outcome.ERROR]),
            skipped=str(counts[Outcome.SKIP]),
            time=f"{sum(verdict.seconds for verdict in of_tier):.3f}",
        )
        for verdict in of_tier:
            _case(suite, verdict)
    Xml.indent(root)
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True))


_ELEMENTS: Mapping[Outcome, str] = {Outcome.FAIL: "failure", Outcome.ERROR: "error", Outcome.SKIP: "skipped"}


def _case(suite: Xml.Element, verdict: Verdict) -> None:
    case = Xml.SubElement(suite, "testcase", classname=verdict.tier.value, name=verdict.name)
    case.set("time", f"{verdict.seconds:.3f}")
    if verdict.outcome in _ELEMENTS:
        Xml.SubElement(case, _ELEMENTS[verdict.outcome], message=_printable(verdict.why))
    evidence = [
        verdict.requirement,
        *(f"> {line}" for line in verdict.sent),
        *(f"< {line}" for line in verdict.received),
    ]
    Xml.SubElement(case, "system-out").text = _printable("\n".join(evidence))


def _printable(text: str) -> str:
    """XML has no place for control characters."""
    return "".join(letter for letter in text if letter >= " " or letter in "\n\t")


def page(verdicts: Sequence[Verdict], run: Json) -> str:
    """The same for people, in Markdown."""
    lines = [
        f"# Conformance of {run['subject']}",
        "",
        summary(verdicts) + ".",
        "",
        f"picker {run['version']}, {run['at']}, seed {run['seed']}"
        + (f", Envoy {', '.join(str(one) for one in _list(run['envoy']))}" if run["envoy"] else ""),
        "",
        f"    {run['command']}",
        "",
        "| id | level | requirement | verdict | why |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.level.value} | {_cell(one.requirement)} | {one.outcome.value} | {_cell(one.why)} |"
        for one in verdicts
    ]
    for one in verdicts:
        if one.outcome in (Outcome.FAIL, Outcome.ERROR):
            lines += ["", f"## {one.name}", "", one.requirement, "", f"{one.outcome.value}: {one.why}", "", "```"]
            lines += [*(f"> {line}" for line in one.sent), *(f"< {line}" for line in one.received), "```"]
    return "\n".join(lines) + "\n"


def _list(value: object) -> list[object]:
    assert isinstance(value, list)
    return value


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def summary(verdicts: Sequence[Verdict]) -> str:
    counts = counted(verdicts)
    words = {Outcome.PASS: "passed", Outcome.FAIL: "failed", Outcome.SKIP: "not exercised", Outcome.ERROR: "broken"}
    return ", ".join(f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome]) or "no checks"


def write(folder: Path, verdicts: Sequence[Verdict], run: Json) -> None:
    """results.json, junit.xml and report.md into a folder, which is made if need be. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    (folder / "junit.xml").write_bytes(junit(verdicts))
    (folder / "report.md").write_text(page(verdicts, run), encoding="utf-8")
