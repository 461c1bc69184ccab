"""One generate request in flight at a simulated pod: its answers, and what of them has been said so far."""

from __future__ import annotations

from picker.sim import pod_response
from picker.sim.engine import FinishedRequest
from picker.sim.pod_http import Reply, chunk
from picker.sim.pod_request import Ask
from picker.sim.pod_response import DONE, Answer, Wording
from picker.sim.tokens import BYTES_PER_TOKEN
from picker.types import Usage


class Call:
    """A request, its planned answers, the records of those that ended, and the reply they go to."""

    __slots__ = ("answers", "arrived_at", "ask", "ids", "out", "records", "reply", "report_format", "wording")

    def __init__(self, ask: Ask, answers: list[Answer], reply: Reply, wording: Wording, arrived_at: float) -> None:
        self.ask = ask
        self.answers = answers
        self.reply = reply
        self.wording = wording
        self.arrived_at = arrived_at
        self.report_format: str | None = None  # ORCA load report wanted with the answer
        self.ids: list[int] = []  # the engine's, one for each answer
        self.records: dict[int, FinishedRequest] = {}  # by answer
        self.out: list[bytes] = []  # framed events not yet written

    @property
    def complete(self) -> bool:
        return len(self.records) == len(self.answers)

    def usage(self) -> Usage:
        """Of several prompts vLLM tells the cached tokens of the last; of a stream, of the first to come."""
        first = next(iter(self.records.values())).usage
        usages = [self.records[answer.index].usage for answer in self.answers]
        cached = first.cached_tokens if self.ask.stream else usages[-1].cached_tokens
        return pod_response.total_usage(usages, self.ask.choices, cached)

    def write(self) -> None:
        """Send what has been said since the last time, in one write."""
        if self.out:
            self.reply.write(b"".join(self.out))
            self.out.clear()

    def end_stream(self) -> None:
        if self.ask.include_usage:
            self.out.append(chunk(self.wording.usage(self.usage())))
        self.out.append(chunk(DONE))
        self.reply.end(b"".join(self.out))


class Line:
    """One answer of a stream. Every token is an SSE event, and every event a chunk of its own."""

    __slots__ = ("answer", "call", "head", "said", "tail")

    def __init__(self, call: Call, answer: Answer) -> None:
        self.call = call
        self.answer = answer
        self.said = 0
        head, tail = call.wording.around(answer)
        framed = chunk(head + b" " * BYTES_PER_TOKEN + tail)
        self.head = framed[: framed.index(head) + len(head)]
        self.tail = tail + b"\r\n"

    def say(self, count: int, *, ends: bool) -> None:
        """The next `count` tokens exist; `ends`: the last of them ends the answer."""
        call, answer, out, start = self.call, self.answer, self.call.out, self.said
        if not start and (role := call.wording.role(answer)) is not None:
            out.append(chunk(role))
        self.said = start + count
        plain = self.said - 1 if ends else self.said
        if call.ask.continuous_usage or len(answer.text) < plain * BYTES_PER_TOKEN:
            out += (chunk(call.wording.token(answer, number)) for number in range(start, plain))
        else:
            for at in range(start * BYTES_PER_TOKEN, plain * BYTES_PER_TOKEN, BYTES_PER_TOKEN):
                out += (self.head, answer.text[at : at + BYTES_PER_TOKEN], self.tail)
        if ends:
            out.append(chunk(call.wording.last(answer)))


class SparseLine(Line):
    """One answer of a stream of which only every `interval` tokens are told, as with vLLM's `--stream-interval`.

    The first token goes out at once, whatever the interval, and the last does.
    """

    __slots__ = ("interval", "made")

    def __init__(self, call: Call, answer: Answer, interval: int) -> None:
        super().__init__(call, answer)
        self.interval = interval
        self.made = 0

    def say(self, count: int, *, ends: bool) -> None:
        answer, out, wording = self.answer, self.call.out, self.call.wording
        if not self.said and (role := wording.role(answer)) is not None:
            out.append(chunk(role))
        self.made += count
        plain = self.made - 1 if ends else self.made
        while plain - self.said >= (size := self.interval if self.said else 1):
            out.append(chunk(wording.some(answer, self.said, self.said + size)))
            self.said += size
        if ends:
            out.append(chunk(wording.last(answer, self.said)))
