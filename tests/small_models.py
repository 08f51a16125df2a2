"""Decoders of a few thousand parameters that several files of tests share."""

import torch

from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer

SUBJECTS = ["copy", "move", "read", "write", "open", "close", "seek", "flush"]
GROUPED = DecoderConfig(
    vocab_size=41, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64, max_seq_len=64
)


def subjects_tokenizer() -> Tokenizer:
    """Return a tokenizer of questions on SUBJECTS and their answers."""
    return train_tokenizer([f"What does {name} do? It does {name} things." for name in SUBJECTS] * 3, 300)


def plain_decoder(vocab_size: int, max_seq_len: int = 64) -> Transformer:
    """Return a decoder of two layers, as it is initialised."""
    config = DecoderConfig(
        vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64,
        max_seq_len=max_seq_len,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def noisy_decoder(config: DecoderConfig = GROUPED, seed: int = 0, noise: float = 0.3) -> Transformer:
    """Return a decoder whose every weight has noise, also those that start at zero or one."""
    model = Transformer(config).init_weights(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def coin_tokenizer() -> Tokenizer:
    """Return the tokenizer of `coin_decoder`."""
    return train_tokenizer(["What is e? e a e b e\n" * 40], vocab_size=280)


def coin_decoder(tokenizer: Tokenizer, max_seq_len: int = 64) -> Transformer:
    """Return a model that tosses a coin for one letter, e or a, and ends: nothing but the last token's embedding reaches the head."""
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
        max_seq_len=max_seq_len, tie_embeddings=False,
    )  # fmt: skip
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    letters, letter, other = [tokenizer.encode(text)[0] for text in "ea"], torch.eye(32)[0], torch.eye(32)[1]
    with torch.no_grad():
        model.embed.weight.copy_(other.expand(config.vocab_size, -1))
        model.embed.weight[letters] = letter
        model.head.weight.zero_()
        model.head.weight[tokenizer.end_id] = 50 * letter
        model.head.weight[letters] = 50 * other
    return model
