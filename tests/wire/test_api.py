"""The API's messages, read and written; and whether the generated code is that of the .proto."""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from picker.errors import WireError
from picker.exchange import RequestBody, RequestHead
from picker.prefix.blocks import BlockHasher
from picker.types import CallKind, Usage
from picker.wire import api
from picker.wire.pb import picker_pb2 as pb

ROOT = Path(__file__).parent.parent.parent
MIB = 1024 * 1024


def asked(**fields: Any) -> api.Asked:
    return api.asked(pb.PickRequest(**fields).SerializeToString(), block_bytes=256, most_bytes=MIB)


def features(**fields: Any) -> Any:
    call = asked(features=pb.Features(**fields)).call
    assert call is not None
    return call


def test_a_body_becomes_what_an_exchange_reads() -> None:
    http = pb.HttpRequest(path="/v1/completions", body=b"{}", headers={"X-Session-Id": "s"})
    read = asked(http=http, subset=[" [FD00:0::1]:8000 "], exclude=["a"], reports_first_token=True)
    head = RequestHead(
        "POST", "/v1/completions", {"x-session-id": "s"}, False, frozenset({"[fd00::1]:8000"}), followed=True
    )
    assert read.events == (head, RequestBody(b"{}", end=True))
    assert (read.call, read.exclude) == (None, frozenset({"a"}))


def test_no_subset_is_all_endpoints() -> None:
    [head] = asked(features=pb.Features()).events
    assert isinstance(head, RequestHead)
    assert head.subset is None


def test_features_become_a_call() -> None:
    call = features(model="m", prompt=b"abc", max_tokens=0, priority=-3, session="s", cache_salt="salt")
    assert (call.kind, call.model, call.prompt, call.extra_bytes) == (CallKind.OTHER, "m", b"abc", 0)
    assert (call.max_tokens, call.priority, call.session, call.salt) == (0, -3, "s", "salt")
    assert features().max_tokens is None
    assert (features().model, features().session, features().salt) == (None, None, None)


@pytest.mark.parametrize(
    ("given_", "prompt", "extra", "tokens"),
    [
        ({}, 0, 0, None),
        ({"prompt_bytes": 4000}, 0, 4000, None),
        ({"prompt_tokens": 1000}, 0, 0, 1000),
        ({"prompt": b"x" * 1000, "prompt_bytes": 4000}, 1000, 3000, None),
        ({"prompt": b"x" * 1000, "prompt_tokens": 1000}, 1000, 3000, 250),
        ({"prompt": b"x" * 1000, "prompt_bytes": 10}, 1000, 0, None),
        ({"blocks": pb.BlockHashes(hashes=range(50), block_tokens=16), "prompt_tokens": 1000}, 3072, 928, 768),
        ({"blocks": pb.BlockHashes(hashes=range(4), block_bytes=256)}, 1024, 0, None),
        ({"blocks": pb.BlockHashes(hashes=range(3), block_tokens=16)}, 0, 192, None),
    ],
)
def test_sizes_are_those_of_the_whole_prompt(
    given_: dict[str, Any], prompt: int, extra: int, tokens: int | None
) -> None:
    call = features(**given_)
    assert (len(call.prompt), call.extra_bytes, call.prompt_tokens) == (prompt, extra, tokens)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2000),
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.integers(0, 30),
    st.sampled_from([4, 8, 64, 256]),
)
def test_blocks_agree_as_far_as_the_gateways_do(size: int, hashes: list[int], common: int, block_bytes: int) -> None:
    other = [*hashes[:common], *(hash_ ^ 1 for hash_ in hashes[common:])]
    texts = []
    for each in (hashes, other):
        message = pb.PickRequest(features=pb.Features(blocks=pb.BlockHashes(hashes=each, block_bytes=size)))
        call = api.asked(message.SerializeToString(), block_bytes=block_bytes, most_bytes=MIB).call
        assert call is not None
        texts.append(call.prompt)
    hasher = BlockHasher(b"secret", block_bytes)
    ours, theirs = (hasher.hash(text, root=1).tolist() for text in texts)
    shared = min(common, len(hashes)) * size // block_bytes
    assert len(ours) == len(hashes) * size // block_bytes
    assert ours[:shared] == theirs[:shared]
    assert all(mine != yours for mine, yours in zip(ours[shared:], theirs[shared:], strict=True))


def test_hashes_are_no_text() -> None:
    call = features(blocks=pb.BlockHashes(hashes=[0] * 20, block_tokens=16))
    with pytest.raises(UnicodeDecodeError):
        call.prompt.decode()
    assert call.salt != features(prompt=call.prompt).salt


@pytest.mark.parametrize(
    "blocks",
    [
        pb.BlockHashes(hashes=range(100), block_tokens=2**31),
        pb.BlockHashes(hashes=range(100), block_bytes=2**32 - 1),
    ],
)
def test_a_claim_without_measure_is_refused(blocks: Any) -> None:
    with pytest.raises(WireError, match="beyond the limit"):
        features(blocks=blocks)
    with pytest.raises(WireError, match="beyond the limit"):
        features(prompt=b"x" * (MIB + 1))


def test_an_outcome_is_read() -> None:
    usage = pb.Usage(prompt_tokens=3, completion_tokens=2)
    message = pb.Outcome(pick_id="1-x", finished=pb.Finished(usage=usage))
    assert api.told(message.SerializeToString()) == ("1-x", api.Ended(0, Usage(3, 2, None)))
    message = pb.Outcome(pick_id="1-x", started=pb.Started(status=200))
    assert api.told(message.SerializeToString()) == ("1-x", api.Started(200, None))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (lambda: api.asked(data, block_bytes=256, most_bytes=MIB), lambda: api.told(data)):
        try:
            read()
        except WireError:
            pass


def test_what_is_wrong_fits_a_status() -> None:
    """`wire.http2` sends forty bytes of a message."""
    paths = [ROOT / "src/picker" / name for name in ("wire/api.py", "frontends/api.py", "frontends/api_keys.py")]
    calls = [node for path in paths for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    said = [
        each.value
        for call in calls
        if ast.unparse(call.func) in ("WireError", "call.end", "end")
        for each in call.args
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]
    assert len(said) > 8
    assert [text for text in said if len(text) > 40] == []


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_generated_code_is_that_of_the_proto() -> None:
    generator = _generator()
    line = generator.mark(generator.SOURCE.read_bytes())
    for name in ("picker_pb2.py", "picker_pb2.pyi"):
        text = (generator.TARGET / name).read_text(encoding="utf-8")
        assert line in text, f"{name} is stale: run proto/generate.py, which says how"


def test_the_compiler_would_make_the_same() -> None:
    try:
        found = importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != "1.74.0":
        pytest.skip(f"the compiler that made it is not here ({found}): pip install grpcio-tools==1.74.0")
    generator = _generator()
    for name, text in generator.generate(generator.SOURCE).items():
        assert (generator.TARGET / name).read_text(encoding="utf-8") == text
