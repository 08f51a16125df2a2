"""Byte-level BPE from text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from plinth.config import UserError
from plinth.tokenizer.chat_template import CHAT_TEMPLATE
from plinth.tokenizer.encode import END_OF_TEXT, PAD, SPECIAL_TOKENS, Tokenizer

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# Where merges may not cross: English clitics | a word with one leading space or sign | one digit | signs with a leading space, up to
# the end of their line | blank lines | indentation, but for the one space that belongs to the next word | other space.
# It cuts as Qwen3.5's tokenizer does, a pattern that llama.cpp knows by name ("qwen35"): llama.cpp has patterns of its own alone, so
# that a tokenizer with any other cannot be exported to it. A digit is a token, since a small vocabulary has no room for numbers.
SPLIT_PATTERN = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


@dataclass(frozen=True)
class TokenizerConfig:
    """How a tokenizer is trained."""

    vocab_size: int = 4096
    """Entries: 6 special tokens, 256 bytes, the rest merges."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"vocab_size={self.vocab_size} is below {MIN_VOCAB_SIZE}: {len(SPECIAL_TOKENS)} special tokens and 256 bytes. "
                f"Use {MIN_VOCAB_SIZE} for plain bytes, or some thousands for merges."
            )


def train_tokenizer(texts: Iterable[str], vocab_size: int = TokenizerConfig.vocab_size) -> Tokenizer:
    """Learn merges from texts; the same texts give the same tokenizer.

    Nothing is normalised, so decode(encode(text)) == text for every text. A small corpus may hold fewer merges than asked for: see
    the result's vocab_size. Raises UserError when vocab_size has no room for the bytes, or when there is no text.
    Source: Sennrich et al. 2016, arXiv:1508.07909, on bytes.
    """
    TokenizerConfig(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    counted = _NonEmpty(texts)
    backend.train_from_iterator(counted, trainer)
    if not counted.seen:
        raise UserError("there is no text to train a tokenizer on. Name a corpus or files that hold some.")
    return Tokenizer(backend, tokenizer_config())


def tokenizer_config() -> dict[str, object]:
    """Return what tokenizer_config.json says of a tokenizer of ours.

    Documents end with <|endoftext|>, so it stands before each but the first: it is the bos token too. Nothing adds it unasked.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


class _NonEmpty:
    """Passes texts on and remembers whether one held anything."""

    def __init__(self, texts: Iterable[str]):
        self.texts, self.seen = texts, False

    def __iter__(self):
        for text in self.texts:
            self.seen = self.seen or bool(text)
            yield text
