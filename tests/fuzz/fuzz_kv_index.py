"""Coverage-guided fuzzing of KV events from ZeroMQ frames to the index, by atheris (`pip install atheris`).

    PYTHONPATH=tests python tests/fuzz/fuzz_kv_index.py [-max_total_time=120] [CORPUS_DIR]

What is a finding is said in `kv_story`; the same is tried with hypothesis in `test_kv_story.py`.
"""

from __future__ import annotations

import sys

try:
    import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    print("skipped: atheris is not installed (pip install atheris)", file=sys.stderr)
    sys.exit(0)

with atheris.instrument_imports(include=["picker.sources", "picker.wire", "picker.prefix"]):
    from fuzz.kv_story import play

if __name__ == "__main__":
    atheris.Setup(sys.argv, play)
    atheris.Fuzz()
