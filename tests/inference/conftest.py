"""Small random models whose answers depend on the whole prompt, and a tokenizer trained here."""

import pytest
import torch

from plinth.inference.engine import Engine
from plinth.inference.text import TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.tokenizer.train import train_tokenizer

SHAPES = {
    "grouped": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "intermediate_size": 48},
    "one kv head": {"hidden_size": 32, "num_heads": 1, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 64},
    "odd": {"hidden_size": 36, "num_heads": 3, "num_kv_heads": 3, "head_dim": 10, "intermediate_size": 50},
    "real": {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "intermediate_size": 768, "vocab_size": 1024},
}
TEXTS = ["Größe, naïve café, 東京タワー, 🙂🙃: text that needs more than one byte a character.\n", "def main(argv):\n    return 0\n"]


def random_model(shape: str = "grouped", dtype: torch.dtype = torch.float32, max_seq_len: int = 256, **options) -> Transformer:
    config = DecoderConfig(**({"vocab_size": 211, "num_layers": 2, "max_seq_len": max_seq_len} | SHAPES[shape] | options))
    model, generator = Transformer(config), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.5 if parameter.dim() == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.normal_(0.0, scale, generator=generator)
    return model.to(dtype).eval()


def random_prompts(lengths, vocab_size: int = 211) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def make_model():
    return random_model


@pytest.fixture(scope="session")
def make_prompts():
    return random_prompts


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS * 10, vocab_size=320)


@pytest.fixture(scope="session")
def text_engine(tokenizer) -> TextEngine:
    model = random_model(vocab_size=tokenizer.vocab_size)
    return TextEngine(Engine(model, max_batch=4, eos_ids=(tokenizer.end_of_text_id, tokenizer.end_id)), tokenizer)
