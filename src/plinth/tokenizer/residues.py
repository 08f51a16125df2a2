"""A token a residue: tokenizers of proteins and of nucleic acids, which need no training."""

from __future__ import annotations

import string
from collections.abc import Mapping

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from plinth.config import UserError
from plinth.tokenizer.encode import END_OF_TEXT, PAD, SPECIAL_TOKENS, Tokenizer

UNKNOWN = "<|unknown|>"
# One-letter codes of IUPAC-IUB. Proteins: the twenty, selenocysteine and pyrrolysine, then B (D or N), J (I or L), Z (E or Q), X (any),
# and the stop. Nucleic acids: four bases and uracil, then the codes of two, of three and of any base.
ALPHABETS: Mapping[str, str] = {
    "protein": "ACDEFGHIKLMNPQRSTVWYUOBJZX*",
    "nucleotide": "ACGTURYKMSWBDHVN",
}


def residue_tokenizer(alphabet: str) -> Tokenizer:
    """Return the tokenizer of "protein" or "nucleotide": a letter is a token, lower case is upper case, white space is left out.

    Any other character is <|unknown|>. Raises UserError for another alphabet.
    Source of the codes: IUPAC-IUB 1984 (amino acids), Cornish-Bowden 1985, doi:10.1093/nar/13.9.3021 (incompletely known bases).
    """
    if alphabet not in ALPHABETS:
        raise UserError(f"residues={alphabet!r} is unknown. Use {' or '.join(ALPHABETS)}.")
    tokens = [*SPECIAL_TOKENS, UNKNOWN, *ALPHABETS[alphabet]]
    # BPE without merges: the library's fastest way to a token a character.
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token=UNKNOWN))
    upper = [normalizers.Replace(letter, letter.upper()) for letter in string.ascii_lowercase]
    backend.normalizer = normalizers.Sequence(upper)  # type: ignore[assignment]
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    backend.decoder = decoders.Fuse()  # type: ignore[assignment]
    backend.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    return Tokenizer(backend, residue_config())


def residue_config() -> dict[str, object]:
    """Return tokenizer_config.json of a residue tokenizer; it has no chat."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def num_unknown(tokenizer: Tokenizer, texts: list[str]) -> int:
    """Return how many characters of the texts are no residue of the tokenizer's alphabet."""
    unknown = tokenizer.special_id(UNKNOWN)
    return sum(ids.count(unknown) for ids in tokenizer.encode_batch(texts)) if unknown is not None else 0
