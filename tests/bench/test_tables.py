"""The benchmark page shows what its results say, and nothing else."""

import json
from pathlib import Path

from bench.tables import HERE, filled, table


def test_the_page_shows_what_the_results_say() -> None:
    page = (HERE / "README.md").read_text()
    assert filled(page) == page, "python bench/tables.py writes the tables anew"


def test_a_table_is_made_from_the_file_it_names(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"p50_us": 1234.5, "mode": "lean"}]}))
    page = "before\n<!-- table: a.json mode,p50_us -->\nstale\n<!-- end -->\nafter\n"
    assert filled(page, tmp_path) == (
        "before\n<!-- table: a.json mode,p50_us -->\n"
        "| mode | p50 us |\n|---|---|\n| lean | 1,234 |\n<!-- end -->\nafter\n"
    )


def test_what_was_not_measured_is_a_dash() -> None:
    assert table([{"rss_mb": None, "chunks": 1000, "cores": 0.0418}], ["rss_mb", "chunks", "cores"]).splitlines()[
        2
    ] == ("| - | 1,000 | 0.042 |")
