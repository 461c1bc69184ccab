"""Makes src/picker/wire/pb/picker_pb2.py and its types from proto/picker/v1/picker.proto.

    python -m venv /tmp/protoc && /tmp/protoc/bin/pip install grpcio-tools==1.74.0
    /tmp/protoc/bin/python proto/generate.py

Needed by whoever changes the .proto, by nobody else: what it makes is checked in, and a test tells when it is stale.
The version is pinned because generated code refuses a protobuf library older than its compiler; this one asks for the
same as the Envoy messages that picker depends on (6.31.1).
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTO = ROOT / "proto"
SOURCE = PROTO / "picker" / "v1" / "picker.proto"
TARGET = ROOT / "src" / "picker" / "wire" / "pb"
MODULE = "picker.wire.pb.picker_pb2"


def mark(source: bytes) -> str:
    """The line that tells which source a file was made from."""
    return f"# sha256 of picker.proto: {hashlib.sha256(source).hexdigest()}\n"


def generate(source: Path) -> dict[str, str]:
    """File name -> text, as the compiler makes it, each behind its mark."""
    from grpc_tools import protoc

    line = mark(source.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        out = (f"--python_out={folder}", f"--pyi_out={folder}")
        # By its full path: programs that load several files know them by that.
        status = protoc.main(["protoc", f"-I{PROTO}", *out, str(source.relative_to(PROTO))])
        if status:
            sys.exit(status)
        made = {path.name: path.read_text(encoding="utf-8") for path in Path(folder).rglob("*_pb2.py*")}
    made = {name: line + text.replace("'picker.v1.picker_pb2'", f"'{MODULE}'") for name, text in made.items()}
    made["picker_pb2.pyi"] = "# mypy: ignore-errors\n" + made["picker_pb2.pyi"]
    return made


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    for name, text in generate(SOURCE).items():
        (TARGET / name).write_text(text, encoding="utf-8")
        print(f"wrote {(TARGET / name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
