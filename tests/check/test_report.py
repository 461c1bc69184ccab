"""What is written about a run."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from picker.check import report
from picker.check.verdict import Level, Outcome, Tier, Verdict


def verdict(name: str, outcome: Outcome, why: str = "", variant: str = "") -> Verdict:
    return Verdict(
        name, Tier.T1, Level.MUST, "Be good.", "practice", variant, outcome, why, ("a frame",), ("another",), 0.25
    )


VERDICTS = [
    verdict("A-1.good", Outcome.PASS),
    verdict("A-1.bad", Outcome.FAIL, "it was <not>\x00 | good", "original_dst"),
    verdict("A-1.unseen", Outcome.SKIP, "no pool"),
    verdict("A-1.broken", Outcome.ERROR, "KeyError"),
]


def document() -> report.Json:
    return report.document(VERDICTS, subject="127.0.0.1:9002", envoy=["1.40.0"], seed=7)


def test_results_count_what_was_not_exercised_apart_from_what_passed() -> None:
    run = document()
    assert [run[key] for key in ("passed", "failed", "skipped", "errors")] == [1, 1, 1, 1]


def test_a_result_has_its_evidence() -> None:
    results = json.loads(json.dumps(document()))["results"]
    assert results[1] == {
        "id": "A-1.bad",
        "variant": "original_dst",
        "tier": "T1",
        "level": "must",
        "requirement": "Be good.",
        "source": "practice",
        "sent": ["a frame"],
        "received": ["another"],
        "verdict": "fail",
        "why": "it was <not>\x00 | good",
        "seconds": 0.25,
    }


def test_junit_tells_failures_errors_and_skips_apart() -> None:
    suite = ElementTree.fromstring(report.junit(VERDICTS)).find("testsuite")
    assert suite is not None
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    cases = {case.get("name"): [child.tag for child in case] for case in suite}
    assert cases["A-1.bad[original_dst]"] == ["failure", "system-out"]
    assert cases["A-1.good"] == ["system-out"]


def test_the_three_files_are_written(tmp_path: Path) -> None:
    report.write(tmp_path / "new", VERDICTS, document())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["junit.xml", "report.md", "results.json"]
    page = (tmp_path / "new" / "report.md").read_text()
    assert "1 passed, 1 failed, 1 not exercised, 1 broken" in page
    assert "> a frame" in page
