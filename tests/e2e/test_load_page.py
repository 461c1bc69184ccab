"""The page of a load run in a real browser: its content, dark mode, and a narrow window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from load.runs import failed, measured_of, record
from picker.load.measured import Stage
from picker.load.slo import Slo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium"),
]

# Answers in the page's title what a reader would see; nothing of it is in the page itself.
_PROBE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement, body = getComputedStyle(document.body);
  const drawings = [...document.querySelectorAll("svg")];
  const told = {
    wider: root.scrollWidth - innerWidth,
    ground: body.backgroundColor,
    ink: getComputedStyle(drawings[0].querySelector("text")).fill,
    empty: drawings.filter(svg => svg.getBoundingClientRect().width < 100).length,
    drawings: drawings.length,
    sections: [...document.querySelectorAll("section")].map(section => section.id).join(" "),
    columns: getComputedStyle(document.querySelector(".plots")).gridTemplateColumns.split(" ").length,
  };
  root.setAttribute("data-told", JSON.stringify(told).replaceAll('"', "'"));
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_page = pytest.importorskip(
        "picker.load.run_page",
        reason="needs matplotlib and jinja2: pip install 'picker-gateway[report]'",
        exc_type=ModuleNotFoundError,
    )
    records = [record(n / 10, 0.1 + n / 100, endpoint=f"10.0.0.{n % 4}:8000") for n in range(80)]
    run = measured_of(*records, failed(8.0), stages=(Stage(0.0, 4.0, 10.0), Stage(4.0, 9.0, 20.0)))
    path = tmp_path_factory.mktemp("page") / "run.html"
    path.write_text(run_page.render(run, Slo(ttft=0.5)) + _PROBE, encoding="utf-8")
    return path


def browse(page: Path, folder: Path, *flags: str) -> str:
    """The document as the browser has it once everything has run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder}", *flags, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


def told(document: str) -> dict[str, str]:
    found = re.search(r'data-told="{(.*?)}"', document)
    assert found, "the browser did not run the page to its end"
    return dict(re.findall(r"'(\w+)':'?([^']*?)'?(?=,'|$)", found[1]))


def test_the_browser_shows_everything_in_light(page: Path, tmp_path: Path) -> None:
    document = browse(page, tmp_path, "--window-size=1280,900")
    seen = told(document)
    assert seen["sections"] == "goodput distributions ladder time endpoints errors percentiles"
    assert (seen["drawings"], seen["empty"], seen["columns"]) == ("12", "0", "2")
    assert (seen["ground"], seen["ink"]) == ("rgb(255, 255, 255)", "rgb(28, 31, 35)")
    for words in ("Time to first token", "Requests in flight, by endpoint", "http-503", "10.0.0.3:8000", "Some CPU"):
        assert words in document


def test_dark_mode_and_a_narrow_window_are_readable(page: Path, tmp_path: Path) -> None:
    seen = told(browse(page, tmp_path, "--window-size=500,900", "--blink-settings=preferredColorScheme=0"))
    assert (seen["ground"], seen["ink"]) == ("rgb(21, 24, 28)", "rgb(232, 234, 237)")
    assert int(seen["wider"]) <= 0
    assert (seen["empty"], seen["columns"]) == ("0", "1")
