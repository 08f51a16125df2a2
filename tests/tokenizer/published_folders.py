"""Tokenizer folders of the kinds that are published, small ones trained on the spot, with chat templates that have their quirks."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "the cat sat on the mat, and the hat sat on the cat.",
    "Be brief. Hello there! Grüße aus Köln 123",
    "1 + 1 = 2; def f(x): return x",
] * 4

HEADERS = (  # the first header behind the first token of all; what is said is trimmed; the date of today
    "{% for message in messages %}"
    "{% set content = '<|head|>' + message['role'] + '<|tail|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
BRACKETS = (  # no role but user and assistant; the end token behind a blank
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)
TURNS = (  # the system role refused, the assistant under another name, a break behind the end of a turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TOOLS = (  # tools in the system's turn, a default system message, calls as JSON, the results in a user's turn
    "{%- if tools %}\n"
    "    {{- '<|im_start|>system\\n' }}\n"
    "    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}\n"
    '    {{- "<tools>" }}\n'
    '    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}\n'
    '    {{- "\\n</tools><|im_end|>\\n" }}\n'
    "{%- elif messages[0].role != 'system' %}\n"
    "    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n"
    "{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if tools and loop.first and message.role == 'system' %}{%- continue %}{%- endif %}\n"
    "    {%- if message.role == 'tool' %}\n"
    "        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}\n"
    "    {%- else %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}\n"
    "        {%- for call in message.tool_calls or [] %}\n"
    "            {{- '<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}\n"
    "        {%- endfor %}\n"
    "        {{- '<|im_end|>\\n' }}\n"
    "    {%- endif %}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['role'] + ': ' + message['content'] }}{% endif %}{% endfor %}"
)


def byte_level(special: list[str], added: list[str] = []) -> tokenizers.Tokenizer:  # noqa: B006
    """Return byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return tokenizer


def with_bytes(scheme: str | None) -> tokenizers.Tokenizer:
    """Return BPE with byte fallback, converted from sentencepiece, as Llama 2, Mistral and Gemma have it; a blank before a text or not."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False))
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    if scheme is None:  # the older way: a normaliser puts the blank before every stretch between special tokens
        parts["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
        }
    else:
        parts["normalizer"] = None
        parts["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    parts["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def word_pieces() -> tokenizers.Tokenizer:
    """Return WordPiece, as BERT has it."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def begun(tokenizer: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    """Return the tokenizer with a first token before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def write(tokenizer: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def write_headers(folder: Path) -> Path:
    special = ["<|begin|>", "<|end_of_text|>", "<|head|>", "<|tail|>", "<|eot_id|>"]
    return write(
        begun(byte_level(special), "<|begin|>"), folder, bos_token="<|begin|>", eos_token="<|eot_id|>", chat_template=HEADERS
    )  # fmt: skip


def write_brackets(folder: Path, scheme: str | None = None) -> Path:
    names = {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": "<unk>"}
    return write(begun(with_bytes(scheme), "<s>"), folder, **names, add_bos_token=True, chat_template=BRACKETS)


def write_turns(folder: Path) -> Path:
    tokenizer = with_bytes("never")
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    folder = write(begun(tokenizer, "<s>"), folder, bos_token="<s>", eos_token="</s>")
    (folder / "chat_template.jinja").write_text(TURNS)
    return folder


def write_tools(folder: Path) -> Path:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<tool_call>", "</tool_call>"])
    return write(tokenizer, folder, eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False, chat_template=TOOLS)


KINDS = {
    "headers": write_headers,
    "brackets": write_brackets,
    "brackets, blank first": lambda folder: write_brackets(folder, "first"),
    "turns": write_turns,
    "tools": write_tools,
}
