"""What a load run will ask, decided before it begins: prompts, answer lengths and pauses for given arrival times.

Pure: random generators are passed in, nothing is sent and no clock is read. Times are seconds from the start of the
run, in the time of the pods (`client` divides them where simulated pods run faster than real time).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from picker.load.arrivals import Arrivals, FloatArray, Process
from picker.load.text import Piece, Words, key

__all__ = ["Arrivals", "FloatArray", "Plan", "Planned", "Process", "Sessions", "SharedPrefix", "Turn"]

Part = Piece | Words


# --- the plan ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. text: what the user says. think: seconds from the end of the previous answer to this request.

    raw: the JSON of an OpenAI request that is sent as it is, instead.
    """

    text: tuple[Part, ...]
    max_tokens: int
    think: float = 0.0
    raw: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Planned:
    """One conversation, sent at `at`: a single request, or turns that each build on the answers before them.

    model: to ask for instead of the run's, a LoRA adapter for example.
    """

    at: float
    turns: tuple[Turn, ...]
    system: tuple[Part, ...] = ()
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a run will send, in order of `at`. source_requests: how many the trace it was made from has.

    stages: (start, end, rate) of each where the rate changes, in seconds of the plan.
    """

    name: str
    conversations: tuple[Planned, ...]
    source_requests: int | None = None
    stages: tuple[tuple[float, float, float], ...] = ()

    @property
    def requests(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    @property
    def duration(self) -> float:
        """Seconds until the last conversation begins."""
        return self.conversations[-1].at if self.conversations else 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, without the answers that later turns carry along."""
        return sum(_prompt_tokens(conversation) for conversation in self.conversations)


def _prompt_tokens(conversation: Planned) -> int:
    total, history = 0, sum(piece.tokens for piece in conversation.system)
    for turn in conversation.turns:
        history += sum(piece.tokens for piece in turn.text)
        total += history
    return total


# --- what ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Groups of prompts that begin alike: a system prompt for each group, a question of its own for each prompt.

    As inference-perf's `shared_prefix`: the groups x prompts are shuffled once and then walked round and round, so a
    prompt recurs only after all the others. The defaults are llm-d's B2B workload, scaled down by ten.
    Lengths are tokens.
    """

    groups: int = 15
    prompts: int = 5
    system_tokens: int = 6000
    question_tokens: int = 1200
    max_tokens: int = 100

    def plan(self, times: Sequence[float] | FloatArray, rng: np.random.Generator, *, seed: int) -> Plan:
        """One conversation of one turn for each of `times`; `seed` names the texts."""
        order = rng.permutation(self.groups * self.prompts)
        conversations = tuple(
            self._prompt(int(order[i % len(order)]), at=float(at), seed=seed) for i, at in enumerate(times)
        )
        return Plan(name="shared-prefix", conversations=conversations)

    def _prompt(self, number: int, *, at: float, seed: int) -> Planned:
        system = Piece(key(seed, "system", number % self.groups), self.system_tokens)
        question = Piece(key(seed, "question", number), self.question_tokens)
        return Planned(at=at, system=(system,), turns=(Turn((question,), self.max_tokens),))


@dataclass(frozen=True, slots=True)
class Sessions:
    """Chats of several turns: each begins at its time, each next turn comes `think` after the actual answer.

    system_tokens is one system prompt for all; context_tokens the mean of each session's own (log-normal, standard
    deviation 0.6 of the mean). turns: mean of a normal distribution with half of it as standard deviation, at least 1
    and at most three times the mean. think: median of a log-normal with sigma 0.7. The shape is inference-perf's
    interactive chat.
    """

    system_tokens: int = 1000
    context_tokens: int = 4000
    turns: float = 4.0
    question_tokens: int = 50
    max_tokens: int = 300
    think: float = 33.0

    def plan(self, times: Sequence[float] | FloatArray, rng: np.random.Generator, *, seed: int) -> Plan:
        """One conversation for each of `times`; `seed` names the texts."""
        conversations = tuple(self._session(i, at=float(at), rng=rng, seed=seed) for i, at in enumerate(times))
        return Plan(name="sessions", conversations=conversations)

    def _session(self, number: int, *, at: float, rng: np.random.Generator, seed: int) -> Planned:
        count = round(float(np.clip(rng.normal(self.turns, self.turns / 2), 1, 3 * self.turns)))
        thinks = rng.lognormal(np.log(max(self.think, 1e-9)), 0.7, count)
        context = Piece(key(seed, "context", number), self._context(rng))
        questions = [Piece(key(seed, "turn", number, turn), self.question_tokens) for turn in range(count)]
        turns = tuple(
            Turn((question,), self.max_tokens, think=float(think))
            for question, think in zip(questions, thinks, strict=True)
        )
        return Planned(at=at, system=(Piece(key(seed, "system"), self.system_tokens), context), turns=turns)

    def _context(self, rng: np.random.Generator) -> int:
        if self.context_tokens == 0:
            return 0
        variance = np.log(1 + 0.6**2)
        return max(1, round(float(rng.lognormal(np.log(self.context_tokens) - variance / 2, np.sqrt(variance)))))
