"""A model's tokenizer as exact matching needs it: the bytes of every token, and text in the form those bytes join to.

A tokenizer changes text before it cuts it: normal forms, a space in front, white space eaten by special tokens. The
canonical text is what is left after that, so that the tokens' bytes, joined, are exactly it. Which changes a tokenizer
makes is read from its tokenizer.json and then tried on samples; what we do not understand is refused by name.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from picker.errors import ConfigError
from picker.prefix.spelling import Vocabulary
from picker.tokenizers.libraries import library
from picker.tokenizers.samples import SAMPLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Json = Mapping[str, Any]

_SPACE = "\u2581"  # how SentencePiece writes a space
# White space as Unicode has it (its property White_Space), and as special tokens eat it. Python's `strip` takes four
# separators more, from U+001C to U+001F.
_BLANKS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextTokenizer:
    """Cuts canonical text into tokens and makes text canonical.

    tokenizer: the content of tokenizer.json. config: that of tokenizer_config.json (added tokens, beginning of text).
    vocabulary: the bytes of each id. opening: ids that an engine puts before a completion's text by default.
    """

    def __init__(self, tokenizer: Json, config: Json | None = None) -> None:
        made = library("tokenizers").Tokenizer
        self._spec = spec = _with_added(tokenizer, config or {})
        self._byte_level = _is_byte_level(spec)
        self._whole: Tokenizer = made.from_str(json.dumps({**spec, "truncation": None, "padding": None}))
        shown = [{**token, "content": self._shown(token)} for token in spec["added_tokens"]]
        self._inner: Tokenizer = made.from_str(json.dumps(self._inner_spec(shown)))
        # An added token whose text is not in the vocabulary gets a number of its own.
        numbers = {self._inner.token_to_id(token["content"]): token["id"] for token in shown}
        self._renumbered = {ours: theirs for ours, theirs in numbers.items() if ours != theirs}
        self._prepends = _prepends(spec.get("pre_tokenizer"))
        self._normal_form = [each["type"] for each in _flat(spec.get("normalizer"), "normalizers")]
        self._added = _AddedTokens(spec["added_tokens"], shown)
        self.vocabulary = Vocabulary(_table(spec, shown, self._byte_level))
        self.opening = self._opening(config or {})
        self._try_out()

    @property
    def added_pattern(self) -> re.Pattern[str] | None:
        """Finds the texts of added tokens in canonical text; None where there are none."""
        return self._added.everywhere

    @property
    def longest_added(self) -> int:
        """Characters of the longest of them."""
        return self._added.longest

    def canonical(self, text: str) -> str:
        """The text whose UTF-8 is what its tokens spell, joined."""
        if self._unchanged(text):
            return text
        return "".join(
            self._spaced(piece) if added else self._normal(piece, first=place == 0)
            for place, added, piece in self._added.cut(text)
        )

    def encode(self, canonical: str) -> list[int]:
        """Ids of a canonical text, or of a piece of one from seam to seam. Lets other threads run."""
        ids: list[int] = self._inner.encode(canonical, add_special_tokens=False).ids
        return [self._renumbered.get(token, token) for token in ids] if self._renumbered else ids

    # --- reading the description ---------------------------------------------------------------------------

    def _inner_spec(self, shown: list[dict[str, Any]]) -> dict[str, Any]:
        """The same tokenizer for text that is canonical: what it would change has been changed."""
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        added = [{**token, "lstrip": False, "rstrip": False} for token in shown]
        return {
            **self._spec,
            "added_tokens": added,
            "normalizer": None if self._byte_level else spaces,
            "pre_tokenizer": _without_prepending(self._spec.get("pre_tokenizer")),
            **dict.fromkeys(("post_processor", "truncation", "padding")),
        }

    def _shown(self, token: Json) -> str:
        """An added token as it stands in canonical text: some are looked for only after all else has been changed."""
        normalizer = self._whole.normalizer
        changed = token.get("normalized") and normalizer is not None
        return self._spaced(normalizer.normalize_str(token["content"]) if changed else token["content"])

    def _spaced(self, text: str) -> str:
        return text if self._byte_level else text.replace(_SPACE, " ")

    def _opening(self, config: Json) -> tuple[int, ...]:
        """transformers lets `add_bos_token` of the configuration win over the post-processor."""
        if "add_bos_token" in config or "add_eos_token" in config:
            named = config.get("bos_token")
            text = named.get("content") if isinstance(named, dict) else named
            beginning = self._whole.token_to_id(text) if config.get("add_bos_token") and isinstance(text, str) else None
            return () if beginning is None else (beginning,)
        bare = self._whole.encode("x", add_special_tokens=False).ids
        full = self._whole.encode("x").ids
        starts = [n for n in range(len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare]
        return tuple(full[: starts[0]]) if starts else ()

    def _unchanged(self, text: str) -> bool:
        """The common case, told without looking for tokens: nothing this tokenizer does would change the text."""
        if self._prepends or self._added.strip or not self._byte_level:
            return False
        match self._normal_form:
            case []:
                return True
            case ["NFC" | "NFD" | "NFKC" | "NFKD" as form]:
                return text.isascii() or unicodedata.is_normalized(form, text)
        return False

    def _normal(self, piece: str, *, first: bool) -> str:
        if not piece:
            return piece
        normalizer = self._whole.normalizer
        found: str = normalizer.normalize_str(piece) if normalizer is not None else piece
        found = self._spaced(found)
        if (self._prepends == "always" or (self._prepends == "first" and first)) and not found.startswith(" "):
            found = " " + found
        return found

    def _try_out(self) -> None:
        """Raises ConfigError where the canonical text of a sample is not what its tokens spell."""
        for text in (*SAMPLES, *self._added.samples()):
            canonical = self.canonical(text)
            ids = self._whole.encode(text, add_special_tokens=False).ids
            if ids != self.encode(canonical):
                raise ConfigError(
                    "the tokenizer prepares text in a way we do not understand; no exact matching with it"
                )
            spelling = self.vocabulary.spell(ids)
            if spelling is not None and spelling.data != canonical.encode():
                raise ConfigError("the tokenizer's tokens do not join to its text; no exact matching with it")
        self.vocabulary.unspelled = 0


class _AddedTokens:
    """Texts that are cut out as tokens before anything else happens, and the white space some of them eat."""

    def __init__(self, tokens: list[dict[str, Any]], shown: list[dict[str, Any]]) -> None:
        self.longest = max((len(token["content"]) for token in shown), default=0)
        self.strip = any(token.get("lstrip") or token.get("rstrip") for token in tokens)
        # Not those of one character repeated: where such a token begins depends on where the run of them begins.
        self.everywhere = _pattern([token for token in shown if len(set(token["content"])) > 1])
        self._by_text = {token["content"]: token for token in tokens}
        self._first = _pattern([token for token in tokens if not token.get("normalized")])

    def cut(self, text: str) -> Iterator[tuple[int, bool, str]]:
        """(place in the text, whether it is a token, text) of all pieces in order, without the white space eaten."""
        at = 0
        for match in self._first.finditer(text) if self._first is not None else ():
            start, end, token = match.start(), match.end(), self._by_text[match.group()]
            if start < at:
                continue
            before = text[at:start]
            yield at, False, before.rstrip(_BLANKS) if token.get("lstrip") else before
            yield start, True, match.group()
            at = end
            if token.get("rstrip"):
                at += len(text) - end - len(text[end:].lstrip(_BLANKS))
        yield at, False, text[at:]

    def samples(self) -> Iterator[str]:
        # Not runs of spaces as SentencePiece writes them: nobody writes those in a text.
        tokens = [text for text in self._by_text if _SPACE not in text]
        odd = [text for text, token in self._by_text.items() if token.get("lstrip") or token.get("rstrip")]
        for text in (*tokens[:24], *tokens[-8:], *odd[:16]):
            yield f"before {text} after"
            yield f"{text}x{text}\n{text}"


def _pattern(tokens: list[Any]) -> re.Pattern[str] | None:
    """The longest of those that begin at one place, like the automaton of `tokenizers`."""
    if not tokens:
        return None
    longest_first = sorted(tokens, key=lambda token: -len(token["content"]))
    texts = [
        rf"(?<!\w){re.escape(token['content'])}(?!\w)" if token.get("single_word") else re.escape(token["content"])
        for token in longest_first
    ]
    return re.compile("|".join(texts))


def _with_added(tokenizer: Json, config: Json) -> dict[str, Any]:
    """The description with the added tokens that only the configuration knows."""
    added = [token for token in tokenizer.get("added_tokens") or () if token["content"]]
    known = {token["content"] for token in added}
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if token["content"] not in known:
            added.append({"single_word": False, "lstrip": False, "rstrip": False, **token, "id": int(key)})
    return {**tokenizer, "added_tokens": sorted(added, key=lambda token: token["id"])}


def _flat(part: Any, key: str) -> list[dict[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence of them."""
    if part is None:
        return []
    return [inner for each in part[key] for inner in _flat(each, key)] if part["type"] == "Sequence" else [part]


def _is_byte_level(spec: Json) -> bool:
    """Whether tokens are written in GPT-2's alphabet of bytes, not in SentencePiece's way. Others: ConfigError."""
    decoder = {each["type"] for each in _flat(spec.get("decoder"), "decoders")}
    cutter = {each["type"] for each in _flat(spec.get("pre_tokenizer"), "pretokenizers")}
    kind = spec["model"].get("type", "BPE")
    if decoder and decoder <= {"ByteLevel", "Fuse"} and "ByteLevel" in cutter and kind == "BPE":
        return True
    if decoder and decoder <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and kind in ("BPE", "Unigram"):
        return False
    names = ", ".join(sorted(decoder)) or "none"
    raise ConfigError(f"a {kind} tokenizer with the decoder {names} is not one we can spell; no exact matching with it")


def _prepends(cutter: Any) -> str | None:
    """When a space is put in front: "always" (every piece between added tokens), "first" (the text), or never."""
    for each in _flat(cutter, "pretokenizers"):
        if each["type"] == "ByteLevel" and each.get("add_prefix_space"):
            return "always"
        if each["type"] == "Metaspace" and (scheme := each.get("prepend_scheme", "always")) != "never":
            return str(scheme)
    return None


def _without_prepending(cutter: Any) -> Any:
    if cutter is None:
        return None
    if cutter["type"] == "Sequence":
        return {**cutter, "pretokenizers": [_without_prepending(each) for each in cutter["pretokenizers"]]}
    if cutter["type"] == "ByteLevel":
        return {**cutter, "add_prefix_space": False}
    return {**cutter, "prepend_scheme": "never"} if cutter["type"] == "Metaspace" else cutter


# --- what ids spell ----------------------------------------------------------------------------------------


def _table(spec: Json, shown: list[dict[str, Any]], byte_level: bool) -> list[bytes | None]:
    model = spec["model"]
    vocab = model["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], place) for place, entry in enumerate(vocab))
    spelled: dict[int, bytes | None] = {
        number: bytes_of_token(text) if byte_level else bytes_of_pieces(text) for text, number in pairs
    }
    spelled |= {token["id"]: token["content"].encode() for token in shown}
    if not byte_level and not model.get("byte_fallback"):
        unknown = vocab.get(model.get("unk_token")) if isinstance(vocab, dict) else model.get("unk_id")
        spelled |= {} if unknown is None else {unknown: None}  # it stands for whatever the vocabulary lacks
    return [spelled.get(number) for number in range(max(spelled, default=-1) + 1)]


class _Alphabet(dict[int, int]):
    """Code point to byte; a character that stands for no byte makes the whole token plain text."""

    def __missing__(self, key: int) -> int:
        raise ValueError


def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable ones stand for themselves, others are moved up from 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _Alphabet({ord(character): byte for character, byte in byte_alphabet().items()})


def bytes_of_token(text: str) -> bytes:
    """The bytes of a token written in the alphabet of bytes; of any other, its text, as the decoder has it."""
    try:
        return text.translate(_ALPHABET).encode("latin-1")
    except ValueError:
        return text.encode()


def bytes_of_pieces(text: str) -> bytes:
    """The bytes of a token written SentencePiece's way."""
    if (match := _BYTE.fullmatch(text)) is not None:
        return bytes([int(match.group(1), 16)])
    return text.replace(_SPACE, " ").encode()
