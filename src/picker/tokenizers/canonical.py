"""Whether tokens are what their text would be cut into again.

An engine's own output need not be: sampling may reach the same text by other tokens. A later turn of the conversation
brings that text back in its canonical tokens, and then the blocks of sampled ones are not found again, although the
bytes are the same. Told once for each block, off the request path.
"""

from __future__ import annotations

from collections.abc import Sequence

from picker.tokenizers.tokenizer import TextTokenizer
from picker.tokenizers.window import Seams

_CONTEXT = 64  # tokens before a block that are looked at, to find a seam


class Canonical:
    """Judges runs of token ids of one tokenizer. checked, odd: how many were judged, and found wanting."""

    def __init__(self, tokenizer: TextTokenizer, seams: Seams) -> None:
        self._vocabulary, self._seams = tokenizer.vocabulary, seams
        self.checked = self.odd = 0

    def check(self, context: Sequence[int], block: Sequence[int]) -> bool:
        """Whether `block` after `context` is what its text is cut into, up to the last seam.

        context: ids before the block, none where it begins the prompt; the last few are enough. True also where that
        cannot be told (no seam, an unknown id): only what is known to be odd is odd.
        """
        self.checked += 1
        fine = self._same(list(context[-_CONTEXT:]), list(block))
        self.odd += not fine
        return fine

    def _same(self, context: list[int], block: list[int]) -> bool:
        spelling = self._vocabulary.spell(context + block)
        if spelling is None:
            return True
        low, high = _characters(spelling.data)
        try:
            text = spelling.data[low:high].decode()
        except UnicodeDecodeError:
            return False  # no text brings such bytes back
        ends = spelling.ends.tolist()
        places, _ = self._seams.in_text(text)
        inner = [place for place in places if 0 < place < len(text)]
        if not context:
            inner.insert(0, 0)  # where a prompt begins is a seam
        if len(inner) < 2:
            return True
        start, end = inner[0], inner[-1]
        first = low + len(text[:start].encode())
        cut = self._seams.ends(text[start:end])
        if cut is None:
            return True
        last = first + len(text[start:end].encode())
        # Only the block is judged; what lies before it has been judged with its own.
        begin = max(ends[len(context) - 1] if context else 0, first - 1)
        expected = {first, *(first + each for each in cut)}
        return {each for each in expected if each > begin} == {each for each in ends if begin < each <= last}


def _characters(data: bytes) -> tuple[int, int]:
    """The part of bytes that begins and ends with whole characters, as far as the edges go."""
    low, high = 0, len(data)
    while low < min(3, high) and data[low] & 0xC0 == 0x80:
        low += 1
    for back in range(1, min(3, high - low) + 1):
        lead = data[high - back]
        if lead >= 0xC0:
            needed = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return (low, high - back) if needed > back else (low, high)
        if lead < 0x80:
            break
    return low, high
