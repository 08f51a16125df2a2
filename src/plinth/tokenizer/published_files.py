"""Tokenizers of folders older than tokenizer.json: byte-level BPE (vocab.json, merges.txt) and WordPiece (vocab.txt)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from plinth.config import UserError, read_json
from plinth.tokenizer.encode import END_OF_TEXT, Tokenizer

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def build_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer of a model folder, writing tokenizer.json first where only older files hold it; None without any.

    Raises UserError for sentencepiece's own file, which nothing here reads.
    """
    if not (folder / "tokenizer.json").is_file():
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _byte_level(folder)
        elif (folder / "vocab.txt").is_file():
            backend = _word_pieces(folder)
        elif found := next((name for name in SENTENCEPIECE if (folder / name).is_file()), None):
            raise UserError(
                f"{folder / found} is sentencepiece's own file, and there is no tokenizer.json beside it. Make one where transformers and "
                "sentencepiece are installed: AutoTokenizer.from_pretrained(...).save_pretrained(folder)."
            )
        else:
            return None
        backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.load(folder)


def _byte_level(folder: Path) -> tokenizers.Tokenizer:
    """Return GPT-2's kind of tokenizer, with the tokens that added_tokens.json adds."""
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library raises plain Exception for a malformed file
        raise UserError(f"{folder / 'merges.txt'} and vocab.json are not byte-level BPE: {error}. Copy the model again.") from None
    config = _settings(folder)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    special = [
        token for token in (END_OF_TEXT, *sorted(added, key=added.get)) if token in added or tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer


def _word_pieces(folder: Path) -> tokenizers.Tokenizer:
    """Return BERT's kind of tokenizer."""
    vocab = {token: i for i, token in enumerate((folder / "vocab.txt").read_text(encoding="utf-8").split("\n")) if token}
    missing = [token for token in BERT_SPECIAL if token not in vocab]
    if missing:
        raise UserError(f"{folder / 'vocab.txt'} lacks {', '.join(missing)}; it is not BERT's vocabulary. Copy the model again.")
    config = _settings(folder)
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    lower = bool(config.get("do_lower_case", True))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lower,
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")]
    )
    tokenizer.add_special_tokens(list(BERT_SPECIAL))
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
