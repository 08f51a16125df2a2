"""Text to token ids and back, without loss, in Hugging Face's tokenizer format."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from plinth.config import UserError, read_json, write_atomic

SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS
BATCH_CHARACTERS = 1 << 20  # encoded at a time: an encoding holds strings and offsets, some hundred bytes a token


class Tokenizer:
    """A tokenizer folder: `tokenizer.json`, and `tokenizer_config.json` with the chat template.

    Special tokens that stand in a text stay text: `encode` never returns the id of one. Only code that means one, such as
    `chat.render`, places its id.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None):
        """Wrap a `tokenizers.Tokenizer`; `config` is what tokenizer_config.json holds and is kept as it is."""
        self.config = dict(config or {})
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
        config_file = Path(path) / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        template = Path(path) / "chat_template.jinja"
        if "chat_template" not in config and template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(backend, config)

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

    @property
    def end_of_text_id(self) -> int | None:
        return self.special_id(END_OF_TEXT)

    @property
    def pad_id(self) -> int | None:
        return self.special_id(PAD)

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
