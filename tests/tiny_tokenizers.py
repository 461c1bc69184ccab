"""Small tokenizers of the kinds that language models have, trained in a moment, and the texts they are trained on."""

from __future__ import annotations

import functools
import json
from typing import Any

from picker.tokenizers.samples import SAMPLES, mixtures
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROSE = (
    "The scheduler places each request on the endpoint where it is expected to cost least, and says why. "
    "A prefix that is cached need not be computed again; what is not cached is computed once and then shared. "
    "def place(request, pool):\n    for endpoint in pool.endpoints:\n        yield endpoint, endpoint.cost(request)\n\n"
    "Wie groß ist die Größe? Naïve cafés. 请求被调度到成本最低的端点，然后说明原因。日本語も読めます。Привет, мир! "
    "if (x == 12345) { return y[0] + 3.14; } // don't, won't, they'll, it's\n\n\t\tindented    with   spaces\r\n"
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS = ("qwen", "llama3", "o200k", "deepseek", "gpt2", "llama2", "metaspace", "gemma", "unigram", "phi3")

CHAT_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not tools %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content is string %}{{- message.content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


@functools.cache
def texts() -> list[str]:
    return [PROSE, *SAMPLES, *mixtures(40, 60, seed=7)] * 2


@functools.cache
def spec(kind: str = "qwen") -> dict[str, Any]:
    """tokenizer.json of a small tokenizer of this kind."""
    tokenizer = _byte_level(kind) if kind in ("qwen", "llama3", "o200k", "deepseek", "gpt2") else _pieces(kind)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = {"qwen": QWEN, "llama3": LLAMA3, "o200k": O200K}.get(kind)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    if pattern is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])
    elif kind == "deepseek":
        steps = [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK]
        splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bare])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=list(CHATML), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if kind == "llama3":
        first = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), first])
    return tokenizer


def _pieces(kind: str) -> Tokenizer:
    space = "\u2581"
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=900, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=1300, special_tokens=[*specials, *fallback], show_progress=False)
    if kind in ("metaspace", "unigram"):
        scheme = "first" if kind == "metaspace" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(replacement=space, prepend_scheme=scheme)
    else:
        # Trained on words, used on whole texts, as SentencePiece's models are.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="never")
    tokenizer.train_from_iterator(texts(), trainer)
    if kind in ("llama2", "phi3", "gemma"):
        tokenizer.pre_tokenizer = None
        replace = normalizers.Replace(" ", space)
        tokenizer.normalizer = (
            replace if kind == "gemma" else normalizers.Sequence([normalizers.Prepend(space), replace])
        )
        steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    if kind == "phi3":
        tokenizer.add_special_tokens([AddedToken("<|assistant|>", rstrip=True), AddedToken("<mask>", lstrip=True)])
    described = json.loads(tokenizer.to_str())
    for entry in described["added_tokens"]:
        if entry["content"].startswith("<0x"):
            entry["special"] = False
    described["added_tokens"] = [entry for entry in described["added_tokens"] if not entry["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(described))
