"""Text to token ids and back, without loss, in Hugging Face's tokenizer format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from plinth.config import UserError, read_json, write_atomic

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # fields of tokenizer_config.json
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")  # what published chat models end an answer with
BATCH_CHARACTERS = 1 << 20  # encoded at a time: an encoding holds strings and offsets, some hundred bytes a token


class Tokenizer:
    """A tokenizer folder: `tokenizer.json`, and `tokenizer_config.json` with the chat template.

    Special tokens that stand in a text stay text: `encode` never returns the id of one. Only code that means one, such as
    `chat.render`, places its id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """Wrap a `tokenizers.Tokenizer`; `config` is what tokenizer_config.json holds and is kept as it is."""
        self.config = dict(config or {})
        self.generation_ends: tuple[int, ...] = ()
        """ids that the model's generation_config.json ends a text at"""
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # a special token typed in a text is text
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a tokenizer folder. Raises UserError that names the file when it is absent or malformed."""
        file = Path(path) / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{path} holds no tokenizer.json. Name a folder that `plinth tokenizer train` wrote, or a model folder.")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a malformed file
            raise UserError(f"{file} is not a tokenizer: {error}. Copy or train it again.") from None
        config = _read_object(Path(path) / "tokenizer_config.json")
        template = Path(path) / "chat_template.jinja"
        if "chat_template" not in config and template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        for name, token in _read_object(Path(path) / "special_tokens_map.json").items():
            config.setdefault(name, token)  # older folders name their special tokens there only
        tokenizer = cls(backend, config)
        ends = _read_object(Path(path) / "generation_config.json").get("eos_token_id")
        tokenizer.generation_ends = tuple(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int))
        return tokenizer

    def save(self, path: Path | str) -> None:
        """Write the two files into `path`, which is made when it is absent."""
        Path(path).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path) / "tokenizer.json", self.backend_json())
        write_atomic(Path(path) / "tokenizer_config.json", json.dumps(self.config, indent=2, ensure_ascii=False) + "\n")

    def backend_json(self) -> str:
        """Return the contents of tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Raises UserError when it holds half a surrogate pair, which no file in UTF-8 can."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode` would, on all cores."""
        ids: list[list[int]] = []
        for batch in _batches(texts, BATCH_CHARACTERS):
            try:
                encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            except (UnicodeEncodeError, TypeError):  # the library raises either for a lone surrogate
                raise UserError(_why_not_text(batch)) from None
            ids.extend(encoding.ids for encoding in encodings)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, as `encode` does, and of each the stretch (first, end) of characters of the text that it stands for."""
        ids = self.encode(text)  # with its errors
        encoding = self._backend.encode(text, add_special_tokens=False)
        return ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD. Special tokens are left out or spelled."""
        if not self.is_byte_level:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return b"".join(self.token_bytes(i, skip_special) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return the bytes that one token stands for: none for a special token, or its name with skip_special=False.

        An id that the vocabulary lacks (a model's vocabulary may be padded) stands for no bytes.
        """
        if token_id in self.special_ids:
            return b"" if skip_special else (self._backend.id_to_token(token_id) or "").encode()
        return self._token_bytes[token_id] if 0 <= token_id < len(self._token_bytes) else b""

    def pieces(self) -> list[str | None]:
        """Return how the vocabulary spells each id; None where it has none."""
        return [self._backend.id_to_token(i) for i in range(self.vocab_size)]

    def special_id(self, name: str) -> int | None:
        """Return the id of a special token such as `<|user|>`, or None when this tokenizer lacks it."""
        token_id = self._backend.token_to_id(name)
        return token_id if token_id in self.special_ids else None

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def sha256(self) -> str:
        """The hash of tokenizer.json as `save` writes it: two tokenizers that share it give the same ids."""
        return hashlib.sha256(self._backend.to_str().encode("utf-8")).hexdigest()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token that is spelled so, special or not."""
        return self._backend.token_to_id(token)

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens that tokenizer_config.json names, such as bos_token, as chat templates are given them."""
        named = {name: self.config.get(name) for name in NAMED}
        spelled = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        return {name: token for name, token in spelled.items() if isinstance(token, str)}

    def _named_id(self, name: str) -> int | None:
        token = self.named_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    @cached_property
    def is_ours(self) -> bool:
        """Whether Plinth trained it, so that its conversations are rendered by `plinth.tokenizer.chat` itself."""
        return [self._backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))

    def chat_template(self, *, with_tools: bool = False) -> str | None:
        """Return the chat template; where several are published, the one for conversations with tools, or the default one."""
        found = self.config.get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            found = (named.get("tool_use") if with_tools else None) or named.get("default")
        return found if isinstance(found, str) else None

    @property
    def can_chat(self) -> bool:
        """Whether conversations can be rendered: by our header tokens, or by a template that was published with it."""
        return self.assistant_id is not None or self.chat_template() is not None

    @cached_property
    def special_names(self) -> tuple[str, ...]:
        """The special tokens as they are spelled."""
        return tuple(token.content for token in self._backend.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """What finds the special tokens in a text, the longest first, with the blanks that some take along; None without any."""
        spelled = []
        for token in self._backend.get_added_tokens_decoder().values():
            if token.special:
                left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
                spelled.append((len(token.content), left + re.escape(token.content) + right))
        return re.compile("|".join(pattern for _, pattern in sorted(spelled, reverse=True))) if spelled else None

    def encode_parts(self, texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
        """Return (id, first character, one past the last) of the tokens of texts that follow each other between special tokens.

        A blank that a tokenizer puts before a text's first word it puts before the first of them only.
        """
        first = self._backend.encode_batch(list(texts[:1]), add_special_tokens=False)
        rest = self._inner_backend.encode_batch(list(texts[1:]), add_special_tokens=False)
        return [[(i, *span) for i, span in zip(encoding.ids, encoding.offsets)] for encoding in [*first, *rest]]

    def encode_continuing(self, text: str) -> list[int]:
        """Return the ids of a text that goes on behind other tokens: nothing is put before it, neither a blank nor a first token."""
        return self._continuing_backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _inner_backend(self) -> tokenizers.Tokenizer:
        """The backend for a text that is not the first, which gets no blank where its pre-tokenizer says "first"."""
        return self._without_blank("first")

    @cached_property
    def _continuing_backend(self) -> tokenizers.Tokenizer:
        """The backend that puts no blank before any text."""
        return self._without_blank("first", "always")

    def _without_blank(self, *schemes: str) -> tokenizers.Tokenizer:
        """Return the backend without the blank that pre-tokenizers of these schemes, or with "always" a normaliser, put before a text."""
        parts = json.loads(self._backend.to_str())
        before, normal = parts.get("pre_tokenizer") or {}, parts.get("normalizer") or {}
        changed = False
        for part in [before, *before.get("pretokenizers", [])]:
            if part.get("prepend_scheme") in schemes:
                part["prepend_scheme"], changed = "never", True
        if "always" in schemes and "Prepend" in (normal.get("type"), *(part["type"] for part in normal.get("normalizers", []))):
            kept = [part for part in normal.get("normalizers", []) if part["type"] != "Prepend"]
            parts["normalizer"], changed = {"type": "Sequence", "normalizers": kept}, True
        if not changed:
            return self._backend
        backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def prefix_ids(self) -> list[int]:
        """The ids that a text alone begins with: what the tokenizer puts before one, such as <s>; none for ours."""
        added = self.config.get("add_bos_token")
        bos = self._named_id("bos_token")
        if isinstance(added, bool) and bos is not None:
            return [bos] if added else []
        return self._processor_prefix

    @cached_property
    def _processor_prefix(self) -> list[int]:
        encoding = self._backend.encode("a", add_special_tokens=True)
        count = next((i for i, special in enumerate(encoding.special_tokens_mask) if not special), 0)
        return encoding.ids[:count]

    def special_ids_around(self) -> list[int]:
        """Return the ids that the tokenizer puts around a text, before it and behind it; with add_bos_token, as that says."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        behind = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask) if special]
        return self.prefix_ids + behind[len(self._processor_prefix) :]

    @property
    def start_id(self) -> int | None:
        """The id behind which a document begins: what the tokenizer puts before a text, else <|endoftext|>."""
        return self.prefix_ids[-1] if self.prefix_ids else self.end_of_text_id

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: of a document and of a message, by name and by the model's generation_config.json."""
        turn_ends = [self.special_id(token) for token in TURN_ENDS]
        ids = [self.end_of_text_id, self.end_id, self._named_id("eos_token"), *turn_ends, *self.generation_ends]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def end_of_text_id(self) -> int | None:
        """The id that ends a document: <|endoftext|>, else what tokenizer_config.json names as the end."""
        found = self.special_id(END_OF_TEXT)
        return self._named_id("eos_token") if found is None else found

    @property
    def pad_id(self) -> int | None:
        found = self.special_id(PAD)
        return self._named_id("pad_token") if found is None else found

    @property
    def system_id(self) -> int | None:
        return self.special_id(SYSTEM)

    @property
    def user_id(self) -> int | None:
        return self.special_id(USER)

    @property
    def assistant_id(self) -> int | None:
        return self.special_id(ASSISTANT)

    @property
    def end_id(self) -> int | None:
        return self.special_id(END)

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token is a sequence of bytes spelled in the byte-level alphabet, as ours are."""
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        return "ByteLevel" in {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        spell = _byte_level_bytes if self.is_byte_level else _sentencepiece_bytes
        table = [b""] * self.vocab_size
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            table[token_id] = spell(token)
        for token_id, token in self._backend.get_added_tokens_decoder().items():
            table[token_id] = token.content.encode("utf-8")  # an added token is spelled as it is
        return table


def _read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file beside the tokenizer holds, nothing when it is absent. Raises UserError when it is malformed."""
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object. Copy it again.")
    return values


def byte_alphabet() -> dict[str, int]:
    """Return the printable character that stands for each byte in byte-level BPE, as {character: byte}.

    Source: Radford et al. 2019 (GPT-2): the printable bytes of Latin-1 stand for themselves, the others follow from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode("utf-8")


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def _batches(texts: Iterable[str], characters: int) -> Iterable[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"text={text!r} is of type {type(text).__name__}, not str.")
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _why_not_text(batch: list[str]) -> str:
    for text in batch:
        for i, character in enumerate(text):
            if 0xD800 <= ord(character) <= 0xDFFF:
                return f"text holds U+{ord(character):04X} at character {i}, half of a surrogate pair. Read its file as UTF-8."
    return "a text cannot be encoded as UTF-8."
