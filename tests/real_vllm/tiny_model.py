"""A model directory small enough to make on the spot: Qwen2's shape, random weights, a tokenizer trained here.

Owns config.json, tokenizer.json and tokenizer_config.json, and a LoRA adapter in a folder of its own; the model has no
weights (`--load-format dummy` draws them).
The tokenizer is built as Qwen2's is (NFC, its splitting rule, byte-level BPE), so that what is hard about reading
prompts there is hard here: pieces that depend on their neighbours, code, scripts of several bytes to a letter.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

NAME, ADAPTER = "tiny", "poet"
CONTEXT = 2048  # tokens
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_HIDDEN, _LAYERS, _RANK = 128, 2, 8
_VOCABULARY = 1024  # at most; the text below is what limits it
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEXT = """\
The gateway looks at every prompt and asks which of its servers has already computed the beginning of it.
A conversation grows at its end: what was said before stays as it was, and so do the keys and values computed for it.
You are a helpful assistant. Answer briefly, name your sources, and say so when you do not know the answer.
Please summarise the following report in three sentences, then list the open questions and who could answer them.
It's what we'll do when they've finished; I'm sure you'd agree that it isn't done and that she's right about it.
On 2024-03-17 the cache held 1024 blocks of 32 tokens each; 768 of 1024 (75.0 %) were in use, 12 were evicted.
def matched_blocks(prompt: list[int], cached: set[int], block_size: int = 32) -> int:
    total = 0
    for start in range(0, len(prompt) - 1, block_size):
        block = tuple(prompt[start : start + block_size])
        if hash(block) not in cached:
            break
        total += 1
    return total

class Endpoint:
    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.requests: dict[str, float] = {}

function fetchWeather(city, units = "metric") {
  const answer = await fetch(`https://example.com/weather?city=${city}&units=${units}`);
  if (!answer.ok) { throw new Error("no weather for " + city); }
  return answer.json();
}
{"type": "function", "function": {"name": "get_weather", "description": "The weather in a city", "parameters": \
{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}
SELECT name, count(*) AS requests FROM calls WHERE started_at > now() - interval '5 minutes' GROUP BY name ORDER BY 2;
Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Größe, Straße, Übermut, Ärger, öffentlich.
Voilà l'été où les élèves français ont reçu des idées très élégantes à propos de la mémoire et du cœur.
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; añoraba a su querido cachorro. ¿Verdad? ¡Sí!
Съешь же ещё этих мягких французских булок, да выпей чаю. Память хранит то, что уже было посчитано.
いろはにほへと ちりぬるを。東京の天気は晴れです。キャッシュに残っている接頭辞を再利用します。
今天天气很好，我们去公园散步吧。缓存命中可以节省大量计算。请用一句话回答我的问题。
오늘 날씨가 좋네요. 공원에 산책하러 갈까요? 캐시를 다시 사용하면 계산을 줄일 수 있습니다.
🙂 🚀 👩‍💻 naïve café ﬁn ½ ± µ — “quoted” … ≥ ≤ → ←
"""

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more of these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nAnswer with {\\"name\\": ..., \\"arguments\\": ...} within <tool_call></tool_call> tags.' }}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'system' and not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{\\"name\\": \\"' + call.function.name + '\\", \\"arguments\\": ' }}
            {{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_model(folder: Path) -> Path:
    """Make the model directory, the same bytes every time. Returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write(folder / "config.json", _config(tokenizer.get_vocab_size()))
    _write(folder / "tokenizer_config.json", _tokenizer_config())
    _write_adapter(folder / ADAPTER)
    return folder


def _write_adapter(folder: Path) -> None:
    """A LoRA adapter of random weights, in the safetensors format: a JSON header and the numbers."""
    folder.mkdir(exist_ok=True)
    rng, header, numbers = np.random.default_rng(0), {}, b""
    for layer in range(_LAYERS):
        for name, shape in (("lora_A", (_RANK, _HIDDEN)), ("lora_B", (_HIDDEN, _RANK))):
            weights = rng.normal(size=shape).astype("<f4").tobytes()
            offsets = [len(numbers), len(numbers) + len(weights)]
            entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            header[f"base_model.model.model.layers.{layer}.self_attn.q_proj.{name}.weight"] = entry
            numbers += weights
    head = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + numbers)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": 8, "target_modules": ["q_proj"]}
    _write(folder / "adapter_config.json", config | {"bias": "none", "base_model_name_or_path": NAME})


def train() -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's normaliser and splitting rule, trained on TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    return tokenizer


def _config(vocabulary: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": _HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32768,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "additional_special_tokens": list(SPECIAL[1:]),
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }


def _write(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
