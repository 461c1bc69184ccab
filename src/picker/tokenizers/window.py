"""Where the tokens of a text end, told from a small window of it: the rest of the text is never tokenised.

Tokenizers cut text at seams before they make tokens, and what lies on one side of a seam has no say in the tokens of
the other. A window from seam to seam has therefore the tokens that the whole text has there. Which places are seams
depends on the tokenizer; a few kinds of place are tried on samples when it is loaded, and those that held are used.
Where no seam is near (a long run of one script without spaces), two windows that begin at different places must agree.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from picker.tokenizers.samples import SAMPLES, mixtures
from picker.tokenizers.tokenizer import TextTokenizer

# Kinds of place, by what stands before and after it. A letter or digit is \w without the underscore; apostrophes are
# left out because contractions reach across them, marks because they belong to the letter before.
_LETTER = r"[^\W\d_]"
_MARKS = r"!-&(-/:-@\[-^`{-~，。、！？；：（）「」『』《》“”…—·"
_KINDS = (
    r"(?<=[^\W_])(?= )",  # the end of a word
    r"(?<=[^\W_])(?=[^\S ])",
    rf"(?<={_LETTER})(?=[{_MARKS}])",
    rf"(?<={_LETTER})(?=_)",
    rf"(?<={_LETTER})(?=\d)",
    rf"(?<=\d)(?={_LETTER})",
    r"(?<=\d)(?=[\s.,;:)\]}\"])",
    r"(?<=\n)(?=[^\s])",
)
_REACHES = (96, 768)  # bytes looked at on either side, one after the other
_FAR = 4096  # and where nothing else gave an answer
_LONE = 384  # bytes before the place where two windows without a seam begin
_OTHER = 61  # so many bytes later begins the second
_AGREED = 8  # common ends of tokens before the place that make two windows one
_NEAR = 128  # bytes after it that are tokenised with it
_TRIED = 24  # places of a kind that are tried in one sample


@dataclass(slots=True)
class WindowCounts:
    """How questions were answered: from a seam, by two windows that agreed, or not at all (then "no")."""

    seam: int = 0
    agreed: int = 0
    unsure: int = 0


class Seams:
    """Finds the seams of one tokenizer and tokenises between them."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_pattern
        self.margin = tokenizer.longest_added
        self.counts = WindowCounts()
        samples = [tokenizer.canonical(text) for text in (*SAMPLES, *mixtures(40, 60))]
        self._samples = [(text, self._tokens_end(text)) for text in samples]
        self.kinds = [kind for kind in _KINDS if self._holds(re.compile(kind))]
        self._pattern = re.compile("|".join(self.kinds)) if self.kinds else None
        self._samples = []

    def in_text(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Places of seams in a text, in order, and the spans of the added tokens, whose ends are seams too."""
        spans = [match.span() for match in self._added.finditer(text)] if self._added is not None else []
        places = [match.start() for match in self._pattern.finditer(text)] if self._pattern is not None else []
        if not spans:
            return places, spans
        outside = [place for place in places if not _within(place, spans)]
        return sorted({*outside, *(edge for span in spans for edge in span)}), spans

    def ends(self, text: str) -> list[int] | None:
        """Where tokens end in a text that begins and ends at seams, in bytes from its beginning; None: not spelled."""
        spelling = self._tokenizer.vocabulary.spell(self._tokenizer.encode(text))
        return None if spelling is None or len(spelling.data) != len(text.encode()) else spelling.ends.tolist()

    def _tokens_end(self, text: str) -> set[int]:
        ends = self.ends(text)
        return set() if ends is None else {0, *ends}

    def _holds(self, kind: re.Pattern[str]) -> bool:
        """Whether every place of this kind in the samples parts tokens that are the same with and without the rest."""
        for text, ends in self._samples:
            spans = [match.span() for match in self._added.finditer(text)] if self._added is not None else []
            places = [match.start() for match in kind.finditer(text) if not _within(match.start(), spans)]
            if not ends:
                continue
            for place in places[:: max(1, len(places) // _TRIED)]:
                at = len(text[:place].encode())
                rest = {end - at for end in ends if end >= at}
                if at not in ends or self._tokens_end(text[place:]) != rest:
                    return False
                if self._tokens_end(text[:place]) != {end for end in ends if end <= at}:
                    return False
        return True


class TextSplits:
    """`Splits` of a canonical text: whether a token ends at a position of its UTF-8.

    closed: a token ends where the text does (it is whole, or an added token follows).
    """

    __slots__ = ("_closed", "_data", "_seams")

    def __init__(self, seams: Seams, data: bytes, *, closed: bool = True) -> None:
        self._seams, self._data, self._closed = seams, data, closed

    def __call__(self, position: int) -> bool:
        if position <= 0:
            return position == 0
        if position >= len(self._data):
            return position == len(self._data) and self._closed
        counts = self._seams.counts
        for reach in _REACHES:
            if (found := self._between_seams(position, reach)) is not None:
                counts.seam += 1
                return found
        if (found := self._by_agreement(position)) is not None:
            counts.agreed += 1
            return found
        if (found := self._between_seams(position, _FAR)) is not None:
            counts.seam += 1
            return found
        counts.unsure += 1
        return False

    def _between_seams(self, position: int, reach: int) -> bool | None:
        """The answer of the tokens between the seams around the position; None: there are none within reach."""
        data, margin = self._data, self._seams.margin
        low, high = _whole(data, position - reach - margin), _whole(data, position + reach + margin)
        text = data[low:high].decode()
        before = len(data[low:position].decode(errors="ignore"))  # characters that end at the position or before it
        exact = position == len(data) or data[position] & 0xC0 != 0x80
        places, spans = self._seams.in_text(text)
        if exact and _within(before, spans):
            return False
        # Near the edges of what is looked at, an added token may be cut off and its middle taken for text.
        first, last = (margin if low else 0), len(text) - (margin if high < len(data) else 0)
        after = bisect_right(places, before)
        if exact and after and places[after - 1] == before and first <= before <= last:
            return True
        start = places[after - 1] if after else -1
        if start < first:
            start = 0 if low == 0 else -1
        end = places[after] if after < len(places) and places[after] <= last else len(text) if high == len(data) else -1
        if start < 0 or end < 0:
            return None
        ends = self._seams.ends(text[start:end])
        if ends is None:
            return None
        return position - low - len(text[:start].encode()) in ends

    def _by_agreement(self, position: int) -> bool | None:
        """The answer of two windows that begin at different places, if their tokens fall into step before it."""
        high = _whole(self._data, position + _NEAR)
        found = []
        for back in (_LONE, _LONE - _OTHER):
            low = _whole(self._data, position - back)
            ends = self._seams.ends(self._data[low:high].decode())
            if ends is None:
                return None
            found.append({low + end for end in ends})
        one, other = found
        same = sorted(end for end in one & other if end < position)[-_AGREED:]
        in_step = len(same) == _AGREED and {end for end in one | other if same[0] <= end <= position} <= (one & other)
        return position in one if in_step else None


class KnownSplits:
    """`Splits` where the ends of all tokens are known."""

    __slots__ = ("_ends",)

    def __init__(self, ends: list[int]) -> None:
        self._ends = frozenset((0, *ends))

    def __call__(self, position: int) -> bool:
        return position in self._ends


def _within(place: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a place lies inside one of these spans, not at an edge."""
    return any(start < place < end for start, end in spans)


def _whole(data: bytes, position: int) -> int:
    """The nearest position, at this one or before it, where a character begins; within the data."""
    position = min(max(position, 0), len(data))
    while 0 < position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return position
