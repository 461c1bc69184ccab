"""What a real server made of the script, kept beside the tests: for comparisons where there is no real server.

Owns the file's format and the making of it: `python -m real_vllm.recording` records anew. A step has its answer's
text, with which the script goes on wherever it is played, and its token counts; batches are the published payloads.
"""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from real_vllm.install import home
from real_vllm.listener import replay
from real_vllm.pod import new_pod
from real_vllm.script import Answer, Step, play, script
from real_vllm.tiny_model import write_model

FILE = Path(__file__).parent / "recordings" / "vllm-0.32.0-block-32.json"
_STAMP = slice(2, 10)  # a batch is an array (1 byte) that begins with a float64 (1 + 8): when it was made


@dataclass(frozen=True, slots=True)
class Recorded:
    """One step: the answer's text, and how many of the prompt's tokens there were and were cached."""

    name: str
    text: str | None
    prompt: int | None
    cached: int | None


@dataclass(frozen=True, slots=True)
class Recording:
    """steps: of the whole script. batches: msgpack payloads in order, without the instants they were made at."""

    steps: list[Recorded]
    batches: list[bytes]


def load() -> Recording:
    """The recording that is kept."""
    content = json.loads(FILE.read_text())
    steps = [Recorded(**step) for step in content["steps"]]
    return Recording(steps, [base64.b64decode(batch) for batch in content["batches"]])


def untimed(payload: bytes) -> bytes:
    """A batch's payload with its instant set to zero: the rest depends on the requests alone."""
    return payload[: _STAMP.start] + bytes(8) + payload[_STAMP.stop :]


async def perform(ask: Callable[[Step], Awaitable[Answer]], recording: Recording) -> list[Recorded]:
    """Play the script with the recorded answers' texts and say what these requests came to with `ask`."""
    steps, results = script(), []
    step = next(steps)
    for was in recording.steps:
        results.append(_recorded(step, await ask(step)))
        try:
            step = steps.send(_spoken(step, was))
        except StopIteration:
            break
    return results


def record() -> Recording:
    """Play the script to a fresh server."""
    with tempfile.TemporaryDirectory() as scratch:
        pod = new_pod(home(), write_model(Path(scratch) / "model"), Path(scratch), "pod")
        pod.start()
        try:
            pod.wait()
            with httpx.Client(base_url=pod.url, timeout=60.0) as client:
                steps = [_recorded(step, answer) for step, answer in play(client, script())]
            return Recording(steps, [untimed(frame.payload) for frame in replay(pod)[0]])
        finally:
            pod.stop()


def save(recording: Recording) -> None:
    """Keep it, one step and one batch to a line."""
    steps = ",\n".join(json.dumps(asdict(step), ensure_ascii=False) for step in recording.steps)
    batches = ",\n".join(json.dumps(base64.b64encode(batch).decode()) for batch in recording.batches)
    FILE.write_text(f'{{"steps": [\n{steps}\n],\n"batches": [\n{batches}\n]}}\n')


def _recorded(step: Step, answer: Answer) -> Recorded:
    text = answer.text if "choices" in answer.body else None
    return Recorded(step.name, text, (answer.usage or {}).get("prompt_tokens"), answer.cached)


def _spoken(step: Step, was: Recorded) -> Answer:
    """The recorded answer in the shape that the script reads."""
    if was.name != step.name:
        raise ValueError(f"the recording has {was.name!r} where the script has {step.name!r}: record anew")
    return Answer(200, {"choices": [{"text": was.text or ""}]})


if __name__ == "__main__":
    save(record())
