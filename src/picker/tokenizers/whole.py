"""Full tokenisation, for comparison with matching by bytes: every token of a prompt, and no more work than is new.

The last conversations are remembered. A prompt that begins like one of them is tokenised only from the last seam before
they part. Keeps texts in memory and shows them to nobody.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import Seams

_HEAD = 256  # bytes by which a conversation is found again
_BACK = 512  # bytes before the parting in which a seam is looked for


@dataclass(frozen=True, slots=True)
class _Remembered:
    data: bytes = field(repr=False)
    ids: list[int] = field(repr=False)
    ends: list[int] = field(repr=False)


class WholeTokens:
    """Tokenises canonical texts. Any thread may call it. reused: bytes that were not tokenised again."""

    def __init__(self, tokenizer: TextTokenizer, seams: Seams, remembered: int = 32) -> None:
        self._tokenizer, self._seams, self._limit = tokenizer, seams, remembered
        self._texts: OrderedDict[tuple[bytes, int], _Remembered] = OrderedDict()
        self._lock = threading.Lock()
        self.reused = 0

    def ids(self, data: bytes) -> list[int]:
        """Ids of the whole text. Raises UnicodeDecodeError for what is not UTF-8."""
        with self._lock:
            known = [each for (head, _), each in self._texts.items() if head == data[:_HEAD]]
        common, best = max(
            ((_common(each.data, data), each) for each in known), key=lambda pair: pair[0], default=(0, None)
        )
        start = self._safe(data, common) if best is not None else 0
        kept = _index(best.ends, start) if best is not None and start else None
        if best is None or kept is None:
            start, ids, ends = 0, [], []
        else:
            ids, ends = best.ids[:kept], best.ends[:kept]
        fresh = self._tokenizer.encode(data[start:].decode())
        spelling = self._tokenizer.vocabulary.spell(fresh)
        ids = ids + fresh
        if spelling is not None:
            self._remember(data, ids, ends + (spelling.ends + start).tolist())
        self.reused += start
        return ids

    def _safe(self, data: bytes, common: int) -> int:
        """The last seam well before the parting; 0 where none is near."""
        low = _whole_character(data, common - _BACK)
        high = _whole_character(data, common - self._seams.margin)
        if high <= low:
            return 0
        text = data[low:high].decode()
        places, _ = self._seams.in_text(text)
        inner = [place for place in places if self._seams.margin <= place < len(text)]
        return low + len(text[: inner[-1]].encode()) if inner else 0

    def _remember(self, data: bytes, ids: list[int], ends: list[int]) -> None:
        with self._lock:
            # One prompt of a conversation follows another; the number keeps those that only begin alike.
            self._texts[data[:_HEAD], hash(data[-_HEAD:])] = _Remembered(data, ids, ends)
            while len(self._texts) > self._limit:
                self._texts.popitem(last=False)


def _common(one: bytes, other: bytes) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    differ = np.frombuffer(one, np.uint8, size) != np.frombuffer(other, np.uint8, size)
    return int(differ.argmax()) if differ.any() else size


def _index(ends: list[int], position: int) -> int | None:
    """How many tokens end at or before a position, if one ends there."""
    place = int(np.searchsorted(ends, position))
    return place + 1 if place < len(ends) and ends[place] == position else None


def _whole_character(data: bytes, position: int) -> int:
    position = max(position, 0)
    while 0 < position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position
