"""The tables of bench/README.md, made from the results they show: no figure there is typed by hand.

A table stands between `<!-- table: FILE COLUMN,COLUMN,... -->` and `<!-- end -->`; FILE, below this folder, is what
`picker bench` printed with `--json`. `python bench/tables.py` writes them anew, `--check` only says whether it would.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Columns as the JSON calls them -> as people read them.
HEADINGS = {
    "prompt_bytes": "prompt bytes",
    "requests_per_s": "requests/s",
    "picker_cpu_us_per_request": "picker CPU us",
    "envoy_cpu_us_per_request": "Envoy CPU us",
    "cpu_us_per_request": "CPU us",
    "slow_picker_cpu_us_per_request": "picker CPU us, 10 requests/s",
    "added_p50_ms": "added p50 ms",
    "added_p99_ms": "added p99 ms",
    "rss_mb": "RSS MB",
    "half_added_p99_ms": "p99 at half load ms",
    "ttft_mean_s": "TTFT mean s",
    "ttft_p95_s": "TTFT P95 s",
    "e2e_mean_s": "end to end s",
    "hit_ratio": "hit ratio",
    "pods_late_p99_s": "pods late p99 s",
    "delay_p50_ms": "delay p50 ms",
    "delay_p99_ms": "delay p99 ms",
    "cpu_us_per_chunk": "CPU us a chunk",
    "slowest_s": "slowest s",
    "p50_us": "p50 us",
    "p99_us": "p99 us",
    "hash_p50_us": "of it hashing",
    "events_per_s": "blocks/s, mixed",
    "prefill_events_per_s": "of prefills",
    "generated_events_per_s": "generated",
    "bytes_per_block": "bytes a block",
    "match_p50_us": "match 32 KB us",
    "exact_32k_p50_us": "exact 32 KB us",
    "exact_32k_tokens_p50_us": "by tokenising",
    "exact_400k_p50_us": "exact 400 KB us",
    "exact_400k_tokens_p50_us": "by tokenising",
    "us_per_scrape": "us a scrape",
    "scrapes_per_s": "scrapes/s",
    "age_p99_s": "age p99 s",
}


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Markdown: a line for each row; numbers rounded to three digits, small ones to hundredths."""
    head = "| " + " | ".join(HEADINGS.get(column, column) for column in columns) + " |"
    lines = ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(columns), *lines]) + "\n"


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float() if abs(value) >= 100:
            return f"{value:,.0f}"
        case float() if abs(value) >= 1:
            return f"{value:.1f}"
        case float():
            return f"{value:.3f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def filled(text: str, folder: Path = HERE) -> str:
    """The page with each of its tables made anew."""

    def fill(found: re.Match[str]) -> str:
        opening, file, columns, closing = found.groups()
        rows = json.loads((folder / file).read_text())["rows"]
        return opening + table(rows, columns.split(",")) + closing

    return _TABLE.sub(fill, text)


def main(arguments: Sequence[str]) -> int:
    page = HERE / "README.md"
    before = page.read_text()
    after = filled(before)
    if "--check" in arguments:
        print("the tables are what the results say" if after == before else "the tables are not what the results say")
        return int(after != before)
    page.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
