"""Texts on which a tokenizer is tried when it is loaded: what is assumed of it is believed only if it holds here."""

from __future__ import annotations

import random

SAMPLES = (
    "Hello, world! It's 3.14159 o'clock; they'll WE'RE don't\u2019s.",
    "  leading and trailing  \n\n\tindented\r\n  more   \n \n x\n\n\n",
    'def f(x_y, *args) -> dict[str, int]:\n    return {"a": x_y ** 2}  # 12345678\n\n\nclass A(B): pass\n',
    "Größe, naïve café, cafe\u0301, \u00c5ngström \u212b; Straße ﬁn ½ Ⅷ",
    "中文没有空格，但是有标点。日本語のテキスト、カタカナ「引用」。한국어 문장입니다.",
    "Русский текст, العربية نص، עברית, हिन्दी पाठ, ไทยไม่มีช่องว่าง",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 \u200b\ufeff\u00a0 zero\x00 width\x7f",
    "____---====!!!???...((([[[{{{}}}]]])))<<<>>>|||&&&%%%$$$###@@@~~~```",
    "https://example.org/a/b?c=d&e=%20f#g aGVsbG8gd29ybGQhIGJhc2U2NA== 0xDEADBEEF 1e-10 1,234,567",
    "\u2581already\u2581marked <0x41> </s> <s> <unk> [INST] [/INST] <|im_start|>user\n<|im_end|>",
    "x",
    " ",
    "\n",
)

_WORDS = (
    *(
        "the",
        " of",
        " and",
        "Time",
        " MIX",
        "edCase",
        " snake_case",
        "camelCaseWord",
        " don't",
        "'ll",
        " I'M",
        "ß",
        "é",
    ),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", " \n", "\n  ", "\u00a0", "\u3000", "\u200b", "\u2028"),
    *(
        ".",
        ",",
        "...",
        "!?",
        " -",
        "--",
        "(",
        ")",
        "[]",
        "{}",
        "/*",
        "*/",
        '"',
        "'",
        "`",
        "_",
        "__",
        "=",
        " =>",
        "|",
        "\\n",
    ),
    *("1", "12", "123", "1234567", " 3.14", "0x1f", "１２", "٣", "½", "²", "x2", "2x", "v1.2.3", "1_000"),
    *(
        "中文",
        "漢字仮名",
        "，",
        "。",
        "「",
        "한국어",
        "русский",
        " текст",
        "العربية",
        "हिन्दी",
        "ไทย",
        "e\u0301",
        "\u0301",
    ),
    *("😀", "👩‍👧", "🇩🇪", "€", "™", "→", "α", "ǅ", "ﬁ", "’s", "’", "”", "–", "…"),
)


def mixtures(count: int, pieces: int, seed: int = 0) -> list[str]:
    """Texts of pieces of many scripts and shapes put together at random, the same ones for a seed."""
    chance = random.Random(seed)
    return ["".join(chance.choices(_WORDS, k=pieces)) for _ in range(count)]
